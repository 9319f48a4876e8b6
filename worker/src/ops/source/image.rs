//! The image sources: the root file system of an image, known by its layers and pulled when somebody reads it. Images
//! are in registries, or in a client's content store.

use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_cache::{RecordType, Ref};
use kiln_proto::reference::Reference;
use kiln_proto::{pb, platform};
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError, OpVertex};
use tokio::sync::OnceCell;

use crate::image::{Access, ClientStore, ResolveMode, ResolvedImage, chain_ids};
use crate::ops::keys::KeyBuilder;
use crate::ops::{BuildContext, SessionGroup};
use crate::registry::Credentials;
use crate::worker::Worker;

pub(super) struct ImageSource {
    worker: Arc<Worker>,
    credentials: Arc<dyn Credentials>,
    reference: Reference,
    platform: pb::Platform,
    place: Place,
    /// Only this many layers, from the bottom.
    limit: Option<usize>,
    checksum: Option<String>,
    record_type: RecordType,
    resolved: OnceCell<ResolvedImage>,
    chain: OnceCell<Ref>,
}

/// Where an image is looked up.
enum Place {
    Registry(ResolveMode),
    Layout(SessionGroup, LayoutStore),
}

/// Which content store of which client holds an image.
#[derive(Debug, Clone)]
pub struct LayoutStore {
    /// Any of the build's if empty.
    pub session: String,
    /// What the client calls it.
    pub name: String,
}

impl LayoutStore {
    /// That of an `oci-layout` source.
    pub fn of(op: &pb::SourceOp) -> Self {
        let attr = |key: &str| op.attrs.get(key).cloned().unwrap_or_default();
        Self { session: attr("oci.session"), name: attr("oci.store") }
    }

    /// Finds out what it has under the digest of `reference` for `platform`.
    pub(crate) async fn resolve(
        &self,
        worker: &Worker,
        sessions: &SessionGroup,
        reference: &Reference,
        platform: &pb::Platform,
    ) -> Result<ResolvedImage, OpError> {
        let mut missing = OpError::new("no active sessions");
        for session in sessions.attached(Some(&self.session)).await? {
            let named = session.id() == self.session;
            let store = ClientStore::new(session, format!("oci:{}", self.name));
            match worker.images().resolve_in(&store, reference, platform).await {
                Err(error) if error.is_not_found() && !named => missing = OpError::new(error.to_string()),
                other => return other.map_err(|error| OpError::new(error.to_string())),
            }
        }
        Err(missing)
    }
}

impl ImageSource {
    /// `layout`: it is in a client's content store.
    pub(super) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        vertex: &OpVertex,
        op: &pb::SourceOp,
        name: &str,
        layout: bool,
    ) -> Result<Self, OpError> {
        let reference = Reference::parse(name).map_err(|err| OpError::new(err.to_string()))?;
        let platform = platform::normalized(&vertex.op.platform.clone().unwrap_or_else(platform::host));
        let attr = |key: &str| op.attrs.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let place = match attr("image.resolvemode") {
            _ if layout => Place::Layout(context.sessions.clone(), LayoutStore::of(op)),
            None | Some("default") => Place::Registry(ResolveMode::Default),
            Some("pull") => Place::Registry(ResolveMode::ForcePull),
            Some("local") => Place::Registry(ResolveMode::PreferLocal),
            Some(other) => return Err(OpError::new(format!("invalid resolve mode {other:?}"))),
        };
        let limit = if layout { "oci.layerlimit" } else { "image.layerlimit" };
        let limit = match attr(limit).map(str::parse::<usize>) {
            None => None,
            Some(Ok(limit)) if limit > 0 => Some(limit),
            Some(_) => {
                return Err(OpError::new(format!("invalid layer limit: {limit} must be a number above 0")));
            }
        };
        Ok(Self {
            worker,
            credentials: context.credentials.clone(),
            reference,
            platform,
            place,
            limit,
            checksum: attr("image.checksum").map(str::to_owned),
            record_type: match attr("image.recordtype") {
                Some(kind) if kind == RecordType::Frontend.as_str() => RecordType::Frontend,
                _ => RecordType::Regular,
            },
            resolved: OnceCell::new(),
            chain: OnceCell::new(),
        })
    }

    async fn resolve(&self, ctx: &OpContext) -> Result<&ResolvedImage, OpError> {
        let resolve = || async {
            let access =
                Access { credentials: self.credentials.clone(), progress: Some(ctx.progress.clone()) };
            let mut resolved = match &self.place {
                Place::Registry(mode) => {
                    let images = self.worker.images();
                    let resolved = images.resolve(&self.reference, &self.platform, *mode, &access).await;
                    resolved.map_err(|err| OpError::new(err.to_string()))?
                }
                Place::Layout(sessions, store) => {
                    store.resolve(&self.worker, sessions, &self.reference, &self.platform).await?
                }
            };
            if let Some(expected) = self.checksum.as_ref().filter(|expected| **expected != resolved.digest) {
                return Err(OpError::new(format!(
                    "image digest {} for {} does not match expected checksum {expected}",
                    resolved.digest, self.reference
                )));
            }
            if let Some(limit) = self.limit {
                resolved.layers.truncate(limit);
            }
            Ok(resolved)
        };
        self.resolved.get_or_try_init(resolve).await
    }

    /// The image's layers, known and held, but not fetched.
    async fn chain(&self, ctx: &OpContext) -> Result<&Ref, OpError> {
        let resolved = self.resolve(ctx).await?;
        let pull = || async { self.worker.images().pull(resolved, self.record_type).await };
        self.chain.get_or_try_init(pull).await.map_err(|err| OpError::new(err.to_string()))
    }
}

impl Op<Ref> for ImageSource {
    fn cache_map<'a>(&'a self, ctx: &'a OpContext) -> BoxFuture<'a, Result<CacheMap, OpError>> {
        Box::pin(async move {
            let resolved = self.resolve(ctx).await?;
            // Also where an earlier build knows the layers: that this registry has them may be news. From a client
            // they would be fetched.
            if matches!(self.place, Place::Registry(_)) {
                self.chain(ctx).await?;
            }
            let layers: Vec<String> = resolved.layers.iter().map(|layer| layer.diff_id.clone()).collect();
            let mut key = KeyBuilder::new("kiln.image.v1");
            // The root file system is its layers; tags, manifests and configs may change around it.
            key.part("image layers", chain_ids(&layers).pop().unwrap_or_default());
            let name = self.reference.to_string();
            key.note("base image", name.split_once('@').map_or(name.as_str(), |(name, _)| name));
            key.note("base image digest", &resolved.digest);
            key.note("platform", platform::format(&self.platform));
            Ok(key.finish(Vec::new(), true))
        })
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        _inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move { Ok(vec![self.chain(ctx).await?.clone()]) })
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}
