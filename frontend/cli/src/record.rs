//! `kiln history logs` and `kiln history inspect`: one build of those that the daemon remembers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::SystemTime;

use kiln_daemon::build_status;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::control::{BuildHistoryRecord, Descriptor, StatusRequest};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::args::{Connection, HistoryInspectArgs, HistoryLogsArgs, RecordFormat};
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::progress::Display;
use crate::stdout::harmless;
use crate::{history, stdout};

/// Shows what a build printed, and goes on while it runs.
pub(crate) fn logs(connection: &Connection, args: &HistoryLogsArgs) -> Result<(), CliError> {
    let mut display = Display::new(args.progress, false)?;
    let stream = connect::connect(connection, Start::IfNeeded)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        let reference = find(&mut control, &args.reference).await?.r#ref;
        let mut messages = control.status(StatusRequest { r#ref: reference }).await?.into_inner();
        while let Some(message) = messages.message().await? {
            display.update(&message);
        }
        display.finish();
        Ok(())
    })
}

/// Shows what is known of a build.
pub(crate) fn inspect(connection: &Connection, args: &HistoryInspectArgs) -> Result<(), CliError> {
    let stream = connect::connect(connection, Start::IfNeeded)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        let record = find(&mut control, &args.reference).await?;
        match args.format {
            Some(RecordFormat::Json) => stdout::print(&format!("{:#}\n", json(&record))),
            None => stdout::print(&text(&record)),
        }
    })
}

/// The build whose ref begins so; with nothing to begin with the one that began last.
async fn find(control: &mut ControlClient<Channel>, prefix: &str) -> Result<BuildHistoryRecord, CliError> {
    let mut records = history::records(control, &[]).await?;
    if let Some(at) = records.iter().position(|record| record.r#ref == prefix) {
        return Ok(records.swap_remove(at));
    }
    records.retain(|record| record.r#ref.starts_with(prefix));
    if records.len() > 1 && !prefix.is_empty() {
        return Err(CliError::usage(format!("{} builds begin with {prefix:?}", records.len())));
    }
    let last = records.into_iter().max_by_key(|record| history::time(record.created_at.as_ref()));
    last.ok_or_else(|| match prefix {
        "" => CliError::usage("no build is remembered"),
        prefix => CliError::usage(format!("no build {prefix:?} is remembered")),
    })
}

/// What the record names, by what it is.
fn attachments(record: &BuildHistoryRecord) -> Vec<(&'static str, &Descriptor)> {
    let results = record.result.iter().chain(record.results.values());
    let claimed = results.flat_map(|result| {
        let images = result.results.values().map(|image| ("image", image));
        images.chain(result.attestations.iter().map(|attestation| ("attestation", attestation)))
    });
    let own = [("log", &record.logs), ("trace", &record.trace), ("error", &record.external_error)];
    let own = own.into_iter().filter_map(|(name, blob)| Some((name, blob.as_ref()?)));
    claimed.chain(own).collect()
}

fn json(record: &BuildHistoryRecord) -> Value {
    let mut value = history::json(record);
    let sorted =
        |map: &std::collections::HashMap<String, String>| json!(map.iter().collect::<BTreeMap<_, _>>());
    value["frontend"] = record.frontend.as_str().into();
    value["frontend_attrs"] = sorted(&record.frontend_attrs);
    value["exporters"] = record
        .exporters
        .iter()
        .map(|exporter| json!({"type": exporter.r#type, "attrs": sorted(&exporter.attrs)}))
        .collect();
    value["warnings"] = record.num_warnings.into();
    value["pinned"] = record.pinned.into();
    if let Some(error) = &record.error {
        value["error"] = json!({"code": error.code, "message": error.message});
    }
    let blob = |(kind, blob): (&str, &Descriptor)| json!({"kind": kind, "mediaType": blob.media_type, "digest": blob.digest, "size": blob.size});
    value["attachments"] = attachments(record).into_iter().map(blob).collect();
    value
}

fn text(record: &BuildHistoryRecord) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name:<12}{}", harmless(value));
        }
    };
    let time = |time| history::time(time).map(|time| time.to_string()).unwrap_or_default();
    line("Ref:", &record.r#ref);
    line("Name:", &history::name(record));
    line("Frontend:", &record.frontend);
    line("Status:", build_status(record));
    line("Started:", &time(record.created_at.as_ref()));
    line("Completed:", &time(record.completed_at.as_ref()));
    line("Duration:", &history::duration(record, SystemTime::now()));
    let steps = format!(
        "{} of {}, {} cached, {} warnings",
        record.num_completed_steps, record.num_total_steps, record.num_cached_steps, record.num_warnings
    );
    line("Steps:", &steps);
    line("Error:", record.error.as_ref().map(|error| error.message.as_str()).unwrap_or_default());
    for (key, value) in record.frontend_attrs.iter().collect::<BTreeMap<_, _>>() {
        line("Option:", &format!("{key}={value}"));
    }
    for exporter in &record.exporters {
        let attrs: Vec<String> = exporter
            .attrs
            .iter()
            .collect::<BTreeMap<_, _>>()
            .into_iter()
            .map(|(key, value)| format!(",{key}={value}"))
            .collect();
        line("Output:", &format!("type={}{}", exporter.r#type, attrs.concat()));
    }
    for (kind, blob) in attachments(record) {
        line("Attachment:", &format!("{kind} {} {} ({} bytes)", blob.digest, blob.media_type, blob.size));
    }
    out
}
