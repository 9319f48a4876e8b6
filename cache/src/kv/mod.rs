//! The key-value engine behind everything that is remembered, as a trait small enough to be
//! replaced in tests. Engines know bytes only; what the bytes mean is decided elsewhere.

mod mem;
mod reserve;
mod rocks;

pub use mem::MemKv;
pub use rocks::RocksKv;

use crate::error::Result;

/// A column family: one kind of record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cf {
    /// Schema version, boot id, epochs.
    Meta,
    /// Definition and content keys of finished steps.
    Keys,
    /// What is known of an operation by its digest: followers, duration.
    Ops,
    /// Snapshot records by id.
    Snapshots,
    /// Who needs whom: snapshots by snapshots, blobs by snapshots.
    Refs,
    /// Named small values: of snapshots, of sources, of anything else by namespace.
    Values,
    /// Blob records by digest.
    Blobs,
    /// Digests of file contents, and remembered answers to content queries.
    Content,
    /// Cache mounts and local source directories.
    Mutable,
}

impl Cf {
    /// All of them.
    pub const ALL: [Cf; 9] = [
        Cf::Meta,
        Cf::Keys,
        Cf::Ops,
        Cf::Snapshots,
        Cf::Refs,
        Cf::Values,
        Cf::Blobs,
        Cf::Content,
        Cf::Mutable,
    ];

    /// The family's name on disk.
    pub fn name(self) -> &'static str {
        match self {
            Cf::Meta => "meta",
            Cf::Keys => "keys",
            Cf::Ops => "ops",
            Cf::Snapshots => "snapshots",
            Cf::Refs => "refs",
            Cf::Values => "values",
            Cf::Blobs => "blobs",
            Cf::Content => "content",
            Cf::Mutable => "mutable",
        }
    }
}

/// One change within a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Sets a value.
    Put(Cf, Vec<u8>, Vec<u8>),
    /// Removes a key, if it is there.
    Delete(Cf, Vec<u8>),
}

impl Change {
    /// What is changed.
    fn place(&self) -> (Cf, &[u8]) {
        match self {
            Change::Put(cf, key, _) | Change::Delete(cf, key) => (*cf, key),
        }
    }
}

/// Changes that happen together or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    changes: Vec<Change>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key` to `value`; a later change to the same key wins.
    pub fn put(&mut self, cf: Cf, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> &mut Self {
        self.changes.push(Change::Put(cf, key.into(), value.into()));
        self
    }

    /// Removes `key`.
    pub fn delete(&mut self, cf: Cf, key: impl Into<Vec<u8>>) -> &mut Self {
        self.changes.push(Change::Delete(cf, key.into()));
        self
    }

    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Bytes of all keys and values.
    fn size(&self) -> u64 {
        let size = |change: &Change| match change {
            Change::Put(_, key, value) => key.len() + value.len(),
            Change::Delete(_, key) => key.len(),
        };
        self.changes.iter().map(size).sum::<usize>() as u64
    }

    /// The changes in order.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

/// What a scan does after an entry.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> Result<bool> + 'a;

/// An ordered key-value store with column families.
pub trait Kv: Send + Sync + 'static {
    /// The value of a key.
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// The values of several keys, in the order asked.
    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>>;

    /// Applies a batch. It survives the end of the process at once, the end of the machine's
    /// power only after some later durable write.
    fn write(&self, batch: Batch) -> Result<()>;

    /// Applies a batch that removes things, or without which nothing can be removed: it is written also when the
    /// disk is too full for others.
    fn write_freeing(&self, batch: Batch) -> Result<()> {
        self.write(batch)
    }

    /// Applies a batch and waits until it, and all before it, is on the disk. Written also when the disk is too
    /// full for others, since a store can't be opened or closed without.
    fn write_durable(&self, batch: Batch) -> Result<()>;

    /// True if a write may take long.
    fn blocks(&self) -> bool {
        true
    }

    /// Gives back the space of what was deleted, where that is much of all. May take as long as reading the rest.
    fn reclaim(&self) -> Result<()> {
        Ok(())
    }

    /// Called now and then: gives back memory that many writes took.
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    /// Calls `visit` with each entry whose key starts with `prefix`, in byte order, as of the
    /// moment of the call, until it answers `false` or fails.
    fn scan(&self, cf: Cf, prefix: &[u8], visit: &mut Visit<'_>) -> Result<()>;
}
