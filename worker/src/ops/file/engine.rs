//! Runs a planned file operation on snapshots: stages layers, mounts views, commits. Blocking.

use std::collections::HashMap;

use kiln_cache::{Ref, SnapshotMeta, SnapshotRef, Staged};
use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;
use tokio_util::sync::CancellationToken;

use super::actions::{self, FileError};
use super::again::{Only, Repeat};
use super::copy;
use super::plan::{Operand, Plan, Step, owner};
use super::root::Root;
use crate::ops::users;
use crate::view::View;
use crate::worker::Layers;

/// So many views of inputs stay open: an operation may have more inputs than there are file descriptors.
const VIEWS: usize = 64;

/// An action that failed.
#[derive(Debug)]
pub(crate) struct FailedAction {
    /// Which one, by number.
    pub(crate) action: usize,
    /// Why.
    pub(crate) error: FileError,
    /// What each action had made by then.
    pub(crate) states: Vec<Ref>,
}

/// A layer that is being written. The view goes before the staged directory: nothing may
/// have that as its upper directory when it is committed.
struct Live {
    view: View,
    staged: Staged,
}

enum Made {
    Live(Live),
    Done(Ref),
}

pub(crate) struct Engine<'a> {
    layers: &'a Layers,
    actions: &'a [pb::FileAction],
    plan: &'a Plan,
    inputs: &'a [Ref],
    description: &'a str,
    cancel: &'a CancellationToken,
    made: HashMap<usize, Made>,
    views: HashMap<Operand, View>,
}

impl<'a> Engine<'a> {
    pub(crate) fn new(
        layers: &'a Layers,
        actions: &'a [pb::FileAction],
        plan: &'a Plan,
        inputs: &'a [Ref],
        description: &'a str,
        cancel: &'a CancellationToken,
    ) -> Self {
        Self {
            layers,
            actions,
            plan,
            inputs,
            description,
            cancel,
            made: HashMap::new(),
            views: HashMap::new(),
        }
    }

    /// Runs all actions; one result for each output of the operation.
    pub(crate) fn run(mut self) -> Result<Vec<Ref>, FailedAction> {
        for &index in &self.plan.order {
            if let Err(error) = self.step(index) {
                return Err(FailedAction { action: index, error, states: self.hold() });
            }
        }
        let done = |index: &usize| match self.made.get(index) {
            Some(Made::Done(result)) => result.clone(),
            _ => None,
        };
        Ok(self.plan.outputs.iter().map(done).collect())
    }

    fn step(&mut self, index: usize) -> Result<(), FileError> {
        if self.cancel.is_cancelled() {
            return Err(FileError::Cancelled);
        }
        let plan = self.plan;
        let step = &plan.steps[index];
        // An operation with more actions may write into what the first one made.
        let repeat = match self.actions {
            [only] => Repeat::of(only, step, |operand| self.resolve(operand)),
            _ => None,
        };
        let link = repeat.is_some() && self.resolve(step.base).is_none();
        if let (Some(operand), Some(repeat), true) = (step.source, &repeat, link) {
            let source = repeat.source();
            let view = View::plain(&source.dir(), vec![source.clone()]).map_err(text)?;
            self.views.insert(operand, view);
        }
        self.open(step)?;
        let (live, linked) = self.base(step.base, repeat.as_ref())?;
        let (layer, only) = linked.unzip();
        let from = copy::Origin { only, link };
        if let Err(error) = self.act(index, step, &live, from) {
            self.made.insert(index, Made::Live(live));
            return Err(error);
        }
        let made = if step.folded {
            Made::Live(live)
        } else {
            let Live { view, staged } = live;
            drop(view);
            let result =
                self.layers.snapshots().commit(staged, SnapshotMeta::new(self.description)).map_err(text)?;
            if let Some(layer) = layer {
                layer.remeasure().map_err(text)?;
            }
            if let Some(repeat) = repeat {
                repeat.note(&result).map_err(text)?;
            }
            Made::Done(Some(result))
        };
        self.made.insert(index, made);
        Ok(())
    }

