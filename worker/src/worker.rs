//! The worker: what all builds of one daemon share to run their steps, and how results are found again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::BoxFuture;
use kiln_cache::contenthash;
use kiln_cache::{Ref, ScratchDir, SnapshotRef, Snapshots, Store, StoreError};
use kiln_proto::gateway::{ChecksumRequest, ResolveSourceHttpResponse};
use kiln_proto::pb;
use kiln_proto::reference::Reference;
use kiln_solver::op::{ContentQuery, Key, OpError, OpFactory, ResultStore};
use kiln_solver::progress::VertexProgress;
use tokio_util::task::TaskTracker;

use crate::filework::{FileWork, Panicked};
use crate::flat;
use crate::image::{Access, Images, ResolvedImage};
use crate::lenders::Lenders;
use crate::ops::run_dir::RunDir;
use crate::ops::{
    self, BuildContext, CacheMountLocks, Container, ContainerRequest, Factory, GitObjects, LayoutStore,
    Repositories, ResolvedGit,
};
use crate::registry::Credentials;
use crate::registry::http::Clients;
use crate::sandbox::spec::NetworkMode;
use crate::sandbox::{self, Executor, ExecutorChoice};
use crate::view::{View, ViewError};

/// What clients see as the empty result.
const SCRATCH: &str = "scratch";

/// How much work on files goes on at once: for each processor, and at least.
const FILE_WORK_PER_CPU: usize = 4;
const FILE_WORK: usize = 8;

/// Name resolution in steps; for what is empty, the host's holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// `nameserver` lines.
    pub nameservers: Vec<String>,
    /// `options` line.
    pub options: Vec<String>,
    /// `search` line.
    pub search: Vec<String>,
}

/// How a worker is set up.
#[derive(Clone)]
pub struct WorkerConfig {
    /// Where everything is kept.
    pub store: Arc<Store>,
    /// Where images come from.
    pub images: Arc<Images>,
    /// What runs processes.
    pub executor: ExecutorChoice,
    /// Network of steps that ask for none in particular.
    pub network: NetworkMode,
    /// What `/etc/resolv.conf` in steps has instead of the host's.
    pub dns: Dns,
    /// Directory for sockets and generated files of running steps, made if missing. What a killed daemon left in it
    /// is removed.
    pub run_dir: PathBuf,
}

