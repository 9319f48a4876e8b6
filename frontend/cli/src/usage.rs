//! `kiln du` and `kiln prune`: what the cache holds, and freeing it.

use kiln_proto::control::{DiskUsageRequest, PruneRequest, UsageRecord};
use serde_json::{Value, json};

use crate::args::{Connection, DuArgs, PruneArgs, RecordFormat};
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::progress::units;
use crate::stdout;

/// Lists the cache's records, largest first.
pub(crate) fn du(connection: &Connection, args: &DuArgs) -> Result<(), CliError> {
    let stream = connect::connect(connection, Start::IfNeeded)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        let filter = match args.filters.is_empty() {
            true => {
                vec![kiln_daemon::STORE_RECORDS.to_owned(), kiln_daemon::STORE_RECORDS.replace("==", "!=")]
            }
            false => args.filters.clone(),
        };
        let request = DiskUsageRequest { filter, ..Default::default() };
        let mut records = control.disk_usage(request).await?.into_inner().record;
        records.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
        match args.format {
            Some(RecordFormat::Json) => {
                stdout::print(&format!("{}\n", Value::Array(records.iter().map(json).collect())))
            }
            None => stdout::print(&format!("{}{}", table(&records, args.verbose), summary(&records))),
        }
    })
}

/// Removes records and lists them.
pub(crate) fn prune(connection: &Connection, args: &PruneArgs) -> Result<(), CliError> {
    let stream = connect::connect(connection, Start::IfNeeded)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        let keep = args.keep_duration.unwrap_or_default();
        let request = PruneRequest {
            filter: args.filters.clone(),
            all: args.all,
            keep_duration: i64::try_from(keep.as_nanos()).unwrap_or(i64::MAX),
            reserved_space: args.reserved_space.or(args.keep_storage_min).unwrap_or_default(),
            max_used_space: args.max_used_space.or(args.keep_storage).unwrap_or_default(),
            min_free_space: args.min_free_space.or(args.free_storage).unwrap_or_default(),
        };
        let mut stream = control.prune(request).await?.into_inner();
        let as_json = args.format == Some(RecordFormat::Json);
        if !as_json && !args.verbose {
            stdout::print(&line(&HEADING.map(str::to_owned), USUAL))?;
        }
        let mut total = 0;
        while let Some(record) = stream.message().await? {
            total += record.size;
            stdout::print(&match (as_json, args.verbose) {
                (true, _) => format!("{}\n", json(&record)),
                (false, true) => details(&record),
                (false, false) => line(&row(&record), USUAL),
            })?;
        }
        if as_json {
            return Ok(());
        }
        stdout::print(&format!("Total:\t{}\n", units::bytes(total)))
    })
}

const HEADING: [&str; 4] = ["ID", "RECLAIMABLE", "SIZE", "LAST ACCESSED"];
/// Widths of columns that are enough for what there usually is.
const USUAL: [usize; 3] = [26, HEADING[1].len(), 10];

fn row(record: &UsageRecord) -> [String; 4] {
    let id = format!("{}{}", record.id, if record.mutable { "*" } else { "" });
    let used = time(record.last_used_at.as_ref());
    [id, (!record.in_use).to_string(), units::bytes(record.size), used]
}

fn line(row: &[String; 4], widths: [usize; 3]) -> String {
    let [id, reclaimable, size, used] = row;
    let line = format!("{id:0$}  {reclaimable:1$}  {size:2$}  {used}", widths[0], widths[1], widths[2]);
    format!("{}\n", line.trim_end())
}

fn table(records: &[UsageRecord], verbose: bool) -> String {
    if verbose {
        return records.iter().map(details).collect();
    }
    let mut rows = vec![HEADING.map(str::to_owned)];
    rows.extend(records.iter().map(row));
    let widths = [0, 1, 2].map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    rows.iter().map(|row| line(row, widths)).collect()
}

fn details(record: &UsageRecord) -> String {
    let mut fields = vec![("ID", record.id.clone())];
    if !record.parents.is_empty() {
        fields.push(("Parents", record.parents.join(" ")));
    }
    fields.extend([
        ("Created at", time(record.created_at.as_ref())),
        ("Mutable", record.mutable.to_string()),
        ("Reclaimable", (!record.in_use).to_string()),
        ("Shared", record.shared.to_string()),
        ("Size", units::bytes(record.size)),
        ("Description", stdout::harmless(&record.description).into_owned()),
        ("Usage count", record.usage_count.to_string()),
        ("Last used", time(record.last_used_at.as_ref())),
        ("Type", record.record_type.clone()),
    ]);
    let lines: String = fields
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{:14}{value}\n", format!("{name}:")))
        .collect();
    lines + "\n"
}

/// As buildctl encodes a record.
fn json(record: &UsageRecord) -> Value {
    let time = |time: Option<&prost_types::Timestamp>| {
        time.and_then(|time| jiff::Timestamp::new(time.seconds, time.nanos).ok()).map(|time| time.to_string())
    };
    json!({
        "id": record.id,
        "mutable": record.mutable,
        "inUse": record.in_use,
        "size": record.size,
        "createdAt": time(record.created_at.as_ref()),
        "lastUsedAt": time(record.last_used_at.as_ref()),
        "usageCount": record.usage_count,
        "parents": (!record.parents.is_empty()).then_some(&record.parents),
        "description": record.description,
        "recordType": record.record_type,
        "shared": record.shared,
    })
}

pub(crate) fn time(time: Option<&prost_types::Timestamp>) -> String {
    let time = time.and_then(|time| jiff::Timestamp::new(time.seconds, 0).ok());
    time.map(|time| time.to_string()).unwrap_or_default()
}

fn summary(records: &[UsageRecord]) -> String {
    let sum = |keep: &dyn Fn(&&UsageRecord) -> bool| {
        units::bytes(records.iter().filter(keep).map(|r| r.size).sum())
    };
    format!("Reclaimable:\t{}\nTotal:\t\t{}\n", sum(&|record| !record.in_use), sum(&|_| true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<UsageRecord> {
        vec![
            UsageRecord {
                id: "abc".into(),
                size: 12_000_000,
                mutable: true,
                in_use: true,
                record_type: "exec.cachemount".into(),
                description: "cached mount /c".into(),
                ..Default::default()
            },
            UsageRecord {
                id: "longer-id".into(),
                size: 5,
                last_used_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5 }),
                parents: vec!["abc".into()],
                ..Default::default()
            },
        ]
    }

    #[test]
    fn the_table_lines_up() {
        insta::assert_snapshot!(format!("{}{}", table(&records(), false), summary(&records())));
    }

    #[test]
    fn json_has_buildctls_names() {
        let lines: String = records().iter().map(|record| format!("{}\n", json(record))).collect();
        insta::assert_snapshot!(lines);
    }

    #[test]
    fn details_name_every_field() {
        insta::assert_snapshot!(table(&records(), true));
    }
}
