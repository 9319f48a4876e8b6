//! What a build's progress stream is told about its vertices, and when.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use fixedbitset::FixedBitSet;
use petgraph::graph::NodeIndex;
use tokio::sync::mpsc;

use super::arena::{Map, Step, Vertex};
use super::{Event, Owner};
use crate::explain::Found;
use crate::op::OpError;
use crate::progress::{Event as ProgressEvent, ProgressSink, VertexInfo, VertexState};
use crate::work::{Asker, Outcome, Watcher};

/// The text that clients recognise as a cancelled step.
const CANCELED: &str = "context canceled";

/// A hold on work, and when it began.
pub(super) struct Watched<R> {
    pub(super) asker: Asker<R>,
    pub(super) started: Arc<OnceLock<SystemTime>>,
}

/// Passes on what shared work says. The start is reported here, so that it comes before the output.
pub(super) struct BuildWatcher<R> {
    pub(super) state: VertexState,
    pub(super) sink: Arc<dyn ProgressSink>,
    pub(super) events: mpsc::UnboundedSender<Event<R>>,
    pub(super) place: NodeIndex,
    pub(super) epoch: u64,
    pub(super) started: Arc<OnceLock<SystemTime>>,
}

impl<R: Send + Sync> Watcher<R> for BuildWatcher<R> {
    fn vertex(&self) -> &Arc<str> {
        &self.state.digest
    }

    fn started(&self, at: SystemTime) {
        if self.started.set(at).is_ok() {
            let state = VertexState {
                started: Some(at),
                completed: None,
                cached: false,
                error: String::new(),
                ..self.state.clone()
            };
            self.sink.event(ProgressEvent::Vertex(state));
            let _ = self.events.send(Event::Started { vertex: self.place, epoch: self.epoch, at });
        }
    }

    fn progress(&self, event: ProgressEvent) {
        self.sink.event(event);
    }

    fn done(&self, outcome: Outcome<R>) {
        let _ = self.events.send(Event::Worked { vertex: self.place, epoch: self.epoch, outcome });
    }
}

/// Shows a vertex as running from the moment on at which its resolution has something to say.
pub(super) struct MapProgress {
    info: Arc<VertexInfo>,
    sink: Arc<dyn ProgressSink>,
    started: OnceLock<SystemTime>,
}

impl MapProgress {
    pub(super) fn new(info: Arc<VertexInfo>, sink: Arc<dyn ProgressSink>) -> Self {
        Self { info, sink, started: OnceLock::new() }
    }
}

impl ProgressSink for MapProgress {
    fn event(&self, event: ProgressEvent) {
        self.started.get_or_init(|| {
            let now = SystemTime::now();
            let state = VertexState { info: self.info.clone(), started: Some(now), ..VertexState::default() };
            self.sink.event(ProgressEvent::Vertex(state));
            now
        });
        self.sink.event(event);
    }
}

impl<R> Vertex<R> {
    /// Shown as failed, not as cancelled.
    pub(super) fn shows_own_error(&self) -> bool {
        !self.state.error.is_empty() && self.state.error != CANCELED
    }

    /// It was at work, not loading what an earlier build made, and was left.
    pub(super) fn was_stopped(&self) -> bool {
        self.state.error == CANCELED && !self.all_lookups().iter().any(|lookup| lookup.found == Found::Record)
    }
}

