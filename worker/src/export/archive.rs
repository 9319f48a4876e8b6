//! The `oci` and `docker` exporters: an image layout, in a tar or in the client's content store.

use std::collections::BTreeMap;
use std::io::{self, Read};

use kiln_proto::reference::Reference;
use serde_json::{Value, json};
use tokio::io::AsyncRead;
use tokio_util::io::SyncIoBridge;

use super::attrs::{Attributes, Kind};
use super::config;
use super::input::ExportInput;
use super::manifest::{Assembled, Document, assemble};
use super::output::{LayoutBlob, Output, OutputError, TarOutput};
use super::{ExportContext, ExportError};
use crate::layer::{Kind as EntryKind, LayerError, TarEntry, TarWriter};

const NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const CREATED: &str = "org.opencontainers.image.created";
/// What the blobs of an image are; none names one of a later kind.
const KINDS: [&str; 4] = ["layer", "config", "manifest", "index"];

/// One file of the layout.
struct Blob {
    kind: &'static str,
    size: u64,
    content: Content,
}

enum Content {
    Bytes(Vec<u8>),
    /// A stored blob; the handle keeps it.
    Blob(kiln_cache::BlobRef),
}

pub(super) async fn export(
    context: &ExportContext,
    attributes: &Attributes,
    input: &ExportInput,
    output: &dyn Output,
) -> Result<BTreeMap<String, String>, ExportError> {
    if attributes.kind == Kind::Docker && input.is_map {
        return Err(ExportError::Input(
            "docker exporter does not currently support exporting manifest lists".to_string(),
        ));
    }
    let names = attributes
        .names
        .iter()
        .map(|name| match Reference::parse(name) {
            Ok(reference) => Ok(reference.with_default_tag()),
            Err(error) => Err(ExportError::Attribute(format!("failed to parse {name}: {error}"))),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let assembled = assemble(context, attributes, input).await?;
    let created = match attributes.epoch {
        Some(epoch) => config::at(epoch),
        None => config::rfc3339(std::time::SystemTime::now()),
    };
    let descriptor = assembled.descriptor(&[(CREATED, &created)])?;
    let mut response = assembled.response(&descriptor)?;
    if !names.is_empty() {
        let joined = names.iter().map(Reference::to_string).collect::<Vec<_>>().join(",");
        response.insert("image.name".to_string(), joined);
    }
    let blobs = blobs(context, &assembled).await?;
    if attributes.into_store {
        store(blobs, output).await?;
        return Ok(response);
    }
    let index = index(&descriptor, &names)?;
    let manifest =
        (attributes.kind == Kind::Docker).then(|| docker_manifest(&assembled, &names)).transpose()?;
    let status = context.access.progress.as_ref().map(|p| p.status("sending tarball", "", 0));
    let tar = output.tar(&response)?;
    let sent = send(tar, move |archive| {
        layout(archive, &blobs, &index, manifest.as_deref()).map_err(LayerError::Write)?;
        Ok(())
    });
    match sent.await {
        // The client kept what it has under this name: that is this image.
        Err(ExportError::Output(error)) if error.already_exists => {}
        other => other?,
    }
    status.into_iter().for_each(kiln_solver::progress::StatusHandle::done);
    Ok(response)
}

/// Runs the blocking writer of an archive against an output, and ends it. What the receiver has to say counts
/// more than the broken pipe that it leaves behind.
pub(super) async fn send(
    output: Box<dyn TarOutput>,
    write: impl FnOnce(
        &mut TarWriter<io::BufWriter<&mut SyncIoBridge<Box<dyn TarOutput>>>>,
    ) -> Result<(), ExportError>
    + Send
    + 'static,
) -> Result<(), ExportError> {
    let mut bridge = SyncIoBridge::new(output);
    let (bridge, result) = tokio::task::spawn_blocking(move || {
        let mut archive = TarWriter::new(io::BufWriter::with_capacity(256 << 10, &mut bridge));
        let result = write(&mut archive).and_then(|()| {
            archive
                .finish()
                .map_err(LayerError::Write)?
                .into_inner()
                .map_err(|e| LayerError::Write(e.into_error()))?;
            Ok(())
        });
        (bridge, result)
    })
    .await?;
    match result {
        Ok(()) => Ok(bridge.into_inner().finish().await?),
        Err(error @ ExportError::Layer(LayerError::Write(_))) => {
            let told: Result<(), OutputError> = bridge.into_inner().finish().await;
            Err(told.err().map_or(error, ExportError::Output))
        }
        Err(error) => Err(error),
    }
}

/// Stores the blobs, each after those that it names. The client itself keeps the index of what it has.
async fn store(blobs: BTreeMap<String, Blob>, output: &dyn Output) -> Result<(), ExportError> {
    let mut blobs: Vec<(String, Blob)> = blobs.into_iter().collect();
    blobs.sort_by_key(|(_, blob)| KINDS.iter().position(|kind| *kind == blob.kind));
    for (digest, Blob { kind, size, content }) in blobs {
        let content: Box<dyn AsyncRead + Send + Unpin> = match &content {
            Content::Bytes(bytes) => Box::new(io::Cursor::new(bytes.clone())),
            Content::Blob(blob) => {
                Box::new(tokio::fs::File::open(blob.path()).await.map_err(LayerError::Read)?)
            }
        };
        output.blob(LayoutBlob { kind, digest, size, content }).await?;
    }
    Ok(())
}

/// All blobs of the image by digest.
async fn blobs(
    context: &ExportContext,
    assembled: &Assembled,
) -> Result<BTreeMap<String, Blob>, ExportError> {
    let [layer_kind, config_kind, manifest_kind, index_kind] = KINDS;
    let bytes = |kind, document: &Document| {
        let content = Content::Bytes(document.bytes.clone());
        (document.digest.clone(), Blob { kind, size: document.bytes.len() as u64, content })
    };
    let mut all = BTreeMap::new();
    for image in &assembled.images {
        for layer in &image.layers {
            let blob = context.images.local_blob(layer, &context.access).await?;
            let file = Blob { kind: layer_kind, size: blob.size(), content: Content::Blob(blob) };
            all.insert(layer.blob.digest.clone(), file);
        }
        all.extend([bytes(config_kind, &image.config), bytes(manifest_kind, &image.manifest)]);
        if let Some(claims) = &image.attestation {
            all.extend(claims.contents().map(|content| bytes(layer_kind, content)));
            all.insert(claims.manifest.digest.clone(), bytes(manifest_kind, &claims.manifest).1);
        }
    }
    all.extend(assembled.index.iter().map(|index| bytes(index_kind, index)));
    Ok(all)
}

fn index(descriptor: &Value, names: &[Reference]) -> Result<Vec<u8>, ExportError> {
    let mut manifests = Vec::new();
    for name in names {
        let mut entry = descriptor.clone();
        let annotations = &mut entry["annotations"];
        annotations[NAME] = json!(name.to_string());
        annotations[REF_NAME] = json!(name.tag().or(name.digest()).unwrap_or_default());
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.sort_keys();
        }
        manifests.push(entry);
    }
    if names.is_empty() {
        manifests.push(descriptor.clone());
    }
    let index = json!({"schemaVersion": 2, "mediaType": crate::registry::INDEX_OCI, "manifests": manifests});
    serde_json::to_vec(&index).map_err(|e| ExportError::Internal(e.to_string()))
}

fn docker_manifest(assembled: &Assembled, names: &[Reference]) -> Result<Vec<u8>, ExportError> {
    let entries: Vec<Value> = assembled
        .images
        .iter()
        .map(|image| {
            let tags: Option<Vec<String>> =
                (!names.is_empty()).then(|| names.iter().map(Reference::familiar).collect());
            json!({
                "Config": blob_path(&image.config.digest),
                "RepoTags": tags,
                "Layers": image.layers.iter().map(|layer| blob_path(&layer.blob.digest)).collect::<Vec<_>>(),
            })
        })
        .collect();
    serde_json::to_vec(&entries).map_err(|e| ExportError::Internal(e.to_string()))
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

fn layout<W: io::Write>(
    archive: &mut TarWriter<W>,
    blobs: &BTreeMap<String, Blob>,
    index: &[u8],
    manifest: Option<&[u8]>,
) -> io::Result<()> {
    for dir in ["blobs/", "blobs/sha256/"] {
        archive.entry(&TarEntry::new(dir.as_bytes(), EntryKind::Dir, 0o755), &mut io::empty())?;
    }
    let mut file = |path: &str, mode: u32, size: u64, content: &mut dyn Read| {
        let mut entry = TarEntry::new(path.as_bytes(), EntryKind::Regular, mode);
        entry.size = size;
        archive.entry(&entry, content)
    };
    for (digest, Blob { size, content, .. }) in blobs {
        let path = blob_path(digest);
        match content {
            Content::Bytes(bytes) => file(&path, 0o444, *size, &mut bytes.as_slice())?,
            Content::Blob(blob) => file(&path, 0o444, *size, &mut std::fs::File::open(blob.path())?)?,
        }
    }
    file("index.json", 0o644, index.len() as u64, &mut &*index)?;
    if let Some(manifest) = manifest {
        file("manifest.json", 0o644, manifest.len() as u64, &mut &*manifest)?;
    }
    let marker = br#"{"imageLayoutVersion":"1.0.0"}"#;
    file("oci-layout", 0o444, marker.len() as u64, &mut &marker[..])
}
