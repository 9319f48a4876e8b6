//! Manifests and indexes: from layers and configs to documents ready to be stored.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};
use kiln_cache::SnapshotRef;
use kiln_proto::reference::Reference;
use kiln_proto::{pb, platform};
use oci_spec::image::{
    Arch, Descriptor, Digest as OciDigest, ImageIndexBuilder, ImageManifestBuilder, MediaType, Os,
    PlatformBuilder,
};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::annotations::{self, Place, annotations_at};
use super::attestation::{Attestation, IN_TOTO, PREDICATE_TYPE, package_url, subject};
use super::attrs::Attributes;
use super::config::{self, LayerFacts};
use super::input::{ExportInput, ExportTarget};
use super::{ExportContext, ExportError};
use crate::image::LayerContent;
use crate::registry::{INDEX_DOCKER, INDEX_OCI, MANIFEST_DOCKER, MANIFEST_OCI};
use crate::remotecache::inline;

const CONFIG_OCI: &str = "application/vnd.oci.image.config.v1+json";
/// A config that says nothing.
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const CONFIG_DOCKER: &str = "application/vnd.docker.container.image.v1+json";
/// Layers packed at once; each uses several threads for itself.
const PACKING: usize = 4;

/// A document with its identity.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) digest: String,
    pub(super) media_type: String,
    pub(super) bytes: Vec<u8>,
}

impl AttestationManifest {
    /// What its manifest names.
    pub(super) fn contents(&self) -> impl Iterator<Item = &Document> {
        self.statements.iter().chain([&self.config])
    }
}

impl Document {
    fn new(media_type: &str, bytes: Vec<u8>) -> Self {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        Self { digest, media_type: media_type.to_string(), bytes }
    }
}

/// One platform's image.
#[derive(Debug, Clone)]
pub(super) struct PlatformImage {
    pub(super) manifest: Document,
    pub(super) config: Document,
    pub(super) platform: pb::Platform,
    pub(super) layers: Vec<LayerContent>,
    /// What is claimed of it: a manifest, its config and its statements.
    pub(super) attestation: Option<AttestationManifest>,
}

/// Statements about one image, and the manifest that holds them.
#[derive(Debug, Clone)]
pub(super) struct AttestationManifest {
    pub(super) manifest: Document,
    pub(super) config: Document,
    pub(super) statements: Vec<Document>,
}

/// A whole image: one manifest, or an index of several.
#[derive(Debug, Clone)]
pub(super) struct Assembled {
    pub(super) images: Vec<PlatformImage>,
    pub(super) index: Option<Document>,
    top_annotations: BTreeMap<String, String>,
}

impl Assembled {
    /// The document that the image's name stands for.
    pub(super) fn top(&self) -> Result<&Document, ExportError> {
        self.index
            .as_ref()
            .or_else(|| self.images.first().map(|image| &image.manifest))
            .ok_or_else(|| ExportError::Input("the result has no platform".to_string()))
    }

    /// Descriptor of the top document with these annotations beside its own.
    pub(super) fn descriptor(&self, more: &[(&str, &str)]) -> Result<Value, ExportError> {
        let top = self.top()?;
        let mut all = self.top_annotations.clone();
        // What was asked for stands.
        for (key, value) in more {
            all.entry(key.to_string()).or_insert_with(|| value.to_string());
        }
        let platform = match (&self.index, self.images.as_slice()) {
            (None, [image]) => Some(&image.platform),
            _ => None,
        };
        sorted(&descriptor(&top.media_type, &top.digest, top.bytes.len() as u64, platform, &all)?)
    }

    /// Entries of the exporter response that all image exporters have.
    pub(super) fn response(&self, descriptor: &Value) -> Result<BTreeMap<String, String>, ExportError> {
        use base64::Engine;
        let mut response = BTreeMap::new();
        response.insert("containerimage.digest".to_string(), self.top()?.digest.clone());
        if let (None, Some(image)) = (&self.index, self.images.first()) {
            response.insert("containerimage.config.digest".to_string(), image.config.digest.clone());
        }
        let encoded = base64::engine::general_purpose::STANDARD.encode(descriptor.to_string());
        response.insert("containerimage.descriptor".to_string(), encoded);
        Ok(response)
    }
}

