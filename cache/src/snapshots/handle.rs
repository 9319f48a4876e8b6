//! Handles to snapshots: what is known of one, and what keeps it and all below it from being collected.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::lock;
use super::record::{self, LayerBlob, LazyLayer, Record, SnapshotMeta};
use crate::codec;
use crate::error::{Result, StoreError};
use crate::kv::{Batch, Cf};
use crate::scratch::ScratchDir;
use crate::store::Shared;

/// A handle to a snapshot. While one exists, the snapshot and all below it stay.
#[derive(Clone)]
pub struct SnapshotRef {
    pub(super) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(super) shared: Arc<Shared>,
    pub(super) id: String,
    pub(super) base: Base,
    pub(super) meta: SnapshotMeta,
    pub(super) chain_id: Option<String>,
    pub(super) filled: AtomicBool,
    /// Held while the record is changed.
    pub(super) change: Mutex<()>,
    /// Where its files are, if no record tells of it: they go with it.
    pub(super) unrecorded: Option<ScratchDir>,
}

pub(super) enum Base {
    Layer(Option<SnapshotRef>),
    Stack(Vec<SnapshotRef>),
}

impl SnapshotRef {
    /// The snapshot's name: 25 characters of 0-9 and a-z.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// What a layer stands on; `None` at the bottom, and for a stack.
    pub fn parent(&self) -> Option<SnapshotRef> {
        match &self.inner.base {
            Base::Layer(parent) => parent.clone(),
            Base::Stack(_) => None,
        }
    }

    /// All layers, from bottom to top; each has a directory of its own once materialized.
    pub fn layers(&self) -> Vec<SnapshotRef> {
        let mut out = Vec::new();
        let mut next = Some(self.clone());
        while let Some(current) = next.take() {
            match &current.inner.base {
                Base::Stack(layers) => out.extend(layers.iter().rev().cloned()),
                Base::Layer(parent) => {
                    next = parent.clone();
                    out.push(current);
                }
            }
        }
        // A parent that is a stack may hold a layer that was put on top of it again.
        let mut seen = HashSet::new();
        out.retain(|layer| seen.insert(layer.inner.id.clone()));
        out.reverse();
        out
    }

    /// The uppermost layer; a stack of nothing has none.
    pub fn top_layer(&self) -> Option<SnapshotRef> {
        match &self.inner.base {
            Base::Layer(_) => Some(self.clone()),
            Base::Stack(layers) => layers.last().cloned(),
        }
    }

    /// True if the snapshot consists of other snapshots' layers only.
    pub fn is_stack(&self) -> bool {
        matches!(self.inner.base, Base::Stack(_))
    }

    /// The directory of the top layer alone. A stack has none, a lazy layer not yet.
    pub fn dir(&self) -> PathBuf {
        match &self.inner.unrecorded {
            Some(scratch) => scratch.path().join("fs"),
            None => self.inner.shared.root.join("snapshots").join(&self.inner.id).join("fs"),
        }
    }

