//! Notes on what garbage collection removed: by which rule and when, so that a step that has to run
//! again for it can say so. Only so many of the newest are kept.

use std::time::SystemTime;

use crate::codec;
use crate::error::Result;
use crate::gc::PruneOptions;
use crate::kv::{Batch, Cf, Kv};
use crate::{gone, values};

/// Why a snapshot is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// The rule, for people: `GC policy 2`, or the prune command with its flags.
    pub rule: String,
    /// When it went.
    pub at: SystemTime,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Note {
    #[prost(string, tag = "1")]
    rule: String,
    #[prost(int64, tag = "2")]
    at: i64,
}

fn key(id: &str) -> Vec<u8> {
    values::key(b'e', id, "")
}

/// Notes a removal in the batch that does it.
pub(crate) fn note(batch: &mut Batch, id: &str, rule: &str) {
    let note = Note { rule: rule.to_owned(), at: codec::nanos(SystemTime::now()) };
    batch.put(Cf::Values, key(id), codec::encode(&note));
}

pub(crate) fn find(kv: &dyn Kv, id: &str) -> Result<Option<Eviction>> {
    let key = key(id);
    let Some(bytes) = kv.get(Cf::Values, &key)? else { return Ok(None) };
    let note: Note = codec::decode("eviction", &key, &bytes)?;
    Ok(Some(Eviction { rule: note.rule, at: codec::time(note.at) }))
}

/// Forgets the oldest notes where there are more than `kept`.
pub(crate) fn trim(kv: &dyn Kv, kept: usize) -> Result<()> {
    let mut notes = Vec::new();
    kv.scan(Cf::Values, b"e", &mut |key, value| {
        notes.push((codec::decode::<Note>("eviction", key, value)?.at, key.to_vec()));
        Ok(true)
    })?;
    let Some(surplus) = notes.len().checked_sub(kept).filter(|surplus| *surplus > 0) else { return Ok(()) };
    notes.sort_unstable();
    let mut batch = Batch::new();
    for (_, key) in notes.drain(..surplus) {
        batch.delete(Cf::Values, key);
    }
    // Nothing else needs the keys of those any longer.
    gone::note(&mut batch);
    kv.write_freeing(batch)
}

/// A prune request as the command that makes it.
pub(crate) fn command(options: &PruneOptions) -> String {
    let mut out = "kiln prune".to_owned();
    for filter in &options.filters {
        out.push_str(&format!(" --filter {filter}"));
    }
    if options.all {
        out.push_str(" --all");
    }
    if !options.keep_duration.is_zero() {
        out.push_str(&format!(" --keep-duration {}s", options.keep_duration.as_secs()));
    }
    for (flag, value) in [
        ("reserved-space", options.reserved_space),
        ("max-used-space", options.max_used_space),
        ("min-free-space", options.min_free_space),
    ] {
        if value != 0 {
            out.push_str(&format!(" --{flag} {value}"));
        }
    }
    out
}
