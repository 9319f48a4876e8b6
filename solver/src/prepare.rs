//! What of a definition can be made ready before the build's owner sees it: on all processors, if it is large.
//! Knows nothing of the graph.

use std::sync::Arc;

use kiln_proto::llb;
use kiln_proto::pb;
use rayon::prelude::*;

use crate::error::SolveError;
use crate::op::{Op, OpError, OpFactory, OpVertex};
use crate::progress::VertexInfo;

/// From this many vertices on, work is spread over the processors: below, that takes longer than it saves.
const MANY: usize = 2048;

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
    pub(crate) ignore_cache: bool,
    /// For each input: its place among the vertices, and its output index.
    pub(crate) inputs: Vec<(usize, u32)>,
}

pub(crate) fn prepare<R: 'static>(
    definition: &pb::Definition,
    factory: &dyn OpFactory<R>,
) -> Result<Prepared<R>, SolveError> {
    let loaded = llb::load(definition).map_err(|error| {
        let vertex = match &error {
            llb::LoadError::Invalid { digest, .. } => Some(digest.as_str()),
            _ => None,
        };
        SolveError::load(vertex, "", OpError::new(error.to_string()))
    })?;
    let vertices = match loaded.vertices.len() {
        MANY.. => {
            let vertices = loaded.vertices.into_par_iter().with_min_len(MANY / 4);
            vertices.map(|vertex| prepare_vertex(vertex, factory)).collect::<Result<_, _>>()
        }
        _ => loaded.vertices.into_iter().map(|vertex| prepare_vertex(vertex, factory)).collect(),
    }?;
    Ok(Prepared { vertices, root: loaded.root })
}

fn prepare_vertex<R: 'static>(
    vertex: llb::LoadedVertex,
    factory: &dyn OpFactory<R>,
) -> Result<PreparedVertex<R>, SolveError> {
    let llb::LoadedVertex { digest, op, metadata, inputs, input_digests, name } = vertex;
    let ignore_cache = metadata.ignore_cache;
    let group = metadata.progress_group.clone();
    let vertex = OpVertex { digest, op, metadata, name };
    let op =
        factory.op(&vertex).map_err(|error| SolveError::load(Some(&vertex.digest), &vertex.name, error))?;
    let OpVertex { digest, name, .. } = vertex;
    let info = Arc::new(VertexInfo { digest, inputs: input_digests, name, group });
    Ok(PreparedVertex { info, op, ignore_cache, inputs })
}
