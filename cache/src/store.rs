//! The store as a whole: one root directory, one owner, and what its parts share.
//!
//! ```text
//! lock          held (flock) by the process that owns the root
//! meta/         the key-value database
//! snapshots/ID/fs   one layer each
//! content/sha256/   blobs
//! mutable/ID/fs     cache mounts and local source directories
//! staging/      not yet committed; emptied at start
//! trash/        being removed
//! ```

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::blobs::Blobs;
use crate::contenthash::{self, ContentCache, ContentChange};
use crate::epoch::{self, Epochs};
use crate::error::{Result, StoreError};
use crate::evictions::{self, Eviction};
use crate::keys::KeyStore;
use crate::kv::{Batch, Cf, Kv, RocksKv};
use crate::leases::Leases;
use crate::maintenance::Maintenance;
use crate::mutable::MutableDirs;
use crate::scratch::ScratchDir;
use crate::snapshots::Snapshots;
use crate::usage::UsageTracker;
use crate::values::Values;
use crate::{fsx, sweep};

const SCHEMA_KEY: &[u8] = b"schema";
const SCHEMA: u32 = 2;

/// How to open a store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// How long committed work may stay without a sync to disk, at most. Only a power cut loses it.
    pub sync_interval: Duration,
    /// Of how many snapshots that were removed it is remembered why.
    pub eviction_notes: usize,
    /// Takes the place of the kernel's boot id, for instance where /proc is missing.
    pub boot_id: Option<String>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { sync_interval: Duration::from_secs(20), eviction_notes: 32_768, boot_id: None }
    }
}

/// An open store. Handles taken from it keep the root locked until they are dropped.
pub struct Store {
    shared: Arc<Shared>,
    maintenance: Maintenance,
    keys: Arc<KeyStore>,
}

/// What all parts of the store have in common.
pub(crate) struct Shared {
    pub(crate) root: PathBuf,
    pub(crate) kv: Arc<dyn Kv>,
    pub(crate) epochs: Epochs,
    /// Held shared while a record comes to depend on another, exclusively while one is removed.
    pub(crate) gate: RwLock<()>,
    pub(crate) snapshots: Leases<crate::snapshots::Inner>,
    pub(crate) blobs: Leases<crate::blobs::Inner>,
    pub(crate) mutable: Leases<crate::mutable::Inner>,
    /// Held while it is decided whether a chain id needs a new record.
    pub(crate) chains: Mutex<()>,
    pub(crate) usage: UsageTracker,
    pub(crate) content: ContentCache,
    /// Held shared while a manifest of a content digest is written, exclusively while useless ones are removed.
    pub(crate) manifests: RwLock<()>,
    pub(crate) eviction_notes: usize,
    pub(crate) signal: Arc<crate::maintenance::Signal>,
    closed: AtomicBool,
    lock: File,
}

impl Store {
    /// Opens the store in `root`, which is created if need be. Removes what an earlier owner left
    /// unfinished.
    pub fn open(root: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        fsx::make_private_dir(root)?;
        let root = root.canonicalize().map_err(|e| StoreError::io("resolve", root, e))?;
        let lock = lock(&root)?;
        for dir in ["meta", "snapshots", "content/sha256", "mutable", "staging", "trash"] {
            fsx::make_private_dir(&root.join(dir))?;
        }
        let kv: Arc<dyn Kv> = Arc::new(RocksKv::open(&root.join("meta"))?);
        check_schema(&root, kv.as_ref())?;
        let boot = match options.boot_id {
            Some(boot) => boot,
            None => epoch::boot_id()?,
        };
        let startup = Epochs::start(kv.as_ref(), &boot)?;
        sweep::sweep(&root, kv.as_ref(), &startup)?;
        Epochs::mark_in_use(kv.as_ref(), &boot)?;

        let shared = Arc::new(Shared {
            root,
            kv: Arc::clone(&kv),
            epochs: startup.epochs,
            gate: RwLock::new(()),
            snapshots: Leases::default(),
            blobs: Leases::default(),
            mutable: Leases::default(),
            chains: Mutex::new(()),
            usage: UsageTracker::default(),
            content: ContentCache::default(),
            manifests: RwLock::new(()),
            eviction_notes: options.eviction_notes,
            signal: Arc::default(),
            closed: AtomicBool::new(false),
            lock,
        });
        let maintenance = Maintenance::start(&shared, options.sync_interval)?;
        Ok(Arc::new(Self { shared, maintenance, keys: Arc::new(KeyStore::new(kv)) }))
    }

    /// Tells those who find the store locked that it will soon be free.
    pub fn announce_close(&self) {
        if let Err(error) = note(&self.shared.lock, LEAVING) {
            tracing::debug!(%error, "lock file not written");
        }
    }

    /// Keys of finished steps.
    pub fn keys(&self) -> Arc<KeyStore> {
        Arc::clone(&self.keys)
    }

    /// Layers.
    pub fn snapshots(&self) -> Snapshots {
        Snapshots::new(Arc::clone(&self.shared))
    }

    /// Content by sha256 digest.
    pub fn blobs(&self) -> Blobs {
        Blobs::new(Arc::clone(&self.shared))
    }

    /// Cache mounts and local source directories.
    pub fn mutable(&self) -> MutableDirs {
        MutableDirs::new(Arc::clone(&self.shared))
    }