/// Why a worker could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The directory for running steps could not be made.
    #[error("{}: {source}", path.display())]
    RunDir {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Runs steps. Shared by all builds of a daemon.
pub struct Worker {
    id: String,
    store: Arc<Store>,
    images: Arc<Images>,
    layers: Layers,
    choice: ExecutorChoice,
    network: NetworkMode,
    pub(crate) dns: Dns,
    run_dir: RunDir,
    executor: Mutex<Option<Arc<dyn Executor>>>,
    pub(crate) cache_mounts: CacheMountLocks,
    pub(crate) repositories: Repositories,
    pub(crate) lenders: Lenders,
    /// For sources that are plain URLs.
    pub(crate) web: Clients,
    /// Steps that are running, or ending after their build lost interest.
    pub(crate) steps: TaskTracker,
    files: FileWork,
}

impl Worker {
    /// Opens the worker on a store. Starts no process; the executor is started by the first step that needs it.
    ///
    /// # Errors
    /// If the store or the run directory can't be used.
    pub fn open(config: WorkerConfig) -> Result<Arc<Self>, WorkerError> {
        let WorkerConfig { store, images, executor, network, dns, run_dir } = config;
        let values = store.values();
        let id = match values.get("worker", "id")? {
            Some(id) => String::from_utf8_lossy(&id).into_owned(),
            None => {
                let id = kiln_session::new_id();
                values.put("worker", "id", id.as_bytes())?;
                id
            }
        };
        let layers = Layers { snapshots: store.snapshots(), empty: Arc::new(store.scratch()?) };
        let run_dir =
            RunDir::open(&run_dir).map_err(|source| WorkerError::RunDir { path: run_dir.clone(), source })?;
        Ok(Arc::new(Self {
            id,
            store,
            images,
            layers,
            choice: executor,
            network,
            dns,
            run_dir,
            executor: Mutex::new(None),
            cache_mounts: CacheMountLocks::default(),
            repositories: Repositories::default(),
            lenders: Lenders::default(),
            web: Clients::default(),
            steps: TaskTracker::new(),
            files: FileWork::new(
                FILE_WORK
                    .max(FILE_WORK_PER_CPU * std::thread::available_parallelism().map_or(1, usize::from)),
            ),
        }))
    }

    /// Forgets what was noted of images and files of the web that are no longer in the store. Blocking.
    pub fn forget_gone(&self) -> Result<usize, crate::image::ImageError> {
        Ok(self.images.forget_gone()? + ops::forget_gone(&self.store)?)
    }

    /// The worker's name, kept for the life of the store.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The store that the worker works on.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Where images come from.
    pub fn images(&self) -> &Arc<Images> {
        &self.images
    }

    /// Access to snapshots as directories.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// Network of steps that ask for none in particular.
    pub(crate) fn network(&self) -> NetworkMode {
        self.network
    }

    pub(crate) fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    /// Makes the operations of one build.
    pub fn factory(self: &Arc<Self>, context: BuildContext) -> Arc<dyn OpFactory<Ref>> {
        Arc::new(Factory::new(self.clone(), context))
    }

    /// A container for processes that a client of a build starts itself. What is pulled for it shows in `progress`.
    ///
    /// # Errors
    /// If something of what is to be mounted is not there.
    pub async fn container(
        self: &Arc<Self>,
        context: &BuildContext,
        request: ContainerRequest,
        progress: VertexProgress,
    ) -> Result<Container, OpError> {
        Container::new(self.clone(), context.clone(), request, progress).await
    }

    /// What the ref of a git source stands for in a build, and the commit itself if `objects` are wanted.
    ///
    /// # Errors
    /// If the operation is no git source, or what failed while asking or fetching.
    pub async fn resolve_git(
        self: &Arc<Self>,
        context: &BuildContext,
        source: &pb::SourceOp,
        objects: bool,
    ) -> Result<(ResolvedGit, Option<GitObjects>), OpError> {
        ops::resolve_git(self, context, source, objects).await
    }

    /// What a client's content store has under the digest of `reference` for `platform`.
    ///
    /// # Errors
    /// If the client is not there, or has no such image.
    pub async fn resolve_layout(
        &self,
        context: &BuildContext,
        store: &LayoutStore,
        reference: &Reference,
        platform: &pb::Platform,
    ) -> Result<ResolvedImage, OpError> {
        store.resolve(self, &context.sessions, reference, platform).await
    }

    /// What is known of the file of an http source in a build, and the checksum of it that is asked for. A download
    /// shows in `progress`.
    ///
    /// # Errors
    /// If the operation is no http source, or what failed while asking or fetching.
    pub async fn resolve_http(
        self: &Arc<Self>,
        context: &BuildContext,
        source: &pb::SourceOp,
        checksum: Option<ChecksumRequest>,
        progress: &VertexProgress,
    ) -> Result<ResolveSourceHttpResponse, OpError> {
        ops::resolve_http(self, context, source, checksum, progress).await
    }

    /// Waits until no step is running any more, including cancelled ones that are being torn down. To be
    /// called once no build is left.
    pub async fn idle(&self) {
        self.steps.close();
        self.steps.wait().await;
        self.steps.reopen();
    }

    /// The executor, started if this is its first use. Blocking.
    pub(crate) fn executor(&self) -> Result<Arc<dyn Executor>, sandbox::SandboxError> {
        let mut slot = self.executor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(executor) = &*slot {
            return Ok(executor.clone());
        }
        let executor = sandbox::open(&self.choice, &self.store.root().join("executor"))?;
        *slot = Some(executor.clone());
        Ok(executor)
    }

    /// Brings the files of a result here: downloads and unpacks layers that are still in a registry.
    ///
    /// # Errors
    /// What failed while pulling.
    pub async fn materialize(&self, result: &Ref, access: &Access) -> Result<(), OpError> {
        match result {
            Some(snapshot) if !snapshot.is_materialized() => {
                self.images.materialize(result, access).await.map_err(|err| OpError::new(err.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// [`Worker::materialize`] for several results at once, on behalf of one build.
    pub(crate) async fn materialize_all(
        &self,
        results: &[Ref],
        credentials: &Arc<dyn Credentials>,
        progress: &VertexProgress,
    ) -> Result<(), OpError> {
        let access = Access { credentials: credentials.clone(), progress: Some(progress.clone()) };
        let all = results.iter().map(|result| self.materialize(result, &access));
        futures::future::try_join_all(all).await.map(|_| ())
    }

    /// Access on behalf of whichever build is under way, for work that all builds share.
    fn shared_access(&self) -> Access {
        Access { credentials: Arc::new(self.lenders.current()), progress: None }
    }

    /// A read-only view of a result, brought here if need be.
    ///
    /// # Errors
    /// What failed while pulling or mounting.
    pub async fn view(&self, result: &Ref) -> Result<View, OpError> {
        self.materialize(result, &self.shared_access()).await?;
        let (layers, result) = (self.layers.clone(), result.clone());
        let view = tokio::task::spawn_blocking(move || layers.view(&result)).await;
        let view = view.map_err(|err| OpError::new(format!("opening a view failed: {err}")))?;
        view.map_err(|err| OpError::new(err.to_string()))
    }

    /// Does work on files beside the tasks, only so much at once. What was begun ends even if the future is dropped.
    pub(crate) async fn on_files<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Panicked> {
        self.files.run(work).await
    }

    /// How clients know a result: worker and snapshot.
    fn ref_name(&self, result: &Ref) -> String {
        format!("{}::{}", self.id, result.as_ref().map_or(SCRATCH, SnapshotRef::id))
    }
}

/// Snapshots as directories to read and to write. Cheap to clone; its functions block.
#[derive(Clone)]
pub struct Layers {
    snapshots: Snapshots,
    empty: Arc<ScratchDir>,
}

impl Layers {
    /// Makes and finds snapshots.
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// An empty directory beside the snapshots.
    pub fn empty_dir(&self) -> &Path {
        self.empty.path()
    }

    /// The layers to mount for a result, bottom first, few enough for one overlay.
    ///
    /// # Errors
    /// If a chain that is too long for one mount could not be flattened.
    pub fn chain(&self, result: &Ref) -> Result<Vec<SnapshotRef>, ViewError> {
        result.as_ref().map_or_else(|| Ok(Vec::new()), |top| flat::chain(&self.snapshots, top))
    }

    /// A read-only view of a result whose files are here.
    ///
    /// # Errors
    /// If it can't be mounted.
    pub fn view(&self, result: &Ref) -> Result<View, ViewError> {
        let layers = self.chain(result)?;
        match &layers[..] {
            [] => View::directory(self.empty.path(), layers),
            // Received from a client, who can't send whiteouts.
            [only] if only.meta().record_type == kiln_cache::RecordType::LocalSource => {
                View::directory(&only.dir(), layers)
            }
            _ => View::read_only(layers, self.empty.path()),
        }
    }
}

impl ResultStore<Ref> for Worker {
    fn id(&self, result: &Ref) -> String {
        result.as_ref().map_or("", SnapshotRef::id).to_owned()
    }

    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Ref>, OpError>> {
        let found = match id {
            "" => Ok(Some(None)),
            _ => match self.layers.snapshots.get(id) {
                Ok(found) => Ok(found.map(Some)),
                Err(StoreError::NotFound { .. }) => Ok(None),
                Err(err) => Err(OpError::new(err.to_string())),
            },
        };
        Box::pin(std::future::ready(found))
    }

    fn is_here(&self, result: &Ref) -> bool {
        result.as_ref().is_none_or(SnapshotRef::is_materialized)
    }

    fn content_digest<'a>(
        &'a self,
        result: &'a Ref,
        query: &'a ContentQuery,
    ) -> BoxFuture<'a, Result<Key, OpError>> {
        Box::pin(async move {
            self.materialize(result, &self.shared_access()).await?;
            let (snapshot, query) = (result.clone(), query.clone());
            let hash = self.on_files(move || contenthash::content_digest(snapshot.as_ref(), &query)).await;
            let hash = hash.map_err(|err| OpError::new(format!("hashing failed: {err}")))?;
            hash.map_err(|err| {
                let err = match err {
                    // There is no tree to calculate anything of.
                    StoreError::PathNotFound(path) if result.is_none() => {
                        format!("lstat {path}: no such file or directory")
                    }
                    err => err.to_string(),
                };
                OpError::new(format!("failed to calculate checksum of ref {}: {err}", self.ref_name(result)))
            })
        })
    }

    fn output_digest<'a>(&'a self, result: &'a Ref) -> BoxFuture<'a, Result<Key, OpError>> {
        Box::pin(async move {
            let snapshot = result.clone();
            let hash = self.on_files(move || contenthash::output_digest(snapshot.as_ref())).await;
            let hash = hash.map_err(|err| OpError::new(format!("hashing failed: {err}")))?;
            hash.map_err(|err| OpError::new(err.to_string()))
        })
    }
}
