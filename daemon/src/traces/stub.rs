//! Spans in the form that readers of build records know: JSON as Go's OpenTelemetry library writes its span stubs.

use std::collections::BTreeMap;

use kiln_proto::control::{BuildHistoryRecord, StatusResponse};
use kiln_proto::otlp::collector::trace::v1::ExportTraceServiceRequest;
use kiln_proto::otlp::common::v1::any_value::Value as Any;
use kiln_proto::otlp::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use kiln_proto::otlp::trace::v1::Span;
use kiln_proto::otlp::trace::v1::status::StatusCode;
use prost_types::Timestamp;
use serde_json::{Value, json};

pub(super) type TraceId = [u8; 16];
pub(super) type SpanId = [u8; 8];

/// What spans of the daemon say of where they come from.
const LIBRARY: &str = "kiln";
/// Kinds as in `Span.SpanKind`, which are the same in both forms.
const INTERNAL: i32 = 1;
const SERVER: i32 = 2;

/// One of the daemon's own spans.
pub(super) struct Stub {
    trace: TraceId,
    id: SpanId,
    parent: Option<SpanId>,
    name: String,
    kind: i32,
    start: Timestamp,
    end: Timestamp,
    attributes: Vec<(&'static str, Value)>,
    error: Option<String>,
}

impl Stub {
    /// The call that was the build.
    pub(super) fn build(trace: TraceId, parent: Option<SpanId>, record: &BuildHistoryRecord) -> Self {
        Self {
            trace,
            id: rand::random(),
            parent,
            name: "moby.buildkit.v1.Control/Solve".into(),
            kind: SERVER,
            start: record.created_at.unwrap_or_default(),
            end: record.completed_at.unwrap_or_default(),
            attributes: vec![("ref", text(&record.r#ref))],
            error: record.error.as_ref().map(|error| error.message.clone()),
        }
    }

    /// Each time that a vertex ran, as the build's log has it.
    pub(super) fn vertices(build: &Self, log: &[StatusResponse]) -> Vec<Self> {
        let mut spans = BTreeMap::new();
        let mut order = 0_usize;
        for vertex in log.iter().flat_map(|message| &message.vertexes) {
            let (Some(start), Some(end)) = (vertex.started, vertex.completed) else { continue };
            let key = (vertex.digest.as_str(), start.seconds, start.nanos);
            let span = Self {
                trace: build.trace,
                id: rand::random(),
                parent: Some(build.id),
                name: vertex.name.clone(),
                kind: INTERNAL,
                start,
                end,
                attributes: vec![
                    ("vertex", text(&vertex.digest)),
                    ("cached", json!({ "Type": "BOOL", "Value": vertex.cached })),
                ],
                error: Some(vertex.error.clone()).filter(|error| !error.is_empty()),
            };
            order += 1;
            spans.insert(key, (order, span));
        }
        let mut spans: Vec<_> = spans.into_values().collect();
        spans.sort_by_key(|(order, _)| *order);
        spans.into_iter().map(|(_, span)| span).collect()
    }

    pub(super) fn encode(&self) -> String {
        let attributes: Vec<Value> =
            self.attributes.iter().map(|(key, value)| json!({ "Key": key, "Value": value })).collect();
        let service = json!([{ "Key": "service.name", "Value": text("kiln") }]);
        let scope = scope(LIBRARY, env!("CARGO_PKG_VERSION"));
        let status = match &self.error {
            Some(error) => json!({ "Code": 1, "Description": error }),
            None => json!({ "Code": 0, "Description": "" }),
        };
        json!({
            "Name": self.name,
            "SpanContext": context(&self.trace, &self.id),
            "Parent": context(&self.trace, &self.parent.unwrap_or_default()),
            "SpanKind": self.kind,
            "StartTime": time(self.start.seconds, self.start.nanos),
            "EndTime": time(self.end.seconds, self.end.nanos),
            "Attributes": attributes,
            "Events": null,
            "Links": null,
            "Status": status,
            "DroppedAttributes": 0,
            "DroppedEvents": 0,
            "DroppedLinks": 0,
            "ChildSpanCount": 0,
            "Resource": service,
            "InstrumentationScope": scope,
            "InstrumentationLibrary": scope,
        })
        .to_string()
    }
}

/// All spans of a report that are well-formed, each with its trace.
pub(super) fn encode_reported(request: &ExportTraceServiceRequest) -> Vec<(TraceId, String)> {
    let mut all = Vec::new();
    for resource_spans in &request.resource_spans {
        let resource = resource_spans.resource.as_ref().map(|resource| attributes(&resource.attributes));
        let resource = resource.unwrap_or_else(|| json!([]));
        for scope_spans in &resource_spans.scope_spans {
            let library = library(scope_spans.scope.as_ref());
            let spans = scope_spans.spans.iter();
            all.extend(spans.filter_map(|span| reported(span, &resource, &library)));
        }
    }
    all
}

fn reported(span: &Span, resource: &Value, library: &Value) -> Option<(TraceId, String)> {
    let trace: TraceId = span.trace_id.as_slice().try_into().ok()?;
    let id: SpanId = span.span_id.as_slice().try_into().ok()?;
    let parent: SpanId = span.parent_span_id.as_slice().try_into().unwrap_or_default();
    let status = span.status.clone().unwrap_or_default();
    // The two forms number the codes differently.
    let code = match status.code() {
        StatusCode::Unset => 0,
        StatusCode::Error => 1,
        StatusCode::Ok => 2,
    };
    let events: Vec<Value> = span
        .events
        .iter()
        .map(|event| {
            json!({
                "Name": event.name,
                "Attributes": attributes(&event.attributes),
                "DroppedAttributeCount": event.dropped_attributes_count,
                "Time": unix(event.time_unix_nano),
            })
        })
        .collect();
    let value = json!({
        "Name": span.name,
        "SpanContext": context(&trace, &id),
        "Parent": context(&trace, &parent),
        "SpanKind": span.kind,
        "StartTime": unix(span.start_time_unix_nano),
        "EndTime": unix(span.end_time_unix_nano),
        "Attributes": attributes(&span.attributes),
        "Events": events,
        "Links": null,
        "Status": { "Code": code, "Description": status.message },
        "DroppedAttributes": span.dropped_attributes_count,
        "DroppedEvents": span.dropped_events_count,
        "DroppedLinks": span.dropped_links_count,
        "ChildSpanCount": 0,
        "Resource": resource,
        "InstrumentationScope": library,
        "InstrumentationLibrary": library,
    });
    Some((trace, value.to_string()))
}

/// A span without a parent has one of zeros.
fn context(trace: &TraceId, id: &SpanId) -> Value {
    let present = *id != SpanId::default();
    json!({
        "TraceID": hex::encode(if present { *trace } else { TraceId::default() }),
        "SpanID": hex::encode(id),
        "TraceFlags": if present { "01" } else { "00" },
        "TraceState": "",
        "Remote": false,
    })
}

fn library(given: Option<&InstrumentationScope>) -> Value {
    given.map_or_else(|| scope("", ""), |given| scope(&given.name, &given.version))
}

fn scope(name: &str, version: &str) -> Value {
    json!({ "Name": name, "Version": version, "SchemaURL": "", "Attributes": {} })
}

fn text(value: &str) -> Value {
    json!({ "Type": "STRING", "Value": value })
}

fn attributes(all: &[KeyValue]) -> Value {
    all.iter().map(|pair| json!({ "Key": pair.key, "Value": attribute(pair.value.as_ref()) })).collect()
}

/// Values that no reader knows become text.
fn attribute(value: Option<&AnyValue>) -> Value {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Any::StringValue(value)) => text(value),
        Some(Any::BoolValue(value)) => json!({ "Type": "BOOL", "Value": value }),
        Some(Any::IntValue(value)) => json!({ "Type": "INT64", "Value": value }),
        Some(Any::DoubleValue(value)) => json!({ "Type": "FLOAT64", "Value": value }),
        Some(Any::ArrayValue(array)) => {
            let words: Vec<String> = array
                .values
                .iter()
                .map(|value| match &value.value {
                    Some(Any::StringValue(value)) => value.clone(),
                    other => format!("{other:?}"),
                })
                .collect();
            json!({ "Type": "STRINGSLICE", "Value": words })
        }
        Some(other) => text(&format!("{other:?}")),
        None => text(""),
    }
}

fn unix(nanos: u64) -> String {
    let nanos = i128::from(nanos);
    jiff::Timestamp::from_nanosecond(nanos).map(|time| time.to_string()).unwrap_or_default()
}

fn time(seconds: i64, nanos: i32) -> String {
    jiff::Timestamp::new(seconds, nanos).map(|time| time.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_proto::control::Vertex;

    #[test]
    fn one_span_for_each_run_of_a_vertex() {
        let at = |seconds| Some(Timestamp { seconds, nanos: 5 });
        let vertex = |started, completed, error: &str| Vertex {
            digest: "sha256:a".into(),
            name: "[1/2] RUN x".into(),
            started,
            completed,
            error: error.into(),
            ..Vertex::default()
        };
        let message = |vertex| StatusResponse { vertexes: vec![vertex], ..StatusResponse::default() };
        let log = [
            message(vertex(None, None, "")),
            message(vertex(at(1), None, "")),
            message(vertex(at(1), at(2), "")),
            message(vertex(at(3), at(4), "")),
            message(vertex(at(3), at(4), "exit code: 1")),
        ];
        let record = BuildHistoryRecord { created_at: at(1), completed_at: at(5), ..Default::default() };
        let build = Stub::build([1; 16], None, &record);
        let spans: Vec<Value> = Stub::vertices(&build, &log)
            .iter()
            .map(|span| serde_json::from_str(&span.encode()).expect("JSON"))
            .collect();
        assert_eq!(spans.len(), 2);
        assert_eq!(spans[0]["StartTime"], "1970-01-01T00:00:01.000000005Z");
        assert_eq!(spans[1]["EndTime"], "1970-01-01T00:00:04.000000005Z");
        assert_eq!(spans[0]["Parent"]["SpanID"], hex::encode(build.id));
        assert_eq!(spans[1]["Status"], json!({ "Code": 1, "Description": "exit code: 1" }));
        let root: Value = serde_json::from_str(&build.encode()).expect("JSON");
        assert_eq!(root["Parent"]["TraceID"], "0".repeat(32));
    }
}
