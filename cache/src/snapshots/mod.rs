//! Snapshots: immutable file systems made of layers. A layer is a directory in the form of an
//! overlay's upper directory (a whiteout is a character device 0:0, an opaque directory has the
//! extended attribute `trusted.overlay.opaque=y`, or `user.overlay.opaque=y` without privileges)
//! on top of a parent. A stack is a snapshot made of layers that exist already; it has no
//! directory of its own. This module mounts nothing.

mod opaque;
pub(crate) mod record;

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub use record::{LayerBlob, LazyLayer, RecordType, SnapshotMeta};

use crate::codec;
use crate::error::{Result, StoreError};
use crate::fsx;
use crate::kv::{Batch, Cf};
use crate::scratch::ScratchDir;
use crate::store::Shared;
use record::Record;

/// Makes and finds snapshots. Cheap to clone.
#[derive(Clone)]
pub struct Snapshots {
    shared: Arc<Shared>,
}

/// A directory being filled, to become a layer. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    scratch: ScratchDir,
    fs: PathBuf,
    /// Made when it is first asked for: most layers are written without an overlay.
    work: OnceLock<PathBuf>,
    parent: Option<SnapshotRef>,
}

impl Staged {
    /// The layer's directory: an overlay's upper directory.
    pub fn fs(&self) -> &Path {
        &self.fs
    }

    /// An empty directory beside it for the overlay's own use.
    ///
    /// # Errors
    /// It could not be made.
    pub fn work(&self) -> Result<&Path> {
        if let Some(made) = self.work.get() {
            return Ok(made);
        }
        let dir = self.scratch.path().join("work");
        match std::fs::create_dir(&dir) {
            Ok(()) => {}
            // Another thread was quicker.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(StoreError::io("create directory", &dir, error)),
        }
        Ok(self.work.get_or_init(|| dir))
    }

    /// What the layer will stand on.
    pub fn parent(&self) -> Option<&SnapshotRef> {
        self.parent.as_ref()
    }
}

/// A handle to a snapshot. While one exists, the snapshot and all below it stay.
#[derive(Clone)]
pub struct SnapshotRef {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    shared: Arc<Shared>,
    id: String,
    base: Base,
    meta: SnapshotMeta,
    chain_id: Option<String>,
    filled: AtomicBool,
    /// Held while the record is changed.
    change: Mutex<()>,
}

enum Base {
    Layer(Option<SnapshotRef>),
    Stack(Vec<SnapshotRef>),
}

impl Snapshots {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Starts a layer on `parent`. Its root directory looks like the parent's.
    pub fn stage(&self, parent: Option<&SnapshotRef>) -> Result<Staged> {
        let scratch = ScratchDir::new(&self.shared)?;
        let fs = scratch.path().join("fs");
        std::fs::create_dir(&fs).map_err(|e| StoreError::io("create directory", &fs, e))?;
        copy_root_attributes(parent, &fs)?;
        Ok(Staged { scratch, fs, work: OnceLock::new(), parent: parent.cloned() })
    }

    /// Turns a staged directory into a snapshot. No mount may have it as upper directory any more. What opaque
    /// directories hide of the parent, the snapshot hides name by name.
    pub fn commit(&self, staged: Staged, meta: SnapshotMeta) -> Result<SnapshotRef> {
        let parent = staged.parent.clone();
        if let Some(parent) = &parent {
            opaque::spell_out(&staged.fs, parent)?;
        }
        let id = fsx::random_id();
        let mut record = Record::new(&meta);
        record.bases = parent.iter().map(|parent| parent.id().to_owned()).collect();
        record.filled = true;
        let _guard = self.shared.dependent()?;
        self.install(staged, &id)?;
        record.epoch = self.shared.epochs.stamp();
        self.create(id, record, Base::Layer(parent))
    }

    /// A snapshot of all layers of `inputs`, those of later inputs on top. One input, or several
    /// equal ones, is that input itself.
    pub fn merge(&self, inputs: &[SnapshotRef], meta: SnapshotMeta) -> Result<SnapshotRef> {
        if let [first, rest @ ..] = inputs
            && rest.iter().all(|other| other.id() == first.id())
        {
            return Ok(first.clone());
        }
        let layers: Vec<_> = inputs.iter().flat_map(SnapshotRef::layers).collect();
        self.stack(&layers, meta)
    }

