//! Sources: where a build's files come from. One module for each scheme of the identifier.

pub(super) mod git;
pub(super) mod http;
mod image;
mod local;
mod mirror;

use std::sync::Arc;

use kiln_cache::{Ref, Store, StoreError};
use kiln_proto::gateway::{ChecksumRequest, ResolveSourceHttpResponse};
use kiln_proto::pb;
use kiln_solver::op::{Op, OpError, OpVertex};
use kiln_solver::progress::VertexProgress;

pub use image::LayoutStore;

use super::BuildContext;
use crate::worker::Worker;

/// Makes the operation of a source, by the scheme of its identifier.
pub(super) fn make(
    worker: Arc<Worker>,
    context: &BuildContext,
    vertex: &OpVertex,
    op: &pb::SourceOp,
) -> Result<Arc<dyn Op<Ref>>, OpError> {
    let Some((scheme, rest)) = op.identifier.split_once("://") else {
        return Err(OpError::new(format!("failed to parse identifier {:?}", op.identifier)));
    };
    match scheme {
        "docker-image" => Ok(Arc::new(image::ImageSource::new(worker, context, vertex, op, rest, false)?)),
        "oci-layout" => Ok(Arc::new(image::ImageSource::new(worker, context, vertex, op, rest, true)?)),
        "local" => Ok(Arc::new(local::LocalSource::new(worker, context, op, rest)?)),
        "git" => Ok(Arc::new(git::GitSource::new(worker, context, op, rest)?)),
        "http" | "https" => Ok(Arc::new(http::HttpSource::new(worker, context, op)?)),
        other => Err(OpError::new(format!("unsupported: source scheme {other} ({})", op.identifier))),
    }
}

/// What the ref of a git source stands for in a build.
pub(crate) async fn resolve_git(
    worker: &Arc<Worker>,
    context: &BuildContext,
    op: &pb::SourceOp,
    objects: bool,
) -> Result<(git::Resolved, Option<git::GitObjects>), OpError> {
    let Some(rest) = op.identifier.strip_prefix("git://") else {
        return Err(OpError::new(format!("not a git source: {}", op.identifier)));
    };
    git::GitSource::new(worker.clone(), context, op, rest)?.metadata(objects).await
}

/// What is known of the file of an http source, and the checksum of it that is asked for.
pub(crate) async fn resolve_http(
    worker: &Arc<Worker>,
    context: &BuildContext,
    op: &pb::SourceOp,
    checksum: Option<ChecksumRequest>,
    progress: &VertexProgress,
) -> Result<ResolveSourceHttpResponse, OpError> {
    http::HttpSource::new(worker.clone(), context, op)?.metadata(checksum, progress).await
}

/// Forgets what was noted of results that are no longer in the store; gives the number of notes. Blocking.
pub(crate) fn forget_gone(store: &Store) -> Result<usize, StoreError> {
    http::notes::forget_gone(store)
}

/// A flag among the attributes of a source.
fn flag(op: &pb::SourceOp, name: &str) -> bool {
    op.attrs.get(name).is_some_and(|value| value == "true")
}

/// A JSON array of strings among the attributes of a source.
fn strings(op: &pb::SourceOp, name: &str) -> Result<Vec<String>, OpError> {
    let Some(text) = op.attrs.get(name).filter(|text| !text.is_empty()) else { return Ok(Vec::new()) };
    let parsed: Option<Vec<String>> =
        serde_json::from_str(text).map_err(|err| OpError::new(format!("invalid {name} {text:?}: {err}")))?;
    Ok(parsed.unwrap_or_default())
}
