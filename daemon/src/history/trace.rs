//! Traces of records. A client's last spans come after its build has ended, so a record gets its trace a little later,
//! or when somebody asks for it.

use std::sync::Arc;
use std::time::Duration;

use kiln_proto::control::BuildHistoryEventType;

use super::{Content, Finished, History, RECORDS, storage};
use crate::error::BuildError;
use crate::traces::{self, Wanted};

const TRACE_TYPE: &str = "application/vnd.buildkit.otlp.json.v0";
/// How long a client has for its last spans.
const LAST_SPANS: Duration = Duration::from_secs(3);

impl History {
    /// Gives a build that has ended its trace, once its client has reported all of it.
    pub(super) fn expect_trace(self: &Arc<Self>, id: String, wanted: Wanted) {
        self.untraced.insert(id.clone(), wanted);
        let history = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LAST_SPANS).await;
            if !history.untraced.contains_key(&id) {
                return;
            }
            let stored = tokio::task::spawn_blocking(move || history.finalize(&id)).await;
            if let Ok(Err(error)) = stored {
                tracing::warn!(%error, "storing the trace of a build");
            }
        });
    }

    /// Gives a build its trace now, if it has none; what is not known needs none.
    pub(crate) fn finalize(&self, id: &str) -> Result<(), BuildError> {
        let mut finished = self.lock();
        let finished = self.finished(&mut finished)?;
        let wanted = self.untraced.remove(id).map(|(_, wanted)| wanted);
        let Some(mut record) = self.record(id)?.filter(|record| record.trace.is_none()) else {
            return Ok(());
        };
        let log = self.replay(id)?.unwrap_or_default();
        let mut trace = Content::new().map_err(storage)?;
        traces::write(&mut trace, &record, &log, wanted.as_ref()).map_err(storage)?;
        let trace = trace.finish().map_err(storage)?;
        trace.store(&self.values)?;
        record.trace = Some(trace.descriptor(TRACE_TYPE));
        record.generation += 1;
        self.values.put(RECORDS, id, &prost::Message::encode_to_vec(&record)).map_err(storage)?;
        finished.insert(id.to_owned(), Finished::of(&record));
        self.send(BuildHistoryEventType::Complete, record);
        Ok(())
    }

    /// Stores all traces that are still waited for.
    pub(crate) fn finalize_all(&self) {
        let waiting: Vec<String> = self.untraced.iter().map(|entry| entry.key().clone()).collect();
        for id in waiting {
            if let Err(error) = self.finalize(&id) {
                tracing::warn!(%error, build = id, "storing the trace of a build");
            }
        }
    }
}