    /// What was said about it when it was made.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.inner.meta
    }

    /// The OCI chain id of an image's layer.
    pub fn chain_id(&self) -> Option<&str> {
        self.inner.chain_id.as_deref()
    }

    /// Where the layer comes from, if it was made by [`super::Snapshots::lazy_layer`].
    pub fn lazy(&self) -> Result<Option<LazyLayer>> {
        match self.inner.chain_id {
            None => Ok(None),
            Some(_) => Ok(self.load_record()?.lazy),
        }
    }

    /// True if the files of this layer are here; for a stack, those of all its layers.
    pub fn is_filled(&self) -> bool {
        match &self.inner.base {
            Base::Layer(_) => self.inner.filled.load(Ordering::Acquire),
            Base::Stack(layers) => layers.iter().all(SnapshotRef::is_filled),
        }
    }

    /// True if the files of all layers, down to the bottom, are here.
    pub fn is_materialized(&self) -> bool {
        self.layers().iter().all(SnapshotRef::is_filled)
    }

    /// The layer as a blob in one compression (`gzip`, `zstd`, `uncompressed`, …), if it was made
    /// or pulled in that form. Whether the blob is in the content store is another question.
    pub fn blob(&self, compression: &str) -> Result<Option<LayerBlob>> {
        let key = record::value_key(self.id(), &format!("blob/{compression}"));
        let found = self.inner.shared.kv.get(Cf::Values, &key)?;
        found.map(|bytes| codec::decode("layer blob", &key, &bytes)).transpose()
    }

    /// Notes the layer's blob in one compression. The blob stays as long as the snapshot.
    pub fn set_blob(&self, compression: &str, blob: &LayerBlob) -> Result<()> {
        let _guard = self.inner.shared.dependent()?;
        let mut batch = Batch::new();
        batch.put(
            Cf::Values,
            record::value_key(self.id(), &format!("blob/{compression}")),
            codec::encode(blob),
        );
        batch.put(Cf::Refs, record::blob_user_key(&blob.digest, self.id()), []);
        self.inner.shared.kv.write(batch)
    }

    /// A small value by name, which goes with the snapshot.
    pub fn kv(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.inner.shared.kv.get(Cf::Values, &record::value_key(self.id(), &format!("kv/{name}")))
    }

    /// Sets a small value by name.
    pub fn set_kv(&self, name: &str, value: &[u8]) -> Result<()> {
        self.inner.shared.check_open()?;
        let mut batch = Batch::new();
        batch.put(Cf::Values, record::value_key(self.id(), &format!("kv/{name}")), value);
        self.inner.shared.kv.write(batch)
    }

    /// To be called when other layers got links to its files: its size in the ledger is found out anew, so that
    /// they are not counted twice.
    pub fn remeasure(&self) -> Result<()> {
        self.inner.shared.check_open()?;
        let mut batch = Batch::new();
        batch.delete(Cf::Values, crate::usage::size_key(self.id()));
        self.inner.shared.kv.write(batch)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// Refuses what would stand on a snapshot that is about to go.
    pub(super) fn check_recorded(&self) -> Result<()> {
        match self.inner.unrecorded {
            Some(_) => {
                Err(StoreError::Invalid(format!("snapshot {} is only there to be looked into", self.id())))
            }
            None => Ok(()),
        }
    }

    pub(super) fn load_record(&self) -> Result<Record> {
        let record = Record::load(self.inner.shared.kv.as_ref(), self.id())?;
        record.ok_or_else(|| StoreError::NotFound { what: "snapshot", id: self.id().to_owned() })
    }

    pub(super) fn add_sources(&self, layer: LazyLayer) -> Result<()> {
        let _changing = lock(&self.inner.change);
        let mut record = self.load_record()?;
        let Some(lazy) = &mut record.lazy else { return Ok(()) };
        let mut batch = Batch::new();
        if lazy.blob.digest != layer.blob.digest {
            // Two images promise the same files by different blobs. An image may promise what it does not
            // hold, so before anything was unpacked the one that is asked for now has its say.
            if self.is_filled() {
                return Ok(());
            }
            batch.delete(Cf::Refs, record::blob_user_key(&lazy.blob.digest, self.id()));
            *lazy = layer;
        } else {
            let before = lazy.sources.len();
            for source in layer.sources {
                if !lazy.sources.contains(&source) {
                    lazy.sources.push(source);
                }
            }
            if lazy.sources.len() == before {
                return Ok(());
            }
        }
        self.inner.shared.check_open()?;
        record.save(&mut batch, self.id());
        self.inner.shared.kv.write(batch)
    }
}

impl PartialEq for SnapshotRef {
    fn eq(&self, other: &Self) -> bool {
        self.inner.id == other.inner.id
    }
}

impl Eq for SnapshotRef {}

impl std::fmt::Debug for SnapshotRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SnapshotRef").field(&self.inner.id).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.unrecorded.is_none() {
            self.shared.usage.touch(&self.id);
            self.shared.snapshots.release(&self.id);
        }
        // The last handle to a long chain must not drop its parents one inside the other.
        let mut pending = take_bases(&mut self.base);
        while let Some(base) = pending.pop() {
            if let Some(mut inner) = Arc::into_inner(base.inner) {
                pending.append(&mut take_bases(&mut inner.base));
            }
        }
    }
}

fn take_bases(base: &mut Base) -> Vec<SnapshotRef> {
    match base {
        Base::Layer(parent) => parent.take().into_iter().collect(),
        Base::Stack(layers) => std::mem::take(layers),
    }
}
