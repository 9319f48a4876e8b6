//! From a reference to a digest, a manifest, a config; and from these to a chain of lazy snapshots.

use std::sync::Arc;

use kiln_cache::{LayerBlob, LazyLayer, Ref, SnapshotMeta};
use kiln_proto::reference::Reference;
use kiln_proto::{pb, platform};
use oci_spec::image::{ImageIndex, ImageManifest};

use super::error::blocking;
use super::manifest::{self, Document};
use super::{Access, ImageError, Images};
use crate::layer::media_compression;
use crate::registry::Repository;

/// Configs larger than this are not believed.
const MAX_CONFIG: u64 = 8 << 20;
const MAX_MANIFEST: u64 = 4 << 20;
/// Values: which digest a name had when it was last resolved.
const TAGS: &str = "image-tag";
/// Values: media types of stored manifests, which their bytes need not say.
const TYPES: &str = "manifest-type";

/// Where a tag's meaning is looked up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ResolveMode {
    /// In the registry.
    #[default]
    Default,
    /// In the registry, also if something local would do.
    ForcePull,
    /// In what was resolved before, if there is any such thing.
    PreferLocal,
}

/// An image for one platform. Its layers need not be here.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// The reference with its tag, without the digest unless it was given.
    pub reference: Reference,
    /// Digest that the reference names: of the index, if there is one.
    pub digest: String,
    /// Digest of the platform's manifest.
    pub manifest_digest: String,
    /// Digest of the config.
    pub config_digest: String,
    /// The config as stored.
    pub config: Vec<u8>,
    /// The platform that the index names; `None` without an index.
    pub platform: Option<pb::Platform>,
    /// The layers, bottom first.
    pub layers: Vec<LayerBlob>,
}

impl Images {
    /// Finds out what `reference` means for `platform`: digest, manifest, config.
    pub async fn resolve(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &pb::Platform,
        mode: ResolveMode,
        access: &Access,
    ) -> Result<ResolvedImage, ImageError> {
        let reference = reference.clone().with_default_tag();
        let repository = self.registry.repository(&reference, access.credentials.clone());
        let digest = self.digest(&reference, &repository, mode).await?;
        let (mut media_type, mut bytes) = self.document(&repository, &digest).await?;
        let label = reference.to_string();
        let mut manifest_digest = digest.clone();
        let mut found_platform = None;
        // An index may hold indexes; real ones do not nest deeper than this.
        for _ in 0..4 {
            match manifest::parse(&label, &media_type, &bytes)? {
                Document::Index(index) => {
                    let (child, platform) = select(&reference, &digest, &index, platform)?;
                    found_platform = Some(platform);
                    (media_type, bytes) = self.document(&repository, &child).await?;
                    manifest_digest = child;
                }
                Document::Manifest(manifest) => {
                    let config_digest = manifest.config().digest().to_string();
                    let config = self.config(&repository, &config_digest, manifest.config().size()).await?;
                    let layers = layers(&label, &manifest, &config)?;
                    return Ok(ResolvedImage {
                        reference,
                        digest,
                        manifest_digest,
                        config_digest,
                        config,
                        platform: found_platform,
                        layers,
                    });
                }
            }
        }
        Err(ImageError::image(label, "indexes are nested too deeply"))
    }

    /// The image as a chain of snapshots, which are filled when [`Images::materialize`] is asked. `None`: no layers.
    pub async fn pull(self: &Arc<Self>, image: &ResolvedImage) -> Result<Ref, ImageError> {
        let this = self.clone();
        let layers = image.layers.clone();
        let source = image.reference.clone().without_tag_and_digest().to_string();
        let description = format!("pulled from {}", image.reference);
        blocking(move || {
            let ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
            let chains = manifest::chain_ids(&ids);
            let mut top: Ref = None;
            for (blob, chain_id) in layers.into_iter().zip(chains) {
                let layer = LazyLayer { blob, chain_id, sources: vec![source.clone()] };
                top = Some(this.snapshots.lazy_layer(
                    top.as_ref(),
                    layer,
                    SnapshotMeta::new(description.clone()),
                )?);
            }
            Ok(top)
        })
        .await
    }

    async fn digest(
        self: &Arc<Self>,
        reference: &Reference,
        repository: &Repository,
        mode: ResolveMode,
    ) -> Result<String, ImageError> {
        if let Some(digest) = reference.digest() {
            return Ok(digest.to_string());
        }
        let name = reference.to_string();
        if mode == ResolveMode::PreferLocal
            && let Some(known) = self.values.get(TAGS, &name)?
            && let Ok(known) = String::from_utf8(known)
            && self.stored(&known)?.is_some()
        {
            return Ok(known);
        }
        let tag = reference.manifest_name();
        let digest = match repository.head_manifest(tag).await? {
            Some(head) => head.digest,
            None => {
                let manifest = repository.manifest(tag).await?;
                self.keep(&manifest.media_type, manifest.bytes).await?
            }
        };
        if self.values.get(TAGS, &name)?.as_deref() != Some(digest.as_bytes()) {
            self.values.put(TAGS, &name, digest.as_bytes())?;
        }
        Ok(digest)
    }

