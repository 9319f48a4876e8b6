//! Which keys are known and what was found under them. The solver asks; it decides what a key
//! means. Records may name results that are gone by now: whoever loads a result finds out.

use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use crate::codec;
use crate::error::{Result, StoreError};
use crate::kv::{Batch, Cf, Kv};

/// What an earlier build left under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// Names of the results, one for each output; the empty string stands for scratch.
    pub results: Vec<String>,
    /// Digest (`sha256:…`) of the vertex that made them.
    pub vertex: String,
    /// That vertex's display name.
    pub name: String,
    /// When it finished.
    pub created: SystemTime,
    /// How long it ran.
    pub duration: Duration,
    /// The output digest of each result, where it was computed.
    pub output_content: Vec<Option<[u8; 32]>>,
    /// The content key of the vertex, where it says more than the definition key.
    pub content_key: Option<[u8; 32]>,
}

/// Where the solver keeps its keys.
pub trait KeyStorage: Send + Sync + 'static {
    /// The record under a key.
    fn get(&self, key: &[u8; 32]) -> Result<Option<KeyRecord>>;
    /// Puts one record under several keys at once.
    fn put(&self, keys: &[[u8; 32]], record: &KeyRecord) -> Result<()>;
    /// Forgets a key.
    fn remove(&self, key: &[u8; 32]) -> Result<()>;
    /// True if an operation with this digest was once recorded by what it read from other
    /// operations' outputs, so that knowing those outputs' digests may find it again.
    fn followers(&self, op_digest: &[u8; 32]) -> Result<bool>;
    /// Notes that an operation with this digest was recorded so.
    fn mark_follower(&self, op_digest: &[u8; 32]) -> Result<()>;
    /// How long the operation with this digest took when it last ran.
    fn duration(&self, op_digest: &[u8; 32]) -> Result<Option<Duration>>;
    /// Notes how long it took.
    fn set_duration(&self, op_digest: &[u8; 32], duration: Duration) -> Result<()>;
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

    fn put(&self, keys: &[[u8; 32]], record: &KeyRecord) -> Result<()> {
        let value = codec::encode(&Encoded::from(record));
        let _recording = self.recording.read();
        let mut batch = Batch::new();
        for key in keys {
            batch.put(Cf::Keys, *key, value.clone());
        }
        self.kv.write(batch)
    }

    fn remove(&self, key: &[u8; 32]) -> Result<()> {
        let mut batch = Batch::new();
        batch.delete(Cf::Keys, *key);
        self.kv.write(batch)
    }

    fn followers(&self, op_digest: &[u8; 32]) -> Result<bool> {
        Ok(self.kv.get(Cf::Ops, &op_key(b'f', op_digest))?.is_some())
    }

    fn mark_follower(&self, op_digest: &[u8; 32]) -> Result<()> {
        let key = op_key(b'f', op_digest);
        let mark = stamped(&[1]);
        let _recording = self.recording.read();
        if self.kv.get(Cf::Ops, &key)?.as_ref() == Some(&mark) {
            return Ok(());
        }
        let mut batch = Batch::new();
        batch.put(Cf::Ops, key, mark);
        self.kv.write(batch)
    }

    fn duration(&self, op_digest: &[u8; 32]) -> Result<Option<Duration>> {
        let key = op_key(b'd', op_digest);
        let Some(bytes) = self.kv.get(Cf::Ops, &key)? else { return Ok(None) };
        let nanos = bytes.first_chunk().ok_or_else(|| StoreError::Corrupt {
            what: "duration",
            key: hex::encode(op_digest),
            reason: "less than 8 bytes".to_owned(),
        })?;
        Ok(Some(Duration::from_nanos(u64::from_le_bytes(*nanos))))
    }

    fn set_duration(&self, op_digest: &[u8; 32], duration: Duration) -> Result<()> {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let _recording = self.recording.read();
        let mut batch = Batch::new();
        batch.put(Cf::Ops, op_key(b'd', op_digest), stamped(&nanos.to_le_bytes()));
        self.kv.write(batch)
    }
}

/// What is known of an operation ends in the day on which it was written.
fn stamped(value: &[u8]) -> Vec<u8> {
    [value, &today().to_le_bytes()].concat()
}

/// Days since 1970.
pub(crate) fn today() -> u32 {
    let days = codec::nanos(SystemTime::now()) / (24 * 3600 * 1_000_000_000);
    u32::try_from(days).unwrap_or(u32::MAX)
}

fn op_key(kind: u8, digest: &[u8; 32]) -> Vec<u8> {
    let mut key = Vec::with_capacity(33);
    key.push(kind);
    key.extend_from_slice(digest);
    key
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Encoded {
    #[prost(string, repeated, tag = "1")]
    pub(crate) results: Vec<String>,
    #[prost(string, tag = "2")]
    vertex: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(int64, tag = "4")]
    created: i64,
    #[prost(uint64, tag = "5")]
    duration: u64,
    /// An empty entry stands for a digest that was not computed.
    #[prost(bytes = "vec", repeated, tag = "6")]
    output_content: Vec<Vec<u8>>,
    /// Empty stands for none.
    #[prost(bytes = "vec", tag = "7")]
    content_key: Vec<u8>,
}

impl From<&KeyRecord> for Encoded {
    fn from(record: &KeyRecord) -> Self {
        Self {
            results: record.results.clone(),
            vertex: record.vertex.clone(),
            name: record.name.clone(),
            created: codec::nanos(record.created),
            duration: u64::try_from(record.duration.as_nanos()).unwrap_or(u64::MAX),
            output_content: record
                .output_content
                .iter()
                .map(|d| d.map_or_else(Vec::new, |d| d.to_vec()))
                .collect(),
            content_key: record.content_key.map_or_else(Vec::new, |d| d.to_vec()),
        }
    }
}

impl Encoded {
    fn into_record(self, key: &[u8; 32]) -> Result<KeyRecord> {
        let digest = |bytes: Vec<u8>| match bytes.len() {
            0 => Ok(None),
            _ => bytes.try_into().map(Some).map_err(|_| StoreError::Corrupt {
                what: "key",
                key: hex::encode(key),
                reason: "a digest is not 32 bytes".to_owned(),
            }),
        };
        Ok(KeyRecord {
            results: self.results,
            vertex: self.vertex,
            name: self.name,
            created: codec::time(self.created),
            duration: Duration::from_nanos(self.duration),
            output_content: self.output_content.into_iter().map(digest).collect::<Result<_>>()?,
            content_key: digest(self.content_key)?,
        })
    }
}
