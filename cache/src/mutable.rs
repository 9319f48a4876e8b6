//! Named directories that are written in place and outlive builds: cache mounts, the local copies of clients'
//! directories, git repositories. Who may use one at the same time as whom is the caller's affair.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use crate::codec;
use crate::error::{Result, StoreError};
use crate::fsx;
use crate::kv::{Batch, Cf, Kv};
use crate::snapshots::RecordType;
use crate::store::Shared;
use crate::values;

/// What a mutable directory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MutableKind {
    /// `RUN --mount=type=cache`.
    CacheMount,
    /// The receiving end of a client's directory.
    Local,
    /// What was fetched of a git remote.
    GitRepository,
}

impl MutableKind {
    pub(crate) fn record_type(self) -> RecordType {
        match self {
            Self::CacheMount => RecordType::CacheMount,
            Self::Local => RecordType::LocalSource,
            Self::GitRepository => RecordType::Regular,
        }
    }
}

/// Makes and finds mutable directories. Cheap to clone.
#[derive(Clone)]
pub struct MutableDirs {
    shared: Arc<Shared>,
}

/// A mutable directory in use; it is not removed while a handle exists.
#[derive(Clone)]
pub struct MutableDir {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    shared: Arc<Shared>,
    id: String,
    record_key: Vec<u8>,
    fs: PathBuf,
    /// Its record is gone: the last handle takes the directory along.
    removed: AtomicBool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Record {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(string, tag = "2")]
    pub(crate) record_type: String,
    #[prost(string, tag = "3")]
    pub(crate) description: String,
    #[prost(int64, tag = "4")]
    pub(crate) created: i64,
    /// The epoch in which its last user let go of it, or [`OPEN`]: what was written then may be torn by a power
    /// cut.
    #[prost(uint64, tag = "5")]
    pub(crate) epoch: u64,
}

/// Epoch of a directory that somebody writes to: never durable.
pub(crate) const OPEN: u64 = u64::MAX;

impl MutableDirs {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The directory with this key, made empty (mode 0755) if there is none. Others may have it open, too.
    pub fn open(&self, kind: MutableKind, key: &str, description: &str) -> Result<MutableDir> {
        let _guard = self.shared.exclusive();
        self.shared.check_open()?;
        self.open_locked(kind, key, description)
    }

    /// The first directory of this key that nobody else has open, made if all are taken.
    pub fn open_alone(&self, kind: MutableKind, key: &str, description: &str) -> Result<MutableDir> {
        let _guard = self.shared.exclusive();
        self.shared.check_open()?;
        for number in 0u32.. {
            let numbered = if number == 0 { key.to_owned() } else { format!("{key}\0{number}") };
            match load(self.shared.kv.as_ref(), &record_key(kind, &numbered))? {
                Some(record) if self.shared.mutable.is_held(&record.id) => {}
                _ => return self.open_locked(kind, &numbered, description),
            }
        }
        Err(StoreError::Invalid(format!("no free directory for {key:?}")))
    }

    /// Forgets the directory with this key. Who has it open keeps it to the end; the next
    /// [`MutableDirs::open`] gives a new one.
    pub fn remove(&self, kind: MutableKind, key: &str) -> Result<()> {
        let _guard = self.shared.exclusive();
        self.shared.check_open()?;
        let record_key = record_key(kind, key);
        let Some(record) = load(self.shared.kv.as_ref(), &record_key)? else { return Ok(()) };
        let mut batch = Batch::new();
        erase(self.shared.kv.as_ref(), &mut batch, &record_key, &record.id)?;
        self.shared.kv.write(batch)?;
        let held = self.shared.mutable.get(&record.id);
        match held {
            Some(inner) => inner.removed.store(true, Ordering::Release),
            None => self.shared.discard(&dir_path(&self.shared.root, &record.id)),
        }
        Ok(())
    }

