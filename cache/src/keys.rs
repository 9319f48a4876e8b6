//! Which keys are known and what was found under them. The solver asks; it decides what a key
//! means. Records may name results that are gone by now: whoever loads a result finds out.

use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use crate::codec;
use crate::error::{Result, StoreError};
use crate::kv::{Batch, Cf, Kv};

/// Stands for a result that nobody made: an imported cache may have only some outputs of a vertex.
pub const MISSING_RESULT: &str = "-";

/// What an earlier build left under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// Names of the results, one for each output; the empty string stands for scratch, [`MISSING_RESULT`] for one that
    /// is not known.
    pub results: Vec<String>,
    /// Display name of the vertex that made them.
    pub name: Arc<str>,
    /// The content key of the vertex, where it says more than the definition key.
    pub content_key: Option<[u8; 32]>,
}

/// What is known of an operation, whatever it ran on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpRecord {
    /// How long it took when it last ran.
    pub duration: Duration,
    /// It counts some input by the whole of what that input's operation produced, so that knowing
    /// the digests of such outputs may find it again.
    pub follows_outputs: bool,
}

/// Something to remember.
#[derive(Debug, Clone)]
pub enum KeyChange {
    /// One record under several keys.
    Record {
        /// The keys.
        keys: Vec<[u8; 32]>,
        /// What is found under each of them.
        record: Arc<KeyRecord>,
    },
    /// What is known of the operation with this digest.
    Op {
        /// The operation's digest.
        digest: [u8; 32],
        /// Replaces what was known of it.
        record: OpRecord,
    },
}

/// Where the solver keeps its keys.
pub trait KeyStorage: Send + Sync + 'static {
    /// The record under a key.
    fn get(&self, key: &[u8; 32]) -> Result<Option<KeyRecord>>;
    /// What is known of an operation by its digest.
    fn op(&self, digest: &[u8; 32]) -> Result<Option<OpRecord>>;
    /// True if a write may take long, so that no task should wait for it in place.
    fn blocks(&self) -> bool {
        true
    }
    /// Remembers all of `changes`, or nothing.
    fn write(&self, changes: &[KeyChange]) -> Result<()>;
    /// Forgets a key whose record names these results, which are gone; false if it names others by now.
    fn remove(&self, key: &[u8; 32], results: &[String]) -> Result<bool>;
}

/// Keys kept in a [`Kv`].
pub struct KeyStore {
    pub(crate) kv: Arc<dyn Kv>,
    /// Held shared while something is recorded, exclusively while records of lost results are removed.
    pub(crate) recording: RwLock<()>,
}

impl KeyStore {
    /// A key store in `kv`; with a [`crate::kv::MemKv`] it lasts as long as the value.
    pub fn new(kv: Arc<dyn Kv>) -> Self {
        Self { kv, recording: RwLock::default() }
    }
}

impl KeyStorage for KeyStore {
    fn get(&self, key: &[u8; 32]) -> Result<Option<KeyRecord>> {
        let Some(bytes) = self.kv.get(Cf::Keys, key)? else { return Ok(None) };
        codec::decode::<Encoded>("key", key, &bytes)?.into_record(key).map(Some)
    }

    fn op(&self, digest: &[u8; 32]) -> Result<Option<OpRecord>> {
        let Some(bytes) = self.kv.get(Cf::Ops, digest)? else { return Ok(None) };
        let encoded: EncodedOp = codec::decode("operation", digest, &bytes)?;
        Ok(Some(OpRecord {
            duration: Duration::from_nanos(encoded.duration),
            follows_outputs: encoded.follows_outputs,
        }))
    }

    fn blocks(&self) -> bool {
        self.kv.blocks()
    }

    fn write(&self, changes: &[KeyChange]) -> Result<()> {
        let _recording = self.recording.read();
        let mut batch = Batch::new();
        for change in changes {
            match change {
                KeyChange::Record { keys, record } => {
                    let value = codec::encode(&Encoded::from(&**record));
                    for key in keys {
                        batch.put(Cf::Keys, *key, value.clone());
                    }
                }
                KeyChange::Op { digest, record } => {
                    let encoded = EncodedOp {
                        duration: nanos(record.duration),
                        follows_outputs: record.follows_outputs,
                        day: today(),
                    };
                    batch.put(Cf::Ops, *digest, codec::encode(&encoded));
                }
            }
        }
        self.kv.write(batch)
    }

    fn remove(&self, key: &[u8; 32], results: &[String]) -> Result<bool> {
        let _recording = self.recording.write();
        if self.get(key)?.is_some_and(|record| record.results != results) {
            return Ok(false);
        }
        let mut batch = Batch::new();
        batch.delete(Cf::Keys, *key);
        self.kv.write_freeing(batch)?;
        Ok(true)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Days since 1970.
pub(crate) fn today() -> u32 {
    let days = codec::nanos(SystemTime::now()) / (24 * 3600 * 1_000_000_000);
    u32::try_from(days).unwrap_or(u32::MAX)
}

/// Tags 2, 4, 5, 6 and 8 were used by earlier versions.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Encoded {
    #[prost(string, repeated, tag = "1")]
    pub(crate) results: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
    /// Empty stands for none.
    #[prost(bytes = "vec", tag = "7")]
    content_key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct EncodedOp {
    #[prost(uint64, tag = "1")]
    duration: u64,
    #[prost(bool, tag = "2")]
    follows_outputs: bool,
    /// When it was written, see [`today`].
    #[prost(uint32, tag = "3")]
    pub(crate) day: u32,
}

impl From<&KeyRecord> for Encoded {
    fn from(record: &KeyRecord) -> Self {
        Self {
            results: record.results.clone(),
            name: record.name.to_string(),
            content_key: record.content_key.map_or_else(Vec::new, |d| d.to_vec()),
        }
    }
}

impl Encoded {
    fn into_record(self, key: &[u8; 32]) -> Result<KeyRecord> {
        let corrupt = || StoreError::Corrupt {
            what: "key",
            key: hex::encode(key),
            reason: "a digest is not 32 bytes".to_owned(),
        };
        let content_key = match self.content_key.is_empty() {
            true => None,
            false => Some(self.content_key.try_into().map_err(|_| corrupt())?),
        };
        Ok(KeyRecord { results: self.results, name: self.name.into(), content_key })
    }
}
