//! What is remembered of contents: answers to queries, per snapshot, and digests of files, per layer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::codec;
use crate::error::Result;
use crate::fsx;
use crate::kv::{Batch, Cf};
use crate::snapshots::SnapshotRef;
use crate::values;

/// What is known of a layer's entries, by path relative to its root: of a file, blake3 of its content; of a directory, the
/// digest of all in it.
pub type Files = HashMap<Vec<u8>, [u8; 32]>;

/// Entries kept in memory over all layers, while the store is busy.
const KEPT: usize = 100_000;

/// Tables in memory, so that a burst of queries reads them once.
#[derive(Default)]
pub(crate) struct ContentCache {
    files: Mutex<HashMap<String, Arc<Files>>>,
}

impl ContentCache {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Files>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives memory back when the store has come to rest.
    pub(crate) fn shrink(&self) {
        *self.lock() = HashMap::new();
    }

    fn insert(&self, layer: &str, files: &Arc<Files>) {
        let mut kept = self.lock();
        let sum: usize = kept.values().map(|files| files.len() + 1).sum();
        if sum + files.len() > KEPT {
            kept.clear();
        }
        if files.len() <= KEPT {
            kept.insert(layer.to_owned(), Arc::clone(files));
        } else {
            kept.remove(layer);
        }
    }
}

/// A part of a layer's table, as it was found out at one time.
#[derive(Clone, PartialEq, prost::Message)]
struct Segment {
    #[prost(bytes = "vec", repeated, tag = "1")]
    paths: Vec<Vec<u8>>,
    /// 32 bytes for each path.
    #[prost(bytes = "vec", tag = "2")]
    digests: Vec<u8>,
}

/// The prefix of all that is kept for a snapshot in `Cf::Content`.
pub(crate) fn snapshot_prefix(id: &str) -> Vec<u8> {
    values::key(b's', id, "")
}

fn answer_key(snapshot: &SnapshotRef, name: &[u8]) -> Vec<u8> {
    let mut key = values::key(b's', snapshot.id(), "a");
    key.extend_from_slice(name);
    key
}

pub(super) fn answer(snapshot: &SnapshotRef, name: &[u8]) -> Result<Option<blake3::Hash>> {
    let found = snapshot.shared().kv.get(Cf::Content, &answer_key(snapshot, name))?;
    Ok(found.and_then(|bytes| blake3::Hash::from_slice(&bytes).ok()))
}

/// Writes an answer, together with what is in `batch`.
pub(super) fn remember(
    snapshot: &SnapshotRef,
    name: &[u8],
    digest: blake3::Hash,
    mut batch: Batch,
) -> Result<()> {
    let shared = snapshot.shared();
    shared.check_open()?;
    batch.put(Cf::Content, answer_key(snapshot, name), *digest.as_bytes());
    shared.signal.dirty();
    shared.kv.write(batch)
}

/// What is known of a layer's files.
pub(super) fn files(layer: &SnapshotRef) -> Result<Arc<Files>> {
    let shared = layer.shared();
    if let Some(known) = shared.content.lock().get(layer.id()) {
        return Ok(Arc::clone(known));
    }
    let mut files = Files::new();
    let prefix = values::key(b's', layer.id(), "f");
    shared.kv.scan(Cf::Content, &prefix, &mut |key, value| {
        let segment: Segment = codec::decode("content", key, value)?;
        let digests = segment.digests.chunks_exact(32).filter_map(|chunk| chunk.try_into().ok());
        files.extend(segment.paths.into_iter().zip(digests));
        Ok(true)
    })?;
    let files = Arc::new(files);
    shared.content.insert(layer.id(), &files);
    Ok(files)
}

pub(super) fn add_files(layer: &SnapshotRef, files: Files) -> Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let shared = layer.shared();
    shared.check_open()?;
    let mut segment = Segment::default();
    for (path, digest) in &files {
        segment.paths.push(path.clone());
        segment.digests.extend_from_slice(digest);
    }
    let mut batch = Batch::new();
    let key = values::key(b's', layer.id(), &format!("f{}", fsx::random_id()));
    batch.put(Cf::Content, key, codec::encode(&segment));
    drop(segment);
    let known = self::files(layer)?;
    shared.content.lock().remove(layer.id());
    shared.kv.write(batch)?;
    shared.signal.dirty();
    let mut all = Arc::try_unwrap(known).unwrap_or_else(|known| known.as_ref().clone());
    all.extend(files);
    shared.content.insert(layer.id(), &Arc::new(all));
    Ok(())
}
