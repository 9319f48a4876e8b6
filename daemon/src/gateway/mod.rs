//! One running build as a frontend sees it: it solves definitions to references, reads files in
//! them, resolves images, and at last returns a result. Frontends inside the daemon call
//! [`Bridge`] directly, others through the gRPC service in `service`.

mod caches;
pub(crate) mod caps;
mod containers;
mod failures;
mod processes;
mod refs;
mod service;
mod signals;
mod source_meta;
pub(crate) mod stdio;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use futures::FutureExt;
use futures::future::BoxFuture;
use kiln_cache::SnapshotRef;
use kiln_proto::policy::Policy;
use kiln_proto::{control, gateway, pb, platform, types};
use kiln_worker::ops::Container;
use prost::Message;
use tokio::sync::{OnceCell, oneshot};
use tokio_util::sync::CancellationToken;

pub(crate) use caches::CacheEntry;
pub(crate) use refs::{BuildResult, LazyRef, Offered, Refs};
pub(crate) use service::GatewayService;

use crate::config::FrontendConfig;
use crate::daemon::Daemon;
use crate::engine::{EngineBuild, GitObjects, ResolvedGit, ResolvedImage};
use crate::error::BuildError;
use crate::frontends;
use crate::jobs::Job;
use crate::policy::{IMAGE, LAYOUT, SourcePolicy};
use crate::progress::{ProgressLog, Step};
use crate::provenance;

type ImageCell = Arc<OnceCell<ResolvedImage>>;

/// Frontends that ask for frontends; each may be a process of its own.
const MAX_NESTING: usize = 16;

/// What all frontends of a build share.
struct Common {
    build: Arc<EngineBuild>,
    progress: Arc<ProgressLog>,
    session: String,
    images: DashMap<String, ImageCell>,
    /// Caches that were to be imported, by their ids; whether they were told of.
    imports: DashMap<String, Arc<OnceCell<()>>>,
    asked: Mutex<Vec<Arc<Asked>>>,
    /// What the client asked of the build itself.
    root: FrontendRequest,
    worker: Arc<types::WorkerRecord>,
    allowed: FrontendConfig,
}

/// One frontend's gateway to its build: that of the client or one inside the daemon, which lives as long as the build,
/// or that of a program in a container.
pub(crate) struct Bridge {
    common: Arc<Common>,
    cancel: CancellationToken,
    policy: SourcePolicy,
    inputs: HashMap<String, pb::Definition>,
    refs: DashMap<String, Arc<LazyRef>>,
    containers: DashMap<String, Arc<Container>>,
    /// What failed steps left, by the names that their errors gave it.
    shown: DashMap<String, SnapshotRef>,
    returned: Mutex<Option<oneshot::Sender<Result<BuildResult, BuildError>>>>,
    depth: usize,
}

/// Where the result that a frontend returns will arrive.
pub(crate) type Returned = oneshot::Receiver<Result<BuildResult, BuildError>>;

/// What a frontend was asked to do, and how it went about it.
pub(crate) struct Asked {
    pub(crate) request: FrontendRequest,
    /// What it read on its way.
    pub(crate) read: Vec<Arc<LazyRef>>,
    /// The references that it gave.
    results: Vec<Arc<LazyRef>>,
}

impl Asked {
    /// Whether it gave what `definition` describes.
    pub(crate) fn gave(&self, definition: &pb::Definition) -> bool {
        let wanted = root(definition);
        wanted.is_some() && self.results.iter().any(|result| root(result.definition()) == wanted)
    }
}

/// The vertex of a definition's result and its output.
fn root(definition: &pb::Definition) -> Option<pb::Input> {
    pb::Op::decode(definition.def.last()?.as_slice()).ok()?.inputs.into_iter().next()
}

/// What a frontend is asked to do.
#[derive(Debug, Clone, Default)]
pub(crate) struct FrontendRequest {
    /// `dockerfile.v0`, `gateway.v0`.
    pub(crate) name: String,
    /// Its attributes.
    pub(crate) opts: HashMap<String, String>,
    /// Definitions that stand for contexts.
    pub(crate) inputs: HashMap<String, pb::Definition>,
}

