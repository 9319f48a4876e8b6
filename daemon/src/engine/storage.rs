//! Disk usage, pruning, and garbage collection after builds. Blocking, except for the collector,
//! which works on a thread of its own.

use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use kiln_cache::{GcPolicy, PruneOptions, Store, StoreError, UsageRecord};
use kiln_proto::{control, types};
use tokio::sync::Notify;

use super::Engine;
use super::failure::store_error;
use crate::config::{self, DiskSpace, GcConfig};
use crate::error::BuildError;
use crate::memory;

/// Builds that end within this time share one collection.
const SETTLE: Duration = Duration::from_secs(1);

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
        let records = self.store.usage(&request.filter, age).map_err(store_error)?;
        Ok(records.into_iter().map(record).collect())
    }

    /// Removes what a client no longer wants; gives what went.
    pub(crate) fn prune(
        &self,
        request: &control::PruneRequest,
    ) -> Result<Vec<control::UsageRecord>, BuildError> {
        let options = PruneOptions {
            filters: request.filter.clone(),
            all: request.all,
            keep_duration: duration(request.keep_duration),
            reserved_space: bytes(request.reserved_space),
            max_used_space: bytes(request.max_used_space),
            min_free_space: bytes(request.min_free_space),
        };
        let mut removed = Vec::new();
        self.store.prune(&options, &mut |gone| removed.push(record(gone))).map_err(store_error)?;
        Ok(removed)
    }

    /// A blob and its size.
    pub(crate) fn open_blob(&self, digest: &str) -> Result<Option<(std::fs::File, u64)>, BuildError> {
        let Some(blob) = self.store.blobs().get(digest).map_err(store_error)? else { return Ok(None) };
        let file = blob.open().map_err(store_error)?;
        Ok(Some((file, blob.size())))
    }
}

/// Cleans up in the background when builds have ended.
pub(super) struct Collector {
    policies: Vec<GcPolicy>,
    wanted: Arc<Notify>,
    enabled: bool,
}

impl Collector {
    /// Starts the task that collects. It ends with the store.
    pub(super) fn new(store: &Arc<Store>, config: &GcConfig) -> Self {
        let policies = policies(config, store.root());
        let wanted = Arc::new(Notify::new());
        let rules = if config.enabled { policies.clone() } else { Vec::new() };
        tokio::spawn(after_builds(Arc::downgrade(store), rules, wanted.clone()));
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

/// Collects garbage, and gives memory back, whenever builds have ended.
async fn after_builds(store: Weak<Store>, policies: Vec<GcPolicy>, wanted: Arc<Notify>) {
    loop {
        wanted.notified().await;
        tokio::time::sleep(SETTLE).await;
        let (store, policies) = (store.clone(), policies.clone());
        let done = tokio::task::spawn_blocking(move || {
            let Some(store) = store.upgrade() else { return false };
            match store.collect_garbage(&policies) {
                Ok(0) => {}
                Ok(freed) => tracing::info!(bytes = freed, "collected garbage"),
                Err(StoreError::Closed) => return false,
                Err(error) => tracing::warn!(%error, "collecting garbage"),
            }
            memory::give_back();
            true
        });
        if !matches!(done.await, Ok(true)) {
            return;
        }
    }
}

/// The configured rules, or the default list with the configured or measured limits.
fn policies(config: &GcConfig, root: &Path) -> Vec<GcPolicy> {
    let capacity = rustix::fs::statvfs(root).map_or(0, |stat| stat.f_blocks * stat.f_frsize);
    let space = |space: Option<DiskSpace>| space.map_or(0, |space| bytes(space.bytes(capacity)));
    if !config.policies.is_empty() {
        return config.policies.iter().map(|policy| configured(policy, &space)).collect();
    }
    let or = |value: Option<DiskSpace>, default| value.map_or(default, |value| space(Some(value)));
    let reserved = or(config.reserved, capacity / 10);
    let max_used = or(config.max_used, capacity / 10 * 8);
    let min_free = or(config.min_free, capacity / 5);
    PruneOptions::defaults(reserved, max_used, min_free)
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
