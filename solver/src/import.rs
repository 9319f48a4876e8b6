//! Caches from elsewhere as the solver sees them: records beside the key store's, matched by BuildKit's way of making
//! keys. Where they come from and what their results are is the business of who brings them.

use futures::future::BoxFuture;
pub use kiln_cache::remote::{RecordDigest, RemoteLink, record_digest};

use crate::keys::Part;
use crate::op::{CacheMap, Key, OpError};

/// One cache that a build was told to look into. Its records are numbered.
pub trait ImportedCache<R>: Send + Sync + 'static {
    /// All records with a digest.
    fn records(&self, digest: &RecordDigest) -> &[u32];
    /// The digest of a record.
    fn digest(&self, record: u32) -> Option<RecordDigest>;
    /// For each input of a record, what it may be.
    fn inputs(&self, record: u32) -> &[Vec<RemoteLink>];
    /// True if there are results for a record.
    fn has_result(&self, record: u32) -> bool;
    /// A result of a record; `None` if there turns out to be none that can be had.
    fn load(&self, record: u32) -> BoxFuture<'_, Result<Option<R>, OpError>>;
}

/// How an operation is called in caches that are exchanged.
pub(crate) fn operation(map: &CacheMap) -> String {
    named(&map.digest)
}

fn named(key: &Key) -> String {
    format!("blake3:{}", key.to_hex())
}

/// The record that stands for content, and with which selector it is linked.
pub(crate) fn content(part: &Part, selector: Option<&str>) -> Option<(RecordDigest, String)> {
    const CONTENT: i64 = -1;
    match part {
        // What it selects is part of it.
        Part::Query(digest) => Some((record_digest(&named(digest), CONTENT), String::new())),
        Part::Output(digest) => {
            let name = format!("output:{}", named(digest));
            Some((record_digest(&name, CONTENT), selector.unwrap_or_default().to_owned()))
        }
        Part::Edge(..) => None,
    }
}
