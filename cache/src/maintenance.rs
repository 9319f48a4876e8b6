//! The store's one background thread: syncs epochs, empties the trash, writes usage statistics.
//! It sleeps as long as there is nothing to do.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Result, StoreError};
use crate::fsx;
use crate::store::Shared;

/// Wakes the thread.
#[derive(Default)]
pub(crate) struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    dirty_since: Option<Instant>,
    trash: bool,
    stop: bool,
}

enum Work {
    Trash,
    Sync,
    Stop,
}

impl Signal {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was committed that is not on disk for certain.
    pub(crate) fn dirty(&self) {
        let mut state = self.lock();
        if state.dirty_since.is_none() {
            state.dirty_since = Some(Instant::now());
            self.changed.notify_one();
        }
    }

    /// Something lies in the trash.
    pub(crate) fn trash(&self) {
        let mut state = self.lock();
        if !state.trash {
            state.trash = true;
            self.changed.notify_one();
        }
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_one();
    }

    fn next(&self, interval: Duration) -> Work {
        let mut state = self.lock();
        loop {
            if state.stop {
                return Work::Stop;
            }
            if std::mem::take(&mut state.trash) {
                return Work::Trash;
            }
            let Some(since) = state.dirty_since else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = interval.saturating_sub(since.elapsed());
            if left.is_zero() {
                state.dirty_since = None;
                return Work::Sync;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The running thread.
pub(crate) struct Maintenance {
    signal: Arc<Signal>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Maintenance {
    pub(crate) fn start(shared: &Arc<Shared>, interval: Duration) -> Result<Self> {
        let signal = Arc::clone(&shared.signal);
        let weak = Arc::downgrade(shared);
        signal.trash();
        let of_thread = Arc::clone(&signal);
        let thread = std::thread::Builder::new()
            .name("kiln-store".to_owned())
            .stack_size(256 << 10)
            .spawn(move || run(&of_thread, &weak, interval))
            .map_err(|e| StoreError::io("start a thread for", &shared.root, e))?;
        Ok(Self { signal, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the thread after what it is doing.
    pub(crate) fn stop(&self) {
        self.signal.stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the store's background thread panicked");
        }
    }
}

fn run(signal: &Signal, shared: &Weak<Shared>, interval: Duration) {
    loop {
        let work = signal.next(interval);
        let Some(shared) = shared.upgrade() else { return };
        match work {
            Work::Stop => return,
            Work::Trash => empty_trash(&shared),
            Work::Sync => {
                let done = shared
                    .usage
                    .flush(shared.kv.as_ref())
                    .and_then(|()| shared.epochs.advance(shared.kv.as_ref(), &shared.root, false))
                    .and_then(|()| shared.kv.settle());
                if let Err(error) = done {
                    tracing::warn!(%error, "can't sync the store");
                }
                shared.content.shrink();
            }
        }
    }
}

/// Directories keep the size that they once needed: from so many bytes on an empty one is replaced.
const LARGE: u64 = 64 << 10;

fn empty_trash(shared: &Shared) {
    let trash = shared.root.join("trash");
    match fsx::list(&trash) {
        Err(error) => tracing::warn!(%error, "can't list the trash"),
        Ok(names) => {
            for name in names {
                if let Err(error) = fsx::remove_tree(&trash.join(&name)) {
                    tracing::warn!(path = %trash.join(&name).display(), %error, "can't remove");
                }
            }
            if fsx::occupied(&trash) > LARGE {
                let fresh = shared.staging().join(fsx::random_id());
                // Refused if there is something in it again: then it is replaced after that.
                if std::fs::create_dir(&fresh).is_ok() && std::fs::rename(&fresh, &trash).is_err() {
                    let _ = std::fs::remove_dir(&fresh);
                }
            }
        }
    }
}
