//! What the progress stream calls a vertex when its sender gave it no name.

use super::EMPTY;
use crate::pb::{self, file_action::Action, op};

/// Names of merges and diffs contain their inputs' names, which doubles with every level of a
/// graph that uses inputs twice; longer names are cut here.
const MAX_LEN: usize = 4096;

/// The default name of `op`. `input` gives the name of each of its inputs, by its place in [`pb::Op::inputs`].
pub fn default_name<'a>(op: &pb::Op, input: impl Fn(usize) -> &'a str) -> String {
    let name = match &op.op {
        Some(op::Op::Source(source)) => source.identifier.clone(),
        Some(op::Op::Exec(exec)) => exec.meta.as_ref().map(|m| m.args.join(" ")).unwrap_or_default(),
        Some(op::Op::File(file)) => {
            let names: Vec<String> =
                file.actions.iter().filter_map(|a| a.action.as_ref()).map(action).collect();
            names.join(", ")
        }
        Some(op::Op::Build(_)) => "build".to_string(),
        Some(op::Op::Merge(_)) => {
            let names: Vec<&str> = (0..op.inputs.len()).map(input).collect();
            format!("merge ({})", names.join(", "))
        }
        Some(op::Op::Diff(diff)) => {
            let side = |side: Option<i64>| match side {
                Some(EMPTY) | None => "scratch".to_string(),
                Some(i) => {
                    let at = usize::try_from(i).ok().filter(|&i| i < op.inputs.len());
                    format!("({})", at.map(&input).unwrap_or_default())
                }
            };
            let lower = side(diff.lower.as_ref().map(|l| l.input));
            let upper = side(diff.upper.as_ref().map(|u| u.input));
            format!("diff {lower} -> {upper}")
        }
        Some(op::Op::Passthrough(pass)) => format!("passthrough {}", pass.id),
        None => "unknown".to_string(),
    };
    cut(name)
}

fn action(action: &Action) -> String {
    match action {
        Action::Mkdir(a) => format!("mkdir {}", a.path),
        Action::Mkfile(a) => format!("mkfile {}", a.path),
        Action::Symlink(a) => format!("symlink {} -> {}", a.newpath, a.oldpath),
        Action::Rm(a) => format!("rm {}", a.path),
        Action::Copy(a) => format!("copy {} {}", a.src, a.dest),
    }
}

fn cut(mut name: String) -> String {
    if name.len() > MAX_LEN {
        let mut end = MAX_LEN;
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        name.truncate(end);
        name.push('…');
    }
    name
}
