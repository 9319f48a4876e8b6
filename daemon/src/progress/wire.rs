//! Events as messages of the status stream. A message stays near [`MAX_LOG_BYTES`] of output.

use std::sync::Arc;
use std::time::SystemTime;

use kiln_proto::control;
use kiln_solver::progress::{Event, VertexLog, VertexState, VertexStatus, VertexWarning};
use prost_types::Timestamp;

/// Output in one message.
const MAX_LOG_BYTES: usize = 1 << 20;
/// Vertices and statuses in one message, so that a graph of any size stays within gRPC's limit.
const MAX_ITEMS: usize = 2000;

/// Messages that carry `events` in order of what clients need: vertices before what names them.
pub(super) fn messages(events: &[Arc<Event>]) -> Vec<control::StatusResponse> {
    let mut messages = Vec::new();
    let mut message = control::StatusResponse::default();
    let mut log_bytes = 0;
    let mut items = 0;
    for event in events {
        items += 1;
        if items > MAX_ITEMS {
            messages.push(sorted(std::mem::take(&mut message)));
            (items, log_bytes) = (1, 0);
        }
        match &**event {
            Event::Vertex(state) => message.vertexes.push(vertex(state)),
            Event::Status(state) => message.statuses.push(status(state)),
            Event::Warning(state) => message.warnings.push(warning(state)),
            Event::Log(state) => {
                if log_bytes > 0 && log_bytes + state.data.len() > MAX_LOG_BYTES {
                    messages.push(sorted(std::mem::take(&mut message)));
                    log_bytes = 0;
                }
                for chunk in state.data.chunks(MAX_LOG_BYTES) {
                    if log_bytes + chunk.len() > MAX_LOG_BYTES {
                        messages.push(sorted(std::mem::take(&mut message)));
                        log_bytes = 0;
                    }
                    log_bytes += chunk.len();
                    message.logs.push(log(state, chunk));
                }
            }
        }
    }
    if message != control::StatusResponse::default() {
        messages.push(sorted(message));
    }
    messages
}

/// Vertices by start (not started first), statuses and logs by time; equal ones keep their order.
fn sorted(mut message: control::StatusResponse) -> control::StatusResponse {
    let key = |time: &Option<Timestamp>| time.map(|time| (time.seconds, time.nanos));
    message.vertexes.sort_by_key(|vertex| key(&vertex.started));
    message.statuses.sort_by_key(|status| key(&status.timestamp));
    message.logs.sort_by_key(|log| key(&log.timestamp));
    message
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
