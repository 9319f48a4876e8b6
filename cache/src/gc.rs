//! Removing what is not needed: on request (prune) and by policy. Nothing that is held, and nothing
//! that something else stands on, is ever removed. Records of keys that point to removed results
//! stay for a while (see [`Store::forget_gone`]); whoever loads such a result learns that it is gone.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::error::Result;
use crate::filter::Filter;
use crate::fsx;
use crate::kv::Batch;
use crate::snapshots::record::{self, Record};
use crate::store::{Shared, Store};
use crate::usage::{Entry, Part, Place, UsageRecord};
use crate::{RecordType, blobs, evictions, gone, mutable, values};

/// What to remove (wire: `PruneRequest`, `GCPolicy`). Without limits everything that matches goes;
/// with limits, the least recently used until they are met.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Only what matches one of these (none: all).
    pub filters: Vec<String>,
    /// Internal and frontend records, too.
    pub all: bool,
    /// Only what was not used for so long.
    pub keep_duration: Duration,
    /// Bytes that are always allowed.
    pub reserved_space: u64,
    /// Bytes that the store may take; 0 for no limit.
    pub max_used_space: u64,
    /// Bytes that should be free on the disk; 0 for no limit.
    pub min_free_space: u64,
}

/// One step of the automatic clean-up; steps are taken in order.
pub type GcPolicy = PruneOptions;

impl PruneOptions {
    /// The policies for these limits, in bytes. As BuildKit's, but for the first rule: there it removes cache
    /// mounts and client's directories that were idle for two days whenever the whole cache has more than
    /// 512 MB. Here they go first, too, but not before the limits that hold for everything are reached.
    pub fn defaults(reserved_space: u64, max_used_space: u64, min_free_space: u64) -> Vec<GcPolicy> {
        let day = Duration::from_secs(24 * 3600);
        let limits = Self { reserved_space, max_used_space, min_free_space, ..Self::default() };
        vec![
            Self {
                filters: [RecordType::LocalSource, RecordType::CacheMount, RecordType::GitCheckout]
                    .map(|kind| format!("type=={}", kind.as_str()))
                    .to_vec(),
                keep_duration: 2 * day,
                ..limits.clone()
            },
            Self { keep_duration: 60 * day, ..limits.clone() },
            limits.clone(),
            Self { all: true, ..limits },
        ]
    }

    fn has_limits(&self) -> bool {
        self.reserved_space != 0 || self.max_used_space != 0 || self.min_free_space != 0
    }

    /// How many bytes may stay. Space that is reserved is a limit by itself if there is no other one.
    fn allowance(&self, total: u64, free: u64) -> u64 {
        let max = (self.max_used_space != 0).then_some(self.max_used_space);
        let short = match self.min_free_space {
            0 => None,
            wanted => Some(total.saturating_sub(wanted.saturating_sub(free))),
        };
        let keep = [max, short].into_iter().flatten().min().unwrap_or(0);
        keep.max(self.reserved_space)
    }
}

impl Store {
    /// Removes what `options` say; `removed` is called with each record that went.
    pub fn prune(&self, options: &PruneOptions, removed: &mut dyn FnMut(UsageRecord)) -> Result<()> {
        let shared = self.shared();
        // What was deleted before and still takes space counts against no limit.
        shared.kv.reclaim()?;
        let any = shared.prune(options, &evictions::command(options), &shared.ledger()?, removed)?;
        shared.tidy(any)
    }

    /// Applies policies in order; `removed` is called with each record that went.
    pub fn collect_garbage(&self, policies: &[GcPolicy], removed: &mut dyn FnMut(UsageRecord)) -> Result<()> {
        if policies.is_empty() {
            return Ok(());
        }
        let shared = self.shared();
        shared.kv.reclaim()?;
        let mut entries = shared.ledger()?;
        let mut any = false;
        for (number, policy) in policies.iter().enumerate() {
            if shared.prune(policy, &format!("GC policy {number}"), &entries, removed)? {
                entries = shared.ledger()?;
                any = true;
            }
        }
        shared.tidy(any)
    }
}

impl Shared {
    /// After records were removed, if any were.
    fn tidy(&self, any: bool) -> Result<()> {
        if any {
            evictions::trim(self.kv.as_ref(), self.eviction_notes)?;
            self.kv.reclaim()?;
        }
        Ok(())
    }

