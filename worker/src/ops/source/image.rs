//! The image source: an image's root file system, known by its layers and pulled when somebody reads it.

use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_cache::Ref;
use kiln_proto::reference::Reference;
use kiln_proto::{pb, platform};
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError, OpVertex};
use tokio::sync::OnceCell;

use crate::image::{Access, ResolveMode, ResolvedImage, chain_ids};
use crate::ops::BuildContext;
use crate::ops::keys::KeyBuilder;
use crate::registry::Credentials;
use crate::worker::Worker;

pub(super) struct ImageSource {
    worker: Arc<Worker>,
    credentials: Arc<dyn Credentials>,
    reference: Reference,
    platform: pb::Platform,
    mode: ResolveMode,
    /// Only this many layers, from the bottom.
    limit: Option<usize>,
    checksum: Option<String>,
    resolved: OnceCell<ResolvedImage>,
    chain: OnceCell<Ref>,
}

impl ImageSource {
    pub(super) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        vertex: &OpVertex,
        op: &pb::SourceOp,
        name: &str,
    ) -> Result<Self, OpError> {
        let reference = Reference::parse(name).map_err(|err| OpError::new(err.to_string()))?;
        let platform = platform::normalized(&vertex.op.platform.clone().unwrap_or_else(platform::host));
        let attr = |key: &str| op.attrs.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let mode = match attr("image.resolvemode") {
            None | Some("default") => ResolveMode::Default,
            Some("pull") => ResolveMode::ForcePull,
            Some("local") => ResolveMode::PreferLocal,
            Some(other) => return Err(OpError::new(format!("invalid resolve mode {other:?}"))),
        };
        let limit = match attr("image.layerlimit").map(str::parse::<usize>) {
            None => None,
            Some(Ok(limit)) if limit > 0 => Some(limit),
            Some(_) => {
                return Err(OpError::new("invalid layer limit: image.layerlimit must be a number above 0"));
            }
        };
        Ok(Self {
            worker,
            credentials: context.credentials.clone(),
            reference,
            platform,
            mode,
            limit,
            checksum: attr("image.checksum").map(str::to_owned),
            resolved: OnceCell::new(),
            chain: OnceCell::new(),
        })
    }

    async fn resolve(&self, ctx: &OpContext) -> Result<&ResolvedImage, OpError> {
        let resolve = || async {
            let access =
                Access { credentials: self.credentials.clone(), progress: Some(ctx.progress.clone()) };
            let images = self.worker.images();
            let resolved = images.resolve(&self.reference, &self.platform, self.mode, &access).await;
            let mut resolved = resolved.map_err(|err| OpError::new(err.to_string()))?;
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
        let pull = || async { self.worker.images().pull(resolved).await };
        self.chain.get_or_try_init(pull).await.map_err(|err| OpError::new(err.to_string()))
    }
}

impl Op<Ref> for ImageSource {
    fn cache_map<'a>(&'a self, ctx: &'a OpContext) -> BoxFuture<'a, Result<CacheMap, OpError>> {
        Box::pin(async move {
            let resolved = self.resolve(ctx).await?;
            // Also where an earlier build knows the layers: that this registry has them may be news.
            self.chain(ctx).await?;
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
