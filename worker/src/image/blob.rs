//! Layers of snapshots as blobs: found, converted, or packed, once for all who ask.

use std::io;
use std::sync::Arc;

use kiln_cache::{BlobRef, LayerBlob, SnapshotRef};
use kiln_proto::reference::Reference;

use super::error::blocking;
use super::{Access, ImageError, Images, Turns};
use crate::layer::{
    Compression, Compressor, Decompressor, DigestWriter, LayerError, PackOptions, media_compression,
    pack_layer,
};

/// Diff id of an archive without entries: what a step that changed nothing leaves.
pub(crate) const EMPTY_DIFF_ID: &str =
    "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef";

const FORMS: [Compression; 3] = [Compression::Gzip, Compression::Zstd, Compression::Uncompressed];

/// In what form layers are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobOptions {
    /// The form of layers that are packed now.
    pub compression: Compression,
    /// Its level; `None` for the default.
    pub level: Option<i32>,
    /// Existing blobs in another form are converted.
    pub force: bool,
    /// Layers made by steps get no time later than this (seconds since the epoch).
    pub clamp: Option<i64>,
    /// Zstd is not among the media types that will be used.
    pub docker_types: bool,
}

impl BlobOptions {
    /// As they are for this layer.
    fn of(mut self, layer: &SnapshotRef) -> Result<Self, ImageError> {
        if layer.lazy()?.is_some() {
            // What was pulled keeps its times.
            self.clamp = None;
        }
        Ok(self)
    }
}

/// A layer that can be put into an image.
#[derive(Debug, Clone)]
pub struct LayerContent {
    /// The blob; `media_type` is the one under which it was stored or pulled.
    pub blob: LayerBlob,
    /// Its form.
    pub compression: Compression,
    /// Repositories (`docker.io/library/alpine`) that are known to have it.
    pub sources: Vec<String>,
    /// The content, if it is here.
    pub local: Option<BlobRef>,
}

impl LayerContent {
    /// Paths of the repositories at one registry that are known to have the blob.
    pub fn mountable(&self, registry_host: &str) -> Vec<String> {
        let at_host = |source: &String| {
            let reference = Reference::parse(source).ok()?;
            (reference.registry_host() == registry_host).then(|| reference.path().to_string())
        };
        self.sources.iter().filter_map(at_host).collect()
    }
}

/// Label of a blob that lists repositories of one registry which have it.
pub(super) fn source_label(host: &str) -> String {
    format!("containerd.io/distribution.source.{host}")
}

impl Images {
    /// The blob of one layer, packed if there is none yet. The content of a layer that was only pulled by name
    /// need not be here; [`Images::local_blob`] gets it.
    pub async fn layer_content(
        self: &Arc<Self>,
        layer: &SnapshotRef,
        options: BlobOptions,
        access: &Access,
    ) -> Result<LayerContent, ImageError> {
        let options = options.of(layer)?;
        if let Some(found) = self.existing(layer, options)? {
            return Ok(found);
        }
        let make = async {
            match self.existing(layer, options)? {
                Some(found) => Ok(found),
                None => self.make(layer, options, access).await,
            }
        };
        self.in_turn(format!("pack {}/{}", layer.id(), form_key(options)), make).await
    }

    /// The blob of one layer, unless it would have to be packed.
    pub(crate) fn known_layer(
        &self,
        layer: &SnapshotRef,
        options: BlobOptions,
    ) -> Result<Option<LayerContent>, ImageError> {
        self.existing(layer, options.of(layer)?)
    }

    /// Does `work` while no other work with the same key is being done.
    pub(crate) async fn in_turn<T>(&self, key: String, work: impl Future<Output = T>) -> T {
        // Declared first, so that it looks when this turn's own handle is gone, also if the future is dropped.
        let _turn = Turn { turns: &self.turns, key: key.clone() };
        let lock = self.turns.entry(key).or_default().clone();
        let _held = lock.lock().await;
        work.await
    }

