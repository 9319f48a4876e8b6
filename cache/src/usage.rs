//! The ledger: what takes how much room, who uses it, and when it was last used. Every byte below the root is in
//! one record and counts once, also where several records hold the same blob or links to the same file. Sizes are
//! measured when they are first asked for, not when something is committed.

use std::collections::{HashMap, HashSet, hash_map};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::codec;
use crate::error::{Result, StoreError};
use crate::filter::Filter;
use crate::fsx::{self, DiskUsage};
use crate::kv::{Batch, Cf, Kv};
use crate::snapshots::record::{self, Record};
use crate::snapshots::{LayerBlob, RecordType};
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
    /// Bytes on disk, of this record alone. What several hold is in the size of one of them.
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
    /// The store's own; never removed.
    Store,
}

/// The type of records that stand for what the store needs for itself.
pub const STORE_RECORD: &str = "kiln.store";

/// What more than one record may hold; its bytes are free when none does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    /// A file with several names.
    Inode(u64),
    /// A blob by digest.
    Blob(String),
}

pub(crate) struct Entry {
    pub(crate) record: UsageRecord,
    pub(crate) place: Place,
    /// Bytes that nothing else holds.
    pub(crate) own: u64,
    /// What other records may hold, too, with its bytes.
    pub(crate) parts: Vec<(Part, u64)>,
}

/// Uses since the last flush.
#[derive(Default)]
pub(crate) struct UsageTracker {
    touched: Mutex<HashMap<String, Use>>,
    /// Held while notes are written: of what is removed meanwhile none must be written after its removal.
    writing: Mutex<()>,
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

    /// Writes down what was noted; what can't be written stays noted.
    pub(crate) fn flush(&self, kv: &dyn Kv) -> Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = self.lock().clone();
        let mut batch = Batch::new();
        for (id, used) in &noted {
            let before = stored(kv, id)?.unwrap_or_default();
            let sum = Use { last: used.last, count: before.count + used.count };
            batch.put(Cf::Values, usage_key(id), codec::encode(&sum));
        }
        if batch.is_empty() {
            return Ok(());
        }
        kv.write(batch)?;
        let mut touched = self.lock();
        for (id, written) in noted {
            if let hash_map::Entry::Occupied(mut entry) = touched.entry(id) {
                match entry.get().count == written.count {
                    true => drop(entry.remove()),
                    false => entry.get_mut().count -= written.count,
                }
            }
        }
        Ok(())
    }

    /// To be called before what is known of `id` is removed, which nobody uses any longer.
    pub(crate) fn forget(&self, id: &str) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
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
        let records = self.shared().ledger()?.into_iter().map(|entry| entry.record);
        Ok(records
            .filter(|record| filter.matches(record))
            .filter(|record| limit.is_none_or(|limit| record.last_used.unwrap_or(record.created) <= limit))
            .collect())
    }
}

impl Shared {
    /// Every record, each with its size and what it shares.
    pub(crate) fn ledger(&self) -> Result<Vec<Entry>> {
        let mut out = Vec::new();
        record::each(self.kv.as_ref(), |id, record| {
            out.push((id.to_owned(), record));
            Ok(())
        })?;
        let mut out: Vec<Entry> =
            out.into_iter().map(|(id, record)| self.snapshot_entry(id, record)).collect::<Result<_>>()?;
        let mut dirs = Vec::new();
        mutable::each(self.kv.as_ref(), |key, record| {
            dirs.push((key.to_vec(), record));
            Ok(())
        })?;
        for (key, record) in dirs {
            out.push(self.mutable_entry(key, record)?);
        }
        let mut found = Vec::new();
        self.kv.scan(Cf::Blobs, b"", &mut |key, value| {
            let record: blobs::Record = codec::decode("blob", key, value)?;
            found.push((String::from_utf8_lossy(key).into_owned(), record));
            Ok(true)
        })?;
        let with_snapshots: HashSet<Part> =
            out.iter().flat_map(|entry| &entry.parts).map(|(part, _)| part.clone()).collect();
        for (digest, record) in found {
            if !with_snapshots.contains(&Part::Blob(digest.clone())) {
                out.push(self.blob_entry(digest, record)?);
            }
        }
        out.extend(self.own_entries()?);
        let mut counted = HashSet::new();
        for entry in &mut out {
            let first = entry.parts.iter().filter(|(part, _)| counted.insert(part.clone()));
            entry.record.size = entry.own + first.map(|(_, bytes)| bytes).sum::<u64>();
        }
        Ok(out)
    }