impl<R: Clone + Send + Sync + 'static> Owner<R> {
    pub(super) fn report(&mut self, place: NodeIndex, change: impl FnOnce(&mut VertexState)) {
        let state = &mut self.graph[place].state;
        change(state);
        self.progress.event(ProgressEvent::Vertex(state.clone()));
    }

    pub(super) fn note_started(&mut self, place: NodeIndex, at: SystemTime) {
        let state = &mut self.graph[place].state;
        state.started = Some(at);
        state.completed = None;
        state.cached = false;
        state.error.clear();
    }

    /// Ends the interval in which resolution was shown as running; a failure is reported by who handles it.
    pub(super) fn report_mapped(&mut self, place: NodeIndex, error: Option<&OpError>) {
        let Map::Asked(progress) = &self.graph[place].map else { return };
        if let Some(&at) = progress.started.get() {
            self.note_started(place, at);
            if error.is_none() {
                self.report_completed(place);
            }
        }
    }

    pub(super) fn report_cached(&mut self, place: NodeIndex, now: SystemTime) {
        let now = Some(now);
        self.report(place, |state| {
            state.started = now;
            state.completed = now;
            state.cached = true;
            state.error.clear();
        });
    }

    pub(super) fn report_completed(&mut self, place: NodeIndex) {
        let now = SystemTime::now();
        self.report(place, |state| {
            state.started.get_or_insert(now);
            state.completed = Some(now);
        });
    }

    pub(super) fn report_failed(&mut self, place: NodeIndex, error: &str) {
        self.leave_work(place);
        let now = SystemTime::now();
        self.report(place, |state| {
            // A vertex that was shown as done before failed in a new interval.
            if state.completed.is_some() {
                state.started = None;
            }
            state.started.get_or_insert(now);
            state.completed = Some(now);
            state.cached = false;
            state.error = error.to_owned();
        });
    }

    /// Ends what is shown as running because nobody wants it any longer.
    pub(super) fn report_canceled(&mut self, place: NodeIndex) {
        self.leave_work(place);
        let state = &self.graph[place].state;
        // Resolution goes on for whoever comes next and ends its own interval.
        let resolving = matches!(self.graph[place].map, Map::Asked(_));
        if state.started.is_some() && state.completed.is_none() && !resolving {
            self.report(place, |state| {
                state.completed = Some(SystemTime::now());
                state.error = CANCELED.to_owned();
            });
        }
    }

    /// Lets go of work, if there is some, and takes note of its start: work tells that to the
    /// progress stream at once, but to the loop by an event, which may still be on its way. Once
    /// the hold is dropped nothing more is told, so what is noted then is final.
    fn leave_work(&mut self, place: NodeIndex) {
        let vertex = &mut self.graph[place];
        let at = match std::mem::replace(&mut vertex.step, Step::Waiting) {
            Step::Working(Watched { asker, started }) => {
                drop(asker);
                started.get().copied()
            }
            step => {
                vertex.step = step;
                match &vertex.map {
                    Map::Asked(progress) => progress.started.get().copied(),
                    Map::Unasked | Map::Told(_) | Map::Known(_) => None,
                }
            }
        };
        if let Some(at) = at
            && vertex.state.started != Some(at)
        {
            self.note_started(place, at);
        }
    }

    /// After a request was answered: what lies below a finished vertex and was not needed is
    /// shown as cached. Each vertex is visited once in a build's life.
    pub(super) fn report_skipped(&mut self, root: NodeIndex) {
        if self.graph[root].reported_below {
            return;
        }
        let mut skipped = Vec::new();
        // In the order of the arena, backwards: so consumers come before their inputs.
        let mut seen = FixedBitSet::with_capacity(root.index() + 1);
        let mut below_done = FixedBitSet::with_capacity(root.index() + 1);
        seen.insert(root.index());
        for index in (0..=root.index()).rev() {
            if !seen.contains(index) {
                continue;
            }
            let vertex = &mut self.graph[NodeIndex::new(index)];
            let done = match vertex.step {
                _ if vertex.reported_below => continue,
                Step::Done(_) => true,
                Step::Failed(_) => false,
                _ if !below_done.contains(index) || vertex.wanted > 0 => continue,
                _ => {
                    if !vertex.state.cached {
                        skipped.push(NodeIndex::new(index));
                    }
                    true
                }
            };
            vertex.reported_below = done;
            let below = || vertex.inputs.iter().map(|edge| edge.vertex.index());
            seen.extend(below());
            if done {
                below_done.extend(below());
            }
        }
        let now = SystemTime::now();
        for place in skipped.into_iter().rev() {
            self.report_cached(place, now);
        }
    }

    /// The build ends: nothing stays shown as running.
    pub(super) fn report_end(&mut self) {
        for place in self.graph.places() {
            self.leave_work(place);
            let state = &self.graph[place].state;
            if state.started.is_some() && state.completed.is_none() {
                self.report(place, |state| {
                    state.completed = Some(SystemTime::now());
                    state.error = CANCELED.to_owned();
                });
            }
        }
    }
}
