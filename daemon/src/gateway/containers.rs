//! Containers of a build's frontend: made of references, and gone with the build at the latest.

use std::sync::Arc;

use kiln_cache::Ref;
use kiln_proto::{gateway, pb};
use kiln_worker::ops::{Container, ContainerRequest};
use tonic::Code;

use super::Bridge;
use crate::engine::op_error;
use crate::error::BuildError;

impl Bridge {
    /// Makes a container; no process is started yet.
    pub(super) async fn new_container(
        &self,
        request: gateway::NewContainerRequest,
    ) -> Result<(), BuildError> {
        let id = request.container_id.clone();
        let exists = || BuildError::new(Code::AlreadyExists, format!("Container {id} already exists"));
        if self.containers.contains_key(&id) {
            return Err(exists());
        }
        let network = pb::NetMode::try_from(request.network).map_err(|_| {
            BuildError::new(Code::InvalidArgument, format!("unknown network mode {}", request.network))
        })?;
        if let Some(filter) = request.constraints.iter().flat_map(|constraints| &constraints.filter).next() {
            return Err(BuildError::unsupported(format_args!("worker constraint {filter:?}")));
        }
        let shown = request.mounts.iter().map(|mount| self.mounted(mount));
        let inputs = futures::future::try_join_all(shown).await?;
        let container = self
            .common
            .build
            .container(ContainerRequest {
                mounts: request.mounts.iter().map(plain).collect(),
                inputs,
                network,
                hostname: request.hostname,
                extra_hosts: request.extra_hosts,
                os: request.platform.map(|platform| platform.os).unwrap_or_default(),
            })
            .await?;
        match self.containers.entry(id.clone()) {
            dashmap::Entry::Occupied(_) => Err(exists()),
            dashmap::Entry::Vacant(entry) => {
                entry.insert(Arc::new(container));
                Ok(())
            }
        }
    }

    async fn mounted(&self, mount: &pb::Mount) -> Result<Ref, BuildError> {
        if let Some(shown) = self.shown(&mount.result_id) {
            return Ok(Some(shown));
        }
        let reference = self.reference(&mount.result_id).map_err(|_| {
            let (id, dest) = (&mount.result_id, &mount.dest);
            BuildError::build(format!("failed to find ref {id} for {dest:?} mount"))
        })?;
        match reference {
            Some(reference) => reference.get().await,
            None => Ok(None),
        }
    }

    /// A container by its id.
    pub(super) fn container(&self, id: &str) -> Option<Arc<Container>> {
        self.containers.get(id).map(|container| container.value().clone())
    }

    /// Ends a container and all that runs in it.
    ///
    /// # Errors
    /// There is no such container, or what the first of its processes to fail failed with.
    pub(super) async fn release_container(&self, id: &str) -> Result<(), BuildError> {
        match self.containers.remove(id) {
            Some((_, container)) => container.release().await.map_err(op_error),
            None => Err(no_container(id)),
        }
    }

    /// Ends all containers; nobody can reach them any more.
    pub(crate) async fn release_containers(&self) {
        let ids: Vec<String> = self.containers.iter().map(|container| container.key().clone()).collect();
        for id in ids {
            // How its processes ended was told to whoever followed them.
            let _ = self.release_container(&id).await;
        }
    }
}

/// A mount without what means nothing here.
fn plain(mount: &pb::Mount) -> pb::Mount {
    pb::Mount { result_id: String::new(), ..mount.clone() }
}

pub(super) fn no_container(id: &str) -> BuildError {
    BuildError::build(format!("container details for {id} not found"))
}