    /// The content of a layer as a local file, downloaded if need be.
    pub async fn local_blob(
        self: &Arc<Self>,
        content: &LayerContent,
        access: &Access,
    ) -> Result<BlobRef, ImageError> {
        match &content.local {
            Some(blob) => Ok(blob.clone()),
            None => self.fetch_blob(&content.blob, &content.sources, access).await,
        }
    }

    fn existing(
        &self,
        layer: &SnapshotRef,
        options: BlobOptions,
    ) -> Result<Option<LayerContent>, ImageError> {
        let lazy = layer.lazy()?;
        if options.clamp.is_some() {
            return match layer.blob(&form_key(options))? {
                Some(blob) => self.content(blob, options.compression, Vec::new()),
                None => Ok(None),
            };
        }
        let usable = |form: Compression| {
            let fits = !options.force && (!options.docker_types || form != Compression::Zstd);
            fits || form == options.compression
        };
        let mut forms = FORMS.to_vec();
        forms.sort_by_key(|form| *form != options.compression);
        for form in forms.into_iter().filter(|form| usable(*form)) {
            if let Some(blob) = layer.blob(form.as_str())?
                && let Some(found) = self.content(blob, form, Vec::new())?
            {
                return Ok(Some(found));
            }
        }
        if let Some(lazy) = lazy
            && let Some(form) = media_compression(&lazy.blob.media_type).filter(|form| usable(*form))
        {
            return self.content(lazy.blob, form, lazy.sources);
        }
        Ok(None)
    }

    /// A blob that is here, or that a repository is known to have.
    fn content(
        &self,
        blob: LayerBlob,
        compression: Compression,
        mut sources: Vec<String>,
    ) -> Result<Option<LayerContent>, ImageError> {
        let local = self.blobs.get(&blob.digest)?;
        if local.is_none() && sources.is_empty() {
            return Ok(None);
        }
        let prefix = source_label("");
        for (label, paths) in self.blobs.info(&blob.digest)?.map(|info| info.labels).unwrap_or_default() {
            let Some(host) = label.strip_prefix(&prefix) else { continue };
            let domain = if host == "registry-1.docker.io" { "docker.io" } else { host };
            for path in paths.split(',').filter(|path| !path.is_empty()) {
                let source = format!("{domain}/{path}");
                if !sources.contains(&source) {
                    sources.push(source);
                }
            }
        }
        Ok(Some(LayerContent { blob, compression, sources, local }))
    }

    async fn make(
        self: &Arc<Self>,
        layer: &SnapshotRef,
        options: BlobOptions,
        access: &Access,
    ) -> Result<LayerContent, ImageError> {
        let this = self.clone();
        let layer = layer.clone();
        let lazy = layer.lazy()?;
        if options.clamp.is_none()
            && let Some(original) = self.any_form(&layer)?
        {
            // The uncompressed archive must stay the same: its digest is in configs and chain ids.
            let source = self.local_blob(&original, access).await?;
            return blocking(move || this.convert(&layer, &original.blob, &source, options)).await;
        }
        if lazy.is_some() && !layer.is_filled() {
            return Err(ImageError::Internal(format!(
                "layer {} is neither here nor anywhere known",
                layer.id()
            )));
        }
        blocking(move || this.pack(&layer, options)).await
    }

    /// The layer in whatever form there is, if only the form is wrong.
    fn any_form(&self, layer: &SnapshotRef) -> Result<Option<LayerContent>, ImageError> {
        let any = BlobOptions {
            compression: Compression::Gzip,
            level: None,
            force: false,
            clamp: None,
            docker_types: false,
        };
        self.existing(layer, any)
    }

