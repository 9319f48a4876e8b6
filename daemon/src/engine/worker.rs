//! The worker as the engine uses it: opening it by the configuration, a build's operations, reading
//! results, and looking up images.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_cache::{RecordType, Ref, SnapshotMeta, Store};
use kiln_proto::gateway::{ChecksumRequest, ResolveSourceHttpResponse};
use kiln_proto::pb;
use kiln_proto::reference::Reference;
use kiln_session::SessionManager;
use kiln_solver::op::{OpError, OpFactory, ResultStore};
use kiln_solver::progress::VertexProgress;
use kiln_worker::image::{Access, Images, ResolveMode};
use kiln_worker::ops::{
    BuildContext, Container, ContainerRequest, Entitlements, GitObjects, HttpAnswers, LayoutStore,
    Resolutions, ResolvedGit, SessionGroup,
};
use kiln_worker::registry::{Anonymous, Credentials, Registry};
use kiln_worker::sandbox::ExecutorChoice;
use kiln_worker::sandbox::spec;
use kiln_worker::{Worker, WorkerConfig};
use tonic::Code;

use super::credentials::ClientCredentials;
use super::failure::store_error;
use super::{BuildScope, EngineError};
use crate::config::{self, Config, NetworkMode};
use crate::error::BuildError;
use crate::progress::ProgressLog;

/// An image as frontends see it.
#[derive(Debug, Clone)]
pub(crate) struct ResolvedImage {
    /// Of what the name points to: a manifest, or an index of them.
    pub(crate) digest: String,
    /// The image's configuration, JSON.
    pub(crate) config: Vec<u8>,
}

/// The open worker.
pub(super) struct WorkerHandle {
    worker: Arc<Worker>,
    sessions: Arc<SessionManager>,
    cgroup_parent: String,
    /// By which clients tell this run of the daemon from others.
    salt: [u8; 32],
}

impl WorkerHandle {
    pub(super) async fn open(
        config: &Config,
        store: &Arc<Store>,
        sessions: &Arc<SessionManager>,
    ) -> Result<Self, EngineError> {
        let network = match config.network {
            NetworkMode::Auto => spec::NetworkMode::Sandbox,
            NetworkMode::Host => spec::NetworkMode::Host,
            NetworkMode::None => spec::NetworkMode::None,
        };
        let executor = match &config.runtime_binary {
            Some(binary) => ExecutorChoice::Runtime(PathBuf::from(binary)),
            None => ExecutorChoice::Lean,
        };
        let registry = Registry::new(config.registries.clone());
        let settings = WorkerConfig {
            store: store.clone(),
            images: Images::new(registry, store),
            executor,
            network,
            dns: config.dns.clone(),
            run_dir: config::runtime_dir().join("steps"),
        };
        let worker = tokio::task::spawn_blocking(move || Worker::open(settings))
            .await
            .map_err(|error| EngineError::Task(error.to_string()))?
            .map_err(|error| EngineError::Worker(error.to_string()))?;
        Ok(Self {
            worker,
            sessions: sessions.clone(),
            cgroup_parent: config.cgroup_parent.clone().unwrap_or_default(),
            salt: rand::random(),
        })
    }

    pub(super) fn id(&self) -> &str {
        self.worker.id()
    }

    /// The worker itself, for background work.
    pub(super) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// Waits until no step runs any more, cancelled ones included.
    pub(super) async fn idle(&self) {
        self.worker.idle().await;
    }

    pub(super) fn results(&self) -> Arc<dyn ResultStore<Ref>> {
        self.worker.clone()
    }

    /// What one build needs of the worker.
    pub(super) fn begin(&self, scope: &BuildScope) -> BuildWorker {
        let ids = if scope.session.is_empty() { Vec::new() } else { vec![scope.session.clone()] };
        let sessions = SessionGroup::new(self.sessions.clone(), ids);
        let credentials: Arc<dyn Credentials> = if scope.session.is_empty() {
            Arc::new(Anonymous)
        } else {
            Arc::new(ClientCredentials::new(self.sessions.clone(), scope.session.clone(), self.salt))
        };
        let granted = |name: &str| scope.entitlements.iter().any(|entitlement| entitlement == name);
        let context = BuildContext {
            sessions,
            entitlements: Entitlements {
                network_host: granted("network.host"),
                security_insecure: granted("security.insecure"),
            },
            credentials,
            cgroup_parent: self.cgroup_parent.clone(),
            git: Resolutions::default(),
            http: HttpAnswers::default(),
        };
        BuildWorker { worker: self.worker.clone(), context, progress: scope.progress.clone() }
    }
}