impl Bridge {
    /// The gateway of a build that `request` describes, and where the result that a client returns will arrive.
    pub(crate) fn new(
        daemon: &Daemon,
        build: Arc<EngineBuild>,
        job: &Job,
        request: &control::SolveRequest,
        policy: SourcePolicy,
    ) -> (Arc<Self>, Returned) {
        let common = Common {
            build,
            progress: job.progress.clone(),
            session: request.session.clone(),
            images: DashMap::new(),
            imports: DashMap::new(),
            asked: Mutex::default(),
            root: FrontendRequest {
                name: request.frontend.clone(),
                opts: request.frontend_attrs.clone(),
                inputs: request.frontend_inputs.clone(),
            },
            worker: daemon.worker.clone(),
            allowed: daemon.config.frontends.clone(),
        };
        Self::of(Arc::new(common), job.cancel.clone(), policy, request.frontend_inputs.clone(), 0)
    }

    /// The gateway of a frontend that is asked by this one's, with references, containers and a result of its own. It
    /// works until `cancel`, and the rules `further` hold for it as well.
    ///
    /// # Errors
    /// There are too many frontends between it and the client, or the rules make no sense.
    pub(crate) fn nested(
        &self,
        inputs: HashMap<String, pb::Definition>,
        cancel: CancellationToken,
        further: &[Policy],
    ) -> Result<(Arc<Self>, Returned), BuildError> {
        if self.depth == MAX_NESTING {
            return Err(BuildError::build("frontends are nested too deeply"));
        }
        let policy = self.policy.with(further)?;
        Ok(Self::of(self.common.clone(), cancel, policy, inputs, self.depth + 1))
    }

    fn of(
        common: Arc<Common>,
        cancel: CancellationToken,
        policy: SourcePolicy,
        inputs: HashMap<String, pb::Definition>,
        depth: usize,
    ) -> (Arc<Self>, Returned) {
        let (sender, returned) = oneshot::channel();
        let bridge = Self {
            common,
            cancel,
            policy,
            inputs,
            refs: DashMap::new(),
            containers: DashMap::new(),
            shown: DashMap::new(),
            returned: Mutex::new(Some(sender)),
            depth,
        };
        (Arc::new(bridge), returned)
    }

    /// Which frontends may be asked.
    pub(crate) fn frontends(&self) -> &FrontendConfig {
        &self.common.allowed
    }

    /// What there is to tell of the worker.
    pub(crate) fn worker(&self) -> &types::WorkerRecord {
        &self.common.worker
    }

    /// The build in the engine.
    pub(crate) fn engine(&self) -> &Arc<EngineBuild> {
        &self.common.build
    }

    /// The build's events.
    pub(crate) fn progress(&self) -> &Arc<ProgressLog> {
        &self.common.progress
    }

    /// The client's session; empty if there is none.
    pub(crate) fn session(&self) -> &str {
        &self.common.session
    }

    /// Completes when the build is stopped.
    pub(crate) fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Definitions that came with the build.
    pub(crate) fn inputs(&self) -> &HashMap<String, pb::Definition> {
        &self.inputs
    }

    /// A reference to what `definition` describes; it is built on first use. An empty definition
    /// is scratch. Its vertices are announced at once.
    ///
    /// # Errors
    /// The definition is malformed or asks for what is not allowed.
    pub(crate) async fn solve(&self, definition: pb::Definition) -> Result<Option<Arc<LazyRef>>, BuildError> {
        self.solve_under(definition, &[]).await
    }

    /// [`Bridge::solve`] of what the rules `further` allow as well.
    ///
    /// # Errors
    /// As there, or the rules make no sense.
    async fn solve_under(
        &self,
        definition: pb::Definition,
        further: &[Policy],
    ) -> Result<Option<Arc<LazyRef>>, BuildError> {
        if definition.def.is_empty() {
            return Ok(None);
        }
        let definition = self.policy.with(further)?.apply(self, definition).await?;
        let target = self.common.build.load(definition).await?;
        let reference = LazyRef::new(target, self.common.build.clone());
        self.refs.insert(reference.id().to_owned(), reference.clone());
        Ok(Some(reference))
    }