fn internal(error: impl std::fmt::Display) -> ExportError {
    ExportError::Internal(format!("image manifest: {error}"))
}

/// Turns a result into documents; layers that have no blob yet are packed.
pub(super) async fn assemble(
    context: &ExportContext,
    attributes: &Attributes,
    input: &ExportInput,
) -> Result<Assembled, ExportError> {
    let status = context.access.progress.as_ref().map(|p| p.status("exporting layers", "", 0));
    let mut images = Vec::new();
    for target in &input.targets {
        images.push(assemble_platform(context, attributes, target).await?);
    }
    // Those that are inline-only make no index of what would be a single manifest, unless it is asked for.
    let counts = |attestation: &Attestation| attributes.attestation_inline || !attestation.inline_only;
    let attested = |target: &ExportTarget| target.attestations.iter().any(counts);
    let indexed = input.is_map || input.targets.iter().any(attested);
    if indexed {
        for (image, target) in images.iter_mut().zip(&input.targets) {
            image.attestation = attestation_manifest(context, attributes, image, target)?;
        }
    }
    status.into_iter().for_each(kiln_solver::progress::StatusHandle::done);
    let platforms: Vec<pb::Platform> = images.iter().map(|image| image.platform.clone()).collect();
    annotations::check(&attributes.annotations, indexed, &platforms)?;
    let at =
        |place, platform: Option<&pb::Platform>| annotations_at(&attributes.annotations, place, platform);
    if !indexed {
        let top_annotations = at(Place::ManifestDescriptor, platforms.first());
        let out = Assembled { images, index: None, top_annotations };
        announce(context, &out);
        return Ok(out);
    }
    let media_type = if attributes.oci_types { INDEX_OCI } else { INDEX_DOCKER };
    let mut entries = images
        .iter()
        .map(|image| {
            let annotations = at(Place::ManifestDescriptor, Some(&image.platform));
            let manifest = &image.manifest;
            let size = manifest.bytes.len() as u64;
            descriptor(&manifest.media_type, &manifest.digest, size, Some(&image.platform), &annotations)
        })
        .collect::<Result<Vec<_>, _>>()?;
    for image in &images {
        let Some(AttestationManifest { manifest, .. }) = &image.attestation else { continue };
        let unknown = || "unknown".to_string();
        let platform = pb::Platform { os: unknown(), architecture: unknown(), ..pb::Platform::default() };
        let annotations = BTreeMap::from([
            ("vnd.docker.reference.digest".to_string(), image.manifest.digest.clone()),
            ("vnd.docker.reference.type".to_string(), "attestation-manifest".to_string()),
        ]);
        let size = manifest.bytes.len() as u64;
        let entry = descriptor(&manifest.media_type, &manifest.digest, size, Some(&platform), &annotations)?;
        entries.push(entry);
    }
    let mut index = ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::from(media_type))
        .manifests(entries);
    let annotations = at(Place::Index, None);
    if !annotations.is_empty() {
        index = index.annotations(annotations.into_iter().collect::<std::collections::HashMap<_, _>>());
    }
    let index = Document::new(media_type, pretty(&index.build().map_err(internal)?)?);
    let out = Assembled { images, index: Some(index), top_annotations: at(Place::IndexDescriptor, None) };
    announce(context, &out);
    Ok(out)
}

