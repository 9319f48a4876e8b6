//! Progress as JSON lines, with the names that BuildKit's client gives the fields.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::control::{StatusResponse, Vertex, VertexLog, VertexStatus, VertexWarning};
use prost_types::Timestamp;
use serde_json::{Map, Value, json};

/// One status message as a line.
pub(super) fn line(message: &StatusResponse) -> String {
    let mut out = Map::new();
    let mut list = |key: &str, values: Vec<Value>| {
        if !values.is_empty() {
            out.insert(key.into(), Value::Array(values));
        }
    };
    list("vertexes", message.vertexes.iter().map(vertex).collect());
    list("statuses", message.statuses.iter().map(status).collect());
    list("logs", message.logs.iter().map(log).collect());
    list("warnings", message.warnings.iter().map(warning).collect());
    format!("{}\n", Value::Object(out))
}

fn vertex(vertex: &Vertex) -> Value {
    let mut out = Object::new();
    out.set("digest", vertex.digest.as_str());
    out.set("inputs", vertex.inputs.clone());
    out.set("name", vertex.name.as_str());
    out.time("started", vertex.started.as_ref());
    out.time("completed", vertex.completed.as_ref());
    out.set("cached", vertex.cached);
    out.set("error", vertex.error.as_str());
    if let Some(group) = &vertex.progress_group {
        out.set("progressGroup", json!({"id": group.id, "name": group.name, "weak": group.weak}));
    }
    out.done()
}

fn status(status: &VertexStatus) -> Value {
    let mut out = Object::new();
    out.set("id", status.id.as_str());
    out.set("vertex", status.vertex.as_str());
    out.set("name", status.name.as_str());
    out.set("total", status.total);
    out.0.insert("current".into(), status.current.into());
    out.time("timestamp", status.timestamp.as_ref());
    out.time("started", status.started.as_ref());
    out.time("completed", status.completed.as_ref());
    out.done()
}

fn log(log: &VertexLog) -> Value {
    let mut out = Object::new();
    out.set("vertex", log.vertex.as_str());
    out.set("stream", log.stream);
    out.set("data", STANDARD.encode(&log.msg));
    out.time("timestamp", log.timestamp.as_ref());
    out.done()
}

fn warning(warning: &VertexWarning) -> Value {
    let mut out = Object::new();
    out.set("vertex", warning.vertex.as_str());
    out.set("level", warning.level);
    out.set("short", STANDARD.encode(&warning.short));
    out.set("detail", warning.detail.iter().map(|detail| STANDARD.encode(detail)).collect::<Vec<_>>());
    out.set("url", warning.url.as_str());
    if let Some(info) = &warning.info {
        out.set("sourceInfo", json!({"filename": info.filename, "data": STANDARD.encode(&info.data)}));
    }
    let position = |at: &Option<kiln_proto::pb::Position>| {
        at.map(|at| json!({"line": at.line, "character": at.character}))
    };
    let ranges = warning
        .ranges
        .iter()
        .map(|range| json!({"start": position(&range.start), "end": position(&range.end)}));
    out.set("range", ranges.collect::<Vec<_>>());
    out.done()
}

/// An object that leaves out empty values, as Go's `omitempty` does.
struct Object(Map<String, Value>);

impl Object {
    fn new() -> Self {
        Self(Map::new())
    }

    fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        let empty = match &value {
            Value::Null => true,
            Value::Bool(value) => !value,
            Value::String(value) => value.is_empty(),
            Value::Array(value) => value.is_empty(),
            Value::Number(value) => value.as_i64() == Some(0),
            Value::Object(_) => false,
        };
        if !empty {
            self.0.insert(key.into(), value);
        }
    }

    fn time(&mut self, key: &str, time: Option<&Timestamp>) {
        let time = time.and_then(|time| jiff::Timestamp::new(time.seconds, time.nanos).ok());
        self.set(key, time.map(|time| time.to_string()));
    }

    fn done(self) -> Value {
        Value::Object(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::testing::*;
    use super::line;

    #[test]
    fn fields_have_the_names_of_buildkits_client() {
        let mut message = vertices(vec![vertex("a", Some(0), None)]);
        message.statuses = status("a", "sha256:0", 0, 10, 5, true).statuses;
        message.logs = log("a", 1500, "hi\n").logs;
        message.warnings = warning("a", "odd").warnings;
        insta::assert_snapshot!(line(&message));
    }
}