    /// Runs a frontend.
    ///
    /// # Errors
    /// What the frontend says, or that it is not known.
    pub(crate) fn run_frontend(
        self: &Arc<Self>,
        mut request: FrontendRequest,
    ) -> BoxFuture<'_, Result<BuildResult, BuildError>> {
        // Boxed, as one frontend may ask another.
        async move {
            provenance::check(&request.opts, &self.common.root.opts)?;
            self.import(caches::of_frontend(&request.opts)?).await;
            let result = frontends::run(self, &mut request).await?;
            let results = result.refs.all().into_iter().cloned().collect();
            let asked = Asked { request, read: result.read.clone(), results };
            self.lock_asked().push(Arc::new(asked));
            Ok(result)
        }
        .boxed()
    }

    fn lock_asked(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Asked>>> {
        self.common.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a frontend was asked for when it gave a reference; nothing for those that clients made. Scratch is
    /// taken for what the last frontend gave that gave no other reference.
    pub(crate) fn asked(&self, reference: Option<&LazyRef>) -> Option<Arc<Asked>> {
        let gave = |asked: &&Arc<Asked>| match reference {
            Some(reference) => asked.results.iter().any(|result| result.id() == reference.id()),
            None => asked.results.is_empty(),
        };
        self.lock_asked().iter().rev().find(gave).cloned()
    }

    /// What all frontends of the build were asked.
    pub(crate) fn all_asked(&self) -> Vec<Arc<Asked>> {
        self.lock_asked().clone()
    }

    /// What the client asked of the build itself.
    pub(crate) fn root(&self) -> &FrontendRequest {
        &self.common.root
    }

    /// What this one's frontend built that no other frontend was asked for.
    pub(crate) fn built_by_itself(&self) -> Vec<Arc<LazyRef>> {
        let asked = self.lock_asked().clone();
        let by_frontend = |id: &str| {
            asked.iter().any(|asked| {
                let mut references = asked.results.iter().chain(&asked.read);
                references.any(|reference| reference.id() == id)
            })
        };
        let built = self.refs.iter().filter(|entry| entry.is_built() && !by_frontend(entry.key()));
        built.map(|entry| entry.value().clone()).collect()
    }

    /// Whether a frontend was told that the image `reference` has this digest.
    pub(crate) fn resolved(&self, reference: &str, digest: &str) -> bool {
        let of = format!("{IMAGE}{reference} ");
        let is = |cell: &ImageCell| cell.get().is_some_and(|image| image.digest == digest);
        self.common.images.iter().any(|entry| entry.key().starts_with(&of) && is(entry.value()))
    }

    /// A reference by its id; the empty id is scratch.
    pub(crate) fn reference(&self, id: &str) -> Result<Option<Arc<LazyRef>>, BuildError> {
        if id.is_empty() {
            return Ok(None);
        }
        match self.refs.get(id) {
            Some(reference) => Ok(Some(reference.value().clone())),
            None => Err(BuildError::build(format!("no such ref: {id}"))),
        }
    }

    /// Digest and config of the image that the policy, and after it the rules `further`, have in place of the one that
    /// `source` is of, and its name.
    ///
    /// # Errors
    /// It is not allowed, or there is no such image.
    pub(crate) async fn resolve_image(
        &self,
        source: pb::SourceOp,
        wanted: &pb::Platform,
        mode: &str,
        log_name: &str,
        further: &[Policy],
    ) -> Result<(String, ResolvedImage), BuildError> {
        let allowed = self.allowed(source, wanted, further).await?;
        let name = allowed.identifier.strip_prefix(IMAGE).or(allowed.identifier.strip_prefix(LAYOUT));
        let Some(name) = name.map(str::to_owned) else {
            return Err(BuildError::unsupported(format_args!("{} in place of an image", allowed.identifier)));
        };
        Ok((name, self.find_image(&allowed, wanted, mode, log_name).await?))
    }

    /// Digest and config of an image; asked once for each image, platform and mode in a build.
    /// Emits a vertex named `log_name`.
    async fn find_image(
        &self,
        source: &pb::SourceOp,
        wanted: &pb::Platform,
        mode: &str,
        log_name: &str,
    ) -> Result<ResolvedImage, BuildError> {
        let platform = platform::format_all(wanted);
        let identifier = &source.identifier;
        let attrs: BTreeMap<_, _> = source.attrs.iter().collect();
        let key = format!("{identifier} {platform} {mode} {attrs:?}");
        let cell = self.common.images.entry(key).or_default().value().clone();
        let resolve = || async {
            let digest = text_digest(&format!("{identifier}{platform}"));
            let step = Step::start(self.common.progress.clone(), &digest, log_name);
            let answer = self.common.build.resolve_image(source, wanted, mode, step.progress()).await;
            step.end(answer.as_ref().err().map(|error| error.message.as_str()));
            answer
        };
        cell.get_or_try_init(resolve).await.cloned()
    }

    /// What the ref of a git source stands for, and the commit itself if `objects` are wanted. Emits a vertex named
    /// `log_name`.
    pub(crate) async fn resolve_git(
        &self,
        source: &pb::SourceOp,
        objects: bool,
        log_name: &str,
    ) -> Result<(ResolvedGit, Option<GitObjects>), BuildError> {
        let step = Step::start(self.common.progress.clone(), &text_digest(&source.identifier), log_name);
        let answer = self.common.build.resolve_git(source, objects).await;
        step.end(answer.as_ref().err().map(|error| error.message.as_str()));
        answer
    }

    /// What is known of the file of an http source, and the checksum of it that is asked for. Emits a vertex named
    /// `log_name`.
    pub(crate) async fn resolve_http(
        &self,
        source: &pb::SourceOp,
        checksum: Option<gateway::ChecksumRequest>,
        log_name: &str,
    ) -> Result<gateway::ResolveSourceHttpResponse, BuildError> {
        let step = Step::start(self.common.progress.clone(), &text_digest(&source.identifier), log_name);
        let answer = self.common.build.resolve_http(source, checksum, step.progress()).await;
        step.end(answer.as_ref().err().map(|error| error.message.as_str()));
        answer
    }

    /// Accepts the result of a client's frontend.
    ///
    /// # Errors
    /// There is one already, or it names references that are not of this build.
    pub(crate) fn accept(&self, request: gateway::ReturnRequest) -> Result<(), BuildError> {
        let outcome = match request.error {
            Some(status) if status.code != 0 || !status.message.is_empty() => {
                Err(BuildError::from_rpc(status))
            }
            _ => Ok(self.decode_result(request.result.unwrap_or_default())?),
        };
        let sender = self.returned.lock().unwrap_or_else(PoisonError::into_inner).take();
        match sender {
            Some(sender) => {
                // A build that is over has no use for a result.
                let _ = sender.send(outcome);
                Ok(())
            }
            None => Err(BuildError::build("gateway result is already set")),
        }
    }

    fn decode_result(&self, result: gateway::Result) -> Result<BuildResult, BuildError> {
        use gateway::result::Result as Wire;
        let map = |refs: Vec<(String, String)>| {
            refs.into_iter()
                .map(|(name, id)| Ok((name, self.reference(&id)?)))
                .collect::<Result<BTreeMap<_, _>, BuildError>>()
                .map(Refs::Map)
        };
        let refs = match result.result {
            None => Refs::Single(None),
            Some(Wire::RefDeprecated(id)) => Refs::Single(self.reference(&id)?),
            Some(Wire::Ref(reference)) => Refs::Single(self.reference(&reference.id)?),
            Some(Wire::RefsDeprecated(refs)) => map(refs.refs.into_iter().collect())?,
            Some(Wire::Refs(refs)) => map(refs.refs.into_iter().map(|(name, r)| (name, r.id)).collect())?,
        };
        let mut attestations = BTreeMap::new();
        for (platform, all) in result.attestations {
            let offer = |wire: gateway::Attestation| {
                let reference = self.reference(wire.r#ref.as_ref().map_or("", |r| &r.id))?;
                Ok(Offered { reference, wire })
            };
            let all: Result<Vec<Offered>, BuildError> = all.attestation.into_iter().map(offer).collect();
            attestations.insert(platform, all?);
        }
        let metadata = result.metadata.into_iter().collect();
        Ok(BuildResult { refs, metadata, attestations, read: Vec::new() })
    }

    fn encode_result(&self, result: &BuildResult) -> gateway::Result {
        use gateway::result::Result as Wire;
        let encode = |reference: &Option<Arc<LazyRef>>| match reference {
            None => gateway::Ref::default(),
            Some(reference) => {
                self.refs.insert(reference.id().to_owned(), reference.clone());
                gateway::Ref { id: reference.id().to_owned(), def: Some(reference.definition().clone()) }
            }
        };
        let refs = match &result.refs {
            Refs::Single(reference) => Wire::Ref(encode(reference)),
            Refs::Map(refs) => Wire::Refs(gateway::RefMap {
                refs: refs.iter().map(|(name, reference)| (name.clone(), encode(reference))).collect(),
            }),
        };
        gateway::Result {
            result: Some(refs),
            metadata: result.metadata.clone().into_iter().collect(),
            attestations: HashMap::new(),
        }
    }
}

/// The source of an image of a registry.
pub(crate) fn image_source(reference: &str) -> pb::SourceOp {
    pb::SourceOp { identifier: format!("{IMAGE}{reference}"), ..pb::SourceOp::default() }
}

/// `sha256:…` of a text: digests of vertices that are not operations.
pub(crate) fn text_digest(text: &str) -> String {
    use sha2::Digest;
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(text.as_bytes())))
}
