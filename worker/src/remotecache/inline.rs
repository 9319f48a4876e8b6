//! Records in the config of an image: they name the image's own layers by their places.

use std::collections::HashMap;

use kiln_cache::remote::{Builder, ChainResult, Document, LayerResult};
use kiln_cache::{Ref, SnapshotRef};
use kiln_solver::export::ExportVertex;

use super::collect::add_records;
use crate::export::{ExportContext, ExportError};
use crate::image::{BlobOptions, EMPTY_DIFF_ID, LayerContent};

/// The records of an image with these layers as JSON, if there are any. The same result gives the same ones whether it was
/// made or came from such an image.
pub(crate) fn records(
    context: &ExportContext,
    vertices: &[ExportVertex<Ref>],
    layers: &[(&SnapshotRef, &LayerContent)],
    options: BlobOptions,
) -> Result<Option<Vec<u8>>, ExportError> {
    let by_id: HashMap<&str, usize> =
        layers.iter().enumerate().map(|(at, (snapshot, _))| (snapshot.id(), at)).collect();
    let by_diff_id: HashMap<&str, usize> =
        layers.iter().enumerate().map(|(at, (_, layer))| (layer.blob.diff_id.as_str(), at)).collect();
    let place = |layer: &SnapshotRef| match by_id.get(layer.id()) {
        Some(at) => Some(Some(*at)),
        None => {
            let known = context.images.known_layer(layer, options).ok()??;
            match known.blob.diff_id.as_str() {
                EMPTY_DIFF_ID => Some(None),
                diff_id => by_diff_id.get(diff_id).copied().map(Some),
            }
        }
    };
    let chain = |snapshot: &SnapshotRef| {
        let places: Vec<Option<usize>> = snapshot.layers().iter().map(place).collect::<Option<_>>()?;
        Some(places.into_iter().flatten().map(|at| at.to_string()).collect())
    };
    let mut builder = Builder::default();
    // Without times, which come out differently each time.
    add_records(&mut builder, vertices, chain, |_| None);
    let mut document = builder.finish();
    if document.layers.is_empty() {
        return Ok(None);
    }
    let chains: Vec<Vec<i64>> = (0..document.layers.len()).map(|at| places(&document, at)).collect();
    for record in &mut document.records {
        for LayerResult { layer, created_at } in std::mem::take(&mut record.results) {
            let chain =
                usize::try_from(layer).ok().and_then(|at| chains.get(at)).cloned().unwrap_or_default();
            // In the image's own order the uppermost tells all.
            match chain.iter().copied().eq(0..chain.len() as i64) {
                true => record.results.push(LayerResult { layer: chain.len() as i64 - 1, created_at }),
                false => record.chains.push(ChainResult { layers: chain, created_at }),
            }
        }
    }
    let json = serde_json::to_vec(&document.records);
    json.map(Some).map_err(|error| ExportError::Internal(format!("records of a cache: {error}")))
}

/// The places in the image that a layer of the document and those below it have.
fn places(document: &Document, top: usize) -> Vec<i64> {
    let mut chain = Vec::new();
    let mut next = document.layers.get(top);
    while let Some(layer) = next {
        chain.extend(layer.blob.parse::<i64>().ok());
        next = usize::try_from(layer.parent).ok().and_then(|parent| document.layers.get(parent));
    }
    chain.reverse();
    chain
}
