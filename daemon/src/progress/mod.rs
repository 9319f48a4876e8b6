//! What is known of one build's progress: every event so far, kept for whoever asks, now or later.
//! Completes what the solver reports by the rules of the status stream (wire: control-and-session
//! §5) and turns it into messages. Knows nothing of builds beyond their events.

mod limits;
mod wire;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hashbrown::HashMap;
use kiln_proto::control;
use kiln_solver::progress::{Event, ProgressSink, VertexInfo, VertexState, VertexStatus};
use tokio::sync::watch;

use limits::{Clip, LogLimits};

/// Updates of one running transfer are kept at most this often.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Counters of a build, by vertex.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Vertices announced.
    pub(crate) total: usize,
    /// Answered by the cache.
    pub(crate) cached: usize,
    /// Completed, cached ones included.
    pub(crate) completed: usize,
    /// Warnings.
    pub(crate) warnings: usize,
}

/// The event log of one build. Anyone may read from the start at any time.
pub(crate) struct ProgressLog {
    state: Mutex<State>,
    /// Length of the log, and whether it is closed.
    grown: watch::Sender<(usize, bool)>,
}

#[derive(Default)]
struct State {
    events: Vec<Arc<Event>>,
    /// Where in `events` the last state of each vertex is.
    vertices: HashMap<Arc<str>, usize>,
    statuses: HashMap<(String, String), SystemTime>,
    limits: LogLimits,
    warnings: usize,
    closed: bool,
}

impl ProgressLog {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::default()), grown: watch::Sender::new((0, false)) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the log: vertices still open are completed, as canceled unless `succeeded`.
    pub(crate) fn close(&self, succeeded: bool) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        state.flush_clipped();
        let now = SystemTime::now();
        let open: Vec<VertexState> = state
            .states()
            .filter(|vertex| vertex.started.is_some() && vertex.completed.is_none())
            .cloned()
            .collect();
        for mut vertex in open {
            vertex.completed = Some(now);
            if !succeeded && vertex.error.is_empty() {
                vertex.error = "context canceled".into();
            }
            state.push_vertex(vertex);
        }
        state.closed = true;
        let length = state.events.len();
        drop(state);
        self.grown.send_replace((length, true));
    }

    /// Nothing is added any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.grown.borrow().1
    }

    /// What has happened to how many vertices.
    pub(crate) fn counts(&self) -> Counts {
        let state = self.lock();
        Counts {
            total: state.vertices.len(),
            cached: state.states().filter(|vertex| vertex.cached).count(),
            completed: state.states().filter(|vertex| vertex.completed.is_some()).count(),
            warnings: state.warnings,
        }
    }

    /// A reader that starts at the first event.
    pub(crate) fn read(self: &Arc<Self>) -> ProgressReader {
        ProgressReader { log: self.clone(), next: 0, grown: self.grown.subscribe() }
    }

    /// The whole log as messages.
    pub(crate) fn replay(&self) -> Vec<control::StatusResponse> {
        wire::messages(&self.lock().events)
    }
}

impl ProgressSink for ProgressLog {
    fn event(&self, event: Event) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        state.take(event);
        let length = state.events.len();
        drop(state);
        self.grown.send_if_modified(|grown| {
            let more = grown.0 < length;
            grown.0 = grown.0.max(length);
            more
        });
    }
}

impl State {
    fn take(&mut self, event: Event) {
        match event {
            Event::Vertex(vertex) => self.take_vertex(vertex),
            Event::Status(status) => {
                if self.wanted(&status) {
                    self.events.push(Arc::new(Event::Status(status)));
                }
            }
            Event::Log(mut log) => {
                match self.limits.admit(&log.vertex, log.stream, &log.data, log.timestamp) {
                    Clip::Keep => {}
                    Clip::Cut(data) => log.data = data,
                    Clip::Drop => return,
                }
                self.events.push(Arc::new(Event::Log(log)));
            }
            Event::Warning(warning) => {
                self.warnings += 1;
                self.events.push(Arc::new(Event::Warning(warning)));
            }
        }
    }

