//! The one error that crosses the daemon's gRPC border, and its typed details. Details are `Any`s
//! whose value is JSON, not protobuf (wire: control-and-session "Error encoding"); those that came
//! from elsewhere are handed on as they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_cache::Ref;
use kiln_proto::{pb, rpc};
use kiln_solver::op::Remains;
use prost::Message;
use prost_types::Any;
use serde_json::{Value, json};
use tonic::{Code, Status};

/// A failed request or build.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct BuildError {
    /// gRPC code.
    pub code: Code,
    /// What the user reads; clients put `failed to solve: ` before it.
    pub message: String,
    /// Typed details.
    pub details: Vec<Any>,
    /// The vertex that it is about, for whoever wants to look into that.
    pub(crate) failed: Option<Arc<FailedVertex>>,
}

/// A vertex that failed.
#[derive(Debug, PartialEq)]
pub(crate) struct FailedVertex {
    pub(crate) op: pb::Op,
    /// What its definition says of it to people.
    pub(crate) description: BTreeMap<String, String>,
    /// The failing action of a file operation.
    pub(crate) file_action: Option<usize>,
    pub(crate) remains: Option<Arc<Remains<Ref>>>,
}

impl BuildError {
    /// An error of a code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: Vec::new(), failed: None }
    }

    /// A failure of the build itself: code Unknown, as buildkitd answers.
    pub fn build(message: impl Into<String>) -> Self {
        Self::new(Code::Unknown, message)
    }

    /// The caller went away or asked to stop.
    pub fn canceled() -> Self {
        Self::new(Code::Cancelled, "context canceled")
    }

    /// Something that Kiln does not do.
    pub fn unsupported(what: impl std::fmt::Display) -> Self {
        Self::new(Code::Unimplemented, format!("unsupported: {what}"))
    }

    /// Adds a detail.
    pub fn with(mut self, detail: Any) -> Self {
        self.details.push(detail);
        self
    }

    /// Puts `context: ` before the text.
    pub fn context(mut self, context: impl std::fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// Whether it says which lines of which file it is about.
    pub(crate) fn is_located(&self) -> bool {
        self.details.iter().any(|detail| detail.type_url.contains("errdefs.Source"))
    }

    /// Whether the build was stopped, as opposed to having failed.
    pub fn is_canceled(&self) -> bool {
        self.code == Code::Cancelled || self.message.ends_with("context canceled")
    }

    /// As `google.rpc.Status`, with details.
    pub fn to_rpc(&self) -> rpc::Status {
        rpc::Status { code: self.code as i32, message: self.message.clone(), details: self.details.clone() }
    }

    /// From `google.rpc.Status`, e.g. what a client's frontend returned.
    pub fn from_rpc(status: rpc::Status) -> Self {
        let code = Code::from_i32(status.code);
        Self { details: status.details, ..Self::new(code, status.message) }
    }
}

impl From<BuildError> for Status {
    fn from(error: BuildError) -> Self {
        if error.details.is_empty() {
            return Status::new(error.code, error.message);
        }
        let encoded = error.to_rpc().encode_to_vec();
        Status::with_details(error.code, error.message, encoded.into())
    }
}

impl From<Status> for BuildError {
    fn from(status: Status) -> Self {
        let details = rpc::Status::decode(status.details()).map(|full| full.details).unwrap_or_default();
        Self { details, ..Self::new(status.code(), status.message()) }
    }
}

fn detail(type_url: &str, value: &Value) -> Any {
    Any {
        type_url: format!("github.com/moby/buildkit/{type_url}+json"),
        value: value.to_string().into_bytes(),
    }
}

/// Ties an error to a vertex.
pub(crate) fn vertex_detail(digest: &str) -> Any {
    detail("errdefs.Vertex", &json!({ "digest": digest }))
}

/// Exit code of the process that failed.
pub(crate) fn exit_detail(code: i32) -> Any {
    detail("gatewayapi.ExitMessage", &json!({ "Code": code }))
}

/// The frontend in which an error arose.
pub(crate) fn frontend_detail(name: &str, source: &str) -> Any {
    let mut value = json!({ "name": name });
    if !source.is_empty() {
        value["source"] = source.into();
    }
    detail("errdefs.Frontend", &value)
}

/// A capability that a frontend lacks; clients fall back on seeing it.
pub(crate) fn frontend_cap_detail(name: &str) -> Any {
    detail("errdefs.FrontendCap", &json!({ "name": name }))
}

/// What a client says of a source that it denies.
pub(crate) fn denial_detail(messages: &[&str]) -> Any {
    let messages: Vec<Value> = messages.iter().map(|message| json!({ "message": message })).collect();
    detail("policysession.DecisionResponse", &json!({ "action": 1, "denyMessages": messages }))
}

