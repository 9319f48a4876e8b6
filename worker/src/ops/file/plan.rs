//! The order in which the actions of one file operation run, and which of them share a layer.

use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;

/// What an action builds on or reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Operand {
    /// Nothing: an empty root.
    Scratch,
    /// An input of the operation.
    Input(usize),
    /// The result of another action.
    Action(usize),
}

/// One action with its operands resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) base: Operand,
    /// What a copy copies from.
    pub(crate) source: Option<Operand>,
    pub(crate) user: Option<Operand>,
    pub(crate) group: Option<Operand>,
    /// The next action that builds on this one goes on in the same layer, and nobody else sees this result.
    pub(crate) folded: bool,
}

/// A checked file operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// By action number.
    pub(crate) steps: Vec<Step>,
    /// Action numbers, operands first.
    pub(crate) order: Vec<usize>,
    /// By output number, the action that makes it.
    pub(crate) outputs: Vec<usize>,
}

impl Plan {
    /// Checks the operation; `inputs` is how many inputs its vertex has.
    pub(crate) fn new(op: &pb::FileOp, inputs: usize) -> Result<Self, String> {
        let count = op.actions.len();
        let operand = |index: i64| match usize::try_from(index) {
            Err(_) if index == -1 => Ok(Operand::Scratch),
            Ok(index) if index < inputs => Ok(Operand::Input(index)),
            Ok(index) if index < inputs + count => Ok(Operand::Action(index - inputs)),
            _ => Err(format!("invalid input index {index} in file op with {inputs} inputs")),
        };
        let mut steps = Vec::with_capacity(count);
        for action in &op.actions {
            let (user, group) = named_owners(action)?;
            steps.push(Step {
                base: operand(action.input)?,
                source: match action.action {
                    Some(Action::Copy(_)) => Some(operand(action.secondary_input)?),
                    _ => None,
                },
                user: user.map(operand).transpose()?,
                group: group.map(operand).transpose()?,
                folded: false,
            });
        }
        let outputs = outputs(op)?;
        let mut uses = vec![0usize; count];
        let mut base_uses = vec![0usize; count];
        for step in &steps {
            for operand in operands(step) {
                if let Operand::Action(index) = operand {
                    uses[index] += 1;
                }
            }
            if let Operand::Action(index) = step.base {
                base_uses[index] += 1;
            }
        }
        for (index, step) in steps.iter_mut().enumerate() {
            step.folded = uses[index] == 1 && base_uses[index] == 1 && !outputs.contains(&index);
        }
        let order = order(&steps)?;
        Ok(Self { steps, order, outputs })
    }
}

fn operands(step: &Step) -> impl Iterator<Item = Operand> {
    [Some(step.base), step.source, step.user, step.group].into_iter().flatten()
}

/// Inputs of the named user and group of an action, if it has any.
fn named_owners(action: &pb::FileAction) -> Result<(Option<i64>, Option<i64>), String> {
    let Some(owner) = owner(action) else { return Ok((None, None)) };
    let named =
        |option: Option<&pb::UserOpt>, what: &str| match option.and_then(|option| option.user.as_ref()) {
            Some(pb::user_opt::User::ByName(named)) if named.input < 0 => {
                Err(format!("invalid missing {what} mount"))
            }
            Some(pb::user_opt::User::ByName(named)) => Ok(Some(named.input)),
            _ => Ok(None),
        };
    Ok((named(owner.user.as_ref(), "user")?, named(owner.group.as_ref(), "group")?))
}

/// The owner that an action gives to what it creates.
pub(crate) fn owner(action: &pb::FileAction) -> Option<&pb::ChownOpt> {
    match action.action.as_ref()? {
        Action::Copy(action) => action.owner.as_ref(),
        Action::Mkfile(action) => action.owner.as_ref(),
        Action::Mkdir(action) => action.owner.as_ref(),
        Action::Symlink(action) => action.owner.as_ref(),
        Action::Rm(_) => None,
    }
}