    /// A snapshot of exactly these layers, from bottom to top, each without what is below it. If
    /// one comes twice, the upper place counts.
    pub fn stack(&self, layers: &[SnapshotRef], meta: SnapshotMeta) -> Result<SnapshotRef> {
        if let Some(stack) = layers.iter().find(|layer| layer.is_stack()) {
            return Err(StoreError::Invalid(format!("snapshot {} is a stack, not a layer", stack.id())));
        }
        let mut seen = HashSet::new();
        let mut kept: Vec<_> = layers.iter().rev().filter(|layer| seen.insert(layer.id())).cloned().collect();
        kept.reverse();
        let id = fsx::random_id();
        let mut record = Record::new(&meta);
        record.bases = kept.iter().map(|layer| layer.id().to_owned()).collect();
        record.stack = true;
        let _guard = self.shared.dependent()?;
        record.epoch = self.shared.epochs.stamp();
        self.create(id, record, Base::Stack(kept))
    }

    /// A layer whose files are somewhere else for now. If the chain id is known already, that
    /// snapshot is given, with the new sources added to its own.
    pub fn lazy_layer(
        &self,
        parent: Option<&SnapshotRef>,
        layer: LazyLayer,
        meta: SnapshotMeta,
    ) -> Result<SnapshotRef> {
        let _deciding = lock(&self.shared.chains);
        if let Some(known) = self.by_chain_id(&layer.chain_id)? {
            known.add_sources(layer)?;
            return Ok(known);
        }
        let id = fsx::random_id();
        let mut record = Record::new(&meta);
        record.bases = parent.iter().map(|parent| parent.id().to_owned()).collect();
        record.lazy = Some(layer);
        let _guard = self.shared.dependent()?;
        record.epoch = self.shared.epochs.stamp();
        self.create(id, record, Base::Layer(parent.cloned()))
    }

    /// The snapshot of an image's layer with this OCI chain id.
    pub fn by_chain_id(&self, chain_id: &str) -> Result<Option<SnapshotRef>> {
        match self.shared.kv.get(Cf::Refs, &record::chain_key(chain_id))? {
            Some(id) => self.get(&String::from_utf8_lossy(&id)),
            None => Ok(None),
        }
    }

    /// Gives a lazy layer its files. If somebody else was quicker, `staged` is dropped.
    pub fn fill(&self, layer: &SnapshotRef, staged: Staged) -> Result<()> {
        let inner = &layer.inner;
        let _changing = lock(&inner.change);
        if layer.is_stack() {
            return Err(StoreError::Invalid(format!("snapshot {} is a stack and has no files", layer.id())));
        }
        if layer.is_filled() {
            return Ok(());
        }
        let _guard = self.shared.dependent()?;
        let mut record = layer.load_record()?;
        self.install(staged, layer.id())?;
        record.filled = true;
        record.epoch = self.shared.epochs.stamp();
        let mut batch = Batch::new();
        record.save(&mut batch, layer.id());
        if let Err(error) = self.shared.commit(batch) {
            self.shared.discard(&self.shared.root.join("snapshots").join(layer.id()));
            return Err(error);
        }
        inner.filled.store(true, Ordering::Release);
        Ok(())
    }

    /// A handle to the snapshot with this id, if it still exists.
    pub fn get(&self, id: &str) -> Result<Option<SnapshotRef>> {
        let _guard = self.shared.dependent()?;
        // Bases first, without recursion: chains may be long.
        let mut ready: HashMap<String, SnapshotRef> = HashMap::new();
        let mut pending = vec![(id.to_owned(), None::<Record>)];
        while let Some((id, record)) = pending.pop() {
            if ready.contains_key(&id) {
                continue;
            }
            if let Some(live) = self.live(&id) {
                ready.insert(id, live);
                continue;
            }
            if let Some(record) = record {
                let mut bases = Vec::with_capacity(record.bases.len());
                for base in &record.bases {
                    bases.push(ready.get(base).cloned().ok_or_else(|| missing_base(&id, base))?);
                }
                let base = match record.stack {
                    true => Base::Stack(bases),
                    false => Base::Layer(bases.pop()),
                };
                let made = self.adopt(&id, &record, base);
                ready.insert(id, made);
                continue;
            }
            match Record::load(self.shared.kv.as_ref(), &id)? {
                None if pending.is_empty() => return Ok(None),
                None => return Err(StoreError::NotFound { what: "base snapshot", id }),
                Some(record) => {
                    let bases = record.bases.clone();
                    pending.push((id, Some(record)));
                    pending.extend(bases.into_iter().map(|base| (base, None)));
                }
            }
        }
        Ok(ready.remove(id))
    }

