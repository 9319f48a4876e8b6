//! The record of a build from its start to its end: a note of how it ended at once, the whole of it a little later.

use std::sync::Arc;
use std::time::SystemTime;

use kiln_proto::control::{BuildHistoryRecord, BuildResultInfo, Descriptor};
use kiln_proto::rpc::Status;
use kiln_worker::export::{IN_TOTO, PREDICATE_TYPE};
use serde_json::Value;

use super::History;
use super::contents::{Content, Packed};
use crate::error::BuildError;
use crate::progress::ProgressLog;
use crate::traces::Wanted;

/// The type of the provenance that records keep.
const SLSA: &str = "https://slsa.dev/provenance/v1";

/// How a build ended.
pub(crate) struct Outcome {
    pub(crate) ended: SystemTime,
    /// What its frontend said of the result.
    pub(crate) metadata: Vec<(String, String)>,
    /// The provenance of its results, by platform; no platform's name if there is one result only.
    pub(crate) provenance: Vec<(String, Value)>,
    /// The images that were made of them.
    pub(crate) images: Vec<Descriptor>,
    pub(crate) error: Option<BuildError>,
}

/// The record of a running build.
pub(crate) struct Recording {
    history: Arc<History>,
    progress: Arc<ProgressLog>,
    wanted: Option<Wanted>,
    /// How it is kept.
    pub(super) record: BuildHistoryRecord,
}

impl Recording {
    /// Of a build that has begun, which may be part of a client's trace.
    pub(super) fn new(
        history: Arc<History>,
        progress: Arc<ProgressLog>,
        wanted: Option<Wanted>,
        record: BuildHistoryRecord,
    ) -> Self {
        Self { history, progress, wanted, record }
    }

    /// Keeps how the build ended, and its steps by number: a daemon that is killed a moment later still knows that.
    /// Its progress must be closed.
    pub(crate) async fn note(&mut self, outcome: &Outcome) {
        let record = &mut self.record;
        end(record, outcome.ended, outcome.error.as_ref());
        record.exporter_response = outcome.metadata.iter().cloned().collect();
        let counts = self.progress.counts();
        let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        record.num_total_steps = number(counts.total);
        record.num_cached_steps = number(counts.cached);
        record.num_completed_steps = number(counts.completed);
        record.num_warnings = number(counts.warnings);
        let (history, record) = (self.history.clone(), record.clone());
        let kept = tokio::task::spawn_blocking(move || history.note(&record)).await;
        if let Ok(Err(error)) = kept {
            tracing::warn!(%error, build = self.record.r#ref, "the end of the build is not noted");
        }
    }

    /// Stores the rest: the log, what is claimed of results, the error's details. Returns when the build can be looked
    /// up.
    pub(crate) async fn finish(self, outcome: Outcome) {
        let Self { history, progress, wanted, mut record } = self;
        let mut claimed = Vec::new();
        if outcome.error.is_none() {
            let mut result = BuildResultInfo::default();
            for (platform, predicate) in outcome.provenance {
                // Memory is all that it is written to.
                let packed = Content::new().and_then(|mut content| {
                    serde_json::to_writer_pretty(&mut content, &predicate)?;
                    content.finish()
                });
                let Ok(packed) = packed else { continue };
                let mut described = packed.descriptor(IN_TOTO);
                described.annotations.insert(PREDICATE_TYPE.into(), SLSA.into());
                let into = match platform.is_empty() {
                    true => &mut result,
                    false => record.results.entry(platform).or_default(),
                };
                into.attestations.push(described);
                claimed.push(packed);
            }
            result.result_deprecated = outcome.images.first().cloned();
            result.results = (0..).zip(outcome.images).collect();
            record.result = Some(result);
        }
        let (of, id) = (history.clone(), record.r#ref.clone());
        let stored = tokio::task::spawn_blocking(move || {
            store(&of, record, &progress, claimed, outcome.error.as_ref());
        });
        if let Err(error) = stored.await {
            tracing::error!(%error, "storing the record of a build");
        }
        if let Some(wanted) = wanted {
            history.expect_trace(id, wanted);
        }
    }
}

/// Puts down how a build ended.
pub(super) fn end(record: &mut BuildHistoryRecord, ended: SystemTime, error: Option<&BuildError>) {
    record.generation = 1;
    record.completed_at = Some(ended.into());
    // Its details are kept apart.
    record.error = error.map(|error| Status { details: Vec::new(), ..error.to_rpc() });
}

fn store(
    history: &History,
    record: BuildHistoryRecord,
    progress: &ProgressLog,
    claimed: Vec<Packed>,
    error: Option<&BuildError>,
) {
    let (id, created) = (record.r#ref.clone(), record.created_at);
    if let Err(error) = history.finish(record, &progress.replay(), claimed, error) {
        history.active.remove_if(&id, |_, running| running.created_at == created);
        tracing::warn!(%error, build = id, "the build is not in the history");
    }
}
