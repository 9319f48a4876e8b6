//! The file operation: copy, mkdir, mkfile, symlink and rm actions, without a container.
//!
//! `plan` orders the actions, `engine` puts them on layers, the other modules do one action each,
//! on roots that they know only as descriptors.

mod actions;
pub(crate) mod again;
mod copy;
mod crew;
mod describe;
mod engine;
mod modestr;
mod plan;
pub(crate) mod root;
#[cfg(test)]
mod tests;
pub(crate) mod transfer;
mod unpack;
mod wildcard;

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_cache::Ref;
use kiln_proto::pattern::has_wildcard;
use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;
use kiln_solver::op::{
    CacheMap, ContentPath, ContentQuery, Failure, InputMap, Op, OpClass, OpContext, OpError, Remains,
};
use tokio_util::sync::CancellationToken;

pub use actions::FileError;
use engine::Engine;
use plan::{Operand, Plan};

use super::BuildContext;
use super::keys::{self, KeyBuilder};
use crate::registry::Credentials;
use crate::worker::Worker;

/// A file operation of one vertex.
pub(crate) struct FileOp {
    worker: Arc<Worker>,
    credentials: Arc<dyn Credentials>,
    work: Arc<Actions>,
    inputs: usize,
    name: String,
}

/// What is to be done, in which order.
struct Actions {
    actions: Vec<pb::FileAction>,
    plan: Plan,
}

impl FileOp {
    /// Checks the operation of a vertex with `inputs` inputs.
    pub(crate) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        op: pb::FileOp,
        inputs: usize,
        name: &str,
    ) -> Result<Self, OpError> {
        let plan = Plan::new(&op, inputs).map_err(OpError::new)?;
        let credentials = context.credentials.clone();
        let work = Arc::new(Actions { actions: op.actions, plan });
        Ok(Self { worker, credentials, work, inputs, name: name.into() })
    }
}

impl Actions {
    fn describe(&self, key: &mut KeyBuilder<'_>) {
        for (action, step) in self.actions.iter().zip(&self.plan.steps) {
            let (Some(Operand::Input(_)), Some(Action::Copy(copy))) = (step.source, &action.action) else {
                describe::action(key, action);
                continue;
            };
            let source = root::clean(&copy.src);
            // Where it comes from is told by the selector and the content; only its name shows in the result.
            let name = root::split(Path::new(&source)).1.to_string_lossy().into_owned();
            let copy = pb::FileActionCopy { src: name, ..(**copy).clone() };
            key.note("source", source);
            describe::action(key, &pb::FileAction { action: Some(Action::Copy(copy.into())), ..*action });
        }
    }

    /// How each of so many inputs counts.
    fn inputs(&self, inputs: usize) -> Vec<InputMap> {
        // Inputs that are built upon count whole; the others only by what is read of them.
        let mut whole = vec![false; inputs];
        let mut reads: Vec<Vec<ContentPath>> = vec![Vec::new(); inputs];
        for (action, step) in self.actions.iter().zip(&self.plan.steps) {
            if let Operand::Input(index) = step.base {
                whole[index] = true;
            }
            for (operand, path) in [(step.user, "/etc/passwd"), (step.group, "/etc/group")] {
                if let Some(Operand::Input(index)) = operand {
                    reads[index].push(ContentPath {
                        path: path.into(),
                        follow_symlink: true,
                        ..Default::default()
                    });
                }
            }
            if let (Some(Operand::Input(index)), Some(Action::Copy(copy))) = (step.source, &action.action) {
                reads[index].push(content_path(copy));
            }
        }
        reads
            .into_iter()
            .zip(whole)
            .map(|(paths, whole)| {
                // Equal paths stay: the order of all of them is the order of the actions.
                if whole || paths.is_empty() {
                    return InputMap::default();
                }
                let selector = paths.iter().map(|path| path.path.as_str()).collect::<Vec<_>>().join("\0");
                InputMap { selector: Some(selector), content: Some(ContentQuery { paths }) }
            })
            .collect()
    }
}

fn content_path(copy: &pb::FileActionCopy) -> ContentPath {
    let wildcard = copy.allow_wildcard && has_wildcard(&copy.src);
    ContentPath {
        path: root::clean(&copy.src),
        wildcard,
        follow_symlink: copy.follow_symlink,
        include: copy.include_patterns.clone(),
        exclude: copy.exclude_patterns.clone(),
        required: copy.required_paths.clone(),
        must_exist: !wildcard,
    }
}

/// Copies everything in one root to another, as it is.
pub(crate) fn copy_tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), FileError> {
    let action = pb::FileActionCopy {
        src: "/".into(),
        dest: "/".into(),
        mode: -1,
        timestamp: -1,
        dir_copy_contents: true,
        create_dest_path: true,
        ..Default::default()
    };
    copy::copy(
        root::Root(from),
        root::Root(to),
        &action,
        None,
        copy::Origin::default(),
        &CancellationToken::new(),
    )
}

impl Op<Ref> for FileOp {
    fn known_map(&self) -> Option<CacheMap> {
        let work = self.work.clone();
        let inputs = self.work.inputs(self.inputs);
        Some(keys::described("kiln.file.v1", inputs, move |key| work.describe(key)))
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move {
            self.worker.materialize_all(&inputs, &self.credentials, &ctx.progress).await?;
            let cancel = CancellationToken::new();
            let _cancelled_when_dropped = cancel.clone().drop_guard();
            let (layers, work, name) = (self.worker.layers().clone(), self.work.clone(), self.name.clone());
            let run = move || {
                let engine = Engine::new(&layers, &work.actions, &work.plan, &inputs, &name, &cancel);
                engine.run().map_err(|failed| Failure {
                    error: OpError {
                        file_action: Some(failed.action),
                        ..OpError::new(failed.error.to_string())
                    },
                    remains: Some(Arc::new(Remains::Run { inputs, states: failed.states })),
                })
            };
            let result = self.worker.on_files(run).await;
            result.map_err(|err| OpError::new(format!("file operation failed: {err}")))?
        })
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}
