//! Forgetting what was recorded about results that are gone: keys that name them, and what was learnt of
//! operations that nobody ran for long. All of it is of use only to save work, so a record too few costs
//! a later build time and nothing else.

use std::sync::PoisonError;

use crate::codec;
use crate::error::Result;
use crate::evictions;
use crate::keys::{Encoded, EncodedOp, KeyStore, MISSING_RESULT, today};
use crate::kv::{Batch, Cf, Kv};
use crate::store::Store;

/// There since something was removed that keys may name.
const GONE: &[u8] = b"results gone";
/// How long an operation's duration and its mark as a follower are remembered after they were last written, in
/// days. As long as results are kept that nobody uses.
const OPERATIONS: u32 = 60;
/// How many records are looked at while nothing can be recorded.
const AT_ONCE: usize = 64;

/// Notes, together with the removal, that keys may name a result that is gone.
pub(crate) fn note(batch: &mut Batch) {
    batch.put(Cf::Meta, GONE, []);
}

impl Store {
    /// Forgets keys whose results were removed since the last call, and what is known of operations that nobody
    /// ran for long; gives the number of records. Does nothing if no result was removed. Builds go on meanwhile.
    pub fn forget_gone(&self) -> Result<usize> {
        let kv = self.shared().kv.as_ref();
        self.shared().check_open()?;
        if kv.get(Cf::Meta, GONE)?.is_none() {
            return Ok(0);
        }
        // Before looking: what goes from now on may be overlooked and needs a note of its own.
        let mut batch = Batch::new();
        batch.delete(Cf::Meta, GONE);
        kv.write_freeing(batch)?;
        let is_gone = |value: &[u8]| names_gone(kv, value);
        // Keys are digests: so their first bytes part them evenly.
        let mut count = 0;
        for first in 0..=u8::MAX {
            self.shared().check_open()?;
            count += self.keys().forget(Cf::Keys, &[first], &is_gone)?;
        }
        let oldest = today().saturating_sub(OPERATIONS);
        let is_old = |value: &[u8]| {
            Ok(codec::decode::<EncodedOp>("operation", b"", value).is_ok_and(|op| op.day < oldest))
        };
        count += self.keys().forget(Cf::Ops, b"", &is_old)?;
        kv.reclaim()?;
        Ok(count)
    }
}

/// Whether a key's record names a snapshot that is not there. One that can't be read is of no use either. While it is
/// known why the snapshot went, the key stays: by it a build learns that.
fn names_gone(kv: &dyn Kv, value: &[u8]) -> Result<bool> {
    let Ok(record) = codec::decode::<Encoded>("key", b"", value) else { return Ok(true) };
    for id in record.results.iter().filter(|id| !id.is_empty() && *id != MISSING_RESULT) {
        if kv.get(Cf::Snapshots, id.as_bytes())?.is_none() {
            return Ok(evictions::find(kv, id)?.is_none());
        }
    }
    Ok(false)
}

impl KeyStore {
    /// Removes those records under `prefix` that are `useless`; gives their number.
    fn forget(&self, cf: Cf, prefix: &[u8], useless: &dyn Fn(&[u8]) -> Result<bool>) -> Result<usize> {
        let mut found = Vec::new();
        self.kv.scan(cf, prefix, &mut |key, value| {
            if useless(value)? {
                found.push(key.to_vec());
            }
            Ok(true)
        })?;
        let mut count = 0;
        for keys in found.chunks(AT_ONCE) {
            let _recording = self.recording.write().unwrap_or_else(PoisonError::into_inner);
            let mut batch = Batch::new();
            for key in keys {
                // A build may have recorded a new result under the key since it was looked at.
                if let Some(value) = self.kv.get(cf, key)?
                    && useless(&value)?
                {
                    batch.delete(cf, key.as_slice());
                }
            }
            count += batch.changes().len();
            self.kv.write_freeing(batch)?;
        }
        Ok(count)
    }
}
