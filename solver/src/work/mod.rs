//! One execution for one key, whoever asks. The table holds work weakly; each asker holds it
//! strongly; when the last asker leaves, the work is cancelled. Failure and progress reach all.

mod after;
mod board;
mod run;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use futures::FutureExt;
use rustc_hash::FxBuildHasher;
use tokio::task::AbortHandle;

pub(crate) use after::{After, build_ended};
pub(crate) use board::{Outcome, Watcher};
pub(crate) use run::{guarded, guarded_call};

use crate::limit::{Ask, Turn};
use crate::op::{CacheMap, Key, Op, OpClass};
use crate::produced::Produced;
use crate::progress::Event;
use crate::record::Entry;
use crate::solver::Shared;
use board::Board;
use run::End;

/// An operation that is ready to run, and how to remember what it makes.
pub(crate) struct Job<R> {
    pub(crate) vertex: Arc<str>,
    pub(crate) name: Arc<str>,
    pub(crate) op: Arc<dyn Op<R>>,
    pub(crate) map: Arc<CacheMap>,
    pub(crate) ignore_cache: bool,
    pub(crate) inputs: Vec<JobInput<R>>,
    /// Keys under which the result is recorded; none for a result without lasting identity.
    pub(crate) keys: Vec<Key>,
    /// Keys by which others may share this execution, or its record be found.
    pub(crate) shared_by: Vec<Key>,
    /// Content key to note in the record.
    pub(crate) content_key: Option<Key>,
    /// The output key is still to be recorded when the digests of the inputs are known.
    pub(crate) output_key_pending: bool,
    pub(crate) build: u64,
    pub(crate) priority: Duration,
    /// The recorder's moment before the first of the keys was looked up.
    pub(crate) looked_up: u64,
}

pub(crate) struct JobInput<R> {
    pub(crate) produced: Arc<Produced<R>>,
    pub(crate) output: u32,
    /// Digest of the content that the operation reads, if it says what that is.
    pub(crate) content: Option<Box<Key>>,
}

/// An execution that is queued or running.
pub(crate) struct Work<R> {
    board: Arc<Board<R>>,
    /// The build for which it was started.
    build: u64,
    table: InFlight<R>,
    claims: OnceLock<Vec<[u8; 32]>>,
    task: OnceLock<AbortHandle>,
    /// If it has to wait for a slot, and its first asker's place in the queue.
    turn: Mutex<Option<Turn>>,
    first: Option<Ask>,
}

impl<R> Drop for Work<R> {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
        for key in self.claims.get().into_iter().flatten() {
            self.table.map.remove_if(key, |_, work| work.strong_count() == 0);
        }
    }
}

/// A strong hold on work, for one vertex of one build.
pub(crate) struct Asker<R> {
    work: Arc<Work<R>>,
    watcher: u64,
    place: Option<Ask>,
    ours: bool,
}

impl<R> Drop for Asker<R> {
    fn drop(&mut self) {
        self.work.board.leave(self.watcher, self.ours);
        if let Some(place) = self.place
            && let Some(turn) = &*self.work.turn()
        {
            turn.leave(place);
        }
    }
}

impl<R> Asker<R> {
    /// What it holds.
    pub(crate) fn work(&self) -> &Arc<Work<R>> {
        &self.work
    }

    /// True if the work was started for the asker's build.
    pub(crate) fn is_ours(&self) -> bool {
        self.ours
    }
}

impl<R> Work<R> {
    /// Tells `watcher`, who asks for a build where it is so urgent, all that happened so far and all that will.
    /// `starter` is who it was begun for: that one counted as an asker from then on.
    pub(crate) fn ask(
        self: Arc<Self>,
        watcher: Arc<dyn Watcher<R>>,
        (build, priority): (u64, Duration),
        starter: bool,
    ) -> Asker<R> {
        let ours = build == self.build;
        let watcher = self.board.watch(watcher, ours && !starter);
        let place = match starter {
            true => self.first,
            false => self.turn().as_ref().map(|turn| turn.ask(build, priority)),
        };
        Asker { work: self, watcher, place, ours }
    }

    fn turn(&self) -> MutexGuard<'_, Option<Turn>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Table<R> = DashMap<[u8; 32], Weak<Work<R>>, FxBuildHasher>;

/// The table of work in flight, over all builds.
pub(crate) struct InFlight<R> {
    map: Arc<Table<R>>,
}

impl<R> Clone for InFlight<R> {
    fn clone(&self) -> Self {
        Self { map: self.map.clone() }
    }
}

impl<R> Default for InFlight<R> {
    fn default() -> Self {
        Self { map: Arc::default() }
    }
}

impl<R> InFlight<R> {
    /// The work that claimed `key`.
    pub(crate) fn join(&self, key: &Key) -> Option<Arc<Work<R>>> {
        // Upgraded only after the shard is unlocked: dropping the last handle locks it again.
        let work = self.map.get(key.as_bytes()).map(|entry| entry.value().clone());
        work?.upgrade()
    }

