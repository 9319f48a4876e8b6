//! The ledger: what takes how much room, who uses it, and when it was last used. Sizes are measured
//! when they are first asked for, not when something is committed.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::codec;
use crate::error::{Result, StoreError};
use crate::filter::Filter;
use crate::fsx;
use crate::kv::{Batch, Cf, Kv};
use crate::snapshots::LayerBlob;
use crate::snapshots::record::{self, Record};
use crate::store::{Shared, Store};
use crate::{blobs, mutable, values};

/// One line of a disk usage listing (wire: `UsageRecord`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord {
    /// The snapshot's or mutable directory's id, or a blob's digest.
    pub id: String,
    /// True for cache mounts and local source directories.
    pub mutable: bool,
    /// True while something holds it.
    pub in_use: bool,
    /// Bytes on disk, of this record alone.
    pub size: u64,
    /// What it stands on.
    pub parents: Vec<String>,
    /// When it was made.
    pub created: SystemTime,
    /// When it was last let go; `None` if never.
    pub last_used: Option<SystemTime>,
    /// How often it was let go.
    pub usage_count: u64,
    /// For people.
    pub description: String,
    /// `regular`, `source.local`, …
    pub record_type: String,
    /// Always false: nothing outside the store uses its files.
    pub shared: bool,
}

/// Where a record is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Snapshot,
    Blob,
    /// With the key of its record.
    Mutable(Vec<u8>),
}

pub(crate) struct Entry {
    pub(crate) record: UsageRecord,
    pub(crate) place: Place,
}

/// Uses since the last flush.
#[derive(Default)]
pub(crate) struct UsageTracker {
    touched: Mutex<HashMap<String, Use>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Use {
    #[prost(int64, tag = "1")]
    last: i64,
    #[prost(uint64, tag = "2")]
    count: u64,
}

impl UsageTracker {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Use>> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something was let go just now.
    pub(crate) fn touch(&self, id: &str) {
        let last = codec::nanos(SystemTime::now());
        let mut touched = self.lock();
        let entry = touched.entry(id.to_owned()).or_default();
        entry.last = last;
        entry.count += 1;
    }

    /// Writes down what was noted.
    pub(crate) fn flush(&self, kv: &dyn Kv) -> Result<()> {
        let touched = std::mem::take(&mut *self.lock());
        let mut batch = Batch::new();
        for (id, used) in touched {
            let before = stored(kv, &id)?.unwrap_or_default();
            let sum = Use { last: used.last, count: before.count + used.count };
            batch.put(Cf::Values, usage_key(&id), codec::encode(&sum));
        }
        match batch.is_empty() {
            true => Ok(()),
            false => kv.write(batch),
        }
    }

    pub(crate) fn forget(&self, id: &str) {
        self.lock().remove(id);
    }

    fn of(&self, kv: &dyn Kv, id: &str) -> Result<Use> {
        let mut sum = stored(kv, id)?.unwrap_or_default();
        if let Some(recent) = self.lock().get(id) {
            sum.last = recent.last;
            sum.count += recent.count;
        }
        Ok(sum)
    }
}

fn stored(kv: &dyn Kv, id: &str) -> Result<Option<Use>> {
    let key = usage_key(id);
    kv.get(Cf::Values, &key)?.map(|bytes| codec::decode("usage", &key, &bytes)).transpose()
}

pub(crate) fn usage_key(id: &str) -> Vec<u8> {
    values::key(b'u', id, "")
}

pub(crate) fn size_key(id: &str) -> Vec<u8> {
    values::key(b'z', id, "")
}

impl Store {
    /// What is in the store, as far as it matches one of `filters` (none: all) and was last used
    /// longer than `age` ago. Measures what was not measured before: may take a while.
    pub fn usage(&self, filters: &[String], age: Option<Duration>) -> Result<Vec<UsageRecord>> {
        let filter = Filter::parse(filters)?;
        let limit = age.and_then(|age| SystemTime::now().checked_sub(age));
        let records = self.shared().ledger(true)?.into_iter().map(|entry| entry.record);
        Ok(records
            .filter(|record| filter.matches(record))
            .filter(|record| limit.is_none_or(|limit| record.last_used.unwrap_or(record.created) <= limit))
            .collect())
    }
}

impl Shared {
    /// Every record. Without `measure`, sizes that are not known are 0.
    pub(crate) fn ledger(&self, measure: bool) -> Result<Vec<Entry>> {
        let mut out = Vec::new();
        let mut counted = HashSet::new();
        let mut snapshots = Vec::new();
        record::each(self.kv.as_ref(), |id, record| {
            snapshots.push((id.to_owned(), record));
            Ok(())
        })?;
        for (id, record) in snapshots {
            let size = self.snapshot_size(&id, &record, measure, &mut counted)?;
            out.push(self.snapshot_entry(id, record, size)?);
        }
        let mut dirs = Vec::new();
        mutable::each(self.kv.as_ref(), |key, record| {
            dirs.push((key.to_vec(), record));
            Ok(())
        })?;
        for (key, record) in dirs {
            out.push(self.mutable_entry(key, record, measure)?);
        }
        let mut found = Vec::new();
        self.kv.scan(Cf::Blobs, b"", &mut |key, value| {
            let record: blobs::Record = codec::decode("blob", key, value)?;
            found.push((String::from_utf8_lossy(key).into_owned(), record));
            Ok(true)
        })?;
        for (digest, record) in found.into_iter().filter(|(digest, _)| !counted.contains(digest)) {
            out.push(self.blob_entry(digest, record)?);
        }
        Ok(out)
    }

