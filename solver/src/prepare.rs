//! What of a definition can be made ready before the build's owner sees it: on all processors, if it is large.
//! Knows nothing of the graph.

use std::sync::Arc;

use kiln_proto::llb;
use kiln_proto::parallel::{MANY, each};
use kiln_proto::pb;
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::error::SolveError;
use crate::op::{CacheMap, Op, OpError, OpFactory, OpVertex};
use crate::progress::VertexInfo;
use crate::work::guarded_call;

/// A definition, ready to enter the graph.
pub(crate) struct Prepared<R> {
    /// Inputs before who uses them.
    pub(crate) vertices: Vec<PreparedVertex<R>>,
    /// Vertex and output index of the result; `None` for scratch.
    pub(crate) root: Option<(usize, u32)>,
}

pub(crate) struct PreparedVertex<R> {
    pub(crate) info: Arc<VertexInfo>,
    pub(crate) op: Arc<dyn Op<R>>,
    /// What the result depends on, if that needs no resolution.
    pub(crate) map: Option<Arc<CacheMap>>,
    pub(crate) ignore_cache: bool,
    /// For each input: its place among the vertices, and its output index.
    pub(crate) inputs: Vec<(usize, u32)>,
}

/// Blocks for as long as it takes, but no other task of a runtime of several threads.
pub(crate) fn prepare<R: Send + Sync + 'static>(
    definition: &pb::Definition,
    factory: &dyn OpFactory<R>,
) -> Result<Prepared<R>, SolveError<R>> {
    let several = || Handle::try_current().is_ok_and(|h| h.runtime_flavor() == RuntimeFlavor::MultiThread);
    match definition.def.len() >= MANY && several() {
        true => tokio::task::block_in_place(|| prepare_here(definition, factory)),
        false => prepare_here(definition, factory),
    }
}

fn prepare_here<R: Send + Sync + 'static>(
    definition: &pb::Definition,
    factory: &dyn OpFactory<R>,
) -> Result<Prepared<R>, SolveError<R>> {
    let loaded = llb::load(definition).map_err(|error| {
        let vertex = match &error {
            llb::LoadError::Invalid { digest, .. } => Some(digest.as_str()),
            _ => None,
        };
        SolveError::load(vertex, "", OpError::new(error.to_string()))
    })?;
    let many = loaded.vertices.len() >= MANY;
    let vertices = each(many, loaded.vertices, |vertex| prepare_vertex(vertex, factory))?;
    Ok(Prepared { vertices, root: loaded.root })
}

fn prepare_vertex<R: Send + Sync + 'static>(
    vertex: llb::LoadedVertex,
    factory: &dyn OpFactory<R>,
) -> Result<PreparedVertex<R>, SolveError<R>> {
    let llb::LoadedVertex { digest, op, metadata, inputs, input_digests, name } = vertex;
    let ignore_cache = metadata.ignore_cache;
    let group = metadata.progress_group.clone();
    let vertex = OpVertex { digest: digest.clone(), op, metadata, name: name.clone() };
    let made = guarded_call(|| {
        let op = factory.op(vertex)?;
        let map = op.known_map().map(Arc::new);
        Ok((op, map))
    });
    let (op, map) = made.map_err(|error| SolveError::load(Some(&digest), &name, error))?;
    let info = Arc::new(VertexInfo { digest, inputs: input_digests, name, group });
    Ok(PreparedVertex { info, op, map, ignore_cache, inputs })
}
