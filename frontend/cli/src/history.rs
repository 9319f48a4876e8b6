//! `kiln history`: the builds that the daemon remembers, and forgetting them.

use std::time::{Duration, SystemTime};

use kiln_daemon::build_status;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::control::{
    BuildHistoryEventType, BuildHistoryRecord, BuildHistoryRequest, UpdateBuildHistoryRequest,
};
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::args::{Connection, HistoryCommand, HistoryLsArgs, HistoryRmArgs, RecordFormat};
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::stdout::harmless;
use crate::{explain, record, stdout};

/// Runs one of the history commands.
pub(crate) fn main(connection: &Connection, command: HistoryCommand) -> Result<(), CliError> {
    match command {
        HistoryCommand::Ls(args) => ls(connection, &args),
        HistoryCommand::Logs(args) => record::logs(connection, &args),
        HistoryCommand::Inspect(args) => record::inspect(connection, &args),
        HistoryCommand::Rm(args) => rm(connection, args),
        HistoryCommand::Explain(args) => explain::history(connection, &args),
    }
}

/// Lists builds, the latest first.
fn ls(connection: &Connection, args: &HistoryLsArgs) -> Result<(), CliError> {
    let stream = connect::connect(connection, Start::IfNeeded)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        let mut records = records(&mut control, &args.filters).await?;
        records.sort_by_key(|record| std::cmp::Reverse(time(record.created_at.as_ref())));
        match args.format {
            Some(RecordFormat::Json) => {
                let lines: String = records.iter().map(|record| format!("{}\n", json(record))).collect();
                stdout::print(&lines)
            }
            None => stdout::print(&table(&records)),
        }
    })
}

/// Forgets builds.
fn rm(connection: &Connection, args: HistoryRmArgs) -> Result<(), CliError> {
    let stream = connect::connect(connection, Start::IfNeeded)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        for reference in args.references {
            forget(&mut control, &reference).await?;
            stdout::print(&format!("{}\n", harmless(&reference)))?;
        }
        if args.all {
            for record in records(&mut control, &[]).await? {
                if forget_ended(&mut control, &record).await? {
                    stdout::print(&format!("{}\n", harmless(&record.r#ref)))?;
                }
            }
        }
        Ok(())
    })
}

async fn forget(control: &mut ControlClient<Channel>, reference: &str) -> Result<(), Status> {
    let request =
        UpdateBuildHistoryRequest { r#ref: reference.to_owned(), delete: true, ..Default::default() };
    control.update_build_history(request).await.map(drop)
}

/// Forgets a build of which nobody asked by name; false if it still runs or somebody else was faster.
pub(crate) async fn forget_ended(
    control: &mut ControlClient<Channel>,
    record: &BuildHistoryRecord,
) -> Result<bool, CliError> {
    if record.completed_at.is_none() {
        return Ok(false);
    }
    match forget(control, &record.r#ref).await {
        Ok(()) => Ok(true),
        Err(status) if matches!(status.code(), Code::NotFound | Code::FailedPrecondition) => Ok(false),
        Err(status) => Err(status.into()),
    }
}

/// The builds of which the daemon knows now.
pub(crate) async fn records(
    control: &mut ControlClient<Channel>,
    filters: &[String],
) -> Result<Vec<BuildHistoryRecord>, CliError> {
    let request =
        BuildHistoryRequest { early_exit: true, filter: filters.to_vec(), ..BuildHistoryRequest::default() };
    let mut events = control.listen_build_history(request).await?.into_inner();
    let mut records = Vec::new();
    while let Some(event) = events.message().await? {
        let gone = event.r#type() == BuildHistoryEventType::Deleted;
        records.extend(event.record.filter(|_| !gone));
    }
    Ok(records)
}

/// What was built: the remote context, if any, the Dockerfile and the target.
pub(crate) fn name(record: &BuildHistoryRecord) -> String {
    let attr =
        |name: &str| record.frontend_attrs.get(name).map(String::as_str).filter(|value| !value.is_empty());
    if let Some(name) = attr("build-arg:BUILDKIT_BUILD_NAME") {
        return name.to_owned();
    }
    let target = attr("target").map(|target| format!("({target})"));
    let words = [attr("context"), attr("filename"), target.as_deref()];
    words.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

pub(crate) fn time(time: Option<&prost_types::Timestamp>) -> Option<jiff::Timestamp> {
    time.and_then(|time| jiff::Timestamp::new(time.seconds, time.nanos).ok())
}

/// How long a build took, or has taken so far.
pub(crate) fn duration(record: &BuildHistoryRecord, now: SystemTime) -> String {
    let now = || jiff::Timestamp::try_from(now).ok();
    let end = time(record.completed_at.as_ref()).or_else(now);
    let taken = time(record.created_at.as_ref()).zip(end).map(|(start, end)| end.duration_since(start));
    let taken = taken.and_then(|taken| Duration::try_from(taken).ok()).unwrap_or_default();
    let seconds = taken.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, _) => format!("{:.1}s", taken.as_secs_f64()),
        (0, minutes, seconds) => format!("{minutes}m {seconds:02}s"),
        (hours, minutes, seconds) => format!("{hours}h {minutes:02}m {seconds:02}s"),
    }
}

fn table(records: &[BuildHistoryRecord]) -> String {
    let now = SystemTime::now();
    let mut rows = vec![["BUILD ID", "NAME", "STATUS", "CREATED AT", "DURATION"].map(str::to_owned)];
    for record in records {
        let created = record.created_at.as_ref().and_then(|time| jiff::Timestamp::new(time.seconds, 0).ok());
        rows.push([
            harmless(&record.r#ref).into_owned(),
            harmless(&name(record)).into_owned(),
            build_status(record).to_owned(),
            created.map(|created| created.to_string()).unwrap_or_default(),
            duration(record, now),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3].map(width);
    let line = |row: &[String; 5]| {
        let cells: String = widths.iter().zip(row).map(|(width, cell)| format!("{cell:width$}  ")).collect();
        format!("{cells}{}\n", row[4])
    };
    rows.iter().map(line).collect()
}

/// As buildx encodes a build.
pub(crate) fn json(record: &BuildHistoryRecord) -> Value {
    let mut value = json!({
        "ref": record.r#ref,
        "name": name(record),
        "status": build_status(record),
        "created_at": time(record.created_at.as_ref()).map(|time| time.to_string()),
        "total_steps": record.num_total_steps,
        "completed_steps": record.num_completed_steps,
        "cached_steps": record.num_cached_steps,
    });
    if let Some(completed) = time(record.completed_at.as_ref()) {
        value["completed_at"] = completed.to_string().into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_in_a_line() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let attrs = [("filename", "Dockerfile"), ("target", "app")];
        let ended = BuildHistoryRecord {
            r#ref: "abc".into(),
            frontend_attrs: attrs.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            created_at: at(1000),
            completed_at: at(1083),
            ..Default::default()
        };
        let failed = BuildHistoryRecord {
            r#ref: "longer".into(),
            frontend_attrs: [("filename".to_owned(), "\u{1b}[2J\n\u{9b}ä".to_owned())].into(),
            error: Some(kiln_proto::rpc::Status::default()),
            completed_at: at(4723),
            ..ended.clone()
        };
        assert_eq!(
            table(&[ended, failed]),
            concat!(
                "BUILD ID  NAME                STATUS     CREATED AT            DURATION\n",
                "abc       Dockerfile (app)    Completed  1970-01-01T00:16:40Z  1m 23s\n",
                "longer    \\u{1b}[2J\\n\\u{9b}ä  Error      1970-01-01T00:16:40Z  1h 02m 03s\n",
            )
        );
    }
}