    fn snapshot_entry(&self, id: String, record: Record, size: u64) -> Result<Entry> {
        let used = self.usage.of(self.kv.as_ref(), &id)?;
        Ok(Entry {
            record: UsageRecord {
                mutable: false,
                in_use: self.snapshots.is_held(&id),
                size,
                created: codec::time(record.created),
                last_used: (used.count > 0).then(|| codec::time(used.last)),
                usage_count: used.count,
                parents: record.bases,
                description: record.description,
                record_type: record.record_type,
                shared: false,
                id,
            },
            place: Place::Snapshot,
        })
    }

    fn mutable_entry(&self, key: Vec<u8>, record: mutable::Record, measure: bool) -> Result<Entry> {
        let used = self.usage.of(self.kv.as_ref(), &record.id)?;
        let in_use = self.mutable.is_held(&record.id);
        // While it is held it changes: then the size of this moment is not kept.
        let dir = mutable::dir_path(&self.root, &record.id);
        let size = self.size_of(&record.id, &dir, measure, !in_use)?;
        Ok(Entry {
            record: UsageRecord {
                mutable: true,
                in_use,
                size,
                created: codec::time(record.created),
                last_used: (used.count > 0).then(|| codec::time(used.last)),
                usage_count: used.count,
                parents: Vec::new(),
                description: record.description,
                record_type: record.record_type,
                shared: false,
                id: record.id,
            },
            place: Place::Mutable(key),
        })
    }

    fn blob_entry(&self, digest: String, record: blobs::Record) -> Result<Entry> {
        let used = self.usage.of(self.kv.as_ref(), &digest)?;
        Ok(Entry {
            record: UsageRecord {
                mutable: false,
                in_use: self.blobs.is_held(&digest),
                size: record.size,
                created: codec::time(record.created),
                last_used: (used.count > 0).then(|| codec::time(used.last)),
                usage_count: used.count,
                parents: Vec::new(),
                description: format!("content {digest}"),
                record_type: "regular".to_owned(),
                shared: false,
                id: digest,
            },
            place: Place::Blob,
        })
    }

    /// A layer's directory and those of its blobs that no other snapshot was charged for.
    fn snapshot_size(
        &self,
        id: &str,
        record: &Record,
        measure: bool,
        counted: &mut HashSet<String>,
    ) -> Result<u64> {
        let mut size = 0;
        if record.filled {
            size += self.size_of(id, &self.root.join("snapshots").join(id), measure, true)?;
        }
        for digest in self.blob_digests(id)? {
            if let Some(blob) = blobs::load(self, &digest)?
                && counted.insert(digest)
            {
                size += blob.size;
            }
        }
        Ok(size)
    }

    /// Digests of all blobs that are forms of a snapshot's layer.
    pub(crate) fn blob_digests(&self, id: &str) -> Result<Vec<String>> {
        let mut digests = Vec::new();
        self.kv.scan(Cf::Values, &record::value_key(id, "blob/"), &mut |key, value| {
            digests.push(codec::decode::<LayerBlob>("layer blob", key, value)?.digest);
            Ok(true)
        })?;
        if let Some(lazy) = Record::load(self.kv.as_ref(), id)?.and_then(|record| record.lazy)
            && !digests.contains(&lazy.blob.digest)
        {
            digests.push(lazy.blob.digest);
        }
        Ok(digests)
    }

    fn size_of(&self, id: &str, dir: &std::path::Path, measure: bool, keep: bool) -> Result<u64> {
        if let Some(bytes) = self.kv.get(Cf::Values, &size_key(id))?
            && let Ok(bytes) = bytes.try_into()
        {
            return Ok(u64::from_le_bytes(bytes));
        }
        if !measure {
            return Ok(0);
        }
        let size = fsx::disk_usage(dir).map_err(|e| StoreError::io("measure", dir, e))?;
        if keep {
            // The record may be removed at this moment; then its size must not stay behind.
            let _guard = self.dependent()?;
            if dir.exists() {
                let mut batch = Batch::new();
                batch.put(Cf::Values, size_key(id), size.to_le_bytes());
                self.kv.write(batch)?;
            }
        }
        Ok(size)
    }
}