    /// True if the snapshot is there; asking is no use of it.
    pub fn exists(&self, id: &str) -> Result<bool> {
        Ok(Record::load(self.shared.kv.as_ref(), id)?.is_some())
    }

    fn live(&self, id: &str) -> Option<SnapshotRef> {
        Some(SnapshotRef { inner: self.shared.snapshots.get(id)? })
    }

    /// Moves a staged directory to its final place.
    fn install(&self, staged: Staged, id: &str) -> Result<()> {
        // Removing directories may wait for the file system's journal; that is not for a commit.
        if let Some(work) = staged.work.get() {
            self.shared.discard(work);
        }
        staged.scratch.move_to(&self.shared.root.join("snapshots").join(id))
    }

    fn create(&self, id: String, record: Record, base: Base) -> Result<SnapshotRef> {
        let mut batch = Batch::new();
        record.save_new(&mut batch, &id);
        if let Err(error) = self.shared.commit(batch) {
            self.shared.discard(&self.shared.root.join("snapshots").join(&id));
            return Err(error);
        }
        Ok(self.adopt(&id, &record, base))
    }

    /// Makes the handle of a record, or gives the one that another thread made first.
    fn adopt(&self, id: &str, record: &Record, base: Base) -> SnapshotRef {
        let made = Inner {
            shared: Arc::clone(&self.shared),
            id: id.to_owned(),
            base,
            meta: record.meta(),
            chain_id: record.lazy.as_ref().map(|lazy| lazy.chain_id.clone()),
            filled: AtomicBool::new(record.filled),
            change: Mutex::new(()),
        };
        SnapshotRef { inner: self.shared.snapshots.adopt(id, Arc::new(made)) }
    }
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
        self.inner.shared.root.join("snapshots").join(&self.inner.id).join("fs")
    }

    /// What was said about it when it was made.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.inner.meta
    }

    /// The OCI chain id of an image's layer.
    pub fn chain_id(&self) -> Option<&str> {
        self.inner.chain_id.as_deref()
    }

    /// Where the layer comes from, if it was made by [`Snapshots::lazy_layer`].
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

    fn load_record(&self) -> Result<Record> {
        let record = Record::load(self.inner.shared.kv.as_ref(), self.id())?;
        record.ok_or_else(|| StoreError::NotFound { what: "snapshot", id: self.id().to_owned() })
    }

    fn add_sources(&self, layer: LazyLayer) -> Result<()> {
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
        self.shared.usage.touch(&self.id);
        self.shared.snapshots.release(&self.id);
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

fn missing_base(id: &str, base: &str) -> StoreError {
    StoreError::NotFound { what: "base snapshot", id: format!("{base} (of {id})") }
}

fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An overlay shows the attributes of the uppermost layer's root as those of the whole.
fn copy_root_attributes(parent: Option<&SnapshotRef>, dir: &Path) -> Result<()> {
    let fail = |e| StoreError::io("set attributes of", dir, e);
    let top = parent.and_then(SnapshotRef::top_layer).filter(SnapshotRef::is_filled);
    let Some(top) = top else {
        return std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).map_err(fail);
    };
    let source = top.dir();
    let attributes = std::fs::symlink_metadata(&source).map_err(|e| StoreError::io("read", &source, e))?;
    let ours = std::fs::symlink_metadata(dir).map_err(fail)?;
    if (attributes.uid(), attributes.gid()) != (ours.uid(), ours.gid()) {
        std::os::unix::fs::chown(dir, Some(attributes.uid()), Some(attributes.gid())).map_err(fail)?;
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(attributes.mode() & 0o7777)).map_err(fail)
}