    /// Claims `key` for `work`, or answers who has it.
    fn claim(&self, key: [u8; 32], work: &Arc<Work<R>>) -> Option<Arc<Work<R>>> {
        match self.map.entry(key) {
            Slot::Occupied(mut entry) => match entry.get().upgrade() {
                Some(other) => Some(other),
                None => {
                    entry.insert(Arc::downgrade(work));
                    None
                }
            },
            Slot::Vacant(entry) => {
                entry.insert(Arc::downgrade(work));
                None
            }
        }
    }

    fn release(&self, work: &Arc<Work<R>>) {
        for key in work.claims.get().into_iter().flatten() {
            self.map.remove_if(key, |_, holder| std::ptr::eq(holder.as_ptr(), Arc::as_ptr(work)));
        }
    }
}

/// What became of a job.
pub(crate) enum Started<R> {
    /// It is queued or running.
    Begun(Arc<Work<R>>),
    /// Somebody else was at it already, under this key.
    Joined(Arc<Work<R>>, Key),
    /// It is done.
    Ended {
        /// When it began, and what it said.
        told: (Option<SystemTime>, Vec<Event>),
        /// How it ended.
        outcome: Outcome<R>,
    },
}

/// Starts the job, or joins who is at it under one of its keys.
///
/// Keys are claimed in their byte order. Work that holds some keys and finds a later one taken
/// follows its holder, so whoever waits holds smaller keys than whom it waits for: no circle.
pub(crate) fn start<R: Clone + Send + Sync + 'static>(shared: &Arc<Shared<R>>, job: Job<R>) -> Started<R> {
    let queued = match job.op.class() {
        OpClass::Run => shared.limiter.turn(job.build, job.priority),
        OpClass::Io => None,
    };
    let (turn, first, granted) = match queued {
        Some((turn, ask, granted)) => (Some(turn), Some(ask), Some(granted)),
        None => (None, None, None),
    };
    let work = Arc::new(Work {
        board: Arc::new(Board::new(job.vertex.clone())),
        build: job.build,
        table: shared.in_flight.clone(),
        claims: OnceLock::new(),
        task: OnceLock::new(),
        turn: Mutex::new(turn),
        first,
    });
    let mut wanted: Vec<[u8; 32]> = job.shared_by.iter().map(|key| *key.as_bytes()).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut claims = Vec::with_capacity(wanted.len());
    let mut leader = None;
    for key in wanted {
        match shared.in_flight.claim(key, &work) {
            None => claims.push(key),
            Some(other) if claims.is_empty() => return Started::Joined(other, Key::from_bytes(key)),
            Some(other) => {
                leader = Some(other);
                break;
            }
        }
    }
    let _ = work.claims.set(claims);
    if leader.is_some() {
        // It waits for the leader's turn.
        *work.turn() = None;
    }

    let done = Done { shared: shared.clone(), board: work.board.clone(), work: Arc::downgrade(&work) };
    let at_once = matches!(job.op.class(), OpClass::Io) && leader.is_none();
    let (of_task, board, asks) = (shared.clone(), work.board.clone(), (job.build, job.priority));
    let mut running = Box::pin(async move {
        match leader {
            Some(leader) => End::passed_on(run::follow(leader, &board, asks).await),
            None => run::run(&of_task, &board, job, granted).await,
        }
    });
    // What needs no waiting needs no task; and as it is soon done again, nobody waits for its record: the owner has
    // that written with others.
    if at_once && let Some(end) = (&mut running).now_or_never() {
        done.board.finish(end.outcome.clone());
        let ended = Started::Ended { told: done.board.told(), outcome: end.outcome.clone() };
        if let Some(entry) = done.entry(end) {
            shared.recorder.push(entry);
        }
        return ended;
    }
    let of_task = shared.clone();
    let task = shared.tasks.spawn(async move {
        if let Some(entry) = done.entry(running.await) {
            of_task.record(entry);
        }
    });
    // The task can't be cancelled before this: `work` is still held here.
    let _ = work.task.set(task.abort_handle());
    Started::Begun(work)
}

/// What remains to be done when work has ended.
struct Done<R> {
    shared: Arc<Shared<R>>,
    board: Arc<Board<R>>,
    work: Weak<Work<R>>,
}

impl<R: Clone + Send + Sync + 'static> Done<R> {
    /// Askers hear of it when it is recorded, or at once where there is nothing to record.
    fn entry(self, end: End<R>) -> Option<Entry> {
        let Self { shared, board, work } = self;
        let End { outcome, changes, unkeyed } = end;
        // Askers may leave before it is recorded; until then others must find it here.
        let held = work.upgrade();
        let then = move || {
            // What can be found in the store is there by now, so no key is unclaimed and unknown.
            if let Some(work) = held {
                shared.in_flight.release(&work);
            }
            board.finish(outcome);
            if let Some(unkeyed) = unkeyed {
                // Not part of the work: it goes on when all askers have their answer and left.
                after::key_later(&shared, unkeyed);
            }
        };
        if changes.is_empty() {
            then();
            return None;
        }
        Some(Entry { changes, then: Some(Box::new(then)) })
    }
}