    fn pack(&self, layer: &SnapshotRef, options: BlobOptions) -> Result<LayerContent, ImageError> {
        let failed = |e: LayerError| ImageError::Layer {
            action: "pack",
            digest: layer.id().to_string(),
            source: Arc::new(e),
        };
        let pack = PackOptions { overlay: true, clamp: options.clamp, prefix: String::new() };
        let writer = self.blobs.writer()?;
        let (writer, stats) =
            pack_layer(&layer.dir(), &pack, options.compression, options.level, writer).map_err(failed)?;
        let local = writer.commit(Some(&stats.digest), Some(stats.size))?;
        self.record(layer, options, local, stats.diff_id)
    }

    fn convert(
        &self,
        layer: &SnapshotRef,
        original: &LayerBlob,
        source: &BlobRef,
        options: BlobOptions,
    ) -> Result<LayerContent, ImageError> {
        let failed = |e: io::Error| ImageError::Layer {
            action: "convert",
            digest: original.digest.clone(),
            source: Arc::new(LayerError::Read(e)),
        };
        let mut archive = DigestWriter::new(Decompressor::new(source.open()?).map_err(failed)?);
        let mut out =
            Compressor::new(self.blobs.writer()?, options.compression, options.level).map_err(failed)?;
        io::copy(&mut archive, &mut out).map_err(failed)?;
        let writer = out.finish().map_err(failed)?;
        let (_, diff_id, _) = archive.finish();
        if diff_id != original.diff_id {
            return Err(ImageError::Mismatch {
                digest: original.digest.clone(),
                what: "diff id",
                expected: original.diff_id.clone(),
                actual: diff_id,
            });
        }
        let local = writer.commit(None, None)?;
        self.record(layer, options, local, diff_id)
    }

    fn record(
        &self,
        layer: &SnapshotRef,
        options: BlobOptions,
        local: BlobRef,
        diff_id: String,
    ) -> Result<LayerContent, ImageError> {
        let media_type = options.compression.media_type(true).to_string();
        let blob = LayerBlob { digest: local.digest().to_string(), size: local.size(), media_type, diff_id };
        layer.set_blob(&form_key(options), &blob)?;
        Ok(LayerContent { blob, compression: options.compression, sources: Vec::new(), local: Some(local) })
    }
}

/// Takes a key off the table when nobody waits for it any more.
struct Turn<'a> {
    turns: &'a Turns,
    key: String,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.remove_if(&self.key, |_, lock| Arc::strong_count(lock) == 1);
    }
}

/// Under which name a layer remembers its blob in one form.
fn form_key(options: BlobOptions) -> String {
    match options.clamp {
        Some(epoch) => format!("{}@{epoch}", options.compression.as_str()),
        None => options.compression.as_str().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use kiln_cache::{Store, StoreOptions};

    use super::*;
    use crate::registry::{Registry, RegistryConfig};

    #[tokio::test]
    async fn turns_leave_nothing_behind() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = Store::open(&dir.path().join("root"), StoreOptions::default()).expect("store");
        let images = Images::new(Registry::new(RegistryConfig::default()), &store);
        assert_eq!(images.in_turn("a".into(), async { 1 }).await, 1);
        assert!(images.turns.is_empty());

        let mut works = Box::pin(images.in_turn("a".into(), std::future::pending::<()>()));
        let mut waits = Box::pin(images.in_turn("a".into(), async {}));
        assert!((&mut works).now_or_never().is_none() && (&mut waits).now_or_never().is_none());
        drop(works);
        assert_eq!(images.turns.len(), 1, "somebody waits");
        assert!((&mut waits).now_or_never().is_some(), "its turn has come");
        drop(waits);
        assert!(images.turns.is_empty());

        let mut works = Box::pin(images.in_turn("a".into(), std::future::pending::<()>()));
        let mut waits = Box::pin(images.in_turn("a".into(), async {}));
        assert!((&mut works).now_or_never().is_none() && (&mut waits).now_or_never().is_none());
        drop(waits);
        drop(works);
        assert!(images.turns.is_empty(), "both were cancelled");
    }
}
