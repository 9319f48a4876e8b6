//! What is remembered of files that were fetched: by the request, which snapshot has the file; with the snapshot,
//! by what the server can say that the file has not changed.

use kiln_cache::{Ref, SnapshotRef, Store, StoreError};
use serde::{Deserialize, Serialize};

/// Snapshots by request.
const SNAPSHOTS: &str = "http-sources";
/// Of a snapshot: its [`Note`].
const NOTE: &str = "http";

/// What a server said of a file, and what the file was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// By which the server knows the content.
    pub(super) etag: String,
    /// `sha256:…` of the file.
    pub(super) digest: String,
    /// Its name in the snapshot.
    pub(super) name: String,
    /// When it was modified, in seconds since 1970, if the server said so.
    pub(super) modified: Option<u64>,
}

/// What is known of an earlier answer to the same request; its file is still here.
pub(super) fn load(store: &Store, request: &str) -> Result<Option<(Note, SnapshotRef)>, StoreError> {
    let Some(id) = store.values().get(SNAPSHOTS, request)? else { return Ok(None) };
    let Some(snapshot) = store.snapshots().get(&String::from_utf8_lossy(&id))? else { return Ok(None) };
    let note = snapshot.kv(NOTE)?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Ok(note.map(|note| (note, snapshot)))
}

/// Remembers an answer.
pub(super) fn save(store: &Store, request: &str, note: &Note, result: &Ref) -> Result<(), StoreError> {
    let (Some(snapshot), Ok(bytes)) = (result, serde_json::to_vec(note)) else { return Ok(()) };
    snapshot.set_kv(NOTE, &bytes)?;
    store.values().put(SNAPSHOTS, request, snapshot.id().as_bytes())
}

/// Forgets requests whose file is gone; gives their number.
pub(crate) fn forget_gone(store: &Store) -> Result<usize, StoreError> {
    let snapshots = store.snapshots();
    store.values().retain(SNAPSHOTS, &mut |_, id| match std::str::from_utf8(id) {
        Ok(id) => snapshots.exists(id),
        Err(_) => Ok(false),
    })
}