    fn snapshot_entry(&self, id: String, record: Record) -> Result<Entry> {
        let used = self.usage.of(self.kv.as_ref(), &id)?;
        let mut usage = DiskUsage::default();
        if record.filled {
            usage = self.size_of(&id, &self.root.join("snapshots").join(&id), true)?;
        }
        let mut parts = inodes(&usage);
        for digest in self.blob_digests(&id)? {
            if blobs::load(self, &digest)?.is_some() {
                let bytes = fsx::occupied(&blobs::file_path(&self.root, &digest));
                parts.push((Part::Blob(digest), bytes));
            }
        }
        Ok(Entry {
            record: UsageRecord {
                mutable: false,
                in_use: self.snapshots.is_held(&id),
                size: 0,
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
            own: usage.own,
            parts,
        })
    }

    fn mutable_entry(&self, key: Vec<u8>, record: mutable::Record) -> Result<Entry> {
        let used = self.usage.of(self.kv.as_ref(), &record.id)?;
        let in_use = self.mutable.is_held(&record.id);
        // While it is held it changes: then the size of this moment is not kept.
        let dir = mutable::dir_path(&self.root, &record.id);
        let usage = self.size_of(&record.id, &dir, !in_use)?;
        Ok(Entry {
            record: UsageRecord {
                mutable: true,
                in_use,
                size: 0,
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
            own: usage.own,
            parts: inodes(&usage),
        })
    }

    fn blob_entry(&self, digest: String, record: blobs::Record) -> Result<Entry> {
        let used = self.usage.of(self.kv.as_ref(), &digest)?;
        Ok(Entry {
            own: fsx::occupied(&blobs::file_path(&self.root, &digest)),
            record: UsageRecord {
                mutable: false,
                in_use: self.blobs.is_held(&digest),
                size: 0,
                created: codec::time(record.created),
                last_used: (used.count > 0).then(|| codec::time(used.last)),
                usage_count: used.count,
                parents: Vec::new(),
                description: format!("content {digest}"),
                record_type: RecordType::Regular.as_str().to_owned(),
                shared: false,
                id: digest,
            },
            place: Place::Blob,
            parts: Vec::new(),
        })
    }

    /// What is in no other record: the database, the directories that hold the others, and what running
    /// work has not committed. What lies in the trash is as good as gone and counts nowhere.
    fn own_entries(&self) -> Result<Vec<Entry>> {
        let mut database = fsx::occupied(&self.root);
        for name in fsx::list(&self.root)? {
            let path = self.root.join(&name);
            database += match name.as_str() {
                "staging" => continue,
                "snapshots" | "mutable" | "trash" => fsx::occupied(&path),
                "content" => fsx::occupied(&path) + fsx::occupied(&path.join("sha256")),
                "meta" => self.measure(&path)?.own,
                _ => fsx::occupied(&path),
            };
        }
        let entry = |id: &str, description: &str, own| Entry {
            record: UsageRecord {
                id: id.to_owned(),
                mutable: false,
                in_use: true,
                size: 0,
                parents: Vec::new(),
                created: SystemTime::now(),
                last_used: None,
                usage_count: 0,
                description: description.to_owned(),
                record_type: STORE_RECORD.to_owned(),
                shared: false,
            },
            place: Place::Store,
            own,
            parts: Vec::new(),
        };
        let staged = self.measure(&self.staging())?;
        Ok(vec![
            entry("database", "keys, records and the history of builds", database),
            // What is linked there has a name in a record.
            entry("staging", "work in progress", staged.own),
        ])
    }

    /// Bytes in the trash: not yet free, but soon.
    pub(crate) fn discarded(&self) -> Result<u64> {
        Ok(self.measure(&self.root.join("trash"))?.own)
    }

    fn measure(&self, dir: &Path) -> Result<DiskUsage> {
        fsx::disk_usage(dir).map_err(|e| StoreError::io("measure", dir, e))
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

    fn size_of(&self, id: &str, dir: &Path, keep: bool) -> Result<DiskUsage> {
        if let Some(bytes) = self.kv.get(Cf::Values, &size_key(id))?
            && let Some(known) = decode_size(&bytes)
        {
            return Ok(known);
        }
        let usage = self.measure(dir)?;
        if keep {
            // The record may be removed at this moment; then its size must not stay behind.
            let _guard = self.dependent()?;
            if dir.exists() {
                let mut batch = Batch::new();
                batch.put(Cf::Values, size_key(id), encode_size(&usage));
                // On a full disk it is measured again next time.
                if let Err(error) = self.kv.write(batch) {
                    tracing::debug!(%error, id, "size not noted");
                }
            }
        }
        Ok(usage)
    }
}

fn inodes(usage: &DiskUsage) -> Vec<(Part, u64)> {
    usage.linked.iter().map(|&(inode, bytes)| (Part::Inode(inode), bytes)).collect()
}

/// Its own bytes, then inode and bytes of each linked file.
fn encode_size(usage: &DiskUsage) -> Vec<u8> {
    let linked = usage.linked.iter().flat_map(|&(inode, bytes)| [inode, bytes]);
    std::iter::once(usage.own).chain(linked).flat_map(u64::to_le_bytes).collect()
}

fn decode_size(bytes: &[u8]) -> Option<DiskUsage> {
    let (numbers, rest) = bytes.as_chunks::<8>();
    let mut numbers = numbers.iter().map(|number| u64::from_le_bytes(*number));
    let own = numbers.next().filter(|_| rest.is_empty())?;
    let mut linked = Vec::new();
    while let Some(inode) = numbers.next() {
        linked.push((inode, numbers.next()?));
    }
    Some(DiskUsage { own, linked })
}
