//! The `image` exporter: an image assembled in the content store, and pushed if asked.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::PoisonError;

use futures::{StreamExt, TryStreamExt};
use kiln_proto::reference::Reference;

use super::attrs::Attributes;
use super::input::ExportInput;
use super::manifest::{Assembled, Document, assemble};
use super::{ExportContext, ExportError};
use crate::image::LayerContent;
use crate::registry::{BlobSource, PushOutcome, RegistryError, Repository};

/// Blobs pushed at once.
const PUSHES: usize = 4;

pub(super) async fn export(
    context: &ExportContext,
    attributes: &Attributes,
    input: &ExportInput,
) -> Result<BTreeMap<String, String>, ExportError> {
    let assembled = assemble(context, attributes, input).await?;
    keep(context, &assembled).await?;
    let names = names(attributes, &assembled.top()?.digest);
    let mut response = assembled.response(&assembled.descriptor(&[])?)?;
    if !names.is_empty() {
        response.insert("image.name".to_string(), names.join(","));
    }
    for name in &names {
        if let Some(progress) = &context.access.progress {
            progress.status(&format!("naming to {name}"), "", 0).done();
        }
    }
    if attributes.push {
        for name in &attributes.names {
            push(context, attributes, &assembled, name).await?;
        }
    }
    Ok(response)
}

/// Names under which the image is known, as given and derived.
fn names(attributes: &Attributes, digest: &str) -> Vec<String> {
    let mut names = Vec::new();
    for name in &attributes.names {
        names.push(name.clone());
        if attributes.name_canonical
            && let Ok(reference) = Reference::parse(name)
        {
            names.push(format!("{}@{digest}", reference.name()));
        }
    }
    if let Some(prefix) = &attributes.dangling_prefix
        && (!attributes.dangling_empty_only || names.is_empty())
    {
        names.push(format!("{prefix}@{digest}"));
    }
    names
}

/// Stores configs and manifests beside the layers, where the content service finds them.
async fn keep(context: &ExportContext, assembled: &Assembled) -> Result<(), ExportError> {
    let blobs = context.store.blobs();
    let documents: Vec<Vec<u8>> = assembled
        .images
        .iter()
        .flat_map(|image| {
            let attested = image.attestation.iter();
            let attested = attested.flat_map(|claims| claims.contents().chain([&claims.manifest]));
            [&image.config, &image.manifest].into_iter().chain(attested)
        })
        .chain(&assembled.index)
        .map(|document| document.bytes.clone())
        .collect();
    tokio::task::spawn_blocking(move || documents.iter().try_for_each(|bytes| blobs.put(bytes).map(drop)))
        .await??;
    Ok(())
}