async fn assemble_platform(
    context: &ExportContext,
    attributes: &Attributes,
    target: &ExportTarget,
) -> Result<PlatformImage, ExportError> {
    let snapshots: Vec<SnapshotRef> = target.result.iter().flat_map(SnapshotRef::layers).collect();
    let options = attributes.blob_options();
    let packed: Vec<_> =
        snapshots.iter().map(|layer| context.images.layer_content(layer, options, &context.access)).collect();
    let contents: Vec<LayerContent> = futures::stream::iter(packed).buffered(PACKING).try_collect().await?;
    let facts: Vec<LayerFacts> = snapshots
        .iter()
        .zip(&contents)
        .map(|(snapshot, content)| LayerFacts {
            diff_id: content.blob.diff_id.clone(),
            created: snapshot.meta().created,
            description: snapshot.meta().description.clone(),
        })
        .collect();
    let base_history = config::history_len(target.base_config.as_deref());
    let patched = config::patch(
        target.config.as_deref(),
        base_history,
        target.platform.as_ref(),
        &facts,
        attributes.epoch,
    )?;
    let mut config = patched.bytes;
    if let Some(cache) = &target.cache {
        let in_image = snapshots.iter().zip(&contents).zip(&patched.kept).filter(|(_, kept)| **kept);
        let in_image: Vec<_> = in_image.map(|((snapshot, layer), _)| (snapshot, layer)).collect();
        if let Some(records) = inline::records(context, cache, &in_image, options)? {
            config = config::with_cache(&config, &records)?;
        }
    }
    let layers: Vec<LayerContent> =
        contents.into_iter().zip(&patched.kept).filter(|(_, kept)| **kept).map(|(layer, _)| layer).collect();
    let oci = attributes.oci_types;
    let (manifest_type, config_type) =
        if oci { (MANIFEST_OCI, CONFIG_OCI) } else { (MANIFEST_DOCKER, CONFIG_DOCKER) };
    let config = Document::new(config_type, config);
    let none = BTreeMap::new();
    let entries = layers
        .iter()
        .map(|layer| {
            let media_type = layer.compression.media_type(oci);
            descriptor(media_type, &layer.blob.digest, layer.blob.size, None, &none)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let platform = match &target.platform {
        Some(platform) => platform.clone(),
        None => platform::normalized(&patched.platform),
    };
    let mut manifest = ImageManifestBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::from(manifest_type))
        .config(descriptor(config_type, &config.digest, config.bytes.len() as u64, None, &none)?)
        .layers(entries);
    let annotations = annotations_at(&attributes.annotations, Place::Manifest, Some(&platform));
    if !annotations.is_empty() {
        manifest = manifest.annotations(annotations.into_iter().collect::<std::collections::HashMap<_, _>>());
    }
    let manifest = Document::new(manifest_type, pretty(&manifest.build().map_err(internal)?)?);
    Ok(PlatformImage { manifest, config, platform, layers, attestation: None })
}

/// The manifest of all that is claimed of an image.
fn attestation_manifest(
    context: &ExportContext,
    attributes: &Attributes,
    image: &PlatformImage,
    target: &ExportTarget,
) -> Result<Option<AttestationManifest>, ExportError> {
    if target.attestations.is_empty() {
        return Ok(None);
    }
    if !attributes.oci_types {
        return Err(ExportError::Input(
            "cannot export attestations with \"oci-mediatypes=false\"".to_string(),
        ));
    }
    let mut subjects = Vec::new();
    for name in &attributes.names {
        let name = Reference::parse(name)
            .map_err(|error| ExportError::Attribute(format!("failed to parse {name}: {error}")))?;
        subjects.push(subject(&package_url(&name, Some(&image.platform)), &image.manifest.digest));
    }
    let (mut statements, mut layers) = (Vec::new(), Vec::new());
    for attestation in &target.attestations {
        let statement = attestation.statement(&subjects, &context.images, attributes.blob_options())?;
        let bytes = serde_json::to_vec(&statement).map_err(internal)?;
        let statement = Document::new(IN_TOTO, bytes);
        layers.push(json!({
            "mediaType": IN_TOTO,
            "digest": statement.digest,
            "size": statement.bytes.len(),
            "annotations": {PREDICATE_TYPE: attestation.predicate_type},
        }));
        statements.push(statement);
    }
    let mut manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST_OCI});
    let config = if attributes.oci_artifact {
        let config = Document::new(EMPTY, b"{}".to_vec());
        manifest["artifactType"] = "application/vnd.docker.attestation.manifest.v1+json".into();
        manifest["config"] = json!({"mediaType": EMPTY, "digest": config.digest, "size": 2, "data": "e30="});
        config
    } else {
        let diff_ids: Vec<&str> = statements.iter().map(|statement| statement.digest.as_str()).collect();
        let rootfs = json!({"type": "layers", "diff_ids": diff_ids});
        let config = json!({"architecture": "unknown", "os": "unknown", "config": {}, "rootfs": rootfs});
        let config = Document::new(CONFIG_OCI, serde_json::to_vec(&config).map_err(internal)?);
        manifest["config"] =
            json!({"mediaType": CONFIG_OCI, "digest": config.digest, "size": config.bytes.len()});
        config
    };
    manifest["layers"] = layers.into();
    if attributes.oci_artifact {
        let Document { digest, media_type, bytes } = &image.manifest;
        let size = bytes.len() as u64;
        let subject = descriptor(media_type, digest, size, None, &BTreeMap::new())?;
        manifest["subject"] = sorted(&subject)?;
    }
    let manifest = Document::new(MANIFEST_OCI, serde_json::to_vec_pretty(&manifest).map_err(internal)?);
    Ok(Some(AttestationManifest { manifest, config, statements }))
}

