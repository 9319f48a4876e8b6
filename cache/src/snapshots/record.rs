//! How a snapshot is written down.

use std::time::SystemTime;

use crate::codec;
use crate::error::Result;
use crate::kv::{Batch, Cf, Kv, Visit};
use crate::values;

/// What a snapshot is for, as clients see it in disk usage listings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RecordType {
    /// Made by a step or pulled.
    #[default]
    Regular,
    /// Made for the builder's own purposes.
    Internal,
    /// A frontend's image.
    Frontend,
    /// A client's directory.
    LocalSource,
    /// A git checkout.
    GitCheckout,
    /// A cache mount.
    CacheMount,
}

impl RecordType {
    /// The name on the wire (`UsageRecord.RecordType`).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::Internal => "internal",
            Self::Frontend => "frontend",
            Self::LocalSource => "source.local",
            Self::GitCheckout => "source.git.checkout",
            Self::CacheMount => "exec.cachemount",
        }
    }

    pub(crate) fn from_name(name: &str) -> Self {
        [Self::Internal, Self::Frontend, Self::LocalSource, Self::GitCheckout, Self::CacheMount]
            .into_iter()
            .find(|kind| kind.as_str() == name)
            .unwrap_or_default()
    }
}

/// What is said about a snapshot when it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// What it is for.
    pub record_type: RecordType,
    /// For people: which step made it, where it was pulled from.
    pub description: String,
    /// When it was made.
    pub created: SystemTime,
}

impl SnapshotMeta {
    /// A regular snapshot made now.
    pub fn new(description: impl Into<String>) -> Self {
        Self::of_type(RecordType::Regular, description)
    }

    /// A snapshot of some other type made now.
    pub fn of_type(record_type: RecordType, description: impl Into<String>) -> Self {
        Self { record_type, description: description.into(), created: SystemTime::now() }
    }
}

/// A layer in the form in which registries and archives have it.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct LayerBlob {
    /// `sha256:…` of the blob as it is stored and sent.
    #[prost(string, tag = "1")]
    pub digest: String,
    /// Its length in bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// Its media type, which tells the compression.
    #[prost(string, tag = "3")]
    pub media_type: String,
    /// `sha256:…` of the uncompressed tar.
    #[prost(string, tag = "4")]
    pub diff_id: String,
}

/// A layer that is known but perhaps not here yet.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LazyLayer {
    /// The blob to unpack.
    #[prost(message, required, tag = "1")]
    pub blob: LayerBlob,
    /// `sha256:…` over this layer's diff id and those below (OCI chain id).
    #[prost(string, tag = "2")]
    pub chain_id: String,
    /// Where the blob can be had, best first; what a source looks like is the puller's business.
    #[prost(string, repeated, tag = "3")]
    pub sources: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Record {
    /// A layer's parent, or the layers of a stack from bottom to top.
    #[prost(string, repeated, tag = "1")]
    pub(crate) bases: Vec<String>,
    #[prost(bool, tag = "2")]
    pub(crate) stack: bool,
    #[prost(string, tag = "3")]
    pub(crate) record_type: String,
    #[prost(string, tag = "4")]
    pub(crate) description: String,
    #[prost(int64, tag = "5")]
    pub(crate) created: i64,
    /// When its files came to rest; see `epoch`.
    #[prost(uint64, tag = "6")]
    pub(crate) epoch: u64,
    #[prost(message, optional, tag = "7")]
    pub(crate) lazy: Option<LazyLayer>,
    /// The directory is there. Always false for a stack.
    #[prost(bool, tag = "8")]
    pub(crate) filled: bool,
}

impl Record {
    pub(crate) fn new(meta: &SnapshotMeta) -> Self {
        Self {
            record_type: meta.record_type.as_str().to_owned(),
            description: meta.description.clone(),
            created: codec::nanos(meta.created),
            ..Self::default()
        }
    }

