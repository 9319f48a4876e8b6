//! Progress of vertices, as the wire's status stream wants it: every event names its vertex by digest.

use std::ops::Deref;
use std::sync::Arc;
use std::time::SystemTime;

use kiln_proto::pb;

/// One step of a build's progress. Vertices are resent whole on each transition.
#[derive(Debug, Clone)]
pub enum Event {
    /// A vertex was announced, started, completed, found cached, or failed.
    Vertex(VertexState),
    /// A transfer or sub-step of a vertex; same `(vertex, id)` is updated in place.
    Status(VertexStatus),
    /// Output of a vertex.
    Log(VertexLog),
    /// A warning attached to a vertex.
    Warning(VertexWarning),
}

/// What a vertex is, whatever becomes of it.
#[derive(Debug, Clone, Default)]
pub struct VertexInfo {
    /// Digest of the vertex.
    pub digest: Arc<str>,
    /// Digests of its inputs.
    pub inputs: Arc<[Arc<str>]>,
    /// Display name.
    pub name: Arc<str>,
    /// Group in which clients collapse it.
    pub group: Option<pb::ProgressGroup>,
}

/// The whole state of one vertex.
#[derive(Debug, Clone, Default)]
pub struct VertexState {
    /// Which vertex it is.
    pub info: Arc<VertexInfo>,
    /// Started and not completed means running.
    pub started: Option<SystemTime>,
    /// When it ended.
    pub completed: Option<SystemTime>,
    /// It was answered by the cache.
    pub cached: bool,
    /// Why it failed; empty if it did not.
    pub error: String,
}

impl From<VertexInfo> for VertexState {
    fn from(info: VertexInfo) -> Self {
        Self { info: Arc::new(info), ..Self::default() }
    }
}

impl Deref for VertexState {
    type Target = VertexInfo;

    fn deref(&self) -> &VertexInfo {
        &self.info
    }
}

/// A transfer or sub-step.
#[derive(Debug, Clone)]
pub struct VertexStatus {
    /// Digest of the vertex.
    pub vertex: String,
    /// Text shown, e.g. `sha256:…` or `exporting layers`.
    pub id: String,
    /// What is done, e.g. `downloading`.
    pub name: String,
    /// Bytes so far.
    pub current: i64,
    /// Bytes in all; 0 if not known.
    pub total: i64,
    /// When this was true.
    pub timestamp: SystemTime,
    /// When it started.
    pub started: Option<SystemTime>,
    /// When it ended.
    pub completed: Option<SystemTime>,
}

/// A piece of output, not aligned to lines.
#[derive(Debug, Clone)]
pub struct VertexLog {
    /// Digest of the vertex.
    pub vertex: String,
    /// 1 stdout, 2 stderr.
    pub stream: i64,
    /// The bytes.
    pub data: Vec<u8>,
    /// When they came.
    pub timestamp: SystemTime,
}

/// A warning.
#[derive(Debug, Clone, Default)]
pub struct VertexWarning {
    /// Digest of the vertex.
    pub vertex: String,
    /// 1 is the default.
    pub level: i64,
    /// One line.
    pub short: String,
    /// More lines.
    pub detail: Vec<String>,
    /// Where it is explained.
    pub url: String,
    /// The file it is about.
    pub info: Option<pb::SourceInfo>,
    /// Where in the file.
    pub ranges: Vec<pb::Range>,
}

/// Where events go. Must not block.
pub trait ProgressSink: Send + Sync {
    /// Takes one event.
    fn event(&self, event: Event);
}

/// A handle with which the work of one vertex reports on itself.
#[derive(Clone)]
pub struct VertexProgress {
    vertex: Arc<str>,
    sink: Arc<dyn ProgressSink>,
}

impl VertexProgress {
    /// Reports on the vertex with this digest.
    pub fn new(vertex: Arc<str>, sink: Arc<dyn ProgressSink>) -> Self {
        Self { vertex, sink }
    }

    /// Digest of the vertex.
    pub fn vertex(&self) -> &str {
        &self.vertex
    }

    /// Output of the step; `stream` is 1 for stdout, 2 for stderr.
    pub fn log(&self, stream: i64, data: &[u8]) {
        self.sink.event(Event::Log(VertexLog {
            vertex: self.vertex.to_string(),
            stream,
            data: data.to_vec(),
            timestamp: SystemTime::now(),
        }));
    }

    /// Starts a sub-step; dropping the answer without [`StatusHandle::done`] leaves it open.
    pub fn status(&self, id: &str, name: &str, total: i64) -> StatusHandle {
        let status = VertexStatus {
            vertex: self.vertex.to_string(),
            id: id.into(),
            name: name.into(),
            current: 0,
            total,
            timestamp: SystemTime::now(),
            started: Some(SystemTime::now()),
            completed: None,
        };
        self.sink.event(Event::Status(status.clone()));
        StatusHandle { status, sink: self.sink.clone() }
    }

    /// Hands on any event (e.g. of a vertex that is not part of the graph).
    pub fn event(&self, event: Event) {
        self.sink.event(event);
    }
}

/// One open sub-step.
pub struct StatusHandle {
    status: VertexStatus,
    sink: Arc<dyn ProgressSink>,
}

impl StatusHandle {
    /// Reports how far it is, in bytes; callers rate-limit.
    pub fn update(&mut self, current: i64) {
        self.status.current = current;
        self.status.timestamp = SystemTime::now();
        self.sink.event(Event::Status(self.status.clone()));
    }

    /// The sub-step ended.
    pub fn done(mut self) {
        self.status.timestamp = SystemTime::now();
        self.status.completed = Some(self.status.timestamp);
        if self.status.total > 0 {
            self.status.current = self.status.total;
        }
        self.sink.event(Event::Status(self.status.clone()));
    }
}