    /// Removes of `entries`, the whole ledger, what `options` say, and notes that `rule` did it; true if
    /// that was anything.
    fn prune(
        &self,
        options: &PruneOptions,
        rule: &str,
        entries: &[Entry],
        removed: &mut dyn FnMut(UsageRecord),
    ) -> Result<bool> {
        let filter = Filter::parse(&options.filters)?;
        let mut any = false;
        let mut total: u64 = entries.iter().map(|entry| entry.record.size).sum();
        let keep = match options.has_limits() {
            // What was removed a moment ago may not be free yet. Should it become free between the two
            // measurements it counts twice: then too little goes, not too much.
            true => options.allowance(total, self.discarded()?.saturating_add(fsx::free_space(&self.root)?)),
            false => 0,
        };
        let cut_off = SystemTime::now().checked_sub(options.keep_duration);
        let eligible = |record: &UsageRecord| {
            let last = record.last_used.unwrap_or(record.created);
            (options.all || !matches!(record.record_type.as_str(), "internal" | "frontend"))
                && (options.keep_duration.is_zero() || cut_off.is_some_and(|cut_off| last <= cut_off))
                && filter.matches(record)
        };

        let index: HashMap<&str, usize> =
            entries.iter().enumerate().map(|(i, entry)| (entry.record.id.as_str(), i)).collect();
        let mut users = vec![0usize; entries.len()];
        for base in entries.iter().flat_map(|entry| &entry.record.parents) {
            if let Some(&i) = index.get(base.as_str()) {
                users[i] += 1;
            }
        }
        let mut holders: HashMap<&Part, usize> = HashMap::new();
        for (part, _) in entries.iter().flat_map(|entry| &entry.parts) {
            *holders.entry(part).or_default() += 1;
        }
        let rank = |i: usize| {
            let record = &entries[i].record;
            (record.last_used.unwrap_or(record.created), record.usage_count, i)
        };
        let mut queue: BTreeSet<_> = (0..entries.len()).filter(|&i| users[i] == 0).map(rank).collect();
        while let Some((_, _, i)) = queue.pop_first() {
            if options.has_limits() && total <= keep {
                break;
            }
            let entry = &entries[i];
            if !eligible(&entry.record) || !self.remove(&entry.record.id, &entry.place, rule)? {
                continue;
            }
            any = true;
            let mut size = entry.own;
            for (part, bytes) in &entry.parts {
                if let Some(left) = holders.get_mut(part) {
                    *left -= 1;
                    size += if *left == 0 { *bytes } else { 0 };
                }
            }
            total = total.saturating_sub(size);
            for base in &entry.record.parents {
                let Some(&base) = index.get(base.as_str()) else { continue };
                users[base] -= 1;
                if users[base] == 0 {
                    queue.insert(rank(base));
                }
            }
            removed(UsageRecord { in_use: false, size, ..entry.record.clone() });
        }
        Ok(any)
    }

    /// Removes one record unless it is in use; says whether it did.
    fn remove(&self, id: &str, place: &Place, rule: &str) -> Result<bool> {
        let _guard = self.exclusive();
        self.check_open()?;
        let mut batch = Batch::new();
        let mut rubbish = Vec::new();
        match place {
            Place::Snapshot => {
                if !self.forget_snapshot(id, &mut batch, &mut rubbish)? {
                    return Ok(false);
                }
                rubbish.push(self.root.join("snapshots").join(id));
                gone::note(&mut batch);
                evictions::note(&mut batch, id, rule);
            }
            Place::Blob => {
                if self.blobs.is_held(id) || self.has_other_user(id, "")? {
                    return Ok(false);
                }
                blobs::erase(&mut batch, id);
                rubbish.push(blobs::file_path(&self.root, id));
            }
            Place::Mutable(key) => {
                // A directory opened under the same key since may be another one.
                let current = mutable::load(self.kv.as_ref(), key)?;
                if self.mutable.is_held(id) || current.is_none_or(|record| record.id != id) {
                    return Ok(false);
                }
                mutable::erase(self.kv.as_ref(), &mut batch, key, id)?;
                rubbish.push(mutable::dir_path(&self.root, id));
            }
            Place::Store => return Ok(false),
        }
        self.usage.forget(id);
        self.kv.write_freeing(batch)?;
        // Still under the guard: the same blob may be committed again at any time after.
        for path in rubbish {
            self.discard(&path);
        }
        Ok(true)
    }

    /// Adds to `batch` the removal of a snapshot's record and of all that goes with it, and to `rubbish` its blobs'
    /// files; false if something uses it. The caller keeps others out.
    pub(crate) fn forget_snapshot(
        &self,
        id: &str,
        batch: &mut Batch,
        rubbish: &mut Vec<PathBuf>,
    ) -> Result<bool> {
        let Some(record) = Record::load(self.kv.as_ref(), id)? else { return Ok(false) };
        if self.snapshots.is_held(id) || record::any_ref(self.kv.as_ref(), &values::key(b's', id, ""))? {
            return Ok(false);
        }
        for digest in self.blob_digests(id)? {
            if !self.blobs.is_held(&digest) && !self.has_other_user(&digest, id)? {
                blobs::erase(batch, &digest);
                rubbish.push(blobs::file_path(&self.root, &digest));
            }
        }
        record.erase(self.kv.as_ref(), batch, id)?;
        Ok(true)
    }

    fn has_other_user(&self, digest: &str, snapshot: &str) -> Result<bool> {
        let own = record::blob_user_key(digest, snapshot);
        let mut found = false;
        self.kv.scan(crate::kv::Cf::Refs, &record::blob_user_key(digest, ""), &mut |key, _| {
            found |= key != own;
            Ok(!found)
        })?;
        Ok(found)
    }
}
