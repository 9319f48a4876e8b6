//! Where a running operation reports and askers read: keeps what a late asker must still see.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::op::Failure;
use crate::produced::Produced;
use crate::progress::{Event, ProgressSink, VertexLog, VertexStatus};

/// How much output is kept for late askers, in bytes with what each piece takes itself; the newest is kept.
const REPLAY_LOG: usize = 2 << 20;
/// How many warnings and foreign vertices are kept for late askers.
const REPLAY_EVENTS: usize = 4096;

/// How work ended.
pub(crate) struct Outcome<R> {
    pub(crate) result: Result<Arc<Produced<R>>, Failure<R>>,
    /// A record that appeared meanwhile answered it.
    pub(crate) cached: bool,
    /// Nobody was left of the build that started it: a failure may come from that.
    pub(crate) orphaned: bool,
}

impl<R> Clone for Outcome<R> {
    fn clone(&self) -> Self {
        Self { result: self.result.clone(), cached: self.cached, orphaned: self.orphaned }
    }
}

/// One who waits for work. Called with a lock held: must not block or call back.
pub(crate) trait Watcher<R>: Send + Sync {
    /// Digest under which it wants to see the work's events.
    fn vertex(&self) -> &Arc<str>;
    fn started(&self, at: SystemTime);
    fn progress(&self, event: Event);
    fn done(&self, outcome: Outcome<R>);
}

pub(crate) struct Board<R> {
    vertex: Arc<str>,
    state: Mutex<State<R>>,
}

struct State<R> {
    watchers: Vec<(u64, Arc<dyn Watcher<R>>)>,
    next: u64,
    /// How many ask for the build that started it. Who started it counts before they ask.
    own: usize,
    started: Option<SystemTime>,
    outcome: Option<Outcome<R>>,
    replay: Option<Box<Replay>>,
}

impl<R> Board<R> {
    pub(super) fn new(vertex: Arc<str>) -> Self {
        let state =
            State { watchers: Vec::new(), next: 0, own: 1, started: None, outcome: None, replay: None };
        Self { vertex, state: Mutex::new(state) }
    }

    pub(super) fn vertex(&self) -> &Arc<str> {
        &self.vertex
    }

    pub(super) fn watch(&self, watcher: Arc<dyn Watcher<R>>, another_own: bool) -> u64 {
        let mut state = self.lock();
        state.own += usize::from(another_own);
        if let Some(at) = state.started {
            watcher.started(at);
        }
        for event in state.replay.iter().flat_map(|replay| replay.events()) {
            watcher.progress(self.seen_by(&*watcher, event));
        }
        let id = state.next;
        state.next += 1;
        match &state.outcome {
            Some(outcome) => watcher.done(outcome.clone()),
            None => state.watchers.push((id, watcher)),
        }
        id
    }

    /// When it began, and all that is kept of what it said.
    pub(super) fn told(&self) -> (Option<SystemTime>, Vec<Event>) {
        let state = self.lock();
        (state.started, state.replay.iter().flat_map(|replay| replay.events()).collect())
    }

    pub(super) fn leave(&self, watcher: u64, ours: bool) {
        let mut state = self.lock();
        state.own -= usize::from(ours);
        state.watchers.retain(|(id, _)| *id != watcher);
    }

    pub(super) fn start(&self, at: SystemTime) {
        let mut state = self.lock();
        state.started = Some(at);
        for (_, watcher) in &state.watchers {
            watcher.started(at);
        }
    }

    /// Tells all; the first outcome counts.
    pub(super) fn finish(&self, mut outcome: Outcome<R>) {
        let mut state = self.lock();
        if state.outcome.is_some() {
            return;
        }
        outcome.orphaned |= state.own == 0;
        for (_, watcher) in std::mem::take(&mut state.watchers) {
            watcher.done(outcome.clone());
        }
        state.outcome = Some(outcome);
    }

    /// The event as the watcher's own vertex has it: its digest differs where equal keys made
    /// different operations share the work.
    fn seen_by(&self, watcher: &dyn Watcher<R>, mut event: Event) -> Event {
        let digest = match &mut event {
            Event::Vertex(e) => {
                if e.digest == self.vertex && *watcher.vertex() != self.vertex {
                    Arc::make_mut(&mut e.info).digest = watcher.vertex().clone();
                }
                return event;
            }
            Event::Status(e) => &mut e.vertex,
            Event::Log(e) => &mut e.vertex,
            Event::Warning(e) => &mut e.vertex,
        };
        if **digest == *self.vertex && **watcher.vertex() != **digest {
            *digest = watcher.vertex().to_string();
        }
        event
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R: Send + Sync> ProgressSink for Board<R> {
    fn event(&self, event: Event) {
        let mut state = self.lock();
        for (_, watcher) in &state.watchers {
            watcher.progress(self.seen_by(&**watcher, event.clone()));
        }
        state.replay.get_or_insert_default().keep(event);
    }
}

fn weight(log: &VertexLog) -> usize {
    size_of::<VertexLog>() + log.vertex.len() + log.data.len()
}

#[derive(Default)]
struct Replay {
    others: Vec<Event>,
    statuses: Vec<VertexStatus>,
    status_index: HashMap<(String, String), usize>,
    logs: VecDeque<VertexLog>,
    log_bytes: usize,
}

impl Replay {
    fn keep(&mut self, event: Event) {
        match event {
            Event::Log(log) => {
                self.log_bytes += weight(&log);
                self.logs.push_back(log);
                while self.log_bytes > REPLAY_LOG
                    && let Some(old) = self.logs.pop_front()
                {
                    self.log_bytes -= weight(&old);
                }
            }
            Event::Status(status) => {
                let key = (status.vertex.clone(), status.id.clone());
                match self.status_index.get(&key) {
                    Some(&at) => self.statuses[at] = status,
                    None => {
                        self.status_index.insert(key, self.statuses.len());
                        self.statuses.push(status);
                    }
                }
            }
            other if self.others.len() < REPLAY_EVENTS => self.others.push(other),
            _ => {}
        }
    }

    /// Vertices and warnings first: clients drop what belongs to a vertex they don't know.
    fn events(&self) -> impl Iterator<Item = Event> + '_ {
        let statuses = self.statuses.iter().cloned().map(Event::Status);
        let logs = self.logs.iter().cloned().map(Event::Log);
        self.others.iter().cloned().chain(statuses).chain(logs)
    }
}