async fn push(
    context: &ExportContext,
    attributes: &Attributes,
    assembled: &Assembled,
    name: &str,
) -> Result<(), ExportError> {
    let failed =
        |source: RegistryError| ExportError::Push { name: name.to_string(), source: Box::new(source) };
    let reference = Reference::parse(name)
        .map_err(|e| ExportError::Attribute(format!("failed to parse {name}: {e}")))?
        .with_default_tag();
    let repository = context
        .images
        .registry()
        .repository(&reference, context.access.credentials.clone())
        .insecure(attributes.insecure);
    let progress = context.access.progress.as_ref();
    let status = progress.map(|p| p.status("pushing layers", "", 0));
    let mut layers: Vec<&LayerContent> = assembled.images.iter().flat_map(|image| &image.layers).collect();
    layers.sort_by(|a, b| a.blob.digest.cmp(&b.blob.digest));
    layers.dedup_by(|a, b| a.blob.digest == b.blob.digest);
    // Collected first: a closure held across an await would keep the future from being `Send`.
    let pushes: Vec<_> =
        layers.into_iter().map(|layer| push_layer(context, &repository, &reference, layer, name)).collect();
    futures::stream::iter(pushes).buffer_unordered(PUSHES).try_collect::<Vec<()>>().await?;
    status.into_iter().for_each(kiln_solver::progress::StatusHandle::done);
    let top = assembled.top()?;
    let shown = format!("pushing manifest for {}@{}", reference.clone().without_tag_and_digest(), top.digest);
    let shown = match reference.tag() {
        Some(tag) if !attributes.push_by_digest => {
            format!(
                "pushing manifest for {}:{tag}@{}",
                reference.clone().without_tag_and_digest(),
                top.digest
            )
        }
        _ => shown,
    };
    let status = progress.map(|p| p.status(&shown, "", 0));
    for image in &assembled.images {
        let pushed = push_document(&repository, &image.config);
        context.images.in_turn(turn(&reference, &image.config.digest), pushed).await.map_err(failed)?;
        if assembled.index.is_some() {
            let manifest = &image.manifest;
            let pushed =
                repository.push_manifest(&manifest.digest, &manifest.media_type, &manifest.bytes).await;
            pushed.map_err(failed)?;
        }
        if let Some(claims) = &image.attestation {
            for content in claims.contents() {
                let pushed = push_document(&repository, content);
                context.images.in_turn(turn(&reference, &content.digest), pushed).await.map_err(failed)?;
            }
            let manifest = &claims.manifest;
            let pushed =
                repository.push_manifest(&manifest.digest, &manifest.media_type, &manifest.bytes).await;
            pushed.map_err(failed)?;
        }
    }
    let target = match reference.tag() {
        Some(tag) if !attributes.push_by_digest => tag,
        _ => top.digest.as_str(),
    };
    repository.push_manifest(target, &top.media_type, &top.bytes).await.map_err(failed)?;
    status.into_iter().for_each(kiln_solver::progress::StatusHandle::done);
    Ok(())
}

/// Builds that push one blob to one repository at the same time take turns: the later ones find it there.
/// Registries have been seen to lose a blob that arrives twice at once.
fn turn(reference: &Reference, digest: &str) -> String {
    format!("push {}/{}@{digest}", reference.registry_host(), reference.path())
}

async fn push_document(repository: &Repository, document: &Document) -> Result<(), RegistryError> {
    push_bytes(repository, &document.digest, &document.bytes).await
}

pub(crate) async fn push_bytes(
    repository: &Repository,
    digest: &str,
    bytes: &[u8],
) -> Result<(), RegistryError> {
    repository.push_blob(digest, bytes.len() as u64, Some(BlobSource::Bytes(bytes)), &[], &|_| {}).await?;
    Ok(())
}

pub(crate) async fn push_layer(
    context: &ExportContext,
    repository: &Repository,
    reference: &Reference,
    layer: &LayerContent,
    name: &str,
) -> Result<(), ExportError> {
    let failed =
        |source: RegistryError| ExportError::Push { name: name.to_string(), source: Box::new(source) };
    let (digest, size) = (&layer.blob.digest, layer.blob.size);
    let status = context.access.progress.as_ref().map(|p| p.status(digest, "pushing", size as i64));
    let status = Mutex::new(status);
    let sent = |bytes: u64| {
        if let Some(status) = status.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            status.update(bytes as i64);
        }
    };
    let mount_from = layer.mountable(reference.registry_host());
    let path = layer.local.as_ref().map(|blob| blob.path());
    let source = path.as_deref().map(BlobSource::File);
    let pushed = repository.push_blob(digest, size, source, &mount_from, &sent);
    let mut outcome = context.images.in_turn(turn(reference, digest), pushed).await.map_err(failed)?;
    if outcome == PushOutcome::Missing {
        // The layer was never read here, and the target can't take it over from where it is.
        let blob = context.images.local_blob(layer, &context.access).await?;
        let path = blob.path();
        let source = Some(BlobSource::File(&path));
        let pushed = repository.push_blob(digest, size, source, &mount_from, &sent);
        outcome = context.images.in_turn(turn(reference, digest), pushed).await.map_err(failed)?;
    }
    tracing::debug!(%digest, ?outcome, "layer pushed");
    if let Some(status) = status.into_inner().unwrap_or_else(PoisonError::into_inner) {
        status.done();
    }
    if layer.local.is_some() {
        context.images.note_source(digest, &reference.clone().without_tag_and_digest().to_string());
    }
    Ok(())
}