    /// Small named values: metadata of sources, history.
    pub fn values(&self) -> Values {
        Values::new(Arc::clone(&self.shared))
    }

    /// By which rule a snapshot was removed, as long as that is remembered.
    pub fn eviction(&self, id: &str) -> Result<Option<Eviction>> {
        evictions::find(self.shared.kv.as_ref(), id)
    }

    /// What changed from the content of one digest to that of another, by path; `None` if what one of
    /// them was made of is not known.
    pub fn content_changes(&self, before: &[u8; 32], after: &[u8; 32]) -> Result<Option<Vec<ContentChange>>> {
        contenthash::changes(self.shared.kv.as_ref(), before, after)
    }

    /// Forgets what content digests were made of, except for `wanted` ones and those of the last hour.
    pub fn forget_contents(&self, wanted: &HashSet<[u8; 32]>) -> Result<()> {
        self.shared.check_open()?;
        contenthash::sweep(&self.shared, wanted)
    }

    /// A temporary directory on the same file system.
    pub fn scratch(&self) -> Result<ScratchDir> {
        ScratchDir::new(&self.shared)
    }

    /// The root directory, without symlinks.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Stops background work, syncs, and marks a clean stop. Later commits fail; a second call
    /// does nothing.
    pub fn close(&self) -> Result<()> {
        if self.shared.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.maintenance.stop();
        // Whoever passed the check for `closed` before has written its record once this is ours.
        drop(self.shared.exclusive());
        self.shared.usage.flush(self.shared.kv.as_ref())?;
        self.shared.epochs.advance(self.shared.kv.as_ref(), &self.shared.root, true)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "closing the store");
        }
    }
}

impl Shared {
    pub(crate) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        match self.closed.load(Ordering::SeqCst) {
            true => Err(StoreError::Closed),
            false => Ok(()),
        }
    }

    /// Keeps records from being removed while another is made to depend on them.
    pub(crate) fn dependent(&self) -> Result<std::sync::RwLockReadGuard<'_, ()>> {
        let guard = self.gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.check_open()?;
        Ok(guard)
    }

    pub(crate) fn exclusive(&self) -> std::sync::RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Writes records that carry a stamp, and makes sure that a sync follows.
    pub(crate) fn commit(&self, batch: Batch) -> Result<()> {
        self.kv.write(batch)?;
        // Not earlier: a sync that ended before the write would not have covered it.
        self.signal.dirty();
        Ok(())
    }

    /// Moves a file or directory of the store out of sight; it is removed in the background.
    pub(crate) fn discard(&self, path: &Path) {
        let target = self.root.join("trash").join(fsx::random_id());
        match std::fs::rename(path, &target) {
            Ok(()) => self.signal.trash(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "can't discard"),
        }
    }
}

fn lock(root: &Path) -> Result<File> {
    let path = root.join("lock");
    let fail = |e| StoreError::io("open", &path, e);
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut text = String::new();
            // Without a note nobody can say who it is; the lock counts all the same.
            let _ = file.read_to_string(&mut text);
            let mut words = text.split_whitespace();
            let pid = words.next().and_then(|pid| pid.parse().ok());
            let leaving = words.next() == Some(LEAVING);
            return Err(StoreError::Locked { root: root.to_path_buf(), pid, leaving });
        }
        Err(error) => return Err(StoreError::io("lock", &path, error)),
    }
    // Only so that others can be told who it is: a full disk is no reason to stay out.
    if let Err(error) = note(&file, "") {
        tracing::warn!(path = %path.display(), %error, "lock file not written");
    }
    Ok(file)
}

/// Second word of the lock file's note once its owner is about to close the store.
const LEAVING: &str = "leaving";

fn note(lock: &File, word: &str) -> std::io::Result<()> {
    let text = format!("{} {word}\n", std::process::id());
    lock.set_len(0)?;
    std::os::unix::fs::FileExt::write_all_at(lock, text.as_bytes(), 0)
}

fn check_schema(root: &Path, kv: &dyn Kv) -> Result<()> {
    let found = match kv.get(Cf::Meta, SCHEMA_KEY)? {
        None => None,
        Some(bytes) => Some(u32::from_le_bytes(bytes.try_into().map_err(|_| StoreError::Corrupt {
            what: "schema",
            key: "schema".to_owned(),
            reason: "not 4 bytes".to_owned(),
        })?)),
    };
    match found {
        Some(SCHEMA) => Ok(()),
        Some(found) if found > SCHEMA => {
            Err(StoreError::Schema { root: root.to_path_buf(), found, supported: SCHEMA })
        }
        Some(_) | None => {
            let mut batch = Batch::new();
            if found == Some(1) {
                forget_ops(kv, &mut batch)?;
            }
            batch.put(Cf::Meta, SCHEMA_KEY, SCHEMA.to_le_bytes());
            kv.write_durable(batch)
        }
    }
}

/// Version 1 told the properties of an operation apart by a letter before the digest. They are hints, and soon learned anew.
fn forget_ops(kv: &dyn Kv, batch: &mut Batch) -> Result<()> {
    kv.scan(Cf::Ops, b"", &mut |key, _| {
        batch.delete(Cf::Ops, key);
        Ok(true)
    })
}
