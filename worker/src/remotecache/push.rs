//! Writing a cache: layers, the records, and a manifest that names them.

use std::collections::{BTreeMap, HashMap};

use futures::{StreamExt, TryStreamExt};
use kiln_cache::SnapshotMeta;
use kiln_cache::remote::MEDIA_TYPE;
use kiln_proto::reference::Reference;
use kiln_session::NewBlob;
use kiln_solver::progress::StatusHandle;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{CREATED, Collected, DESCRIPTION, Place, UNCOMPRESSED};
use crate::export::config::rfc3339;
use crate::export::image::{push_bytes, push_layer};
use crate::export::{ExportContext, ExportError, OutputError};
use crate::image::{Access, ClientStore, LayerContent};
use crate::registry::{INDEX_DOCKER, INDEX_OCI, MANIFEST_OCI, Repository};

/// Blobs written at once.
const WRITES: usize = 4;

/// How the manifest looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// OCI rather than Docker media types.
    pub oci_types: bool,
    /// Like an image's, rather than an index of all layers.
    pub image_manifest: bool,
}

/// Where blobs go.
enum Target<'a> {
    Registry { repository: Repository, reference: &'a Reference, name: String },
    Client(&'a ClientStore),
}

/// Writes a cache; answers the entries of the exporter response.
///
/// # Errors
/// What could not be written.
pub async fn write(
    context: &ExportContext,
    place: &Place,
    form: Form,
    collected: &Collected,
) -> Result<BTreeMap<String, String>, ExportError> {
    let status = |id: &str| context.access.progress.as_ref().map(|progress| progress.status(id, "", 0));
    let done = |status: Option<StatusHandle>| status.into_iter().for_each(StatusHandle::done);
    if collected.layers.is_empty() {
        done(status("skipping cache export for empty result"));
        return Ok(BTreeMap::new());
    }
    let target = match place {
        Place::Registry { reference, insecure } => {
            let registry = context.images.registry();
            let repository = registry.repository(reference, context.access.credentials.clone());
            let repository = repository.insecure(*insecure);
            Target::Registry { repository, reference, name: reference.to_string() }
        }
        Place::Client { store, .. } => Target::Client(store),
    };
    // Its parts would show as statuses of their own.
    let quiet = Access { progress: None, ..context.access.clone() };
    let quiet = ExportContext { access: quiet, ..context.clone() };
    let writes: Vec<_> = collected
        .layers
        .iter()
        .map(|(digest, (layer, _))| {
            let (quiet, target) = (&quiet, &target);
            async move {
                let status = status(&format!("writing layer {digest}"));
                write_layer(quiet, target, layer).await?;
                done(status);
                Ok::<(), ExportError>(())
            }
        })
        .collect();
    futures::stream::iter(writes).buffer_unordered(WRITES).try_collect::<Vec<()>>().await?;

    let internal = |error: serde_json::Error| ExportError::Internal(format!("cache manifest: {error}"));
    let config = serde_json::to_vec(&collected.document).map_err(internal)?;
    let config_digest = sha256(&config);
    let written = status(&format!("writing config {config_digest}"));
    write_bytes(&target, &config_digest, &config).await?;
    done(written);

    let mut seen = HashMap::new();
    let layers = collected.document.layers.iter().filter(|layer| seen.insert(&layer.blob, ()).is_none());
    let mut entries: Vec<Value> = layers
        .filter_map(|layer| collected.layers.get(&layer.blob))
        .map(|(layer, meta)| descriptor(form, layer, meta))
        .collect();
    let config = json!({"mediaType": MEDIA_TYPE, "digest": config_digest, "size": config.len()});
    let (kind, media_type) = match form {
        Form { image_manifest: true, .. } => ("image manifest", MANIFEST_OCI),
        Form { oci_types: true, .. } => ("manifest", INDEX_OCI),
        Form { oci_types: false, .. } => ("manifest", INDEX_DOCKER),
    };
    let mut manifest = json!({"schemaVersion": 2, "mediaType": media_type});
    if form.image_manifest {
        manifest["config"] = config;
        manifest["layers"] = entries.into();
    } else {
        entries.push(config);
        manifest["manifests"] = entries.into();
    }
    let bytes = serde_json::to_vec(&manifest).map_err(internal)?;
    let digest = sha256(&bytes);
    let written = status(&format!("writing cache {kind} {digest}"));
    match &target {
        Target::Registry { repository, reference, name } => {
            let tag = reference.tag().unwrap_or(&digest);
            let pushed = repository.push_manifest(tag, media_type, &bytes).await;
            pushed.map_err(|source| ExportError::Push { name: name.clone(), source: Box::new(source) })?;
        }
        Target::Client(_) => write_bytes(&target, &digest, &bytes).await?,
    }
    done(written);
    let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
    Ok(BTreeMap::from([("cache.manifest".to_owned(), descriptor.to_string())]))
}

fn descriptor(form: Form, layer: &LayerContent, meta: &SnapshotMeta) -> Value {
    json!({
        "mediaType": layer.compression.media_type(form.oci_types),
        "digest": layer.blob.digest,
        "size": layer.blob.size,
        "annotations": {
            CREATED: rfc3339(meta.created),
            DESCRIPTION: meta.description,
            UNCOMPRESSED: layer.blob.diff_id,
        },
    })
}

async fn write_layer(
    context: &ExportContext,
    target: &Target<'_>,
    layer: &LayerContent,
) -> Result<(), ExportError> {
    match target {
        Target::Registry { repository, reference, name } => {
            push_layer(context, repository, reference, layer, name).await
        }
        Target::Client(store) => {
            let blob = context.images.local_blob(layer, &context.access).await?;
            let content = tokio::fs::File::open(blob.path()).await?;
            let digest = &layer.blob.digest;
            let reference = format!("layer-{digest}");
            let new = NewBlob { reference: &reference, digest, size: layer.blob.size };
            Ok(store.session().write_blob(store.name(), new, content).await.map_err(OutputError::from)?)
        }
    }
}

async fn write_bytes(target: &Target<'_>, digest: &str, bytes: &[u8]) -> Result<(), ExportError> {
    match target {
        Target::Registry { repository, name, .. } => push_bytes(repository, digest, bytes)
            .await
            .map_err(|source| ExportError::Push { name: name.clone(), source: Box::new(source) }),
        Target::Client(store) => {
            let new = NewBlob { reference: digest, digest, size: bytes.len() as u64 };
            Ok(store.session().write_blob(store.name(), new, bytes).await.map_err(OutputError::from)?)
        }
    }
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}
