//! From what a build can tell of its results to records and the layers that they name.

use std::collections::{BTreeMap, HashMap, HashSet};

use futures::{StreamExt, TryStreamExt};
use kiln_cache::remote::{Builder, Document, record_digest};
use kiln_cache::{Ref, SnapshotMeta, SnapshotRef};
use kiln_solver::export::ExportVertex;

use crate::export::config::rfc3339;
use crate::export::{ExportContext, ExportError};
use crate::image::{BlobOptions, EMPTY_DIFF_ID, LayerContent};

/// Layers packed at once; each uses several threads for itself.
const PACKING: usize = 4;

/// Of which results the layers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Of the build's own, and what is among them.
    Min,
    /// Of all steps.
    Max,
}

/// Records, and the layers that they name.
#[derive(Debug, Default)]
pub struct Collected {
    pub(super) document: Document,
    /// By their digests.
    pub(super) layers: BTreeMap<String, (LayerContent, SnapshotMeta)>,
}

/// Adds the records of one result: `chain` says which layers' blobs make up what a vertex made, if they shall be named.
pub(super) fn add_records(
    builder: &mut Builder,
    vertices: &[ExportVertex<Ref>],
    mut chain: impl FnMut(&SnapshotRef) -> Option<Vec<String>>,
    created: impl Fn(&SnapshotRef) -> Option<String>,
) {
    let mut records: Vec<HashMap<u32, usize>> = Vec::with_capacity(vertices.len());
    for vertex in vertices {
        let mut own = HashMap::new();
        let inputs: Vec<Vec<(String, usize)>> = vertex
            .inputs
            .iter()
            .map(|input| {
                let below = records.get(input.vertex).and_then(|below| below.get(&input.output));
                let mut links: Vec<_> =
                    below.iter().map(|record| (input.selector.clone(), **record)).collect();
                for (digest, selector) in &input.contents {
                    links.push((selector.clone(), builder.record(*digest, Vec::new())));
                }
                links
            })
            .collect();
        // What has an input by which nobody could find it is not found.
        if let Some(operation) = &vertex.operation
            && inputs.iter().all(|links| !links.is_empty())
        {
            for (output, result) in &vertex.outputs {
                let record = builder.record(record_digest(operation, (*output).into()), inputs.clone());
                own.insert(*output, record);
                // A source is asked anyway, and has its own place to keep what it gives.
                if let Some(Some(snapshot)) = result.as_ref().filter(|_| !inputs.is_empty())
                    && let Some(chain) = chain(snapshot)
                {
                    builder.result(record, chain, created(snapshot));
                }
            }
        }
        records.push(own);
    }
}

/// The layers of a vertex' results that were made or found.
fn layers(vertex: &ExportVertex<Ref>) -> impl Iterator<Item = SnapshotRef> {
    let made = vertex.outputs.iter().filter_map(|(_, result)| result.as_ref()?.as_ref());
    made.flat_map(SnapshotRef::layers)
}

/// Collects what is to be told of several results, packing layers that have no blob yet.
///
/// # Errors
/// A layer could not be had or packed.
pub async fn collect(
    context: &ExportContext,
    results: &[Vec<ExportVertex<Ref>>],
    mode: Mode,
    options: BlobOptions,
) -> Result<Collected, ExportError> {
    let mut wanted: Vec<SnapshotRef> = Vec::new();
    let mut seen = HashSet::new();
    for vertices in results {
        let told = match mode {
            Mode::Min => &vertices[vertices.len().saturating_sub(1)..],
            Mode::Max => vertices.as_slice(),
        };
        for layer in told.iter().filter(|vertex| !vertex.inputs.is_empty()).flat_map(layers) {
            if seen.insert(layer.id().to_owned()) {
                wanted.push(layer);
            }
        }
    }
    let packed: Vec<_> =
        wanted.iter().map(|layer| context.images.layer_content(layer, options, &context.access)).collect();
    let packed: Vec<LayerContent> = futures::stream::iter(packed).buffered(PACKING).try_collect().await?;
    let contents: HashMap<&str, &LayerContent> = wanted.iter().map(SnapshotRef::id).zip(&packed).collect();
    let chain = |snapshot: &SnapshotRef| {
        let layers = snapshot.layers();
        let contents = layers.iter().map(|layer| contents.get(layer.id()).copied());
        let contents: Vec<&LayerContent> = contents.collect::<Option<_>>()?;
        Some(contents.into_iter().filter(|layer| layer.blob.diff_id != EMPTY_DIFF_ID).map(digest).collect())
    };
    let mut builder = Builder::default();
    for vertices in results {
        add_records(&mut builder, vertices, chain, |snapshot| Some(rfc3339(snapshot.meta().created)));
    }
    let document = builder.finish();
    let named: HashSet<&str> = document.layers.iter().map(|layer| layer.blob.as_str()).collect();
    let layers =
        wanted.iter().zip(&packed).filter(|(_, content)| named.contains(content.blob.digest.as_str()));
    let layers =
        layers.map(|(layer, content)| (digest(content), (content.clone(), layer.meta().clone()))).collect();
    Ok(Collected { document, layers })
}

fn digest(layer: &LayerContent) -> String {
    layer.blob.digest.clone()
}
