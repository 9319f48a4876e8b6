//! A failed build as the daemon tells it: a message and typed details, of which the source lines are printed.

use std::fmt::{self, Write as _};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::rpc;
use prost::Message;
use serde::Deserialize;
use tonic::{Code, Status};

/// Lines of context shown around those that an error is about.
const CONTEXT: usize = 2;

/// Why a build failed.
#[derive(Debug)]
pub(crate) struct SolveFailure {
    code: Code,
    message: String,
    sources: Vec<Source>,
}

/// The lines of a file that an error is about (wire: `errdefs.Source`, as JSON).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Source {
    info: Info,
    ranges: Vec<Range>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Info {
    filename: String,
    data: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Range {
    start: Position,
    end: Position,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
struct Position {
    line: usize,
    character: usize,
}

impl SolveFailure {
    /// Reads the details that ride on a status.
    pub(crate) fn from_status(status: &Status) -> Self {
        let details = rpc::Status::decode(status.details()).map(|full| full.details).unwrap_or_default();
        let sources = details
            .iter()
            .filter(|detail| detail.type_url.ends_with("errdefs.Source+json"))
            .filter_map(|detail| serde_json::from_slice(&detail.value).ok())
            .collect();
        Self { code: status.code(), message: status.message().to_owned(), sources }
    }

    /// The build was stopped from this side.
    pub(crate) fn canceled() -> Self {
        Self { code: Code::Cancelled, message: "context canceled".into(), sources: Vec::new() }
    }

    /// A failure found on this side.
    pub(crate) fn local(message: String) -> Self {
        Self { code: Code::Unknown, message, sources: Vec::new() }
    }

    /// Whether the connection broke, as opposed to the daemon having answered.
    pub(crate) fn is_lost(&self) -> bool {
        self.code == Code::Unavailable
            || (self.code == Code::Unknown && self.message.contains("transport error"))
            || (self.code == Code::Cancelled && self.message.contains("operation was canceled"))
    }
}

impl std::error::Error for SolveFailure {}

impl fmt::Display for SolveFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_lost() {
            true => write!(
                f,
                "failed to solve: the daemon ended or cut the connection ({}); one that was started on demand logs \
                 to kilnd.log in its root",
                self.message
            ),
            false => write!(f, "failed to solve: {}", self.message),
        }
    }
}

/// The lines around what the error is about, ready to print; empty if the daemon named none.
pub(crate) fn excerpt(failure: &SolveFailure) -> String {
    failure.sources.iter().filter_map(one).collect()
}

fn one(source: &Source) -> Option<String> {
    let first = source.ranges.first()?.start;
    let last = source.ranges.iter().map(|range| range.end.line.max(range.start.line)).max()?;
    let data = STANDARD.decode(&source.info.data).ok()?;
    let text = String::from_utf8_lossy(&data);
    let lines: Vec<&str> = text.lines().collect();
    let start = source.ranges.iter().map(|range| range.start.line).min()?;
    if start == 0 || start > lines.len() {
        return None;
    }
    let last = last.min(lines.len());
    let mut out = format!("{}:{}", source.info.filename, first.line);
    if first.character > 0 {
        let _ = write!(out, ":{}", first.character);
    }
    out.push_str("\n--------------------\n");
    for number in start.saturating_sub(CONTEXT).max(1)..=(last + CONTEXT).min(lines.len()) {
        let within =
            |range: &Range| (range.start.line..=range.end.line.max(range.start.line)).contains(&number);
        let mark = if source.ranges.iter().any(within) { ">>>" } else { "   " };
        let _ = writeln!(out, "{number:4} | {mark} {}", lines[number - 1]);
    }
    out.push_str("--------------------\n");
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Any;
    use serde_json::json;

    fn failure(ranges: serde_json::Value) -> SolveFailure {
        let text = "FROM a\nRUN one \\\n  two\nRUN three\nRUN four\nRUN five\n";
        let source =
            json!({"info": {"filename": "Dockerfile", "data": STANDARD.encode(text)}, "ranges": ranges});
        let detail = Any {
            type_url: "github.com/moby/buildkit/errdefs.Source+json".into(),
            value: source.to_string().into_bytes(),
        };
        let other = Any { type_url: "github.com/other".into(), value: vec![1] };
        let full = rpc::Status { code: 2, message: "exit code: 3".into(), details: vec![other, detail] };
        SolveFailure::from_status(&Status::with_details(
            Code::Unknown,
            "exit code: 3",
            full.encode_to_vec().into(),
        ))
    }

    #[test]
    fn the_lines_are_marked_with_context() {
        let failure = failure(json!([{"start": {"line": 2}, "end": {"line": 3}}]));
        assert_eq!(failure.to_string(), "failed to solve: exit code: 3");
        assert_eq!(
            excerpt(&failure),
            "Dockerfile:2\n--------------------\n   1 |     FROM a\n   2 | >>> RUN one \\\n   3 | >>>   two\n   4 |     RUN three\n   5 |     RUN four\n--------------------\n"
        );
    }

    #[test]
    fn a_column_is_named_if_it_is_known() {
        let failure = failure(json!([{"start": {"line": 4, "character": 5}}]));
        assert!(excerpt(&failure).starts_with("Dockerfile:4:5\n"));
    }

    #[test]
    fn ranges_outside_the_file_print_nothing() {
        for ranges in [json!([]), json!([{"start": {"line": 0}}]), json!([{"start": {"line": 99}}])] {
            assert_eq!(excerpt(&failure(ranges.clone())), "", "{ranges}");
        }
    }
}