/// The worker for one build.
pub(super) struct BuildWorker {
    worker: Arc<Worker>,
    context: BuildContext,
    progress: Arc<ProgressLog>,
}

/// An operation's failure outside of any vertex.
pub(crate) fn op_error(error: OpError) -> BuildError {
    let code = error.code.map_or(Code::Unknown, Code::from_i32);
    BuildError { details: error.details, ..BuildError::new(code, error.message) }
}

impl BuildWorker {
    pub(super) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    pub(super) fn credentials(&self) -> &Arc<dyn Credentials> {
        &self.context.credentials
    }

    pub(super) fn factory(&self) -> Arc<dyn OpFactory<Ref>> {
        self.worker.factory(self.context.clone())
    }

    /// Digest and config of the image that a source is of.
    pub(super) async fn resolve_image(
        &self,
        source: &pb::SourceOp,
        platform: &pb::Platform,
        mode: &str,
        progress: &VertexProgress,
    ) -> Result<ResolvedImage, BuildError> {
        let invalid = |text: String| BuildError::new(Code::InvalidArgument, text);
        let mode = match mode {
            "" | "default" => ResolveMode::Default,
            "pull" => ResolveMode::ForcePull,
            "local" => ResolveMode::PreferLocal,
            other => return Err(invalid(format!("invalid resolve mode {other:?}"))),
        };
        let Some((scheme, name)) = source.identifier.split_once("://") else {
            return Err(invalid(format!("failed to parse identifier {:?}", source.identifier)));
        };
        let reference = Reference::parse(name).map_err(|error| invalid(error.to_string()))?;
        let image = if scheme == "oci-layout" {
            let store = LayoutStore::of(source);
            self.worker.resolve_layout(&self.context, &store, &reference, platform).await.map_err(op_error)?
        } else {
            let credentials = self.context.credentials.clone();
            let access = Access { credentials, progress: Some(progress.clone()) };
            let image = self.worker.images().resolve(&reference, platform, mode, &access).await;
            image.map_err(|error| BuildError::build(error.to_string()))?
        };
        Ok(ResolvedImage { digest: image.digest, config: image.config })
    }

    pub(super) async fn hold_file(&self, name: &'static str, data: Vec<u8>) -> Result<Ref, BuildError> {
        let snapshots = self.worker.images().snapshots().clone();
        let hold = move || {
            let staged = snapshots.stage(None).map_err(store_error)?;
            let path = staged.fs().join(name);
            let failed =
                |error| BuildError::new(Code::Internal, format!("write {}: {error}", path.display()));
            std::fs::write(&path, data).map_err(failed)?;
            Ok(Some(snapshots.hold(staged, &SnapshotMeta::of_type(RecordType::Internal, name))))
        };
        tokio::task::spawn_blocking(hold)
            .await
            .map_err(|error| BuildError::new(Code::Internal, format!("task failed: {error}")))?
    }

    /// A container for processes of the client's own. It has no vertex for what is pulled to show at.
    pub(super) async fn container(&self, request: ContainerRequest) -> Result<Container, BuildError> {
        let progress = VertexProgress::new("".into(), self.progress.clone());
        self.worker.container(&self.context, request, progress).await.map_err(op_error)
    }

    /// What the ref of a git source stands for.
    pub(super) async fn resolve_git(
        &self,
        source: &pb::SourceOp,
        objects: bool,
    ) -> Result<(ResolvedGit, Option<GitObjects>), BuildError> {
        self.worker.resolve_git(&self.context, source, objects).await.map_err(op_error)
    }

    /// What is known of the file of an http source.
    pub(super) async fn resolve_http(
        &self,
        source: &pb::SourceOp,
        checksum: Option<ChecksumRequest>,
        progress: &VertexProgress,
    ) -> Result<ResolveSourceHttpResponse, BuildError> {
        self.worker.resolve_http(&self.context, source, checksum, progress).await.map_err(op_error)
    }

    pub(super) async fn read<T, F>(&self, result: Ref, read: F) -> Result<T, BuildError>
    where
        T: Send + 'static,
        F: FnOnce(BorrowedFd<'_>) -> Result<T, BuildError> + Send + 'static,
    {
        let view = self.worker.view(&result).await.map_err(op_error)?;
        tokio::task::spawn_blocking(move || read(view.fd()))
            .await
            .map_err(|error| BuildError::new(Code::Internal, format!("task failed: {error}")))?
    }
}
