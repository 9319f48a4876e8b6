//! Questions about a Dockerfile that are answered without building it. The answer is metadata:
//! `result.json` for programs, `result.txt` for people.

use std::fmt::Write as _;

use kiln_dockerfile::{LintReport, Outline, OutlineNeed, TargetInfo};
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
    /// What can be given to a target.
    Outline,
    /// Which stages there are.
    Targets,
}

impl Subrequest {
    const ALL: [(Self, &str, &str, &[&str]); 4] = [
        (
            Self::Lint,
            "frontend.lint",
            "Lint a Dockerfile",
            &["result.json", "result.txt", "result.statuscode"],
        ),
        (
            Self::Outline,
            "frontend.outline",
            "List all parameters current build target supports",
            &["result.json", "result.txt"],
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

/// What can be given to a target.
pub(super) fn outline(file: &pb::SourceInfo, outline: &Outline) -> BuildResult {
    let Outline { name, description, args, secrets, ssh } = outline;
    let mut text = String::new();
    let mut value = json!({ "sources": [encoded(&file.data)] });
    if !(name.is_empty() && description.is_empty()) {
        value["name"] = name.as_str().into();
        let mut rows = vec![["TARGET:".to_owned(), name.clone()]];
        if !description.is_empty() {
            value["description"] = description.as_str().into();
            rows.push(["DESCRIPTION:".to_owned(), description.clone()]);
        }
        table(&mut text, &rows, 1);
    }
    if !args.is_empty() {
        let mut rows = vec![["BUILD ARG", "VALUE", "DESCRIPTION"].map(str::to_owned)];
        let mut all = Vec::new();
        for arg in args {
            let mut entry = json!({ "name": arg.name, "location": location(arg.lines) });
            for (key, field) in [("value", &arg.value), ("description", &arg.description)] {
                if !field.is_empty() {
                    entry[key] = field.as_str().into();
                }
            }
            all.push(entry);
            rows.push([arg.name.clone(), arg.value.clone(), arg.description.clone()]);
        }
        value["args"] = all.into();
        table(&mut text, &rows, 3);
    }
    for (key, title, needs) in [("secrets", "SECRET", secrets), ("ssh", "SSH", ssh)] {
        if needs.is_empty() {
            continue;
        }
        let mut rows = vec![[title.to_owned(), "REQUIRED".to_owned()]];
        let mut all = Vec::new();
        for OutlineNeed { name, required, lines } in needs {
            let mut entry = json!({ "name": name, "location": location(*lines) });
            if *required {
                entry["required"] = true.into();
            }
            all.push(entry);
            rows.push([name.clone(), if *required { "true".to_owned() } else { String::new() }]);
        }
        value[key] = all.into();
        table(&mut text, &rows, 3);
    }
    result(&value, text)
}

/// Rows whose columns are as wide as need be, and an empty line.
fn table<const N: usize>(text: &mut String, rows: &[[String; N]], gap: usize) {
    for row in rows {
        let mut line = String::new();
        for (at, cell) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[at].chars().count()).max().unwrap_or_default();
            // Writing to a string does not fail.
            let _ = write!(line, "{cell:<width$}{:gap$}", "");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push('\n');
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
        let error = Subrequest::parse("frontend.convertllb").expect_err("not there");
        assert_eq!(error.message, "unsupported: subrequest frontend.convertllb");
        let described = describe();
        let list: Value = serde_json::from_slice(&described.metadata["result.json"]).expect("JSON");
        for entry in list.as_array().expect("a list") {
            Subrequest::parse(entry["name"].as_str().expect("a name")).expect("it is there");
        }
    }
}
