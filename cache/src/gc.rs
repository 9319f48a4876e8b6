//! Removing what is not needed: on request (prune) and by policy. Nothing that is held, and nothing
//! that something else stands on, is ever removed. Records of keys that point to removed results
//! are left alone; whoever loads such a result learns that it is gone.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, SystemTime};

use crate::error::Result;
use crate::filter::Filter;
use crate::fsx;
use crate::kv::Batch;
use crate::snapshots::record::{self, Record};
use crate::store::{Shared, Store};
use crate::usage::{Place, UsageRecord};
use crate::{blobs, evictions, mutable, values};

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
    /// BuildKit's default policies for the given limits, in bytes.
    pub fn defaults(reserved_space: u64, max_used_space: u64, min_free_space: u64) -> Vec<GcPolicy> {
        let day = Duration::from_secs(24 * 3600);
        let limits = Self { reserved_space, max_used_space, min_free_space, ..Self::default() };
        vec![
            Self {
                filters: ["source.local", "exec.cachemount", "source.git.checkout"]
                    .map(|kind| format!("type=={kind}"))
                    .to_vec(),
                keep_duration: 2 * day,
                max_used_space: 512 * 1_000_000,
                ..Self::default()
            },
            Self { keep_duration: 60 * day, ..limits.clone() },
            limits.clone(),
            Self { all: true, ..limits },
        ]
    }

    fn has_limits(&self) -> bool {
        self.reserved_space != 0 || self.max_used_space != 0 || self.min_free_space != 0
    }

    /// How many bytes may stay.
    fn allowance(&self, total: u64, free: u64) -> u64 {
        let mut keep = match self.max_used_space {
            0 => u64::MAX,
            max => max,
        };
        if self.min_free_space > free {
            keep = keep.min(total.saturating_sub(self.min_free_space - free));
        }
        keep.max(self.reserved_space)
    }
}

impl Store {
    /// Removes what `options` say; `removed` is called with each record that went.
    pub fn prune(&self, options: &PruneOptions, removed: &mut dyn FnMut(UsageRecord)) -> Result<()> {
        self.shared().prune(options, &evictions::command(options), removed)?;
        evictions::trim(self.shared().kv.as_ref())
    }

    /// Applies policies in order; gives the number of bytes that were freed.
    pub fn collect_garbage(&self, policies: &[GcPolicy]) -> Result<u64> {
        let mut freed = 0;
        for (number, policy) in policies.iter().enumerate() {
            self.shared()
                .prune(policy, &format!("GC policy {number}"), &mut |record| freed += record.size)?;
        }
        if freed > 0 {
            evictions::trim(self.shared().kv.as_ref())?;
        }
        Ok(freed)
    }
}

impl Shared {
    fn prune(&self, options: &PruneOptions, rule: &str, removed: &mut dyn FnMut(UsageRecord)) -> Result<()> {
        let filter = Filter::parse(&options.filters)?;
        let entries = self.ledger(true)?;
        let mut total: u64 = entries.iter().map(|entry| entry.record.size).sum();
        let keep = match options.has_limits() {
            true => options.allowance(total, fsx::free_space(&self.root)?),
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
            total = total.saturating_sub(entry.record.size);
            for base in &entry.record.parents {
                let Some(&base) = index.get(base.as_str()) else { continue };
                users[base] -= 1;
                if users[base] == 0 {
                    queue.insert(rank(base));
                }
            }
            removed(UsageRecord { in_use: false, ..entry.record.clone() });
        }
        Ok(())
    }

    /// Removes one record unless it is in use; says whether it did.
    fn remove(&self, id: &str, place: &Place, rule: &str) -> Result<bool> {
        let _guard = self.exclusive();
        self.check_open()?;
        let mut batch = Batch::new();
        let mut rubbish = Vec::new();
        match place {
            Place::Snapshot => {
                let Some(record) = Record::load(self.kv.as_ref(), id)? else { return Ok(false) };
                if self.snapshots.is_held(id)
                    || record::any_ref(self.kv.as_ref(), &values::key(b's', id, ""))?
                {
                    return Ok(false);
                }
                rubbish.push(self.root.join("snapshots").join(id));
                for digest in self.blob_digests(id)? {
                    if !self.blobs.is_held(&digest) && !self.has_other_user(&digest, id)? {
                        blobs::erase(&mut batch, &digest);
                        rubbish.push(blobs::file_path(&self.root, &digest));
                    }
                }
                record.erase(self.kv.as_ref(), &mut batch, id)?;
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
        }
        self.kv.write(batch)?;
        self.usage.forget(id);
        // Still under the guard: the same blob may be committed again at any time after.
        for path in rubbish {
            self.discard(&path);
        }
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
