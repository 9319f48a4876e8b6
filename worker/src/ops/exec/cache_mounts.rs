//! Who may use a cache mount's directory at the same time as whom.
//!
//! `shared` users of a key share its directory, a `locked` one has it alone, a `private` one takes a
//! directory of that key which nobody has open.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, PoisonError};

use kiln_cache::{MutableDir, MutableKind, Ref};
use kiln_proto::pb;
use kiln_solver::op::OpError;
use tokio::sync::{Mutex, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use tokio_util::sync::CancellationToken;

use crate::locks::Locks;
use crate::ops::file;
use crate::view::View;
use crate::worker::{Layers, Worker};

/// Name of the mark on a directory that has its initial content.
const FILLED: &str = "filled";

/// Who uses which cache mount, by its key.
pub(crate) type CacheMountLocks = Locks<KeyLock>;

#[derive(Default)]
pub(crate) struct KeyLock {
    users: Arc<RwLock<()>>,
    filling: Mutex<()>,
}

enum Guard {
    Shared { _guard: OwnedRwLockReadGuard<()> },
    Alone { _guard: OwnedRwLockWriteGuard<()> },
    Private,
}

/// A cache mount in use.
pub(crate) struct CacheMount {
    dir: MutableDir,
    _lock: Arc<KeyLock>,
    _guard: Guard,
}

impl CacheMount {
    pub(crate) fn path(&self) -> &std::path::Path {
        self.dir.path()
    }
}

/// A cache mount that a step wants.
pub(crate) struct Wanted {
    /// Names the directory.
    pub(crate) key: String,
    /// How it is shared.
    pub(crate) sharing: pb::CacheSharingOpt,
    /// What it holds at first.
    pub(crate) initial: Ref,
    /// For people.
    pub(crate) description: String,
}

/// Cache mounts that a build has emptied. Steps that ignore the cache start with empty ones, but see what earlier
/// steps of their own build left.
#[derive(Clone, Default)]
pub(crate) struct Emptied(Arc<std::sync::Mutex<HashSet<String>>>);

impl Emptied {
    /// True for a key that was not asked for before.
    fn is_first(&self, key: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned())
    }
}

/// Opens the directories of all cache mounts of one step, in their order. With `emptied` they forget what
/// earlier builds left.
pub(crate) async fn open_all(
    worker: &Worker,
    wanted: &[Wanted],
    emptied: Option<&Emptied>,
    cancel: &CancellationToken,
) -> Result<Vec<Arc<CacheMount>>, OpError> {
    // One order for all steps, and each key once, so that no two steps wait for each other.
    let mut by_key: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, mount) in wanted.iter().enumerate() {
        by_key.entry(&mount.key).or_default().push(index);
    }
    let mut opened: Vec<Option<Arc<CacheMount>>> = wanted.iter().map(|_| None).collect();
    for (key, indices) in by_key {
        let rank = |index: &usize| match wanted[*index].sharing {
            pb::CacheSharingOpt::Locked => 0,
            pb::CacheSharingOpt::Private => 1,
            pb::CacheSharingOpt::Shared => 2,
        };
        let Some(&strictest) = indices.iter().min_by_key(|index| rank(index)) else { continue };
        let mount = tokio::select! {
            mount = open(worker, &wanted[strictest], key, emptied) => Arc::new(mount?),
            () = cancel.cancelled() => return Err(OpError::new("context canceled")),
        };
        for index in indices {
            opened[index] = Some(mount.clone());
        }
    }
    Ok(opened.into_iter().flatten().collect())
}

async fn open(
    worker: &Worker,
    wanted: &Wanted,
    key: &str,
    emptied: Option<&Emptied>,
) -> Result<CacheMount, OpError> {
    let failed = |err: &dyn std::fmt::Display| OpError::new(format!("cache mount {key}: {err}"));
    let lock = worker.cache_mounts.of(key);
    let guard = match wanted.sharing {
        pb::CacheSharingOpt::Locked => Guard::Alone { _guard: lock.users.clone().write_owned().await },
        pb::CacheSharingOpt::Shared => Guard::Shared { _guard: lock.users.clone().read_owned().await },
        pb::CacheSharingOpt::Private => Guard::Private,
    };
    let _filling = lock.filling.lock().await;
    let dirs = worker.store().mutable();
    if emptied.is_some_and(|emptied| emptied.is_first(key)) {
        dirs.remove(MutableKind::CacheMount, key).map_err(|err| failed(&err))?;
    }
    let dir = match guard {
        Guard::Private => dirs.open_alone(MutableKind::CacheMount, key, &wanted.description),
        _ => dirs.open(MutableKind::CacheMount, key, &wanted.description),
    };
    let dir = dir.map_err(|err| failed(&err))?;
    if wanted.initial.is_some() && dir.kv(FILLED).map_err(|err| failed(&err))?.is_none() {
        let (layers, initial, target) = (worker.layers().clone(), wanted.initial.clone(), dir.clone());
        let filled = tokio::task::spawn_blocking(move || fill(&layers, &initial, &target)).await;
        filled.map_err(|err| failed(&err))?.map_err(|err| failed(&err))?;
    }
    drop(_filling);
    Ok(CacheMount { dir, _lock: lock, _guard: guard })
}

fn fill(layers: &Layers, initial: &Ref, dir: &MutableDir) -> Result<(), String> {
    let source = layers.view(initial).map_err(|err| err.to_string())?;
    let target = View::directory(dir.path(), Vec::new()).map_err(|err| err.to_string())?;
    file::copy_tree(source.fd(), target.fd()).map_err(|err| err.to_string())?;
    dir.set_kv(FILLED, b"1").map_err(|err| err.to_string())
}
