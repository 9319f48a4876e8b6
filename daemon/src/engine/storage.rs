//! Disk usage, pruning, and garbage collection after builds. Blocking, except for the collector,
//! which works on a thread of its own.

use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use kiln_cache::{BlobInfo, GcPolicy, PruneOptions, Store, StoreError, UsageRecord};
use kiln_proto::{control, types};
use kiln_worker::Worker;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Engine;
use super::failure::store_error;
use crate::config::{self, DiskSpace, GcConfig};
use crate::error::BuildError;

/// Builds that end within this time share one collection.
const SETTLE: Duration = Duration::from_secs(1);
/// With more memory than this, in bytes, a build's is given back as soon as it has ended.
const PLENTY: u64 = 88 << 20;
/// From the end of one collection to the next one.
const PAUSE: Duration = Duration::from_secs(60);

/// Nanoseconds on the wire; a negative number counts as none.
fn duration(nanos: i64) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
}

fn bytes(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn record(record: UsageRecord) -> control::UsageRecord {
    #[allow(deprecated)]
    control::UsageRecord {
        id: record.id,
        mutable: record.mutable,
        in_use: record.in_use,
        size: i64::try_from(record.size).unwrap_or(i64::MAX),
        parent: record.parents.first().cloned().unwrap_or_default(),
        created_at: Some(record.created.into()),
        last_used_at: record.last_used.map(SystemTime::into),
        usage_count: i64::try_from(record.usage_count).unwrap_or(i64::MAX),
        description: record.description,
        record_type: record.record_type,
        shared: record.shared,
        parents: record.parents,
    }
}

impl Engine {
    /// What is in the store.
    pub(crate) fn usage(
        &self,
        request: &control::DiskUsageRequest,
    ) -> Result<Vec<control::UsageRecord>, BuildError> {
        let age = (request.age_limit > 0).then(|| duration(request.age_limit));
        let mut records = self.store.usage(&request.filter, age).map_err(store_error)?;
        // Clients take each record for something that can go.
        if !request.filter.iter().any(|filter| filter == crate::STORE_RECORDS) {
            records.retain(|record| record.record_type != kiln_cache::STORE_RECORD);
        }
        Ok(records.into_iter().map(record).collect())
    }

    /// Removes what a client no longer wants; `removed` is called with each record that went.
    pub(crate) fn prune(
        &self,
        request: &control::PruneRequest,
        removed: &mut dyn FnMut(control::UsageRecord),
    ) -> Result<(), BuildError> {
        let options = PruneOptions {
            filters: request.filter.clone(),
            all: request.all,
            keep_duration: duration(request.keep_duration),
            reserved_space: bytes(request.reserved_space),
            max_used_space: bytes(request.max_used_space),
            min_free_space: bytes(request.min_free_space),
        };
        self.store.prune(&options, &mut |gone| removed(record(gone))).map_err(store_error)
    }

    /// The digests of all blobs.
    pub(crate) fn blobs(&self) -> Result<Vec<String>, BuildError> {
        self.store.blobs().digests().map_err(store_error)
    }

    /// What is known of a blob.
    pub(crate) fn blob_info(&self, digest: &str) -> Result<Option<BlobInfo>, BuildError> {
        self.store.blobs().info(digest).map_err(store_error)
    }

    /// A blob and its size.
    pub(crate) fn open_blob(&self, digest: &str) -> Result<Option<(std::fs::File, u64)>, BuildError> {
        let Some(blob) = self.store.blobs().get(digest).map_err(store_error)? else { return Ok(None) };
        let file = blob.open().map_err(store_error)?;
        Ok(Some((file, blob.size())))
    }
}

/// Cleans up in the background: soon after the start, and after builds.
pub(super) struct Collector {
    policies: Vec<GcPolicy>,
    wanted: Arc<Notify>,
    enabled: bool,
}

impl Collector {
    /// Starts the task that collects. It ends with the store.
    pub(super) fn new(store: &Arc<Store>, worker: &Arc<Worker>, config: &GcConfig) -> Self {
        let policies = policies(config, store.root());
        let wanted = Arc::new(Notify::new());
        wanted.notify_one();
        let rounds = Rounds {
            store: Arc::downgrade(store),
            worker: Arc::downgrade(worker),
            policies: if config.enabled { policies.clone() } else { Vec::new() },
        };
        tokio::spawn(collect(Arc::new(rounds), wanted.clone()));
        Self { policies, wanted, enabled: config.enabled }
    }

    /// Asks for a collection soon.
    pub(super) fn request(&self) {
        self.wanted.notify_one();
    }

    /// The rules as the worker record shows them.
    pub(super) fn records(&self) -> Vec<types::GcPolicy> {
        if !self.enabled {
            return Vec::new();
        }
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.policies
            .iter()
            .map(|policy| types::GcPolicy {
                all: policy.all,
                keep_duration: i64::try_from(policy.keep_duration.as_nanos()).unwrap_or(i64::MAX),
                filters: policy.filters.clone(),
                reserved_space: number(policy.reserved_space),
                max_used_space: number(policy.max_used_space),
                min_free_space: number(policy.min_free_space),
            })
            .collect()
    }
}

/// What each collection needs.
struct Rounds {
    store: Weak<Store>,
    worker: Weak<Worker>,
    policies: Vec<GcPolicy>,
}

/// Collects garbage and gives memory back, at the start and whenever builds have ended.
async fn collect(rounds: Arc<Rounds>, wanted: Arc<Notify>) {
    let mut next = Instant::now();
    loop {
        wanted.notified().await;
        // Builds that follow one another leave no time for the rest.
        if kiln_alloc::resident() > PLENTY
            && tokio::task::spawn_blocking(kiln_alloc::give_back).await.is_err()
        {
            return;
        }
        tokio::time::sleep(SETTLE).await;
        if Instant::now() < next {
            if tokio::task::spawn_blocking(kiln_alloc::give_back).await.is_err() {
                return;
            }
            tokio::select! {
                () = wanted.notified() => {
                    wanted.notify_one();
                    continue;
                }
                () = tokio::time::sleep_until(next) => {}
            }
        }
        let rounds = rounds.clone();
        let done = tokio::task::spawn_blocking(move || {
            let goes_on = rounds.collect();
            kiln_alloc::give_back();
            goes_on
        });
        if !matches!(done.await, Ok(true)) {
            return;
        }
        next = Instant::now() + PAUSE;
    }
}

impl Rounds {
    /// One collection; false if there will never be anything to collect again.
    fn collect(&self) -> bool {
        let (Some(store), Some(worker)) = (self.store.upgrade(), self.worker.upgrade()) else { return false };
        let (mut records, mut bytes) = (0, 0);
        let collected = store.collect_garbage(&self.policies, &mut |record| {
            records += 1;
            bytes += record.size;
            if record.mutable {
                let (kind, name, bytes) = (record.record_type, record.description, record.size);
                tracing::info!(kind, name, bytes, "removed to free space");
            }
        });
        if records > 0 {
            tracing::info!(records, bytes, "collected garbage");
            self.warn_of_narrow_limits(&store);
        }
        let forgotten = collected.and_then(|()| store.forget_gone());
        match forgotten {
            Ok(_) => {}
            Err(StoreError::Closed) => return false,
            Err(error) => tracing::warn!(%error, "collecting garbage"),
        }
        if let Err(error) = worker.forget_gone() {
            tracing::debug!(%error, "notes of images that are gone stay");
        }
        true
    }
}

impl Rounds {
    /// What the store takes for itself can't be collected: with a limit below that, nothing ever stays.
    fn warn_of_narrow_limits(&self, store: &Store) {
        // One with filters leaves everything else as it is.
        let limits =
            self.policies.iter().filter(|policy| policy.max_used_space > 0 && policy.filters.is_empty());
        let Some(limit) = limits.map(|policy| policy.max_used_space.max(policy.reserved_space)).min() else {
            return;
        };
        let own = store.usage(&[crate::STORE_RECORDS.to_owned()], None).unwrap_or_default();
        let own: u64 = own.iter().map(|record| record.size).sum();
        if own >= limit {
            tracing::warn!(
                own,
                limit,
                "the cache's own records take more bytes than its limit: nothing stays cached"
            );
        }
    }
}

/// The configured rules, or the default list with the configured limits, or with limits by the disk's size.
fn policies(config: &GcConfig, root: &Path) -> Vec<GcPolicy> {
    let capacity = rustix::fs::statvfs(root).map_or(0, |stat| stat.f_blocks * stat.f_frsize);
    let space = |space: Option<DiskSpace>| space.map_or(0, |space| bytes(space.bytes(capacity)));
    if !config.policies.is_empty() {
        return config.policies.iter().map(|policy| configured(policy, &space)).collect();
    }
    let [reserved, max_used, min_free] = match [config.reserved, config.max_used, config.min_free].map(space)
    {
        [0, 0, 0] => limits(capacity),
        configured => configured,
    };
    // Without any limit the list would remove everything.
    if [reserved, max_used, min_free] == [0, 0, 0] {
        return Vec::new();
    }
    PruneOptions::defaults(reserved, max_used, min_free)
}

/// BuildKit's limits for a disk: bytes that are always allowed, that may be used, and that stay free.
fn limits(capacity: u64) -> [u64; 3] {
    const GB: u64 = 1_000_000_000;
    [(capacity / 10).min(10 * GB), (capacity / 10 * 8).min(100 * GB), capacity / 5]
}

fn configured(policy: &config::GcPolicy, space: &dyn Fn(Option<DiskSpace>) -> u64) -> GcPolicy {
    GcPolicy {
        filters: policy.filters.clone(),
        all: policy.all,
        keep_duration: policy.keep_duration,
        reserved_space: space(policy.reserved),
        max_used_space: space(policy.max_used),
        min_free_space: space(policy.min_free),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    #[test]
    fn limits_follow_the_disk_up_to_a_point() {
        assert_eq!(limits(50 * GB), [5 * GB, 40 * GB, 10 * GB]);
        assert_eq!(limits(1000 * GB), [10 * GB, 100 * GB, 200 * GB]);
    }

    #[test]
    fn the_default_list_has_one_budget_for_all_records() {
        let list = policies(&GcConfig::default(), Path::new("/"));
        assert_eq!(list.len(), 4);
        let budget =
            |policy: &GcPolicy| (policy.reserved_space, policy.max_used_space, policy.min_free_space);
        assert!(list.iter().all(|policy| budget(policy) == budget(&list[0])), "{list:?}");
        assert!(list[0].filters.contains(&"type==exec.cachemount".to_owned()));
        assert!(list[3].all && !list[2].all);
    }

    #[test]
    fn a_configured_limit_stands_alone() {
        let config = GcConfig { reserved: Some(DiskSpace::Bytes(7)), ..GcConfig::default() };
        let last = policies(&config, Path::new("/")).pop().expect("a policy");
        assert_eq!((last.reserved_space, last.max_used_space, last.min_free_space), (7, 0, 0));
        let config = GcConfig { min_free: Some(DiskSpace::Percent(0)), ..GcConfig::default() };
        assert_eq!(policies(&config, Path::new("/")), policies(&GcConfig::default(), Path::new("/")));
        // A disk that can't be measured has no limits.
        assert_eq!(policies(&GcConfig::default(), Path::new("/no/such/directory")), []);
    }
}
