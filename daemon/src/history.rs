//! Records of builds, running and finished: what was asked, how it ended, its log. Kept in the
//! store's named values; nothing here influences a build.

use std::sync::Arc;
use std::time::SystemTime;

use dashmap::DashMap;
use kiln_cache::{Filter, Values};
use kiln_proto::control::{
    self, BuildHistoryEvent, BuildHistoryEventType, BuildHistoryRecord, BuildHistoryRequest, BuildResultInfo,
    Descriptor, StatusResponse, UpdateBuildHistoryRequest,
};
use prost::Message;
use sha2::Digest;
use tokio::sync::broadcast;
use tonic::Code;

use crate::config::HistoryConfig;
use crate::error::BuildError;
use crate::explain::Explanations;
use crate::progress::ProgressLog;

/// Records by ref.
const RECORDS: &str = "build-history";
/// Logs and errors by digest.
const CONTENT: &str = "build-history-content";

const LOG_TYPE: &str = "application/vnd.buildkit.status.v0";
/// Misspelt by every client.
const ERROR_TYPE: &str = "application/vnd.googeapis.google.rpc.status+proto";

/// Builds that fall behind a slow listener by more than this end its stream.
const LIVE_EVENTS: usize = 256;

/// All records.
pub(crate) struct History {
    values: Values,
    explanations: Arc<Explanations>,
    config: HistoryConfig,
    active: DashMap<String, BuildHistoryRecord>,
    events: broadcast::Sender<BuildHistoryEvent>,
}

fn storage(error: impl std::fmt::Display) -> BuildError {
    BuildError::new(Code::Internal, format!("build history: {error}"))
}

fn not_found(id: &str) -> BuildError {
    BuildError::new(Code::NotFound, format!("no such build {id}"))
}

impl History {
    /// Over the store's values.
    pub(crate) fn new(values: Values, explanations: Arc<Explanations>, config: HistoryConfig) -> Arc<Self> {
        let events = broadcast::Sender::new(LIVE_EVENTS);
        Arc::new(Self { values, explanations, config, active: DashMap::new(), events })
    }

    /// Starts the record of a build.
    pub(crate) fn begin(
        self: &Arc<Self>,
        request: &control::SolveRequest,
        progress: Arc<ProgressLog>,
    ) -> Recording {
        let record = BuildHistoryRecord {
            r#ref: request.r#ref.clone(),
            frontend: request.frontend.clone(),
            frontend_attrs: request.frontend_attrs.clone(),
            exporters: request.exporters.clone(),
            created_at: Some(SystemTime::now().into()),
            ..BuildHistoryRecord::default()
        };
        self.active.insert(record.r#ref.clone(), record.clone());
        self.send(BuildHistoryEventType::Started, record.clone());
        Recording { history: self.clone(), progress, record: Some(record) }
    }

    fn send(&self, kind: BuildHistoryEventType, record: BuildHistoryRecord) {
        // Nobody listening is fine.
        let _ = self.events.send(BuildHistoryEvent { r#type: kind as i32, record: Some(record) });
    }

    /// The record of a finished build.
    pub(crate) fn record(&self, id: &str) -> Result<Option<BuildHistoryRecord>, BuildError> {
        match self.values.get(RECORDS, id).map_err(storage)? {
            Some(bytes) => BuildHistoryRecord::decode(&bytes[..]).map(Some).map_err(storage),
            None => Ok(None),
        }
    }

    /// The log of a finished build.
    pub(crate) fn replay(&self, id: &str) -> Result<Option<Vec<StatusResponse>>, BuildError> {
        let Some(logs) = self.record(id)?.and_then(|record| record.logs) else { return Ok(None) };
        match self.content(&logs.digest)? {
            Some(bytes) => decode_log(&bytes).map(Some),
            None => Ok(None),
        }
    }

    /// A blob that a record names.
    pub(crate) fn content(&self, digest: &str) -> Result<Option<Vec<u8>>, BuildError> {
        self.values.get(CONTENT, digest).map_err(storage)
    }

    /// The digests of all blobs that records name.
    pub(crate) fn contents(&self) -> Result<Vec<String>, BuildError> {
        self.values.names(CONTENT).map_err(storage)
    }

    fn put_content(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor, BuildError> {
        let digest = format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)));
        self.values.put(CONTENT, &digest, bytes).map_err(storage)?;
        Ok(Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
            ..Descriptor::default()
        })
    }

