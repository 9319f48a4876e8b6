//! The operations of LLB: what each depends on (its cache map) and how it runs.
//!
//! An operation knows its wire form, its inputs' snapshots and the build's sessions. How a process is
//! confined, how an image is pulled and how files cross a session is the business of others.

mod diff;
mod exec;
pub mod file;
mod keys;
mod merge;
pub(crate) mod run_dir;
mod sessions;
mod source;
mod users;

use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_cache::Ref;
use kiln_proto::pb;
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError, OpFactory, OpVertex};

pub(crate) use exec::CacheMountLocks;
pub use exec::container::{Container, ContainerRequest, MountView, ProcessSpec};
pub use exec::process::{Controls, Process};
pub use sessions::SessionGroup;
pub use source::LayoutStore;
pub(crate) use source::git::Repositories;
pub use source::git::{GitObjects, Resolutions, Resolved as ResolvedGit};
pub use source::http::HttpAnswers;
pub(crate) use source::{forget_gone, resolve_git, resolve_http};

use crate::registry::Credentials;
use crate::worker::Worker;

/// What a build allows its steps beyond the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entitlements {
    /// `network.host`
    pub network_host: bool,
    /// `security.insecure`
    pub security_insecure: bool,
}

/// What the operations of one build share.
#[derive(Clone)]
pub struct BuildContext {
    /// Whom to ask for files, secrets and agents.
    pub sessions: SessionGroup,
    /// What steps may ask for.
    pub entitlements: Entitlements,
    /// Credentials for registries, through the build's client.
    pub credentials: Arc<dyn Credentials>,
    /// Parent of the cgroups of steps that name none themselves; may be empty.
    pub cgroup_parent: String,
    /// What refs of git remotes stand for, the same throughout the build.
    pub git: Resolutions,
    /// What files of the web are, the same throughout the build.
    pub http: HttpAnswers,
}

/// Makes the operations of one build.
pub(crate) struct Factory {
    worker: Arc<Worker>,
    context: BuildContext,
    emptied: exec::Emptied,
}

impl Factory {
    pub(crate) fn new(worker: Arc<Worker>, context: BuildContext) -> Self {
        worker.lenders.add(&context.credentials);
        Self { worker, context, emptied: exec::Emptied::default() }
    }
}

impl OpFactory<Ref> for Factory {
    fn op(&self, mut vertex: OpVertex) -> Result<Arc<dyn Op<Ref>>, OpError> {
        use pb::op::Op as Wire;
        let (worker, context) = (self.worker.clone(), &self.context);
        let inputs = vertex.op.inputs.len();
        let name = vertex.name.clone();
        match vertex.op.op.take() {
            Some(Wire::Exec(op)) => {
                let emptied = self.emptied.clone();
                Ok(Arc::new(exec::ExecOp::new(worker, context, emptied, vertex, *op)?))
            }
            Some(Wire::File(op)) => Ok(Arc::new(file::FileOp::new(worker, context, op, inputs, &name)?)),
            Some(Wire::Source(op)) => source::make(worker, context, &vertex, &op),
            Some(Wire::Merge(op)) => Ok(Arc::new(merge::MergeOp::new(worker, &op, inputs, &name)?)),
            Some(Wire::Diff(op)) => Ok(Arc::new(diff::DiffOp::new(worker, context, &op, inputs, &name)?)),
            Some(Wire::Passthrough(op)) => Ok(Arc::new(Passthrough::new(&op, inputs)?)),
            Some(Wire::Build(_)) => {
                Err(OpError::new("unsupported: build operation (a build inside a build)"))
            }
            None => Err(OpError::new("unsupported: unknown operation")),
        }
    }
}

/// An index into the inputs of a vertex; -1 is scratch.
fn operand(index: i64, inputs: usize) -> Result<Option<usize>, OpError> {
    match usize::try_from(index) {
        Ok(index) if index < inputs => Ok(Some(index)),
        Err(_) if index == -1 => Ok(None),
        _ => Err(OpError::new(format!("invalid input index {index} in an operation with {inputs} inputs"))),
    }
}

/// Hands inputs on under another identity.
struct Passthrough {
    id: String,
    outputs: Vec<Option<usize>>,
}

impl Passthrough {
    fn new(op: &pb::PassthroughOp, inputs: usize) -> Result<Self, OpError> {
        let outputs = op.outputs.iter().map(|output| operand(*output, inputs)).collect::<Result<_, _>>()?;
        Ok(Self { id: op.id.clone(), outputs })
    }
}

impl Op<Ref> for Passthrough {
    fn known_map(&self) -> Option<CacheMap> {
        let mut key = keys::KeyBuilder::new("kiln.passthrough.v1");
        key.part("id", &self.id);
        for output in &self.outputs {
            key.part("output", output.map_or("scratch".into(), |index| index.to_string()));
        }
        Some(key.finish(Vec::new(), true))
    }

    fn execute<'a>(
        &'a self,
        _ctx: &'a OpContext,
        inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        let take = |index: &Option<usize>| index.and_then(|index| inputs.get(index).cloned().flatten());
        Box::pin(std::future::ready(Ok(self.outputs.iter().map(take).collect())))
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}
