//! Questions about a Dockerfile that are answered without building it. The answer is metadata:
//! `result.json` for programs, `result.txt` for people.

use std::fmt::Write as _;

use kiln_dockerfile::{LintReport, TargetInfo};
use kiln_proto::pb;
use serde_json::{Value, json};

use crate::error::{BuildError, source_json, subrequest_detail};
use crate::gateway::BuildResult;

/// The version of every answer.
const VERSION: &str = "1.0.0";

/// A question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subrequest {
    /// Which subrequests there are.
    Describe,
    /// What the checks find.
    Lint,
    /// Which stages there are.
    Targets,
}

impl Subrequest {
    const ALL: [(Self, &str, &str, &[&str]); 3] = [
        (
            Self::Lint,
            "frontend.lint",
            "Lint a Dockerfile",
            &["result.json", "result.txt", "result.statuscode"],
        ),
        (
            Self::Targets,
            "frontend.targets",
            "List all targets current build supports",
            &["result.json", "result.txt"],
        ),
        (
            Self::Describe,
            "frontend.subrequests.describe",
            "List available subrequest types",
            &["result.json", "result.txt"],
        ),
    ];

    /// By its id.
    pub(super) fn parse(id: &str) -> Result<Self, BuildError> {
        let known = Self::ALL.iter().find(|(_, name, ..)| *name == id);
        known.map(|(request, ..)| *request).ok_or_else(|| {
            BuildError::unsupported(format_args!("subrequest {id}")).with(subrequest_detail(id))
        })
    }
}

fn result(json: &Value, text: String) -> BuildResult {
    let mut result = BuildResult::default();
    let json = serde_json::to_vec_pretty(json).unwrap_or_default();
    for (key, value) in
        [("result.json", json), ("result.txt", text.into_bytes()), ("version", VERSION.as_bytes().to_vec())]
    {
        result.metadata.insert(key.to_owned(), value);
    }
    result
}

/// A place in the only source.
fn location(lines: (u32, u32)) -> Value {
    let ranges: Vec<Value> = (lines.0..=lines.1.max(lines.0))
        .map(|line| json!({ "start": { "line": line }, "end": { "line": line } }))
        .collect();
    json!({ "ranges": ranges })
}

/// The subrequests that there are.
pub(super) fn describe() -> BuildResult {
    let mut text = String::from("NAME                 VERSION DESCRIPTION\n");
    let mut all = Vec::new();
    for (_, name, description, metadata) in Subrequest::ALL {
        let metadata: Vec<Value> = metadata.iter().map(|name| json!({ "name": name })).collect();
        all.push(json!({
            "name": name, "version": VERSION, "type": "rpc", "description": description, "opts": null,
            "inputs": null, "metadata": metadata, "refs": null,
        }));
        let short = name.trim_start_matches("frontend.");
        // Writing to a string does not fail.
        let _ = writeln!(text, "{short:<20} {VERSION}   {description}");
    }
    result(&Value::Array(all), text)
}

/// The stages of a file.
pub(super) fn targets(file: &pb::SourceInfo, targets: &[TargetInfo]) -> BuildResult {
    let mut text = String::from("TARGET DESCRIPTION\n");
    let mut all = Vec::new();
    for (at, target) in targets.iter().enumerate() {
        let default = at + 1 == targets.len();
        let mut value = json!({ "location": location(target.lines) });
        for (key, field) in [
            ("name", &target.name),
            ("description", &target.description),
            ("base", &target.base),
            ("platform", &target.platform),
        ] {
            if !field.is_empty() {
                value[key] = field.as_str().into();
            }
        }
        if default {
            value["default"] = true.into();
        }
        let mark = if default { "(default)" } else { "" };
        let shown = [target.name.as_str(), mark, target.description.as_str()];
        let shown: Vec<&str> = shown.into_iter().filter(|part| !part.is_empty()).collect();
        let _ = writeln!(text, "{}", shown.join(" "));
        all.push(value);
    }
    result(&json!({ "targets": all, "sources": [encoded(&file.data)] }), text)
}

fn encoded(data: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(data)
}

/// What the checks found.
pub(super) fn lint(file: &pb::SourceInfo, report: &LintReport) -> BuildResult {
    let mut text = String::new();
    let mut warnings = Vec::new();
    for warning in &report.warnings {
        let mut value = json!({
            "ruleName": warning.rule, "description": warning.description, "detail": warning.message,
            "location": location(warning.lines),
        });
        let _ = write!(text, "\nWARNING: {}", warning.rule);
        if !warning.url.is_empty() {
            value["url"] = warning.url.as_str().into();
            let _ = write!(text, " - {}", warning.url);
        }
        let _ = writeln!(text, "\n{}\n{}:{}", warning.message, file.filename, warning.lines.0);
        warnings.push(value);
    }
    let mut value = json!({ "warnings": warnings, "sources": [source_json(file)] });
    if let Some(error) = &report.error {
        let mut place = json!({});
        if let (Some(first), Some(last)) = (error.ranges.first(), error.ranges.last()) {
            let line = |position: &Option<pb::Position>| {
                u32::try_from(position.unwrap_or_default().line).unwrap_or_default()
            };
            place = location((line(&first.start), line(&last.start)));
        }
        value["buildError"] = json!({ "message": error.message, "location": place });
    }
    let mut result = result(&value, text);
    let status = u8::from(!report.warnings.is_empty() || report.error.is_some());
    result.metadata.insert("result.statuscode".into(), status.to_string().into_bytes());
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert_eq!(Subrequest::parse("frontend.lint"), Ok(Subrequest::Lint));
        let error = Subrequest::parse("frontend.outline").expect_err("not there");
        assert_eq!(error.message, "unsupported: subrequest frontend.outline");
        let described = describe();
        let list: Value = serde_json::from_slice(&described.metadata["result.json"]).expect("JSON");
        for entry in list.as_array().expect("a list") {
            Subrequest::parse(entry["name"].as_str().expect("a name")).expect("it is there");
        }
    }
}