/// A subrequest that a frontend lacks.
pub(crate) fn subrequest_detail(name: &str) -> Any {
    detail("errdefs.Subrequest", &json!({ "name": name }))
}

/// Marks an error of a gateway call, and says what there is to look into.
pub(crate) fn solve_detail(value: &Value) -> Any {
    detail("errdefs.Solve", value)
}

/// The lines of a source file that an error is about; clients print them.
pub(crate) fn source_detail(info: &pb::SourceInfo, ranges: &[pb::Range]) -> Any {
    let position = |position: &Option<pb::Position>| {
        let position = position.unwrap_or_default();
        let mut value = json!({});
        if position.line != 0 {
            value["line"] = position.line.into();
        }
        if position.character != 0 {
            value["character"] = position.character.into();
        }
        value
    };
    let mut value = json!({ "info": source_json(info) });
    if !ranges.is_empty() {
        value["ranges"] = ranges
            .iter()
            .map(|range| json!({ "start": position(&range.start), "end": position(&range.end) }))
            .collect();
    }
    detail("errdefs.Source", &value)
}

/// A source file.
pub(crate) fn source_json(info: &pb::SourceInfo) -> Value {
    let mut file = json!({});
    if !info.filename.is_empty() {
        file["filename"] = info.filename.as_str().into();
    }
    if !info.data.is_empty() {
        file["data"] = STANDARD.encode(&info.data).into();
    }
    if let Some(definition) = &info.definition {
        file["definition"] = definition_json(definition);
    }
    if !info.language.is_empty() {
        file["language"] = info.language.as_str().into();
    }
    file
}

/// A definition's operations; its metadata and source map are of no use to a reader of errors.
fn definition_json(definition: &pb::Definition) -> Value {
    json!({ "def": definition.def.iter().map(|op| STANDARD.encode(op)).collect::<Vec<_>>() })
}

/// One detail for each place in the sources that the failed vertex came from. The place that was stated last wraps
/// the others, and comes first.
pub(crate) fn source_details(sources: &pb::Source, vertex: &str) -> Vec<Any> {
    let Some(locations) = sources.locations.get(vertex) else { return Vec::new() };
    locations
        .locations
        .iter()
        .rev()
        .filter_map(|location| {
            let info = usize::try_from(location.source_index).ok().and_then(|i| sources.infos.get(i))?;
            Some(source_detail(info, &location.ranges))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json_of(any: &Any) -> Value {
        serde_json::from_slice(&any.value).expect("details are JSON")
    }

    #[test]
    fn details_survive_the_way_through_a_status() {
        let error = BuildError::build("process \"x\" did not complete successfully: exit code: 3")
            .with(vertex_detail("sha256:00"))
            .with(exit_detail(3))
            .with(Any { type_url: "example.com/unknown".into(), value: vec![0xff, 0] });
        let status = Status::from(error.clone());
        assert_eq!(status.code(), Code::Unknown);
        assert_eq!(BuildError::from(status), error);
        assert_eq!(BuildError::from_rpc(error.to_rpc()), error);
    }

    #[test]
    fn source_excerpt() {
        let line = |line| Some(pb::Position { line, character: 0 });
        let sources = pb::Source {
            locations: [(
                "sha256:aa".to_owned(),
                pb::Locations {
                    locations: vec![
                        pb::Location {
                            source_index: 0,
                            ranges: vec![pb::Range { start: line(2), end: line(2) }],
                        },
                        pb::Location { source_index: 7, ranges: vec![] },
                        pb::Location {
                            source_index: 0,
                            ranges: vec![pb::Range { start: line(1), end: line(1) }],
                        },
                    ],
                },
            )]
            .into(),
            infos: vec![pb::SourceInfo {
                filename: "Dockerfile".into(),
                data: b"FROM x\nRUN y\n".to_vec(),
                language: "Dockerfile".into(),
                definition: None,
            }],
        };
        let details = source_details(&sources, "sha256:aa");
        assert_eq!(details.len(), 2, "an index without a file is skipped");
        assert_eq!(json_of(&details[0])["ranges"], json!([{ "start": { "line": 1 }, "end": { "line": 1 } }]));
        assert_eq!(details[0].type_url, "github.com/moby/buildkit/errdefs.Source+json");
        assert_eq!(
            json_of(&details[1]),
            json!({
                "info": { "filename": "Dockerfile", "data": "RlJPTSB4ClJVTiB5Cg==", "language": "Dockerfile" },
                "ranges": [{ "start": { "line": 2 }, "end": { "line": 2 } }],
            })
        );
        assert!(source_details(&sources, "sha256:bb").is_empty());
    }
}