fn outputs(op: &pb::FileOp) -> Result<Vec<usize>, String> {
    let mut outputs: Vec<Option<usize>> = Vec::new();
    for (index, action) in op.actions.iter().enumerate() {
        if action.output == -1 {
            continue;
        }
        let number = usize::try_from(action.output).ok().filter(|number| *number < op.actions.len());
        let number =
            number.ok_or_else(|| format!("invalid output {} of file action {index}", action.output))?;
        if outputs.len() <= number {
            outputs.resize(number + 1, None);
        }
        if outputs[number].replace(index).is_some() {
            return Err(format!("output {number} of file op is made twice"));
        }
    }
    if outputs.is_empty() {
        return Err("no outputs specified".into());
    }
    let missing = outputs.iter().position(Option::is_none);
    outputs
        .into_iter()
        .collect::<Option<_>>()
        .ok_or_else(|| format!("missing output index {}", missing.unwrap_or(0)))
}

/// Operands before those who need them; a worklist over the actions.
fn order(steps: &[Step]) -> Result<Vec<usize>, String> {
    let mut missing = vec![0usize; steps.len()];
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); steps.len()];
    for (index, step) in steps.iter().enumerate() {
        for operand in operands(step) {
            if let Operand::Action(needed) = operand {
                missing[index] += 1;
                users[needed].push(index);
            }
        }
    }
    let mut order: Vec<usize> = (0..steps.len()).filter(|index| missing[*index] == 0).collect();
    let mut next = 0;
    while let Some(&done) = order.get(next) {
        next += 1;
        for &user in &users[done] {
            missing[user] -= 1;
            if missing[user] == 0 {
                order.push(user);
            }
        }
    }
    if order.len() == steps.len() {
        Ok(order)
    } else {
        Err("file actions depend on each other in a cycle".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mkdir(input: i64, output: i64) -> pb::FileAction {
        let action = Action::Mkdir(pb::FileActionMkDir { path: "/a".into(), ..Default::default() });
        pb::FileAction { input, secondary_input: -1, output, action: Some(action) }
    }

    fn copy(input: i64, secondary_input: i64, output: i64) -> pb::FileAction {
        pb::FileAction { input, secondary_input, output, action: Some(Action::Copy(Box::default())) }
    }

    fn plan(actions: Vec<pb::FileAction>, inputs: usize) -> Result<Plan, String> {
        Plan::new(&pb::FileOp { actions }, inputs)
    }

    #[test]
    fn a_line_of_actions_is_one_layer() {
        let plan = plan(vec![mkdir(0, -1), mkdir(1, -1), mkdir(2, 0)], 1).expect("valid");
        assert_eq!(plan.order, [0, 1, 2]);
        assert_eq!(plan.outputs, [2]);
        assert_eq!(plan.steps.iter().map(|step| step.folded).collect::<Vec<_>>(), [true, true, false]);
    }

    #[test]
    fn a_result_that_is_also_a_source_is_a_layer() {
        let plan = plan(vec![mkdir(-1, -1), copy(-1, 0, 0)], 0).expect("valid");
        assert!(!plan.steps[0].folded);
        assert_eq!(plan.steps[1].source, Some(Operand::Action(0)));
    }

    #[test]
    fn actions_may_come_in_any_order() {
        let plan = plan(vec![mkdir(2, 0), mkdir(0, -1)], 1).expect("valid");
        assert_eq!(plan.order, [1, 0]);
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        assert_eq!(plan(vec![mkdir(0, -1)], 1).unwrap_err(), "no outputs specified");
        assert!(plan(vec![mkdir(0, 1), mkdir(1, -1)], 1).unwrap_err().contains("missing output index 0"));
        assert!(plan(vec![mkdir(7, 0)], 1).unwrap_err().contains("invalid input index 7"));
        assert!(plan(vec![mkdir(2, 0), mkdir(1, -1)], 1).unwrap_err().contains("cycle"));
        assert!(plan(vec![mkdir(0, 0), mkdir(0, 0)], 1).unwrap_err().contains("twice"));
        assert!(plan(vec![mkdir(0, 9)], 1).unwrap_err().contains("invalid output 9"));
        let mut named = mkdir(0, 0);
        let user = pb::user_opt::User::ByName(pb::NamedUserOpt { name: "x".into(), input: -1 });
        let owner = pb::ChownOpt { user: Some(pb::UserOpt { user: Some(user) }), group: None };
        named.action = Some(Action::Mkdir(pb::FileActionMkDir { owner: Some(owner), ..Default::default() }));
        assert_eq!(plan(vec![named], 1).unwrap_err(), "invalid missing user mount");
    }
}