    fn finish(
        &self,
        mut record: BuildHistoryRecord,
        log: &[StatusResponse],
        error: Option<&BuildError>,
    ) -> Result<(), BuildError> {
        let id = record.r#ref.clone();
        record.completed_at = Some(SystemTime::now().into());
        record.generation = 1;
        record.logs = Some(self.put_content(LOG_TYPE, &encode_log(log))?);
        if let Some(error) = error {
            let full = error.to_rpc();
            record.external_error = Some(self.put_content(ERROR_TYPE, &full.encode_to_vec())?);
            record.error = Some(kiln_proto::rpc::Status { details: Vec::new(), ..full });
        }
        self.values.put(RECORDS, &id, &record.encode_to_vec()).map_err(storage)?;
        self.active.remove(&id);
        self.send(BuildHistoryEventType::Complete, record);
        self.clean()
    }

    fn stored(&self) -> Result<Vec<BuildHistoryRecord>, BuildError> {
        let records = self.values.list(RECORDS).map_err(storage)?;
        // A record that an older version wrote in another form is of no use.
        Ok(records.into_iter().filter_map(|(_, bytes)| BuildHistoryRecord::decode(&bytes[..]).ok()).collect())
    }

    /// Drops what is too old or too much, except for pinned records.
    fn clean(&self) -> Result<(), BuildError> {
        let mut loose: Vec<BuildHistoryRecord> =
            self.stored()?.into_iter().filter(|record| !record.pinned).collect();
        loose.sort_by_key(|record| std::cmp::Reverse(completed(record)));
        let oldest = SystemTime::now().checked_sub(self.config.max_age).unwrap_or(SystemTime::UNIX_EPOCH);
        for (index, record) in loose.iter().enumerate() {
            if index >= self.config.max_entries || completed(record) < oldest {
                self.delete(&record.r#ref)?;
            }
        }
        Ok(())
    }

    fn delete(&self, id: &str) -> Result<(), BuildError> {
        self.explanations.forget(id).map_err(storage)?;
        let Some(record) = self.record(id)? else { return Ok(()) };
        self.values.delete(RECORDS, id).map_err(storage)?;
        // Identical logs or errors of two builds share their bytes.
        let others = self.stored()?;
        for content in [&record.logs, &record.external_error].into_iter().flatten() {
            let shared = others.iter().any(|other| {
                [&other.logs, &other.external_error].into_iter().flatten().any(|d| d.digest == content.digest)
            });
            if !shared {
                self.values.delete(CONTENT, &content.digest).map_err(storage)?;
            }
        }
        self.send(BuildHistoryEventType::Deleted, record);
        Ok(())
    }

    /// Pins, unpins or deletes a record.
    pub(crate) fn update(&self, request: &UpdateBuildHistoryRequest) -> Result<(), BuildError> {
        if request.delete {
            return match self.record(&request.r#ref)? {
                Some(_) => self.delete(&request.r#ref),
                None if self.active.contains_key(&request.r#ref) => {
                    let text = format!("build {} is still running", request.r#ref);
                    Err(BuildError::new(Code::FailedPrecondition, text))
                }
                None => Err(not_found(&request.r#ref)),
            };
        }
        if request.finalize {
            // Records are whole when they appear.
            return Ok(());
        }
        let Some(mut record) = self.record(&request.r#ref)? else {
            return Err(not_found(&request.r#ref));
        };
        record.pinned = request.pinned;
        record.generation += 1;
        self.values.put(RECORDS, &request.r#ref, &record.encode_to_vec()).map_err(storage)?;
        self.send(BuildHistoryEventType::Complete, record);
        Ok(())
    }

    /// What a listener gets at once, and, if it stays, where later events come from.
    pub(crate) fn listen(
        &self,
        request: &BuildHistoryRequest,
    ) -> Result<(Vec<BuildHistoryEvent>, Option<broadcast::Receiver<BuildHistoryEvent>>), BuildError> {
        let Ok(limit) = usize::try_from(request.limit) else {
            return Err(BuildError::new(Code::InvalidArgument, "limit must not be negative"));
        };
        let invalid = |text: String| BuildError::new(Code::InvalidArgument, text);
        let relative = |filter: &&String| filter.contains(['<', '>']) || filter.contains("duration");
        if let Some(filter) = request.filter.iter().find(relative) {
            return Err(invalid(format!("unsupported: history filter {filter:?} on times")));
        }
        let filter = Filter::parse(&request.filter).map_err(|error| invalid(error.to_string()))?;
        // Subscribed before looking, so that nothing falls between.
        let live = (!request.early_exit).then(|| self.events.subscribe());
        let wanted = |record: &BuildHistoryRecord| {
            (request.r#ref.is_empty() || record.r#ref == request.r#ref)
                && filter.holds(&|name| field(record, name))
        };
        let event = |kind: BuildHistoryEventType, record| BuildHistoryEvent {
            r#type: kind as i32,
            record: Some(record),
        };
        let mut events: Vec<BuildHistoryEvent> = self
            .active
            .iter()
            .filter(|record| wanted(record))
            .map(|record| event(BuildHistoryEventType::Started, record.value().clone()))
            .collect();
        if !request.active_only {
            let mut stored: Vec<BuildHistoryRecord> = self.stored()?.into_iter().filter(wanted).collect();
            if limit > 0 {
                stored.sort_by_key(|record| std::cmp::Reverse(time(&record.created_at)));
                stored.truncate(limit);
            }
            events.extend(stored.into_iter().map(|record| event(BuildHistoryEventType::Complete, record)));
        }
        Ok((events, live))
    }
}

fn time(timestamp: &Option<prost_types::Timestamp>) -> SystemTime {
    timestamp.and_then(|time| SystemTime::try_from(time).ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn completed(record: &BuildHistoryRecord) -> SystemTime {
    time(&record.completed_at)
}

/// A field of a record by its name in filters.
fn field(record: &BuildHistoryRecord, name: &str) -> Option<String> {
    let attrs = &record.frontend_attrs;
    match name {
        "ref" => Some(record.r#ref.clone()),
        "status" => {
            let status = match &record.error {
                _ if record.completed_at.is_none() => "running",
                None => "completed",
                Some(error) if error.code == Code::Cancelled as i32 => "canceled",
                Some(_) => "error",
            };
            Some(status.to_owned())
        }
        "repository" => attrs.get("vcs:source").or_else(|| attrs.get("context")).cloned(),
        _ => None,
    }
}

/// Each message with its length before it.
fn encode_log(log: &[StatusResponse]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in log {
        let encoded = message.encode_to_vec();
        bytes.extend_from_slice(&u32::try_from(encoded.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&encoded);
    }
    bytes
}

fn decode_log(mut bytes: &[u8]) -> Result<Vec<StatusResponse>, BuildError> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let message = rest.get(..length).ok_or_else(|| storage("log is cut off"))?;
        messages.push(StatusResponse::decode(message).map_err(storage)?);
        bytes = &rest[length..];
    }
    Ok(messages)
}

/// The record of a running build. Dropping it records that the build was canceled.
pub(crate) struct Recording {
    history: Arc<History>,
    progress: Arc<ProgressLog>,
    record: Option<BuildHistoryRecord>,
}

impl Recording {
    /// Stores how the build ended; its progress must be closed. Returns when it can be looked up.
    pub(crate) async fn finish(mut self, metadata: Vec<(String, String)>, error: Option<BuildError>) {
        if let Some(mut record) = self.record.take() {
            record.exporter_response = metadata.into_iter().collect();
            if error.is_none() {
                record.result = Some(BuildResultInfo::default());
            }
            let (history, progress) = (self.history.clone(), self.progress.clone());
            let stored =
                tokio::task::spawn_blocking(move || store(&history, record, &progress, error.as_ref()));
            if let Err(error) = stored.await {
                tracing::error!(%error, "storing the record of a build");
            }
        }
    }
}

fn store(
    history: &History,
    mut record: BuildHistoryRecord,
    progress: &ProgressLog,
    error: Option<&BuildError>,
) {
    let counts = progress.counts();
    let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    record.num_total_steps = number(counts.total);
    record.num_cached_steps = number(counts.cached);
    record.num_completed_steps = number(counts.completed);
    record.num_warnings = number(counts.warnings);
    let id = record.r#ref.clone();
    if let Err(error) = history.finish(record, &progress.replay(), error) {
        history.active.remove(&id);
        tracing::warn!(%error, build = id, "the build is not in the history");
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let Some(record) = self.record.take() else { return };
        let (history, progress) = (self.history.clone(), self.progress.clone());
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn_blocking(move || {
            progress.close(false);
            store(&history, record, &progress, Some(&BuildError::canceled()));
        });
    }
}