    /// A manifest or index by digest with its media type: from the store, else from the registry.
    async fn document(
        self: &Arc<Self>,
        repository: &Repository,
        digest: &str,
    ) -> Result<(String, Vec<u8>), ImageError> {
        if let Some(found) = self.stored(digest)? {
            return Ok(found);
        }
        let manifest = repository.manifest(digest).await?;
        self.keep(&manifest.media_type, manifest.bytes.clone()).await?;
        Ok((manifest.media_type, manifest.bytes))
    }

    fn stored(&self, digest: &str) -> Result<Option<(String, Vec<u8>)>, ImageError> {
        // Only sha256 content is kept here; other digests are asked for each time.
        if !digest.starts_with("sha256:") {
            return Ok(None);
        }
        let (Some(blob), Some(media_type)) = (self.blobs.get(digest)?, self.values.get(TYPES, digest)?)
        else {
            return Ok(None);
        };
        // A damaged file is fetched again rather than reported.
        let Ok(bytes) = blob.read(MAX_MANIFEST) else { return Ok(None) };
        Ok(Some((String::from_utf8_lossy(&media_type).into_owned(), bytes)))
    }

    async fn keep(self: &Arc<Self>, media_type: &str, bytes: Vec<u8>) -> Result<String, ImageError> {
        let this = self.clone();
        let media_type = media_type.to_string();
        blocking(move || {
            let blob = this.blobs.put(&bytes)?;
            this.values.put(TYPES, blob.digest(), media_type.as_bytes())?;
            Ok(blob.digest().to_string())
        })
        .await
    }

    async fn config(
        self: &Arc<Self>,
        repository: &Repository,
        digest: &str,
        size: u64,
    ) -> Result<Vec<u8>, ImageError> {
        if size > MAX_CONFIG {
            return Err(ImageError::image(
                repository.name(),
                format!("config {digest} of {size} bytes is too large"),
            ));
        }
        if let Some(blob) = self.blobs.get(digest)?
            && let Ok(bytes) = blob.read(MAX_CONFIG)
        {
            return Ok(bytes);
        }
        let mut stream = repository.blob(digest, size);
        let mut bytes = Vec::with_capacity(size as usize);
        while let Some(chunk) = stream.chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        let this = self.clone();
        let digest = digest.to_string();
        let kept = bytes.clone();
        blocking(move || {
            let mut writer = this.blobs.writer()?;
            std::io::Write::write_all(&mut writer, &kept)
                .map_err(|e| ImageError::Internal(format!("write image config {digest}: {e}")))?;
            writer.commit(Some(&digest), Some(kept.len() as u64))?;
            Ok(())
        })
        .await?;
        Ok(bytes)
    }
}

/// The manifest of an index that serves a platform best.
fn select(
    reference: &Reference,
    digest: &str,
    index: &ImageIndex,
    wanted: &pb::Platform,
) -> Result<(String, pb::Platform), ImageError> {
    let platforms: Vec<Option<pb::Platform>> =
        index.manifests().iter().map(|entry| entry.platform().as_ref().map(manifest::platform_of)).collect();
    if let Some(best) = platform::select(&platform::normalized(wanted), platforms.iter().map(Option::as_ref))
        && let (Some(entry), Some(Some(found))) = (index.manifests().get(best), platforms.get(best))
    {
        return Ok((entry.digest().to_string(), found.clone()));
    }
    let available: Vec<String> =
        platforms.iter().flatten().map(platform::format).filter(|p| !p.starts_with("unknown")).collect();
    Err(ImageError::NoPlatform {
        reference: reference.to_string(),
        digest: digest.to_string(),
        platform: platform::format(wanted),
        available: if available.is_empty() { "none".to_string() } else { available.join(", ") },
    })
}

fn layers(reference: &str, manifest: &ImageManifest, config: &[u8]) -> Result<Vec<LayerBlob>, ImageError> {
    let diff_ids = manifest::diff_ids(config)
        .map_err(|e| ImageError::image(reference, format!("malformed image config: {e}")))?;
    if diff_ids.len() != manifest.layers().len() {
        return Err(ImageError::image(
            reference,
            format!("manifest has {} layers, config has {}", manifest.layers().len(), diff_ids.len()),
        ));
    }
    manifest
        .layers()
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            let media_type = layer.media_type().to_string();
            if media_compression(&media_type).is_none() {
                return Err(ImageError::image(
                    reference,
                    format!("unsupported: layer of type {media_type:?}"),
                ));
            }
            kiln_proto::reference::check_digest(&diff_id)
                .map_err(|e| ImageError::image(reference, format!("diff id {diff_id:?}: {e}")))?;
            Ok(LayerBlob { digest: layer.digest().to_string(), size: layer.size(), media_type, diff_id })
        })
        .collect()
}
