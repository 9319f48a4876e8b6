//! The way from finished work to the key store. What finishes at about the same time is written
//! together: whoever comes while somebody writes leaves it to them. Nothing here decides what is remembered.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_cache::{KeyChange, KeyStorage};
use rustc_hash::FxBuildHasher;
use tokio::sync::Notify;

use crate::op::Key;

/// From this many waiting entries on, who makes more should wait.
const FULL: usize = 4096;

/// How many keys one generation of [`Recent`] holds.
const GENERATION: usize = 1 << 17;

/// What is to be written, and what then happens.
pub(crate) struct Entry {
    pub(crate) changes: Vec<KeyChange>,
    pub(crate) then: Option<Box<dyn FnOnce() + Send>>,
}

pub(crate) struct Recorder {
    keys: Arc<dyn KeyStorage>,
    queue: Mutex<Queue>,
    /// How many entries are queued.
    waiting: AtomicUsize,
    recent: Mutex<Recent>,
    written: Notify,
}

#[derive(Default)]
struct Queue {
    entries: Vec<Entry>,
    /// Somebody is in [`Recorder::write_out`] and looks here again before they leave.
    writing: bool,
}

/// Keys that were queued of late. Tells without a read that a key which was not there is still not there.
#[derive(Default)]
struct Recent {
    generation: u64,
    now: HashSet<u64, FxBuildHasher>,
    before: HashSet<u64, FxBuildHasher>,
}

impl Recorder {
    pub(crate) fn new(keys: Arc<dyn KeyStorage>) -> Self {
        Self {
            keys,
            queue: Mutex::default(),
            waiting: AtomicUsize::new(0),
            recent: Mutex::default(),
            written: Notify::new(),
        }
    }

    /// Queues an entry, for whoever next calls [`Self::begin`].
    pub(crate) fn push(&self, entry: Entry) {
        lock(&self.recent).add(&entry.changes);
        let mut queue = lock(&self.queue);
        queue.entries.push(entry);
        self.waiting.store(queue.entries.len(), Ordering::Relaxed);
    }

    /// True if something is queued and nobody is writing: then the caller sees to it that [`Self::write_out`] is called.
    #[must_use]
    pub(crate) fn begin(&self) -> bool {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut queue = lock(&self.queue);
        !queue.entries.is_empty() && !std::mem::replace(&mut queue.writing, true)
    }

    /// Writes until nothing is queued. Blocks on the store: for microseconds an entry, unless that stalls.
    pub(crate) fn write_out(&self) {
        loop {
            let entries = {
                let mut queue = lock(&self.queue);
                if queue.entries.is_empty() {
                    queue.writing = false;
                    return;
                }
                self.waiting.store(0, Ordering::Relaxed);
                std::mem::take(&mut queue.entries)
            };
            let (changes, then): (Vec<_>, Vec<_>) =
                entries.into_iter().map(|entry| (entry.changes, entry.then)).unzip();
            let changes: Vec<KeyChange> = changes.into_iter().flatten().collect();
            // A store that can't be written costs a later build time, but doesn't make this one wrong.
            if !changes.is_empty() {
                let records = changes.len();
                match std::panic::catch_unwind(AssertUnwindSafe(|| self.keys.write(&changes))) {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!(records, %error, "results were not recorded"),
                    Err(_) => tracing::error!(records, "a panic while results were recorded"),
                }
            }
            for then in then.into_iter().flatten() {
                // Whoever is told must not keep the others from being written.
                if std::panic::catch_unwind(AssertUnwindSafe(then)).is_err() {
                    tracing::error!("a panic while telling that work was recorded");
                }
            }
            self.written.notify_waiters();
        }
    }

    /// Waits while too much is queued.
    pub(crate) async fn room(&self) {
        loop {
            let written = self.written.notified();
            if !self.is_full() {
                return;
            }
            written.await;
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= FULL
    }

    /// A moment, for [`Self::may_have_come`].
    pub(crate) fn moment(&self) -> u64 {
        lock(&self.recent).generation
    }

    /// False if a key that was looked for in vain at `moment` or later is certainly not in the store by now.
    pub(crate) fn may_have_come(&self, key: &Key, moment: u64) -> bool {
        let recent = lock(&self.recent);
        let short = short(key.as_bytes());
        moment + 1 < recent.generation || recent.now.contains(&short) || recent.before.contains(&short)
    }

    /// Gives the memory back; nobody should have a moment in mind.
    pub(crate) fn forget_recent(&self) {
        let mut recent = lock(&self.recent);
        *recent = Recent { generation: recent.generation + 2, ..Recent::default() };
    }
}

impl Recent {
    fn add(&mut self, changes: &[KeyChange]) {
        for change in changes {
            if let KeyChange::Record { keys, .. } = change {
                self.now.extend(keys.iter().map(short));
            }
        }
        if self.now.len() > GENERATION {
            self.generation += 1;
            self.before = std::mem::take(&mut self.now);
        }
    }
}

/// Enough of a key: who meets its double only looks once more.
fn short(key: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *key;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
