//! `kiln build --explain` and `kiln history explain`: why steps were not cached.

use std::fmt::Write as _;

use kiln_proto::explain::explain_client::ExplainClient;
use kiln_proto::explain::{ExplainRequest, Explanation, FileChange, Reason, Step};
use kiln_session::MAX_MESSAGE_SIZE;
use serde_json::json;

use crate::args::{Connection, ExplainArgs, Format};
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::stdout::{self, harmless};

/// Explains a build of the history.
pub(crate) fn history(connection: &Connection, args: &ExplainArgs) -> Result<(), CliError> {
    let explanation = ask(connection, Start::IfNeeded, args.reference.as_deref().unwrap_or_default())?;
    match args.format {
        Format::Text => stdout::print(&text(&explanation)),
        Format::Json => stdout::print(&json(&explanation)?),
    }
}

/// Explains a build that just ended. Text goes where its progress went. A daemon that has gone meanwhile stays away.
pub(crate) fn build(connection: &Connection, reference: &str, format: Format) -> Result<(), CliError> {
    let explanation = ask(connection, Start::Never, reference)?;
    match format {
        Format::Text => {
            eprint!("{}", text(&explanation));
            Ok(())
        }
        Format::Json => stdout::print(&json(&explanation)?),
    }
}

fn ask(connection: &Connection, start: Start, reference: &str) -> Result<Explanation, CliError> {
    let stream = connect::connect(connection, start)?;
    connect::runtime()?.block_on(async {
        let mut client = ExplainClient::new(stream.channel()?).max_decoding_message_size(MAX_MESSAGE_SIZE);
        Ok(client.explain(ExplainRequest { r#ref: reference.to_owned() }).await?.into_inner())
    })
}

fn json(explanation: &Explanation) -> Result<String, CliError> {
    let failed = |error: serde_json::Error| CliError::file("write", "standard output", error.into());
    let mut value = serde_json::to_value(explanation).map_err(failed)?;
    for reason in value["steps"]
        .as_array_mut()
        .into_iter()
        .flatten()
        .flat_map(|step| step["reasons"].as_array_mut().into_iter().flatten())
    {
        // What a reason of this kind doesn't have.
        if let Some(fields) = reason.as_object_mut() {
            fields.retain(|_, value| *value != json!("") && *value != json!([]) && *value != json!(0));
        }
    }
    Ok(serde_json::to_string_pretty(&value).map_err(failed)? + "\n")
}

fn text(explanation: &Explanation) -> String {
    let Explanation { r#ref, compared_with, total, steps } = explanation;
    let mut out = format!("Build {ref}: ");
    let were = if steps.len() == 1 { "was" } else { "were" };
    let _ = match (steps.len(), compared_with.is_empty()) {
        (0, _) if *total == 0 => writeln!(out, "no step was reached"),
        (0, _) => writeln!(out, "all {total} steps were cached"),
        (missed, true) => {
            writeln!(out, "{missed} of {total} steps {were} not cached; there is no earlier build like it")
        }
        (missed, false) => {
            writeln!(out, "{missed} of {total} steps {were} not cached, compared with build {compared_with}:")
        }
    };
    // That they were never built needs no list.
    let told = |step: &&Step| {
        !compared_with.is_empty()
            || step.reasons.iter().any(|reason| !matches!(reason.kind.as_str(), "never-built" | "input"))
    };
    for step in steps.iter().filter(told) {
        write_step(&mut out, step);
    }
    out.lines().map(|line| harmless(line) + "\n").collect()
}

fn write_step(out: &mut String, step: &Step) {
    let _ = write!(out, "{}", one_line(&step.name));
    // Where the step itself has reasons, those of other steps are said there.
    let own = step.reasons.iter().any(|reason| reason.kind != "input");
    let reasons: Vec<_> = step.reasons.iter().filter(|reason| !own || reason.kind != "input").collect();
    match reasons.as_slice() {
        [only] if only.changes.is_empty() => {
            let _ = writeln!(out, ": {}", say(only));
        }
        reasons => {
            let _ = writeln!(out);
            for reason in reasons {
                let _ = writeln!(out, "    {}", say(reason));
                for change in &reason.changes {
                    let _ = writeln!(out, "        {}", say_change(change));
                }
                let more = (reason.count as usize).saturating_sub(reason.changes.len());
                if more > 0 {
                    let _ = writeln!(out, "        and {more} more");
                }
            }
        }
    }
}

fn say(reason: &Reason) -> String {
    let Reason { kind, name, before, after, step, count, rule, at, .. } = reason;
    let (before, after) = apart(before, after);
    let step = one_line(step);
    match kind.as_str() {
        "part" => {
            let of = if step.is_empty() { String::new() } else { format!(" of {step}") };
            match (before.is_empty(), after.is_empty()) {
                (true, false) => format!("{name}{of}: {after:?} is new"),
                (false, true) => format!("{name}{of}: {before:?} is gone"),
                _ => format!("{name}{of}: {before:?} became {after:?}"),
            }
        }
        "files" if *count == 0 => format!("files of {step} changed"),
        "files" => format!("{count} {} of {step} changed:", if *count == 1 { "file" } else { "files" }),
        "order" if step.is_empty() => format!("{name} {after} instead of {before}"),
        "order" => format!("{step} {name} {after} instead of {before}"),
        "input" => format!("because of {step}"),
        "no-cache" => "the build asked for a new run".to_owned(),
        "evicted" if rule.is_empty() => "its result was removed".to_owned(),
        "evicted" => format!("its result was removed at {at} by {rule}"),
        "unfinished" => "the earlier build did not finish it".to_owned(),
        "shared" => "it was being made already, for another build or step".to_owned(),
        "never-built" => "never built before".to_owned(),
        _ => "nothing was found, though nothing differs".to_owned(),
    }
}

fn say_change(change: &FileChange) -> String {
    let FileChange { path, change, before, after } = change;
    let path = if path.is_empty() { "." } else { path };
    match change.as_str() {
        "renamed" => format!("{path}: renamed from {before}"),
        "content" | "type" | "attributes" => format!("{path}: {change} changed"),
        "target" | "mode" | "owner" => format!("{path}: {change} {before} became {after}"),
        other => format!("{path}: {other}"),
    }
}

/// How much of a text leaves a list readable.
const LENGTH: usize = 128;

/// The part in which two long texts differ, from the word before on.
fn window<'a>(before: &'a str, after: &'a str) -> (&'a str, &'a str) {
    if before.len().max(after.len()) <= LENGTH || before.is_empty() || after.is_empty() {
        return (before, after);
    }
    let same = before.bytes().zip(after.bytes()).take_while(|(a, b)| a == b).count();
    let start =
        before.as_bytes()[..same].iter().rposition(|byte| b" \n".contains(byte)).map_or(0, |at| at + 1);
    (&before[start..], &after[start..])
}

fn one_line(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    match first.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", &first[..end]),
        None if first.len() < text.len() => format!("{first}…"),
        None => first.to_owned(),
    }
}

/// Two texts, each in one line, such that it is seen in what they differ.
fn apart(before: &str, after: &str) -> (String, String) {
    let (before, after) = window(before, after);
    let both = (one_line(before), one_line(after));
    // What differs is in a later line.
    let hidden = before != after && both.0.trim_end_matches('…') == both.1.trim_end_matches('…');
    if hidden {
        (one_line(&before.replace('\n', "\\n")), one_line(&after.replace('\n', "\\n")))
    } else {
        both
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_words() {
        let reason = |kind: &str| Reason { kind: kind.into(), ..Reason::default() };
        let step = |name: &str, reasons: Vec<Reason>| Step { name: name.into(), reasons, ..Step::default() };
        let change = |path: &str, change: &str, before: &str, after: &str| FileChange {
            path: path.into(),
            change: change.into(),
            before: before.into(),
            after: after.into(),
        };
        let part = |name: &str, before: &str, after: &str| Reason {
            name: name.into(),
            before: before.into(),
            after: after.into(),
            ..reason("part")
        };
        let changes = vec![
            change("a", "content", "", ""),
            change("b", "added", "", ""),
            change("c", "renamed", "d", ""),
            change("e", "mode", "0644", "0755"),
        ];
        let files = Reason { step: "context".into(), count: 12, changes, ..reason("files") };
        let explanation = Explanation {
            r#ref: "new".into(),
            compared_with: "old".into(),
            total: 9,
            steps: vec![
                step("COPY", vec![files, Reason { step: "stage".into(), ..reason("files") }]),
                step("RUN a", vec![Reason { step: "COPY".into(), ..reason("input") }]),
                step("RUN b", vec![part("env A", "1", "2"), part("env B", "", "x"), part("env C", "y", "")]),
                step(
                    "RUN c",
                    vec![Reason {
                        before: "x".into(),
                        after: "y".into(),
                        name: "reads".into(),
                        ..reason("order")
                    }],
                ),
                step("RUN \u{1b}[2Jd", vec![reason("no-cache")]),
                step("RUN e", vec![reason("never-built")]),
                step("RUN f", vec![reason("unfinished")]),
                step("RUN g\nmore", vec![reason("lost")]),
                step(
                    "RUN h",
                    vec![Reason { rule: "kiln prune".into(), at: "T".into(), ..reason("evicted") }],
                ),
            ],
        };
        insta::assert_snapshot!(text(&explanation));
        let long = format!("{} x", "word ".repeat(40));
        assert_eq!(window(&long, &long.replace('x', "y z")), ("x", "y z"));
        assert_eq!(apart("date", "date\n"), ("date".into(), "date\\n".into()));
        assert_eq!(apart("a\nb", "c\nb"), ("a…".into(), "c…".into()));
        let alone = |step: &Step| {
            step.reasons
                .iter()
                .all(|reason| matches!(reason.kind.as_str(), "never-built" | "no-cache" | "evicted"))
        };
        let steps = explanation.steps.iter().filter(|step| alone(step)).cloned().collect();
        let alone = Explanation { compared_with: String::new(), steps, ..explanation };
        insta::assert_snapshot!("nothing_to_compare_with", text(&alone));
    }
}
