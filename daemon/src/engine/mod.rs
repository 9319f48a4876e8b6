//! The machine under the services: store, solver, worker and sessions put together. The only module
//! that calls those crates' operative parts, one file for each: `worker` (sources, views), `export`,
//! `cache` (caches elsewhere), `credentials`, `storage` (usage, garbage), `failure` (their errors).

mod cache;
mod credentials;
mod export;
mod failure;
pub(crate) mod files;
mod storage;
mod worker;

use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use kiln_cache::contenthash::ContentChange;
use kiln_cache::{Eviction, Ref, Store, StoreError, StoreOptions, Values};
use kiln_proto::gateway::{ChecksumRequest, ResolveSourceHttpResponse};
use kiln_proto::{pb, types};
use kiln_session::SessionManager;
use kiln_solver::explain::VertexExplanation;
use kiln_solver::progress::VertexProgress;
use kiln_solver::{BuildOptions, LoadedHandle, Solver, SolverOptions};
use tonic::Code;

pub(crate) use cache::{CachePlan, CacheSource, import_id};
pub(crate) use export::{Built, ExportSource, PlannedExport, plan};
use kiln_worker::ops::{Container, ContainerRequest};
pub(crate) use kiln_worker::ops::{GitObjects, ResolvedGit};
pub(crate) use worker::{ResolvedImage, op_error};

use crate::config::Config;
use crate::error::BuildError;
use crate::gateway::caps;
use crate::progress::ProgressLog;
use storage::Collector;
use worker::{BuildWorker, WorkerHandle};

/// Why the engine did not open.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The store.
    #[error("failed to open the store: {0}")]
    Store(#[from] StoreError),
    /// The worker.
    #[error("failed to start the worker: {0}")]
    Worker(String),
    /// A task of the runtime.
    #[error("task failed: {0}")]
    Task(String),
}

impl EngineError {
    /// Whether another daemon has the store; and if so, whether it is about to leave.
    pub(crate) fn locked(&self) -> Option<bool> {
        match self {
            Self::Store(StoreError::Locked { leaving, .. }) => Some(*leaving),
            _ => None,
        }
    }
}

/// How long cancelled work may take to be torn down when the daemon stops.
pub(crate) const TEAR_DOWN: Duration = Duration::from_secs(10);

/// What all builds share.
pub(crate) struct Engine {
    store: Arc<Store>,
    solver: Solver<Ref>,
    worker: WorkerHandle,
    sessions: Arc<SessionManager>,
    collector: Collector,
}

impl Engine {
    /// Opens the store and starts the worker.
    pub(crate) async fn open(config: &Config) -> Result<Arc<Self>, EngineError> {
        let root = config.root.clone();
        let store = tokio::task::spawn_blocking(move || Store::open(&root, StoreOptions::default()))
            .await
            .map_err(|error| EngineError::Task(error.to_string()))??;
        let sessions = SessionManager::new();
        let worker = WorkerHandle::open(config, &store, &sessions).await?;
        let limit = match config.max_parallelism {
            // Many steps wait for the network most of the time.
            0 => std::thread::available_parallelism().map_or(16, |cpus| (4 * cpus.get()).max(16)),
            limit => limit,
        };
        let options = SolverOptions { max_parallelism: limit };
        let solver = Solver::new(store.keys(), worker.results(), options);
        let collector = Collector::new(&store, worker.worker(), &config.gc);
        Ok(Arc::new(Self { store, solver, worker, sessions, collector }))
    }

    /// Attached clients.
    pub(crate) fn sessions(&self) -> &Arc<SessionManager> {
        &self.sessions
    }

    /// Small values of the daemon's own.
    pub(crate) fn values(&self) -> Values {
        self.store.values()
    }

    /// What changed between two content digests.
    pub(crate) fn content_changes(
        &self,
        before: &[u8; 32],
        after: &[u8; 32],
    ) -> Result<Option<Vec<ContentChange>>, StoreError> {
        self.store.content_changes(before, after)
    }

    /// What removed a result.
    pub(crate) fn eviction(&self, result: &str) -> Result<Option<Eviction>, StoreError> {
        self.store.eviction(result)
    }

    /// Forgets what content digests were made of that are not wanted.
    pub(crate) fn forget_contents(&self, wanted: &HashSet<[u8; 32]>) -> Result<(), StoreError> {
        self.store.forget_contents(wanted)
    }

    /// The worker's id, the same for the life of the store.
    pub(crate) fn worker_id(&self) -> &str {
        self.worker.id()
    }

    /// The rules by which the cache is cleaned, for the worker record.
    pub(crate) fn gc_policy(&self) -> Vec<types::GcPolicy> {
        self.collector.records()
    }

    /// Starts a build.
    pub(crate) fn begin(self: &Arc<Self>, scope: BuildScope) -> Arc<EngineBuild> {
        let worker = self.worker.begin(&scope);
        let build =
            self.solver.build(BuildOptions { factory: worker.factory(), progress: scope.progress.clone() });
        Arc::new(EngineBuild { engine: self.clone(), build, worker, session: scope.session })
    }

