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

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use kiln_cache::SnapshotRef;
use kiln_proto::policy::Policy;
use kiln_proto::{control, gateway, pb, platform};
use kiln_worker::ops::Container;
use prost::Message;
use tokio::sync::{OnceCell, oneshot};
use tokio_util::sync::CancellationToken;

pub(crate) use caches::CacheEntry;
pub(crate) use refs::{BuildResult, LazyRef, Offered, Refs};
pub(crate) use service::GatewayService;

use crate::engine::{EngineBuild, GitObjects, ResolvedGit, ResolvedImage};
use crate::error::BuildError;
use crate::frontends;
use crate::policy::{IMAGE, SourcePolicy};
use crate::progress::{ProgressLog, Step};
use crate::provenance;

type ImageCell = Arc<OnceCell<ResolvedImage>>;

/// A build's gateway. Lives as long as the build.
pub(crate) struct Bridge {
    build: Arc<EngineBuild>,
    progress: Arc<ProgressLog>,
    cancel: CancellationToken,
    session: String,
    inputs: HashMap<String, pb::Definition>,
    policy: SourcePolicy,
    refs: DashMap<String, Arc<LazyRef>>,
    images: DashMap<String, ImageCell>,
    /// Caches that were to be imported, by their ids; whether they were told of.
    imports: DashMap<String, Arc<OnceCell<()>>>,
    asked: Mutex<Vec<Arc<Asked>>>,
    /// What the client asked of the build itself.
    root: FrontendRequest,
    containers: DashMap<String, Arc<Container>>,
    /// What failed steps left, by the names that their errors gave it.
    shown: DashMap<String, SnapshotRef>,
    returned: Mutex<Option<oneshot::Sender<Result<BuildResult, BuildError>>>>,
}

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
    /// A gateway for `build`, and where the result that a client returns will arrive.
    pub(crate) fn new(
        build: Arc<EngineBuild>,
        progress: Arc<ProgressLog>,
        cancel: CancellationToken,
        request: &control::SolveRequest,
        policy: SourcePolicy,
    ) -> (Arc<Self>, oneshot::Receiver<Result<BuildResult, BuildError>>) {
        let (sender, receiver) = oneshot::channel();
        let bridge = Arc::new(Self {
            build,
            progress,
            cancel,
            session: request.session.clone(),
            inputs: request.frontend_inputs.clone(),
            root: FrontendRequest {
                name: request.frontend.clone(),
                opts: request.frontend_attrs.clone(),
                inputs: request.frontend_inputs.clone(),
            },
            policy,
            refs: DashMap::new(),
            images: DashMap::new(),
            imports: DashMap::new(),
            asked: Mutex::default(),
            containers: DashMap::new(),
            shown: DashMap::new(),
            returned: Mutex::new(Some(sender)),
        });
        (bridge, receiver)
    }

    /// The build's events.
    pub(crate) fn progress(&self) -> &Arc<ProgressLog> {
        &self.progress
    }

    /// The client's session; empty if there is none.
    pub(crate) fn session(&self) -> &str {
        &self.session
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
        let target = self.build.load(definition).await?;
        let reference = LazyRef::new(target, self.build.clone());
        self.refs.insert(reference.id().to_owned(), reference.clone());
        Ok(Some(reference))
    }

    /// Runs a frontend.
    ///
    /// # Errors
    /// What the frontend says, or that it is not known.
    pub(crate) async fn run_frontend(
        self: &Arc<Self>,
        mut request: FrontendRequest,
    ) -> Result<BuildResult, BuildError> {
        provenance::check(&request.opts, &self.root.opts)?;
        self.import(caches::of_frontend(&request.opts)?).await;
        // In a box, or the call's type grows beyond what the compiler takes.
        let result = Box::pin(frontends::run(self, &mut request)).await?;
        let results = result.refs.all().into_iter().cloned().collect();
        let asked = Asked { request, read: result.read.clone(), results };
        self.lock_asked().push(Arc::new(asked));
        Ok(result)
    }

    fn lock_asked(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Asked>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
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
        &self.root
    }

    /// What the client built that no frontend in the daemon asked for.
    pub(crate) fn built_by_client(&self) -> Vec<Arc<LazyRef>> {
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
        let of = format!("{reference} ");
        let is = |cell: &ImageCell| cell.get().is_some_and(|image| image.digest == digest);
        self.images.iter().any(|entry| entry.key().starts_with(&of) && is(entry.value()))
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

    /// Digest and config of the image that the policy, and after it the rules `further`, have in place of `reference`,
    /// and its name.
    ///
    /// # Errors
    /// It is not allowed, or there is no such image.
    pub(crate) async fn resolve_image(
        &self,
        reference: &str,
        wanted: &pb::Platform,
        mode: &str,
        log_name: &str,
        further: &[Policy],
    ) -> Result<(String, ResolvedImage), BuildError> {
        let source = pb::SourceOp { identifier: format!("{IMAGE}{reference}"), ..Default::default() };
        let allowed = self.allowed(source, wanted, further).await?.identifier;
        let Some(reference) = allowed.strip_prefix(IMAGE) else {
            return Err(BuildError::unsupported(format_args!("{allowed} in place of an image")));
        };
        let image = self.find_image(reference, wanted, mode, log_name).await?;
        Ok((reference.to_owned(), image))
    }

    /// Digest and config of an image; asked once for each image, platform and mode in a build.
    /// Emits a vertex named `log_name`.
    async fn find_image(
        &self,
        reference: &str,
        wanted: &pb::Platform,
        mode: &str,
        log_name: &str,
    ) -> Result<ResolvedImage, BuildError> {
        let platform = platform::format_all(wanted);
        let key = format!("{reference} {platform} {mode}");
        let cell = self.images.entry(key).or_default().value().clone();
        let resolve = || async {
            let digest = text_digest(&format!("docker-image://{reference}{platform}"));
            let step = Step::start(self.progress.clone(), &digest, log_name);
            let answer = self.build.resolve_image(reference, wanted, mode, step.progress()).await;
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
        let step = Step::start(self.progress.clone(), &text_digest(&source.identifier), log_name);
        let answer = self.build.resolve_git(source, objects).await;
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
        let step = Step::start(self.progress.clone(), &text_digest(&source.identifier), log_name);
        let answer = self.build.resolve_http(source, checksum, step.progress()).await;
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

/// `sha256:…` of a text: digests of vertices that are not operations.
pub(crate) fn text_digest(text: &str) -> String {
    use sha2::Digest;
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(text.as_bytes())))
}
