//! Digests of what is in a snapshot: names, types, modes, owners, contents, extended attributes,
//! never times. Two snapshots with the same digest of a path can stand for one another where only
//! that path is read. Digests are blake3; they mean nothing outside Kiln.

mod cache;
mod changes;
mod entry;
mod manifest;
mod query;

pub use cache::Files;
pub(crate) use cache::{ContentCache, snapshot_prefix};
pub(crate) use changes::changes;
pub use changes::{ChangeKind, ContentChange};
pub(crate) use manifest::sweep;

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Result, StoreError};
use crate::kv::Batch;
use crate::layerview::LayerView;
use crate::snapshots::SnapshotRef;
use entry::Hasher;
use manifest::Listing;

/// Which part of an input an operation reads, when that part's content may stand for the input.
///
/// Fields follow the copy action and mount selectors of LLB: paths are absolute beneath the input's root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentQuery {
    /// One entry for each path that is read; the digest covers them in this order.
    pub paths: Vec<ContentPath>,
}

/// One path (or pattern) of a [`ContentQuery`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentPath {
    /// Absolute path beneath the root; `/` is everything.
    pub path: String,
    /// `path` may hold `*`, `?` and `[…]`.
    pub wildcard: bool,
    /// A symlink as the last component is followed.
    pub follow_symlink: bool,
    /// Only entries below `path` that match one of these count (empty: all).
    pub include: Vec<String>,
    /// Entries below `path` that match one of these do not count.
    pub exclude: Vec<String>,
    /// With `include`: each must match something.
    pub required: Vec<String>,
    /// A path that is not there is an error; otherwise it counts as absent.
    pub must_exist: bool,
}

/// Digest of what `query` selects in a snapshot (`None`: the empty root). Answers are remembered
/// with the snapshot, and what they were made of under the digest. All layers must be here.
pub fn content_digest(snapshot: Option<&SnapshotRef>, query: &ContentQuery) -> Result<blake3::Hash> {
    let Some(snapshot) = snapshot else {
        return query::digest(None, query, &mut Listing::default());
    };
    let name = query::fingerprint(query);
    let kv = snapshot.shared().kv.as_ref();
    if let Some(known) = cache::answer(snapshot, &name)?
        && manifest::is_kept(kv, &known)?
    {
        return Ok(known);
    }
    let compute = |reuse: bool| -> Result<(blake3::Hash, Listing)> {
        let mut listing = Listing::default();
        let digest = match LayerView::of(snapshot) {
            // A stack of no layers is the empty root.
            Err(StoreError::Invalid(_)) if snapshot.layers().is_empty() => {
                query::digest(None, query, &mut listing)
            }
            view => query::digest(Some(Hasher::new(&view?, snapshot, reuse)?), query, &mut listing),
        };
        Ok((digest?, listing))
    };
    let (mut digest, mut listing) = compute(true)?;
    let _kept = snapshot.shared().manifests.read();
    if !listing.is_whole(kv)? {
        (digest, listing) = compute(false)?;
    }
    let mut batch = Batch::new();
    if !manifest::is_kept(kv, &digest)? {
        listing.keep(kv, &mut batch, &digest)?;
    }
    cache::remember(snapshot, &name, digest, batch)?;
    Ok(digest)
}

/// Digest of what a snapshot is made of, layer by layer: an image's layer counts by its chain id,
/// without being unpacked; another by its files and marks, chained on those below it.
pub fn output_digest(snapshot: Option<&SnapshotRef>) -> Result<blake3::Hash> {
    const NAME: &[u8] = b"output";
    let mut todo = Vec::new();
    let mut next = snapshot.cloned();
    // Downwards to the first snapshot whose answer is known, and up again.
    let mut digest = loop {
        let Some(current) = next else { break blake3::hash(b"scratch") };
        if let Some(known) = cache::answer(&current, NAME)? {
            break known;
        }
        if let Some(chain_id) = current.chain_id() {
            break tagged(b"chain", &[chain_id.as_bytes()]);
        }
        if current.is_stack() {
            // Each layer counts alone: what it was once made on is not part of the stack.
            let layers = current.layers().iter().map(layer_digest).collect::<Result<Vec<_>>>()?;
            let parts: Vec<&[u8]> = layers.iter().map(|digest| digest.as_bytes().as_slice()).collect();
            let digest = tagged(b"stack", &parts);
            cache::remember(&current, NAME, digest, Batch::new())?;
            break digest;
        }
        next = current.parent();
        todo.push(current);
    };
    for layer in todo.into_iter().rev() {
        digest = tagged(b"layer", &[digest.as_bytes(), layer_digest(&layer)?.as_bytes()]);
        cache::remember(&layer, NAME, digest, Batch::new())?;
    }
    Ok(digest)
}

/// Digest of one layer alone, with its marks of deletion.
fn layer_digest(layer: &SnapshotRef) -> Result<blake3::Hash> {
    const NAME: &[u8] = b"layer";
    if let Some(known) = cache::answer(layer, NAME)? {
        return Ok(known);
    }
    let digest = match layer.lazy()? {
        Some(lazy) => tagged(b"diff", &[lazy.blob.diff_id.as_bytes()]),
        None => entry::layer(layer)?,
    };
    cache::remember(layer, NAME, digest, Batch::new())?;
    Ok(digest)
}

/// Hands over digests of file contents that were computed while the data passed, so that files need not be read again,
/// and what [`known_files`] told of the same files elsewhere.
pub fn record_files(layer: &SnapshotRef, files: Files) -> Result<()> {
    cache::add_files(layer, files)
}

/// What is known of a layer, in the form that [`record_files`] takes, to be carried over to another one.
pub fn known_files(layer: &SnapshotRef) -> Result<Files> {
    Ok(cache::files(layer)?.as_ref().clone())
}

/// Drops what is no longer true once the entries at `changed` are others: what is known of them, of what is below them,
/// and of the directories above.
pub fn forget_changed(files: &mut Files, changed: &HashSet<&[u8]>) {
    fn above(path: &[u8]) -> impl Iterator<Item = &[u8]> {
        path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(end, _)| &path[..end])
    }
    if changed.is_empty() {
        return;
    }
    files.retain(|path, _| !above(path).chain([path.as_slice()]).any(|path| changed.contains(path)));
    for dir in changed.iter().flat_map(|path| above(path)).chain([&b""[..]]) {
        files.remove(dir);
    }
}

/// blake3 over a tag and parts, none of which can run into the next.
fn tagged(tag: &[u8], parts: &[&[u8]]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    update(&mut hasher, tag);
    for part in parts {
        update(&mut hasher, part);
    }
    hasher.finalize()
}

/// Feeds a part with its length in front.
fn update(hasher: &mut blake3::Hasher, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes());
    hasher.update(part);
}

/// Runs `work` on each item, on several threads if there is enough of it, and gives the first error.
fn in_parallel<T: Sync>(items: &[T], worthwhile: bool, work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    // Asking for the cores reads files; most trees are too small for that.
    let threads = match worthwhile {
        true => std::thread::available_parallelism().map_or(1, usize::from).min(items.len()),
        false => 1,
    };
    if threads <= 1 {
        return items.iter().try_for_each(work);
    }
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = work(item) {
                        next.store(items.len(), Ordering::Relaxed);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