fn announce(context: &ExportContext, assembled: &Assembled) {
    let Some(progress) = &context.access.progress else { return };
    for image in &assembled.images {
        progress.status(&format!("exporting manifest {}", image.manifest.digest), "", 0).done();
        progress.status(&format!("exporting config {}", image.config.digest), "", 0).done();
        if let Some(AttestationManifest { manifest, .. }) = &image.attestation {
            progress.status(&format!("exporting attestation manifest {}", manifest.digest), "", 0).done();
        }
    }
    if let Some(index) = &assembled.index {
        progress.status(&format!("exporting manifest list {}", index.digest), "", 0).done();
    }
}

fn descriptor(
    media_type: &str,
    digest: &str,
    size: u64,
    platform: Option<&pb::Platform>,
    annotations: &BTreeMap<String, String>,
) -> Result<Descriptor, ExportError> {
    let digest = OciDigest::try_from(digest).map_err(internal)?;
    let mut out = Descriptor::new(MediaType::from(media_type), size, digest);
    if let Some(platform) = platform {
        let mut builder = PlatformBuilder::default()
            .architecture(Arch::from(platform.architecture.as_str()))
            .os(Os::from(platform.os.as_str()));
        if !platform.variant.is_empty() {
            builder = builder.variant(platform.variant.clone());
        }
        if !platform.os_version.is_empty() {
            builder = builder.os_version(platform.os_version.clone());
        }
        out.set_platform(Some(builder.build().map_err(internal)?));
    }
    if !annotations.is_empty() {
        out.set_annotations(Some(annotations.clone().into_iter().collect()));
    }
    Ok(out)
}

/// As JSON whose annotations are in order: the types keep them in hash maps.
pub(super) fn sorted(document: &impl Serialize) -> Result<Value, ExportError> {
    let mut value = serde_json::to_value(document).map_err(internal)?;
    sort_annotations(&mut value);
    if let Some(entries) = value.get_mut("manifests").and_then(Value::as_array_mut) {
        entries.iter_mut().for_each(sort_annotations);
    }
    Ok(value)
}

fn sort_annotations(value: &mut Value) {
    if let Some(annotations) = value.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.sort_keys();
    }
}

fn pretty(document: &impl Serialize) -> Result<Vec<u8>, ExportError> {
    serde_json::to_vec_pretty(&sorted(document)?).map_err(internal)
}
