//! Lists the daemon's workers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use kiln_proto::control::ListWorkersRequest;
use kiln_proto::types::{BuildkitVersion, GcPolicy, WorkerRecord};
use kiln_proto::{pb, platform};
use serde_json::{Value, json};

use crate::args::{Connection, RecordFormat, record_format};
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::progress::units;
use crate::stdout;

#[derive(Debug, Args)]
pub(crate) struct WorkersArgs {
    /// Only matching workers, e.g. id==abc (may be repeated; one must match)
    #[arg(short, long = "filter", value_name = "FILTER")]
    filters: Vec<String>,
    /// Everything known of each worker
    #[arg(short, long)]
    verbose: bool,
    /// Print the workers as json
    #[arg(long, value_name = "FORMAT", value_parser = record_format)]
    format: Option<RecordFormat>,
}

/// Lists them.
pub(crate) fn main(connection: &Connection, args: &WorkersArgs) -> Result<(), CliError> {
    let stream = connect::connect(connection, Start::IfNeeded)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        let request = ListWorkersRequest { filter: args.filters.clone() };
        let records = control.list_workers(request).await?.into_inner().record;
        stdout::print(&match args.format {
            Some(RecordFormat::Json) => {
                format!("{}\n", Value::Array(records.iter().map(json).collect()))
            }
            None if args.verbose => records.iter().map(details).collect(),
            None => table(&records),
        })
    })
}

fn platforms(record: &WorkerRecord) -> String {
    record.platforms.iter().map(platform::format).collect::<Vec<_>>().join(",")
}

fn table(records: &[WorkerRecord]) -> String {
    let width = records.iter().map(|record| record.id.len()).max().unwrap_or(0);
    let lines = records.iter().map(|record| format!("{:width$}  {}\n", record.id, platforms(record)));
    format!("{:width$}  PLATFORMS\n{}", "ID", lines.collect::<String>())
}

fn details(record: &WorkerRecord) -> String {
    let version = record.buildkit_version.clone().unwrap_or_default();
    let mut text = format!(
        "ID:         {}\nPlatforms:  {}\nBuildKit:   {} {} {}\nLabels:\n",
        record.id,
        platforms(record),
        version.package,
        version.version,
        version.revision
    );
    for (key, value) in record.labels.iter().collect::<BTreeMap<_, _>>() {
        let _ = writeln!(text, "  {key}:  {value}");
    }
    for (number, rule) in record.gc_policy.iter().enumerate() {
        let _ = writeln!(text, "GC policy rule {number}:\n  All:  {}", rule.all);
        if !rule.filters.is_empty() {
            let _ = writeln!(text, "  Filters:  {}", rule.filters.join(" "));
        }
        if rule.keep_duration > 0 {
            let kept = Duration::from_nanos(rule.keep_duration.unsigned_abs());
            let _ = writeln!(text, "  Keep duration:  {}h", kept.as_secs_f64() / 3600.0);
        }
        for (name, bytes) in [
            ("Reserved space", rule.reserved_space),
            ("Minimum free space", rule.min_free_space),
            ("Maximum used space", rule.max_used_space),
        ] {
            if bytes > 0 {
                let _ = writeln!(text, "  {name}:  {}", units::bytes(bytes));
            }
        }
    }
    text + "\n"
}

/// As buildctl encodes a worker.
fn json(record: &WorkerRecord) -> Value {
    let platform = |platform: &pb::Platform| {
        let mut value = json!({"architecture": platform.architecture, "os": platform.os});
        for (key, text) in [("os.version", &platform.os_version), ("variant", &platform.variant)] {
            if !text.is_empty() {
                value[key] = text.as_str().into();
            }
        }
        value
    };
    let rule = |rule: &GcPolicy| {
        json!({
            "all": rule.all,
            "filter": (!rule.filters.is_empty()).then_some(&rule.filters),
            "keepDuration": rule.keep_duration,
            "reservedSpace": rule.reserved_space,
            "maxUsedSpace": rule.max_used_space,
            "minFreeSpace": rule.min_free_space,
        })
    };
    let BuildkitVersion { package, version, revision, .. } =
        record.buildkit_version.clone().unwrap_or_default();
    json!({
        "id": record.id,
        "labels": record.labels.iter().collect::<BTreeMap<_, _>>(),
        "platforms": record.platforms.iter().map(platform).collect::<Vec<_>>(),
        "gcPolicy": record.gc_policy.iter().map(rule).collect::<Vec<_>>(),
        "buildkitVersion": {"package": package, "version": version, "revision": revision},
        "cdiDevices": null,
    })
}