    fn take_vertex(&mut self, vertex: VertexState) {
        let starts = vertex.started.is_some() && vertex.completed.is_none();
        if starts {
            // Inputs that nobody had to look at were answered by a hit further down.
            for input in vertex.inputs.iter() {
                let skipped = self
                    .last(input)
                    .filter(|input| !input.cached && input.completed.is_none() && input.started.is_none())
                    .cloned();
                if let Some(mut input) = skipped {
                    let now = vertex.started;
                    (input.started, input.completed, input.cached) = (now, now, true);
                    self.push_vertex(input);
                }
            }
        }
        if !vertex.error.is_empty() {
            for log in self.limits.tail(&vertex.digest) {
                self.events.push(Arc::new(Event::Log(log)));
            }
        }
        self.push_vertex(vertex);
    }

    /// The last state of each vertex.
    fn states(&self) -> impl Iterator<Item = &VertexState> {
        self.vertices.values().filter_map(|&at| self.state_at(at))
    }

    fn last(&self, digest: &str) -> Option<&VertexState> {
        self.state_at(*self.vertices.get(digest)?)
    }

    fn state_at(&self, at: usize) -> Option<&VertexState> {
        match &**self.events.get(at)? {
            Event::Vertex(state) => Some(state),
            _ => None,
        }
    }

    fn push_vertex(&mut self, vertex: VertexState) {
        self.vertices.insert(vertex.digest.clone(), self.events.len());
        self.events.push(Arc::new(Event::Vertex(vertex)));
    }

    /// Running updates are thinned out; a start and an end are always kept.
    fn wanted(&mut self, status: &VertexStatus) -> bool {
        let key = (status.vertex.clone(), status.id.clone());
        if status.completed.is_some() {
            self.statuses.remove(&key);
            return true;
        }
        match self.statuses.get_mut(&key) {
            Some(last) => {
                let due = status.timestamp.duration_since(*last).is_ok_and(|since| since >= STATUS_INTERVAL);
                if due {
                    *last = status.timestamp;
                }
                due
            }
            None => {
                self.statuses.insert(key, status.timestamp);
                true
            }
        }
    }

    fn flush_clipped(&mut self) {
        self.limits.clear();
    }
}

/// Follows one build's log.
pub(crate) struct ProgressReader {
    log: Arc<ProgressLog>,
    next: usize,
    grown: watch::Receiver<(usize, bool)>,
}

impl ProgressReader {
    /// The next messages; waits for some. `None` once the log is closed and read to its end.
    pub(crate) async fn next(&mut self) -> Option<Vec<control::StatusResponse>> {
        loop {
            let (length, closed) = *self.grown.borrow_and_update();
            if length > self.next {
                let batch: Vec<Arc<Event>> = self.log.lock().events[self.next..].to_vec();
                self.next += batch.len();
                return Some(wire::messages(&batch));
            }
            if closed || self.grown.changed().await.is_err() {
                return None;
            }
        }
    }
}

/// A vertex that is not an operation: a metadata look-up, an export.
pub(crate) struct Step {
    sink: Arc<dyn ProgressSink>,
    vertex: Option<VertexState>,
    progress: kiln_solver::progress::VertexProgress,
}

impl Step {
    /// Announces and starts it.
    pub(crate) fn start(sink: Arc<dyn ProgressSink>, digest: &str, name: &str) -> Self {
        let info = VertexInfo { digest: digest.into(), name: name.into(), ..VertexInfo::default() };
        let mut vertex = VertexState::from(info);
        sink.event(Event::Vertex(vertex.clone()));
        vertex.started = Some(SystemTime::now());
        sink.event(Event::Vertex(vertex.clone()));
        let progress = kiln_solver::progress::VertexProgress::new(digest.into(), sink.clone());
        Self { sink, vertex: Some(vertex), progress }
    }

    /// For logs and statuses of the step.
    pub(crate) fn progress(&self) -> &kiln_solver::progress::VertexProgress {
        &self.progress
    }

    /// It ended; `error` is what clients show.
    pub(crate) fn end(mut self, error: Option<&str>) {
        self.complete(error.unwrap_or_default());
    }

    fn complete(&mut self, error: &str) {
        if let Some(mut vertex) = self.vertex.take() {
            vertex.completed = Some(SystemTime::now());
            vertex.error = error.to_owned();
            self.sink.event(Event::Vertex(vertex));
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.complete("context canceled");
    }
}

#[cfg(test)]
mod tests;