    pub(crate) fn meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            record_type: RecordType::from_name(&self.record_type),
            description: self.description.clone(),
            created: codec::time(self.created),
        }
    }

    pub(crate) fn load(kv: &dyn Kv, id: &str) -> Result<Option<Self>> {
        kv.get(Cf::Snapshots, id.as_bytes())?
            .map(|bytes| codec::decode("snapshot", id.as_bytes(), &bytes))
            .transpose()
    }

    pub(crate) fn save(&self, batch: &mut Batch, id: &str) {
        batch.put(Cf::Snapshots, id.as_bytes(), codec::encode(self));
    }

    /// Saves a record for the first time, with the references that keep its bases.
    pub(crate) fn save_new(&self, batch: &mut Batch, id: &str) {
        self.save(batch, id);
        for base in &self.bases {
            batch.put(Cf::Refs, dependent_key(base, id), []);
        }
        if let Some(lazy) = &self.lazy {
            batch.put(Cf::Refs, chain_key(&lazy.chain_id), id.as_bytes());
            batch.put(Cf::Refs, blob_user_key(&lazy.blob.digest, id), []);
        }
    }

    /// Removes a record, everything that is known about the snapshot, and its references.
    pub(crate) fn erase(&self, kv: &dyn Kv, batch: &mut Batch, id: &str) -> Result<()> {
        batch.delete(Cf::Snapshots, id.as_bytes());
        for base in &self.bases {
            batch.delete(Cf::Refs, dependent_key(base, id));
        }
        if let Some(lazy) = &self.lazy {
            batch.delete(Cf::Refs, chain_key(&lazy.chain_id));
            batch.delete(Cf::Refs, blob_user_key(&lazy.blob.digest, id));
        }
        batch.delete(Cf::Values, crate::usage::size_key(id));
        batch.delete(Cf::Values, crate::usage::usage_key(id));
        kv.scan(Cf::Values, &value_key(id, ""), &mut |key, value| {
            batch.delete(Cf::Values, key);
            if key.starts_with(&value_key(id, "blob/")) {
                let blob: LayerBlob = codec::decode("layer blob", key, value)?;
                batch.delete(Cf::Refs, blob_user_key(&blob.digest, id));
            }
            Ok(true)
        })?;
        kv.scan(Cf::Content, &crate::contenthash::snapshot_prefix(id), &mut |key, _| {
            batch.delete(Cf::Content, key);
            Ok(true)
        })
    }
}

/// Calls `visit` with each snapshot's id and record.
pub(crate) fn each(kv: &dyn Kv, mut visit: impl FnMut(&str, Record) -> Result<()>) -> Result<()> {
    let visit: &mut Visit<'_> = &mut |key, value| {
        let record = codec::decode("snapshot", key, value)?;
        visit(&String::from_utf8_lossy(key), record)?;
        Ok(true)
    };
    kv.scan(Cf::Snapshots, b"", visit)
}

/// The key of a value that belongs to a snapshot.
pub(crate) fn value_key(id: &str, name: &str) -> Vec<u8> {
    values::key(b's', id, name)
}

/// Says that snapshot `user` is made on `base`.
pub(crate) fn dependent_key(base: &str, user: &str) -> Vec<u8> {
    values::key(b's', base, user)
}

/// Says that snapshot `user` has the blob as a form of its layer.
pub(crate) fn blob_user_key(digest: &str, user: &str) -> Vec<u8> {
    values::key(b'b', digest, user)
}

pub(crate) fn chain_key(chain_id: &str) -> Vec<u8> {
    values::key(b'c', chain_id, "")
}

/// True if any key of `Cf::Refs` starts so.
pub(crate) fn any_ref(kv: &dyn Kv, prefix: &[u8]) -> Result<bool> {
    let mut found = false;
    kv.scan(Cf::Refs, prefix, &mut |_, _| {
        found = true;
        Ok(false)
    })?;
    Ok(found)
}
