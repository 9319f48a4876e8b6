//! Snapshots: immutable file systems made of layers. A layer is a directory in the form of an
//! overlay's upper directory (a whiteout is a character device 0:0, an opaque directory has the
//! extended attribute `trusted.overlay.opaque=y`, or `user.overlay.opaque=y` without privileges)
//! on top of a parent. A stack is a snapshot made of layers that exist already; it has no
//! directory of its own. This module mounts nothing.

mod handle;
mod opaque;
pub(crate) mod record;

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use handle::Base;
pub(crate) use handle::Inner;
pub use handle::SnapshotRef;
pub use record::{LayerBlob, LazyLayer, RecordType, SnapshotMeta};

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

    /// Ends a snapshot that nothing uses and gives its directory, to make its successor of it. `None` if something
    /// uses it, or if it is anything but one layer with its files and nothing below. What was recorded as its content
    /// goes with it.
    pub fn take_over(&self, id: &str) -> Result<Option<Staged>> {
        let _guard = self.shared.exclusive();
        self.shared.check_open()?;
        let plain = |record: &Record| record.filled && !record.stack && record.bases.is_empty();
        if !Record::load(self.shared.kv.as_ref(), id)?
            .is_some_and(|record| plain(&record) && record.lazy.is_none())
        {
            return Ok(None);
        }
        let (mut batch, mut rubbish) = (Batch::new(), Vec::new());
        if !self.shared.forget_snapshot(id, &mut batch, &mut rubbish)? {
            return Ok(None);
        }
        self.shared.usage.forget(id);
        self.shared.kv.write_freeing(batch)?;
        rubbish.iter().for_each(|path| self.shared.discard(path));
        let scratch = ScratchDir::of(&self.shared, &self.shared.root.join("snapshots").join(id))?;
        let fs = scratch.path().join("fs");
        Ok(Some(Staged { scratch, fs, work: OnceLock::new(), parent: None }))
    }

    /// Turns a staged directory into a snapshot. No mount may have it as upper directory any more. What opaque
    /// directories hide of the parent, the snapshot hides name by name.
    pub fn commit(&self, staged: Staged, meta: SnapshotMeta) -> Result<SnapshotRef> {
        let parent = staged.parent.clone();
        if let Some(parent) = &parent {
            parent.check_recorded()?;
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

    /// A staged directory as a snapshot that nobody is told of: it is there to be looked into, and gone with its last
    /// handle. Nothing that stays can be made of it. As with [`Self::commit`], no mount may have it any more.
    pub fn hold(&self, staged: Staged, meta: &SnapshotMeta) -> SnapshotRef {
        let Staged { scratch, parent, .. } = staged;
        let mut record = Record::new(meta);
        record.filled = true;
        let held = self.inner(&fsx::random_id(), &record, Base::Layer(parent), Some(scratch));
        SnapshotRef { inner: Arc::new(held) }
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
        layers.iter().try_for_each(SnapshotRef::check_recorded)?;
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
        parent.map_or(Ok(()), SnapshotRef::check_recorded)?;
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
        let made = self.inner(id, record, base, None);
        SnapshotRef { inner: self.shared.snapshots.adopt(id, Arc::new(made)) }
    }

    fn inner(&self, id: &str, record: &Record, base: Base, unrecorded: Option<ScratchDir>) -> Inner {
        Inner {
            shared: Arc::clone(&self.shared),
            id: id.to_owned(),
            base,
            meta: record.meta(),
            chain_id: record.lazy.as_ref().map(|lazy| lazy.chain_id.clone()),
            filled: AtomicBool::new(record.filled),
            change: Mutex::new(()),
            unrecorded,
        }
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