    fn open_locked(&self, kind: MutableKind, key: &str, description: &str) -> Result<MutableDir> {
        let record_key = record_key(kind, key);
        let known = load(self.shared.kv.as_ref(), &record_key)?;
        let mut record = known.unwrap_or_else(|| Record {
            id: fsx::random_id(),
            record_type: kind.record_type().as_str().to_owned(),
            description: description.to_owned(),
            created: codec::nanos(SystemTime::now()),
            epoch: 0,
        });
        let fs = dir_path(&self.shared.root, &record.id).join("fs");
        if !fs.is_dir() {
            use std::os::unix::fs::PermissionsExt;
            fsx::make_dir(&fs)?;
            std::fs::set_permissions(&fs, std::fs::Permissions::from_mode(0o755))
                .map_err(|e| StoreError::io("set mode of", &fs, e))?;
        }
        record.epoch = OPEN;
        let mut batch = Batch::new();
        batch.put(Cf::Mutable, record_key.as_slice(), codec::encode(&record));
        // The directory is about to change; its size has to be found out again.
        batch.delete(Cf::Values, crate::usage::size_key(&record.id));
        let made = Inner {
            shared: Arc::clone(&self.shared),
            id: record.id.clone(),
            record_key,
            fs,
            removed: AtomicBool::new(false),
        };
        let inner = self.shared.mutable.adopt(&record.id, Arc::new(made));
        self.shared.commit(batch)?;
        Ok(MutableDir { inner })
    }
}

impl MutableDir {
    /// The directory's name in the ledger.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.inner.fs
    }

    /// A small value by name, which goes with the directory.
    pub fn kv(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.inner.shared.kv.get(Cf::Values, &values::key(b'm', &self.inner.id, name))
    }

    /// Sets a small value by name.
    pub fn set_kv(&self, name: &str, value: &[u8]) -> Result<()> {
        self.inner.shared.check_open()?;
        let mut batch = Batch::new();
        batch.put(Cf::Values, values::key(b'm', &self.inner.id, name), value);
        self.inner.shared.kv.write(batch)
    }
}

impl std::fmt::Debug for MutableDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("MutableDir").field(&self.inner.id).finish()
    }
}

impl Inner {
    /// Notes when the directory came to rest. Should it be removed at this moment, the record that this may leave
    /// names a directory that is made again.
    fn rest(&self) -> Result<()> {
        let kv = self.shared.kv.as_ref();
        let Some(mut record) = load(kv, &self.record_key)?.filter(|record| record.id == self.id) else {
            return Ok(());
        };
        record.epoch = self.shared.epochs.stamp();
        let mut batch = Batch::new();
        batch.put(Cf::Mutable, self.record_key.as_slice(), codec::encode(&record));
        self.shared.commit(batch)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.removed.get_mut()
            && !self.shared.mutable.is_held(&self.id)
            && let Err(error) = self.rest()
        {
            tracing::debug!(dir = self.id, %error, "still marked as open");
        }
        self.shared.usage.touch(&self.id);
        self.shared.mutable.release(&self.id);
        if *self.removed.get_mut() {
            self.shared.discard(&dir_path(&self.shared.root, &self.id));
        }
    }
}

pub(crate) fn each(kv: &dyn Kv, mut visit: impl FnMut(&[u8], Record) -> Result<()>) -> Result<()> {
    kv.scan(Cf::Mutable, b"", &mut |key, value| {
        visit(key, codec::decode("mutable directory", key, value)?)?;
        Ok(true)
    })
}

pub(crate) fn load(kv: &dyn Kv, record_key: &[u8]) -> Result<Option<Record>> {
    let found = kv.get(Cf::Mutable, record_key)?;
    found.map(|bytes| codec::decode("mutable directory", record_key, &bytes)).transpose()
}

/// Removes the record and what belongs to it.
pub(crate) fn erase(kv: &dyn Kv, batch: &mut Batch, record_key: &[u8], id: &str) -> Result<()> {
    batch.delete(Cf::Mutable, record_key);
    batch.delete(Cf::Values, crate::usage::size_key(id));
    batch.delete(Cf::Values, crate::usage::usage_key(id));
    kv.scan(Cf::Values, &values::key(b'm', id, ""), &mut |key, _| {
        batch.delete(Cf::Values, key);
        Ok(true)
    })
}

pub(crate) fn dir_path(root: &Path, id: &str) -> PathBuf {
    root.join("mutable").join(id)
}

fn record_key(kind: MutableKind, key: &str) -> Vec<u8> {
    values::key(b'm', kind.record_type().as_str(), key)
}