    /// What the actions have made so far; what another one went on with is that one's.
    fn hold(mut self) -> Vec<Ref> {
        let meta = SnapshotMeta::new(self.description);
        let mut state = |index: usize| match self.made.remove(&index)? {
            Made::Done(result) => result,
            Made::Live(Live { view, staged }) => {
                drop(view);
                Some(self.layers.snapshots().hold(staged, &meta))
            }
        };
        (0..self.actions.len()).map(&mut state).collect()
    }

    fn act(&self, index: usize, step: &Step, live: &Live, from: copy::Origin) -> Result<(), FileError> {
        let root = Root(live.view.fd());
        let action = &self.actions[index];
        let view = |operand: Operand| self.views.get(&operand).map(|view| Root(view.fd()));
        let owner = users::action_owner(owner(action), step.user.and_then(view), step.group.and_then(view))?;
        match &action.action {
            Some(Action::Mkdir(action)) => actions::mkdir(root, action, owner),
            Some(Action::Mkfile(action)) => actions::mkfile(root, action, owner),
            Some(Action::Symlink(action)) => actions::symlink(root, action, owner),
            Some(Action::Rm(action)) => actions::rm(root, action),
            Some(Action::Copy(action)) => {
                let Some(source) = step.source.and_then(view) else {
                    return Err(FileError::Text("copy has no source".into()));
                };
                copy::copy(source, root, action, owner, from, self.cancel)
            }
            None => Err(FileError::Text("unsupported: unknown kind of file action".into())),
        }
    }

    /// The layer that an action writes: its base's own if nobody else sees that, else a new one on top. If that begins
    /// as a former copy, with the layer which that made, and what is left to copy.
    fn base(
        &mut self,
        operand: Operand,
        repeat: Option<&Repeat<'_>>,
    ) -> Result<(Live, Option<(SnapshotRef, Only)>), FileError> {
        if let Operand::Action(index) = operand
            && self.plan.steps[index].folded
            && let Some(Made::Live(live)) = self.made.remove(&index)
        {
            return Ok((live, None));
        }
        let parent = self.resolve(operand);
        let snapshots = self.layers.snapshots();
        let mut staged = snapshots.stage(parent.as_ref()).map_err(text)?;
        let mut linked = None;
        if let Some(repeat) = repeat.filter(|repeat| repeat.is_known()) {
            linked = repeat.prepare(snapshots, &staged);
            if linked.is_none() {
                staged = snapshots.stage(parent.as_ref()).map_err(text)?;
            }
        }
        let below = self.layers.chain(&parent).map_err(text)?;
        let view = match (below.is_empty(), repeat) {
            (true, Some(_)) => View::plain(staged.fs(), below),
            (true, None) => View::directory(staged.fs(), below),
            (false, _) => View::writable(below, staged.fs(), staged.work().map_err(text)?),
        };
        let view = view.map_err(text)?;
        Ok((Live { view, staged }, linked))
    }

    /// Opens read-only views of what an action reads. Those of actions before stay for the next ones.
    fn open(&mut self, step: &Step) -> Result<(), FileError> {
        let operands = || [step.source, step.user, step.group].into_iter().flatten();
        if self.views.len() >= VIEWS {
            self.views.retain(|view, _| operands().any(|operand| operand == *view));
        }
        for operand in operands() {
            if !self.views.contains_key(&operand) {
                let view = self.layers.view(&self.resolve(operand)).map_err(text)?;
                self.views.insert(operand, view);
            }
        }
        Ok(())
    }

    fn resolve(&self, operand: Operand) -> Ref {
        match operand {
            Operand::Scratch => None,
            Operand::Input(index) => self.inputs.get(index).cloned().flatten(),
            Operand::Action(index) => match self.made.get(&index) {
                Some(Made::Done(result)) => result.clone(),
                _ => None,
            },
        }
    }
}

fn text(error: impl std::fmt::Display) -> FileError {
    FileError::Text(error.to_string())
}
