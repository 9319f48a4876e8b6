//! What a build can tell a cache elsewhere about one of its results and all that it was made from: how BuildKit's
//! records for them are called and linked, and what was made. How that is written down is the business of others.

use std::collections::HashMap;
use std::sync::Arc;

use crate::import::{self, ImportedCache, RecordDigest};
use crate::keys::Part;
use crate::op::{ContentQuery, Key};
use crate::produced::{Opened, Produced, open};
use crate::solver::Shared;
use crate::work::guarded;

/// A vertex and what is known of it; vertices that it was made from come before it.
#[derive(Debug, Clone)]
pub struct ExportVertex<R> {
    /// The operation as records name it; `None` if it has no identity beyond the build.
    pub operation: Option<String>,
    /// Its inputs.
    pub inputs: Vec<ExportInput>,
    /// Its outputs that are used, with what is there of them.
    pub outputs: Vec<(u32, Option<R>)>,
}

/// An input of a vertex.
#[derive(Debug, Clone)]
pub struct ExportInput {
    /// Place of the vertex that makes it.
    pub vertex: usize,
    /// Which of its outputs.
    pub output: u32,
    /// Which part of it is read.
    pub selector: String,
    /// Content that it may be recognised by: records and selectors.
    pub contents: Vec<(RecordDigest, String)>,
}

/// What the owner of a build knows at once; the results of vertices that it did not need are elsewhere.
pub(crate) struct Described<R> {
    pub(crate) vertices: Vec<ExportVertex<R>>,
    pub(crate) sources: Vec<Sources<R>>,
}

/// A record of an imported cache.
pub(crate) type Importable<R> = (Arc<dyn ImportedCache<R>>, u32);

/// Where results of a vertex may be.
pub(crate) struct Sources<R> {
    pub(crate) produced: Option<Arc<Produced<R>>>,
    pub(crate) keys: Vec<Key>,
    /// Inputs that may be recognised by content which nobody has looked at in this build.
    pub(crate) unread: Vec<(usize, ContentQuery)>,
    /// For some outputs, records of imported caches.
    pub(crate) imported: HashMap<u32, Vec<Importable<R>>>,
}

/// Completes a description with what earlier builds and imported caches have.
pub(crate) async fn complete<R: Clone + Send + Sync + 'static>(
    shared: &Shared<R>,
    described: Described<R>,
) -> Vec<ExportVertex<R>> {
    let Described { mut vertices, sources } = described;
    for (at, sources) in sources.into_iter().enumerate() {
        let (below, rest) = vertices.split_at_mut(at);
        let Some(vertex) = rest.first_mut() else { break };
        // A build that was answered from above tells the same as the one that made it.
        for (input, query) in &sources.unread {
            let input = &mut vertex.inputs[*input];
            let outputs = below.get(input.vertex).into_iter().flat_map(|below| &below.outputs);
            let result = outputs.filter(|(output, _)| *output == input.output).find_map(|(_, r)| r.as_ref());
            if input.contents.is_empty()
                && let Some(result) = result.filter(|result| shared.results.is_here(result))
                && let Ok(digest) = guarded(shared.results.content_digest(result, query)).await
            {
                input.contents.extend(import::content(&Part::Query(digest), None));
            }
        }
        for (output, result) in &mut vertex.outputs {
            *result = sources.produced.as_ref().and_then(|produced| produced.output(*output).cloned());
        }
        for key in sources.keys {
            if vertex.outputs.iter().all(|(_, result)| result.is_some()) {
                break;
            }
            // What can't be read is not told.
            let Ok(Some(record)) = shared.keys.get(key.as_bytes()) else { continue };
            let Ok(Opened::Found(produced)) = open(shared, &key, record, false).await else { continue };
            for (output, result) in &mut vertex.outputs {
                *result = result.take().or_else(|| produced.output(*output).cloned());
            }
        }
        for (output, result) in &mut vertex.outputs {
            for (cache, record) in sources.imported.get(output).into_iter().flatten() {
                if result.is_none() {
                    *result = cache.load(*record).await.ok().flatten();
                }
            }
        }
    }
    vertices
}
