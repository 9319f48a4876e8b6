//! The exec operation: one process in a sandbox on the snapshots of its inputs.
//!
//! This module decides what the process sees and what becomes of what it wrote. How it is confined
//! is the executor's business.

mod cache_mounts;
pub(super) mod container;
pub(super) mod forwards;
mod identity;
mod key;
mod mounts;
mod network_files;
mod output;
pub(super) mod process;
mod run;
mod stubs;

use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_cache::Ref;
use kiln_proto::pb;
use kiln_solver::op::{CacheMap, Failure, Op, OpContext, OpError, OpVertex};
use tokio_util::sync::CancellationToken;

pub(crate) use cache_mounts::{CacheMountLocks, Emptied};

use super::{BuildContext, SessionGroup};
use crate::registry::Credentials;
use crate::worker::Worker;

/// An exec operation of one vertex, checked.
pub(crate) struct ExecOp {
    worker: Arc<Worker>,
    key: CacheMap,
    step: Arc<Step>,
    emptied: Emptied,
}

/// What is asked for.
struct Step {
    op: Arc<pb::ExecOp>,
    meta: pb::Meta,
    resources: Option<pb::LinuxResources>,
    sessions: SessionGroup,
    credentials: Arc<dyn Credentials>,
}

impl Step {
    /// The command as messages show it.
    fn command(&self) -> String {
        self.meta.args.join(" ")
    }
}

impl ExecOp {
    /// Checks the operation and whether the build may do what it asks for.
    pub(crate) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        emptied: Emptied,
        vertex: OpVertex,
        op: pb::ExecOp,
    ) -> Result<Self, OpError> {
        let inputs = vertex.op.inputs.len();
        let Some(mut meta) = op.meta.clone() else {
            return Err(OpError::new("invalid exec op with no meta"));
        };
        if meta.args.is_empty() {
            return Err(OpError::new("invalid exec op with no args"));
        }
        if op.mounts.is_empty() {
            return Err(OpError::new("invalid exec op with no mounts"));
        }
        let root = op.mounts.iter().find(|mount| mounts::is_root(mount));
        if root.is_none_or(|mount| mount.mount_type() != pb::MountType::Bind) {
            return Err(OpError::new("invalid exec op with no rootfs"));
        }
        for mount in &op.mounts {
            super::operand(mount.input, inputs)?;
        }
        check_grants(context, &op)?;
        if let Some(device) = op.cdi_devices.iter().find(|device| !device.optional) {
            return Err(OpError::new(format!("unsupported: CDI device {}", device.name)));
        }
        let op = Arc::new(op);
        let key = key::cache_map(&op, vertex.op.platform.as_ref(), inputs)?;
        // The daemon's own setting is no part of the key.
        if meta.cgroup_parent.is_empty() {
            meta.cgroup_parent.clone_from(&context.cgroup_parent);
        }
        let step = Step {
            op,
            meta,
            resources: vertex.metadata.linux_resources.clone(),
            sessions: context.sessions.clone(),
            credentials: context.credentials.clone(),
        };
        Ok(Self { worker, key, step: Arc::new(step), emptied })
    }
}

/// Refuses what the build was not granted.
fn check_grants(context: &BuildContext, op: &pb::ExecOp) -> Result<(), OpError> {
    if op.network() == pb::NetMode::Host && !context.entitlements.network_host {
        return Err(OpError::new("network.host is not allowed"));
    }
    let security = pb::SecurityMode::try_from(op.security)
        .map_err(|_| OpError::new(format!("invalid security mode {}", op.security)))?;
    if security == pb::SecurityMode::Insecure && !context.entitlements.security_insecure {
        return Err(OpError::new("security.insecure is not allowed"));
    }
    Ok(())
}

impl Op<Ref> for ExecOp {
    fn known_map(&self) -> Option<CacheMap> {
        Some(self.key.clone())
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move {
            self.worker.materialize_all(&inputs, &self.step.credentials, &ctx.progress).await?;
            let cancel = CancellationToken::new();
            let _cancelled_when_dropped = cancel.clone().drop_guard();
            let run = run::Run {
                worker: self.worker.clone(),
                step: self.step.clone(),
                progress: ctx.progress.clone(),
                emptied: ctx.ignore_cache.then(|| self.emptied.clone()),
                cancel,
            };
            // A task of its own: when this future is dropped the step's directories must stay until
            // its last process is gone.
            let task = self.worker.steps.spawn(run.finish(inputs));
            task.await
                .unwrap_or_else(|err| Err(OpError::new(format!("running the step failed: {err}")).into()))
        })
    }

    fn needs_client(&self) -> bool {
        // Secrets are there before the process starts; an agent is asked while it runs.
        self.step.op.mounts.iter().any(|mount| mount.mount_type() == pb::MountType::Ssh)
    }
}
