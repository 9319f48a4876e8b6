//! Events as messages of the status stream. A message stays near [`MAX_LOG_BYTES`] of output.

use std::sync::Arc;
use std::time::SystemTime;

use hashbrown::HashMap;
use kiln_proto::control;
use kiln_solver::progress::{Event, VertexLog, VertexState, VertexStatus, VertexWarning};
use prost_types::Timestamp;

/// Output in one message.
const MAX_LOG_BYTES: usize = 1 << 20;
/// Vertices and statuses in one message, so that a graph of any size stays within gRPC's limit.
const MAX_ITEMS: usize = 2000;

/// Messages that carry `events` in order of what clients need: vertices before what names them. A message tells the
/// last state of each time that a vertex ran only, which says all that the states before it said.
pub(super) fn messages(events: &[Arc<Event>]) -> Vec<control::StatusResponse> {
    let mut messages = Vec::new();
    let mut batch = Batch::default();
    for event in events {
        if batch.items == MAX_ITEMS {
            messages.extend(batch.take());
        }
        match &**event {
            Event::Vertex(state) => batch.vertex(state),
            Event::Status(state) => {
                batch.items += 1;
                batch.statuses.push(state);
            }
            Event::Warning(state) => {
                batch.items += 1;
                batch.warnings.push(state);
            }
            Event::Log(state) => {
                if batch.log_bytes > 0 && batch.log_bytes + state.data.len() > MAX_LOG_BYTES {
                    messages.extend(batch.take());
                }
                for chunk in state.data.chunks(MAX_LOG_BYTES) {
                    if batch.items == MAX_ITEMS || batch.log_bytes + chunk.len() > MAX_LOG_BYTES {
                        messages.extend(batch.take());
                    }
                    batch.items += 1;
                    batch.log_bytes += chunk.len();
                    batch.logs.push((state, chunk));
                }
            }
        }
    }
    messages.extend(batch.take());
    messages
}

/// What goes into one message.
#[derive(Default)]
struct Batch<'a> {
    vertices: Vec<&'a VertexState>,
    /// Where in `vertices` a digest is.
    places: HashMap<&'a str, usize>,
    statuses: Vec<&'a VertexStatus>,
    warnings: Vec<&'a VertexWarning>,
    logs: Vec<(&'a VertexLog, &'a [u8])>,
    items: usize,
    log_bytes: usize,
}

impl<'a> Batch<'a> {
    fn vertex(&mut self, state: &'a VertexState) {
        let next = self.vertices.len();
        let place = self.places.entry(&state.digest).or_insert(next);
        match self.vertices.get_mut(*place) {
            Some(former) if former.started.is_none() || former.started == state.started => *former = state,
            _ => {
                *place = next;
                self.vertices.push(state);
                self.items += 1;
            }
        }
    }

    /// Vertices in the order in which they were announced, which is that of the graph; statuses and logs by time.
    fn take(&mut self) -> Option<control::StatusResponse> {
        let Self { vertices, mut statuses, warnings, mut logs, items, .. } = std::mem::take(self);
        statuses.sort_by_key(|state| state.timestamp);
        logs.sort_by_key(|(state, _)| state.timestamp);
        (items > 0).then(|| control::StatusResponse {
            vertexes: vertices.into_iter().map(vertex).collect(),
            statuses: statuses.into_iter().map(status).collect(),
            logs: logs.into_iter().map(|(state, chunk)| log(state, chunk)).collect(),
            warnings: warnings.into_iter().map(warning).collect(),
        })
    }
}

fn vertex(state: &VertexState) -> control::Vertex {
    control::Vertex {
        digest: state.digest.to_string(),
        inputs: state.inputs.iter().map(|input| input.to_string()).collect(),
        name: state.name.to_string(),
        cached: state.cached,
        started: state.started.map(timestamp),
        completed: state.completed.map(timestamp),
        error: state.error.clone(),
        progress_group: state.group.clone(),
    }
}

fn status(state: &VertexStatus) -> control::VertexStatus {
    control::VertexStatus {
        id: state.id.clone(),
        vertex: state.vertex.clone(),
        name: state.name.clone(),
        current: state.current,
        total: state.total,
        timestamp: Some(timestamp(state.timestamp)),
        started: state.started.map(timestamp),
        completed: state.completed.map(timestamp),
    }
}

fn log(state: &VertexLog, data: &[u8]) -> control::VertexLog {
    control::VertexLog {
        vertex: state.vertex.clone(),
        timestamp: Some(timestamp(state.timestamp)),
        stream: state.stream,
        msg: data.to_vec(),
    }
}

fn warning(state: &VertexWarning) -> control::VertexWarning {
    control::VertexWarning {
        vertex: state.vertex.clone(),
        level: state.level,
        short: state.short.clone().into_bytes(),
        detail: state.detail.iter().map(|line| line.clone().into_bytes()).collect(),
        url: state.url.clone(),
        info: state.info.clone(),
        ranges: state.ranges.clone(),
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    time.into()
}