    /// A build is over: work that it left is torn down, and garbage may be collected.
    pub(crate) fn build_ended(&self) {
        self.collector.request();
    }

    /// Says that this engine will soon be closed.
    pub(crate) fn announce_close(&self) {
        self.store.announce_close();
    }

    /// Waits for work that is still being torn down, then closes the store.
    pub(crate) async fn close(&self) -> Result<(), EngineError> {
        self.sessions.close_all();
        let quiet = async {
            self.solver.idle().await;
            self.worker.idle().await;
        };
        if tokio::time::timeout(TEAR_DOWN, quiet).await.is_err() {
            tracing::warn!("cancelled work did not end in time");
        }
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.close())
            .await
            .map_err(|error| EngineError::Task(error.to_string()))??;
        Ok(())
    }
}

/// What is particular to one build.
pub(crate) struct BuildScope {
    /// The client's session; empty if there is none.
    pub(crate) session: String,
    /// What the build was granted.
    pub(crate) entitlements: Vec<String>,
    /// Where its events go.
    pub(crate) progress: Arc<ProgressLog>,
}

/// One build in the engine. Dropping the last handle cancels what only it wanted.
pub(crate) struct EngineBuild {
    engine: Arc<Engine>,
    build: kiln_solver::Build<Ref>,
    worker: BuildWorker,
    session: String,
}

impl EngineBuild {
    /// Takes a definition into the build and announces its vertices.
    pub(crate) async fn load(&self, definition: pb::Definition) -> Result<Target, BuildError> {
        for cap in definition.metadata.values().flat_map(|metadata| &metadata.caps) {
            if !caps::supported(cap.0) {
                return Err(BuildError::new(
                    Code::Unimplemented,
                    format!("unsupported: requested feature {} is not supported by build server", cap.0),
                ));
            }
        }
        match self.build.load(&definition).await {
            Ok(handle) => Ok(Target { handle, definition }),
            Err(error) => Err(failure::solve_error(error, &definition)),
        }
    }

    /// The worker's id.
    pub(crate) fn worker_id(&self) -> &str {
        self.engine.worker_id()
    }

    /// What was decided about each vertex.
    pub(crate) async fn explain(&self) -> Vec<VertexExplanation> {
        self.build.explain().await
    }

    /// The outputs of each vertex that was made or found so far, by its digest.
    pub(crate) async fn results(&self) -> HashMap<Arc<str>, Vec<Ref>> {
        self.build.results().await
    }

    /// Reads in a result's root directory, on a thread where blocking does no harm.
    pub(crate) async fn read<T, F>(&self, result: Ref, read: F) -> Result<T, BuildError>
    where
        T: Send + 'static,
        F: FnOnce(BorrowedFd<'_>) -> Result<T, BuildError> + Send + 'static,
    {
        self.worker.read(result, read).await
    }

    /// A directory with one file, which goes with its last user.
    pub(crate) async fn hold_file(&self, name: &'static str, data: Vec<u8>) -> Result<Ref, BuildError> {
        self.worker.hold_file(name, data).await
    }

    /// A container for processes of the client's own.
    pub(crate) async fn container(&self, request: ContainerRequest) -> Result<Container, BuildError> {
        self.worker.container(request).await
    }

    /// Digest and config of the image that a source is of.
    pub(crate) async fn resolve_image(
        &self,
        source: &pb::SourceOp,
        platform: &pb::Platform,
        mode: &str,
        progress: &VertexProgress,
    ) -> Result<ResolvedImage, BuildError> {
        self.worker.resolve_image(source, platform, mode, progress).await
    }

    /// What the ref of a git source stands for, and the commit itself if `objects` are wanted.
    pub(crate) async fn resolve_git(
        &self,
        source: &pb::SourceOp,
        objects: bool,
    ) -> Result<(ResolvedGit, Option<GitObjects>), BuildError> {
        self.worker.resolve_git(source, objects).await
    }

    /// What is known of the file of an http source, and the checksum of it that is asked for.
    pub(crate) async fn resolve_http(
        &self,
        source: &pb::SourceOp,
        checksum: Option<ChecksumRequest>,
        progress: &VertexProgress,
    ) -> Result<ResolveSourceHttpResponse, BuildError> {
        self.worker.resolve_http(source, checksum, progress).await
    }
}

/// A definition that was taken into a build.
pub(crate) struct Target {
    handle: LoadedHandle<Ref>,
    definition: pb::Definition,
}

impl Target {
    /// What it was made from.
    pub(crate) fn definition(&self) -> &pb::Definition {
        &self.definition
    }

    /// What a cache elsewhere can be told of it and of all that it was made from.
    pub(crate) async fn describe(&self) -> CacheSource {
        self.handle.describe().await
    }

    /// Builds it.
    pub(crate) async fn result(&self) -> Result<Ref, BuildError> {
        match self.handle.result().await {
            Ok(result) => Ok(result.flatten()),
            Err(error) => Err(failure::solve_error(error, &self.definition)),
        }
    }
}
