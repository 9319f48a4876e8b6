//! From a reference to a digest, a manifest, a config; and from these to a chain of lazy snapshots.

use std::sync::Arc;

use kiln_cache::{BlobRef, LayerBlob, LazyLayer, RecordType, Ref, SnapshotMeta, SnapshotRef};
use kiln_proto::reference::Reference;
use kiln_proto::{pb, platform};
use oci_spec::image::{ImageIndex, ImageManifest};

use super::error::blocking;
use super::manifest::{self, Document};
use super::{Access, ClientStore, ImageError, Images};
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
    /// Whose content store the layers are in; a registry's without.
    store: Option<ClientStore>,
}

/// Where the documents of an image are.
enum Origin<'a> {
    Registry(Repository),
    Client(&'a ClientStore),
}

impl Origin<'_> {
    /// A manifest or index by digest with its media type; that is empty if the document does not say.
    async fn manifest(&self, digest: &str) -> Result<(String, Vec<u8>), ImageError> {
        match self {
            Self::Registry(repository) => {
                let manifest = repository.manifest(digest).await?;
                Ok((manifest.media_type, manifest.bytes))
            }
            Self::Client(store) => {
                let bytes = store.read(digest, MAX_MANIFEST).await?;
                let document: serde_json::Value = serde_json::from_slice(&bytes)
                    .map_err(|error| ImageError::image(digest, format!("it is no manifest: {error}")))?;
                Ok((document["mediaType"].as_str().unwrap_or_default().to_owned(), bytes))
            }
        }
    }

    async fn config(&self, digest: &str, size: u64) -> Result<Vec<u8>, ImageError> {
        match self {
            Self::Registry(repository) => {
                let mut stream = repository.blob(digest, size);
                let mut bytes = Vec::with_capacity(size as usize);
                while let Some(chunk) = stream.chunk().await? {
                    bytes.extend_from_slice(&chunk);
                }
                Ok(bytes)
            }
            Self::Client(store) => store.read(digest, size).await,
        }
    }
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
        self.describe(reference, digest, platform, &Origin::Registry(repository)).await
    }

    /// Finds out what is in a client's content store for `platform`; `reference` names the digest.
    pub async fn resolve_in(
        self: &Arc<Self>,
        store: &ClientStore,
        reference: &Reference,
        platform: &pb::Platform,
    ) -> Result<ResolvedImage, ImageError> {
        let Some(digest) = reference.digest().map(str::to_owned) else {
            return Err(ImageError::image(reference, "an image of a layout is named with its digest"));
        };
        check_kept(&reference.to_string(), "image", &digest)?;
        let mut image = self.describe(reference.clone(), digest, platform, &Origin::Client(store)).await?;
        image.store = Some(store.clone());
        Ok(image)
    }

    async fn describe(
        self: &Arc<Self>,
        reference: Reference,
        digest: String,
        platform: &pb::Platform,
        origin: &Origin<'_>,
    ) -> Result<ResolvedImage, ImageError> {
        let (mut media_type, mut bytes) = self.document(origin, &digest).await?;
        let label = reference.to_string();
        let mut manifest_digest = digest.clone();
        let mut found_platform = None;
        // An index may hold indexes; real ones do not nest deeper than this.
        for _ in 0..4 {
            match manifest::parse(&label, &media_type, &bytes)? {
                Document::Index(index) => {
                    let (child, platform) = select(&reference, &digest, &index, platform)?;
                    found_platform = Some(platform);
                    (media_type, bytes) = self.document(origin, &child).await?;
                    manifest_digest = child;
                }
                Document::Manifest(manifest) => {
                    let config_digest = manifest.config().digest().to_string();
                    check_kept(&label, "config", &config_digest)?;
                    let config = self.config(origin, &config_digest, manifest.config().size()).await?;
                    let layers = layers(&label, &manifest, &config)?;
                    return Ok(ResolvedImage {
                        reference,
                        digest,
                        manifest_digest,
                        config_digest,
                        config,
                        platform: found_platform,
                        layers,
                        store: None,
                    });
                }
            }
        }
        Err(ImageError::image(label, "indexes are nested too deeply"))
    }

    /// The image as a chain of snapshots, which are filled when [`Images::materialize`] is asked. `None`: no layers.
    /// `record_type` is what those are for that are new.
    pub async fn pull(
        self: &Arc<Self>,
        image: &ResolvedImage,
        record_type: RecordType,
    ) -> Result<Ref, ImageError> {
        let this = self.clone();
        let layers = image.layers.clone();
        let (sources, held) = match &image.store {
            None => (vec![image.reference.clone().without_tag_and_digest().to_string()], Vec::new()),
            // The client leaves, and its blobs with it.
            Some(store) => (Vec::new(), self.receive(store, &layers).await?),
        };
        let description = format!("pulled from {}", image.reference);
        blocking(move || {
            let ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
            let chains = manifest::chain_ids(&ids);
            let mut top: Ref = None;
            for (blob, chain_id) in layers.into_iter().zip(chains) {
                let layer = LazyLayer { blob, chain_id, sources: sources.clone() };
                top = Some(this.snapshots.lazy_layer(
                    top.as_ref(),
                    layer,
                    SnapshotMeta::of_type(record_type, description.clone()),
                )?);
            }
            drop(held);
            Ok(top)
        })
        .await
    }

    /// Fetches the layers of a client's image that are not here; all that was here already is held as well.
    async fn receive(
        self: &Arc<Self>,
        store: &ClientStore,
        layers: &[LayerBlob],
    ) -> Result<Vec<Held>, ImageError> {
        let ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let receive = layers.iter().zip(manifest::chain_ids(&ids)).map(async |(layer, chain_id)| {
            if let Some(filled) = self.snapshots.by_chain_id(&chain_id)?.filter(SnapshotRef::is_filled) {
                return Ok(Held::Snapshot(filled));
            }
            let _permit = self.permit().await?;
            store.receive(&self.blobs, layer).await.map(Held::Blob)
        });
        futures::future::try_join_all(receive).await
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

    /// A manifest or index by digest with its media type: from the store, else from where it is.
    async fn document(
        self: &Arc<Self>,
        origin: &Origin<'_>,
        digest: &str,
    ) -> Result<(String, Vec<u8>), ImageError> {
        if let Some(found) = self.stored(digest)? {
            return Ok(found);
        }
        let (media_type, bytes) = origin.manifest(digest).await?;
        self.keep(&media_type, bytes.clone()).await?;
        Ok((media_type, bytes))
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

    /// Forgets what was noted of documents that are no longer in the store. Blocking.
    pub fn forget_gone(&self) -> Result<usize, ImageError> {
        let stored = |digest: &str| Ok(self.blobs.info(digest)?.is_some());
        let tags = self.values.retain(TAGS, &mut |_, digest| match std::str::from_utf8(digest) {
            Ok(digest) => stored(digest),
            Err(_) => Ok(false),
        })?;
        Ok(tags + self.values.retain(TYPES, &mut |digest, _| stored(digest))?)
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
        origin: &Origin<'_>,
        digest: &str,
        size: u64,
    ) -> Result<Vec<u8>, ImageError> {
        if size > MAX_CONFIG {
            return Err(ImageError::image(digest, format!("a config of {size} bytes is too large")));
        }
        if let Some(blob) = self.blobs.get(digest)?
            && let Ok(bytes) = blob.read(MAX_CONFIG)
        {
            return Ok(bytes);
        }
        let bytes = origin.config(digest, size).await?;
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

/// What keeps a layer's files from being collected until its snapshot does.
enum Held {
    Blob(#[expect(dead_code, reason = "held")] BlobRef),
    Snapshot(#[expect(dead_code, reason = "held")] SnapshotRef),
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
            let digest = layer.digest().to_string();
            check_kept(reference, "layer", &digest)?;
            check_kept(reference, "diff id", &diff_id)?;
            Ok(LayerBlob { digest, size: layer.size(), media_type, diff_id })
        })
        .collect()
}

/// The store keeps content by sha256 only, so nothing else could be verified as it comes in.
fn check_kept(reference: &str, what: &str, digest: &str) -> Result<(), ImageError> {
    kiln_proto::reference::check_digest(digest)
        .map_err(|e| ImageError::image(reference, format!("{what} {digest:?}: {e}")))?;
    match digest.starts_with("sha256:") {
        true => Ok(()),
        false => Err(ImageError::image(reference, format!("unsupported: {what} {digest} (only sha256 is)"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::registry::{INDEX_OCI, MANIFEST_OCI};

    const DIGEST: &str = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef";

    fn documents() -> [(&'static str, String); 3] {
        let layer = crate::layer::Compression::Gzip.media_type(true);
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_OCI}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{DIGEST}","size":7}},"layers":[{{"mediaType":"{layer}","digest":"{DIGEST}","size":9}}],"annotations":{{"a":"b"}}}}"#
        );
        let index = format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX_OCI}","manifests":[{{"mediaType":"{MANIFEST_OCI}","digest":"{DIGEST}","size":5,"platform":{{"os":"linux","architecture":"arm","variant":"v7","os.features":["x"]}}}},{{"mediaType":"{MANIFEST_OCI}","digest":"{DIGEST}","size":5}}]}}"#
        );
        let config = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{DIGEST}"]}}}}"#
        );
        [(MANIFEST_OCI, manifest), (INDEX_OCI, index), ("", config)]
    }

    /// Reads bytes as everything that a registry may send, as far as the next request.
    fn read(media_type: &str, bytes: &[u8], config: &[u8]) -> Option<Vec<LayerBlob>> {
        let reference = Reference::parse("docker.io/library/app").ok()?;
        let platform = platform::parse("linux/arm/v7").ok()?;
        match manifest::parse("app", media_type, bytes).ok()? {
            Document::Index(index) => {
                let _ = select(&reference, DIGEST, &index, &platform);
                None
            }
            Document::Manifest(manifest) => layers("app", &manifest, config).ok(),
        }
    }

    #[test]
    fn what_the_store_cannot_keep_is_refused_by_name() {
        let [(media_type, manifest), _, (_, config)] = documents();
        assert_eq!(read(media_type, manifest.as_bytes(), config.as_bytes()).map(|l| l.len()), Some(1));
        let long = format!("sha512:{}", "0".repeat(128));
        let parsed = |text: &str| match manifest::parse("app", media_type, text.as_bytes()) {
            Ok(Document::Manifest(manifest)) => manifest,
            _ => panic!("a manifest"),
        };
        let error = layers("app", &parsed(&manifest.replace(DIGEST, &long)), config.as_bytes());
        assert!(error.expect_err("layer").to_string().contains(&format!("unsupported: layer {long}")));
        let error = layers("app", &parsed(&manifest), config.replace(DIGEST, &long).as_bytes());
        assert!(error.expect_err("diff id").to_string().contains(&format!("unsupported: diff id {long}")));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn damaged_documents_are_errors_or_images_of_checked_digests(
            which in 0usize..2,
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            in_config: bool,
            typed: bool,
        ) {
            let documents = documents();
            let mut bytes = documents[which].1.clone().into_bytes();
            let mut config = documents[2].1.clone().into_bytes();
            for (at, value) in changes {
                let target = if in_config { &mut config } else { &mut bytes };
                let at = at.index(target.len());
                target[at] = value;
            }
            let media_type = if typed { documents[which].0 } else { "text/plain" };
            for layer in read(media_type, &bytes, &config).into_iter().flatten() {
                prop_assert!(check_kept("app", "layer", &layer.digest).is_ok());
                prop_assert!(check_kept("app", "diff id", &layer.diff_id).is_ok());
            }
        }

        #[test]
        fn any_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200), which in 0usize..2) {
            let media_type = [MANIFEST_OCI, INDEX_OCI][which];
            prop_assert!(read(media_type, &bytes, &bytes).is_none());
            let _ = manifest::diff_ids(&bytes);
        }
    }
}
