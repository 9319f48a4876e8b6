//! Records of builds, running and finished: what was asked, how it ended, its log. Kept in the
//! store's named values; nothing here influences a build.

mod contents;
mod filter;
mod recording;
#[cfg(test)]
mod tests;
mod trace;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use dashmap::DashMap;
use kiln_cache::Values;
use kiln_proto::control::{
    self, BuildHistoryEvent, BuildHistoryEventType, BuildHistoryRecord, BuildHistoryRequest, StatusResponse,
    UpdateBuildHistoryRequest,
};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, watch};
use tonic::Code;

use crate::config::HistoryConfig;
use crate::error::BuildError;
use crate::explain::Explanations;
use crate::progress::ProgressLog;
use crate::traces::Wanted;
use contents::{CONTENT, Content, Packed};
use filter::Filters;
pub use filter::build_status;
pub(crate) use recording::{Outcome, Recording};

/// Records by ref.
const RECORDS: &str = "build-history";

const LOG_TYPE: &str = "application/vnd.buildkit.status.v0";
/// Misspelt by every client.
const ERROR_TYPE: &str = "application/vnd.googeapis.google.rpc.status+proto";

/// Builds that fall behind a slow listener by more than this end its stream.
const LIVE_EVENTS: usize = 256;

/// So many builds may be answered and not stored yet.
const ENDING: usize = 64;

/// All records.
pub(crate) struct History {
    values: Values,
    explanations: Arc<Explanations>,
    config: HistoryConfig,
    active: DashMap<String, BuildHistoryRecord>,
    /// Builds that have ended and whose clients may still report spans.
    untraced: DashMap<String, Wanted>,
    /// By ref; `None` until the records are read. Held by who changes one.
    finished: Mutex<Option<HashMap<String, Finished>>>,
    events: broadcast::Sender<BuildHistoryEvent>,
    ending: watch::Sender<Endings>,
    /// One permit for each build that was answered and is not stored yet.
    room: Arc<Semaphore>,
}

/// Builds that have ended and are not stored yet, in the order in which they ended.
#[derive(Default)]
struct Endings {
    next: u64,
    open: BTreeSet<u64>,
}

/// A build that has ended and is not stored yet.
pub(crate) struct Ending {
    history: Arc<History>,
    place: u64,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.history.ending.send_modify(|ending| {
            ending.open.remove(&self.place);
        });
    }
}

/// What decides on the stay of a record and of what it names.
struct Finished {
    created: SystemTime,
    completed: SystemTime,
    pinned: bool,
    /// Digests of its log, its trace, what is claimed of its results and, if it failed, its error.
    contents: Vec<String>,
}

impl Finished {
    fn of(record: &BuildHistoryRecord) -> Self {
        let results = record.result.iter().chain(record.results.values());
        let claimed = results.flat_map(|result| &result.attestations);
        let contents = [&record.logs, &record.external_error, &record.trace].into_iter().flatten();
        let contents = contents.chain(claimed);
        Self {
            created: time(&record.created_at),
            completed: time(&record.completed_at),
            pinned: record.pinned,
            contents: contents.map(|content| content.digest.clone()).collect(),
        }
    }
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
        Arc::new(Self {
            values,
            explanations,
            config,
            active: DashMap::new(),
            untraced: DashMap::new(),
            finished: Mutex::default(),
            events,
            ending: watch::Sender::default(),
            room: Arc::new(Semaphore::new(ENDING)),
        })
    }

    /// For a build that ends, whose record is stored afterwards: until what this gives is dropped, who asks for records
    /// waits.
    pub(crate) fn ending(self: &Arc<Self>) -> Ending {
        let mut place = 0;
        self.ending.send_modify(|ending| {
            place = ending.next;
            ending.next += 1;
            ending.open.insert(place);
        });
        Ending { history: self.clone(), place }
    }

    /// Room for one more build to be stored after its answer; waits while there are very many.
    pub(crate) async fn room(&self) -> OwnedSemaphorePermit {
        // Never closed.
        self.room.clone().acquire_owned().await.expect("open")
    }

    /// Waits until the records of all builds that have ended are stored.
    pub(crate) async fn settled(&self) {
        let mut endings = self.ending.subscribe();
        let next = endings.borrow().next;
        // Its sender is here.
        let _ = endings.wait_for(|ending| ending.open.first().is_none_or(|first| *first >= next)).await;
    }

    /// Starts the record of a build, which may be part of a client's trace.
    pub(crate) fn begin(
        self: &Arc<Self>,
        request: &control::SolveRequest,
        progress: Arc<ProgressLog>,
        wanted: Option<Wanted>,
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
        Recording::new(self.clone(), progress, wanted, record)
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
        contents::load(&self.values, digest)
    }

    /// The digests of all blobs that records name.
    pub(crate) fn contents(&self) -> Result<Vec<String>, BuildError> {
        self.values.names(CONTENT).map_err(storage)
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<String, Finished>>> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All finished builds, read once.
    fn finished<'a>(
        &self,
        finished: &'a mut Option<HashMap<String, Finished>>,
    ) -> Result<&'a mut HashMap<String, Finished>, BuildError> {
        if finished.is_none() {
            *finished = Some(self.sweep()?);
        }
        Ok(finished.get_or_insert_default())
    }

    /// All finished builds. What no record names, or can't be read, because another version or a daemon that was killed
    /// left it, is dropped.
    fn sweep(&self) -> Result<HashMap<String, Finished>, BuildError> {
        let mut found = HashMap::new();
        for (id, bytes) in self.values.list(RECORDS).map_err(storage)? {
            match BuildHistoryRecord::decode(&bytes[..]) {
                Ok(record) => {
                    found.insert(id, Finished::of(&record));
                }
                Err(_) => self.values.delete(RECORDS, &id).map_err(storage)?,
            }
        }
        let named: HashSet<&String> = found.values().flat_map(|build| &build.contents).collect();
        for content in self.contents()?.iter().filter(|content| !named.contains(content)) {
            self.values.delete(CONTENT, content).map_err(storage)?;
        }
        Ok(found)
    }

    /// The ref of the build that ended last.
    pub(crate) fn last(&self) -> Result<Option<String>, BuildError> {
        let mut finished = self.lock();
        let builds = self.finished(&mut finished)?.iter();
        Ok(builds.max_by_key(|(_, build)| build.completed).map(|(id, _)| id.clone()))
    }

    /// Keeps what is known of a build that has ended until all of it is stored.
    fn note(&self, record: &BuildHistoryRecord) -> Result<(), BuildError> {
        let mut finished = self.lock();
        let finished = self.finished(&mut finished)?;
        if is_former(finished, record) {
            return Ok(());
        }
        self.values.put(RECORDS, &record.r#ref, &record.encode_to_vec()).map_err(storage)
    }

    fn finish(
        &self,
        mut record: BuildHistoryRecord,
        log: &[StatusResponse],
        claimed: Vec<Packed>,
        error: Option<&BuildError>,
    ) -> Result<(), BuildError> {
        let id = record.r#ref.clone();
        let mut contents = claimed;
        let logs = encode_log(log).map_err(storage)?;
        record.logs = Some(logs.descriptor(LOG_TYPE));
        contents.push(logs);
        if let Some(error) = error {
            let details = Packed::new(&error.to_rpc().encode_to_vec()).map_err(storage)?;
            record.external_error = Some(details.descriptor(ERROR_TYPE));
            contents.push(details);
        }
        let build = Finished::of(&record);
        let mut finished = self.lock();
        let finished = self.finished(&mut finished)?;
        if is_former(finished, &record) {
            return Ok(());
        }
        contents.iter().try_for_each(|content| content.store(&self.values))?;
        self.values.put(RECORDS, &id, &record.encode_to_vec()).map_err(storage)?;
        let former = finished.insert(id.clone(), build);
        // Another build may run under that name by now.
        self.active.remove_if(&id, |_, running| running.created_at == record.created_at);
        self.send(BuildHistoryEventType::Complete, record);
        self.drop_contents(finished, former)?;
        self.clean(finished)
    }

    fn stored(&self) -> Result<Vec<BuildHistoryRecord>, BuildError> {
        let records = self.values.list(RECORDS).map_err(storage)?;
        // A record that an older version wrote in another form is of no use.
        Ok(records.into_iter().filter_map(|(_, bytes)| BuildHistoryRecord::decode(&bytes[..]).ok()).collect())
    }

    /// Drops what is too old or too much, except for pinned records.
    fn clean(&self, finished: &mut HashMap<String, Finished>) -> Result<(), BuildError> {
        let mut loose: Vec<(SystemTime, String)> = finished
            .iter()
            .filter(|(_, build)| !build.pinned)
            .map(|(id, build)| (build.completed, id.clone()))
            .collect();
        loose.sort_by_key(|(completed, _)| std::cmp::Reverse(*completed));
        let oldest = SystemTime::now().checked_sub(self.config.max_age).unwrap_or(SystemTime::UNIX_EPOCH);
        for (index, (completed, id)) in loose.iter().enumerate() {
            if index >= self.config.max_entries || *completed < oldest {
                self.explanations.retire(id).map_err(storage)?;
                self.delete(finished, id)?;
            }
        }
        Ok(())
    }

    fn delete(&self, finished: &mut HashMap<String, Finished>, id: &str) -> Result<(), BuildError> {
        self.untraced.remove(id);
        let record = self.record(id)?;
        self.values.delete(RECORDS, id).map_err(storage)?;
        let former = finished.remove(id);
        self.drop_contents(finished, former)?;
        if let Some(record) = record {
            self.send(BuildHistoryEventType::Deleted, record);
        }
        Ok(())
    }

    /// Drops what only a build that is gone named.
    fn drop_contents(
        &self,
        finished: &HashMap<String, Finished>,
        gone: Option<Finished>,
    ) -> Result<(), BuildError> {
        for content in gone.into_iter().flat_map(|gone| gone.contents) {
            // Identical logs or errors of two builds share their bytes.
            if !finished.values().any(|other| other.contents.contains(&content)) {
                self.values.delete(CONTENT, &content).map_err(storage)?;
            }
        }
        Ok(())
    }

    /// Pins, unpins or deletes a record.
    pub(crate) fn update(&self, request: &UpdateBuildHistoryRequest) -> Result<(), BuildError> {
        if request.finalize && !request.delete {
            return self.finalize(&request.r#ref);
        }
        let mut finished = self.lock();
        let finished = self.finished(&mut finished)?;
        if request.delete {
            return match self.record(&request.r#ref)? {
                Some(_) => {
                    self.explanations.forget(&request.r#ref).map_err(storage)?;
                    self.delete(finished, &request.r#ref)
                }
                None if self.active.contains_key(&request.r#ref) => {
                    let text = format!("build {} is still running", request.r#ref);
                    Err(BuildError::new(Code::FailedPrecondition, text))
                }
                None => Err(not_found(&request.r#ref)),
            };
        }
        let Some(mut record) = self.record(&request.r#ref)? else {
            return Err(not_found(&request.r#ref));
        };
        record.pinned = request.pinned;
        record.generation += 1;
        self.values.put(RECORDS, &request.r#ref, &record.encode_to_vec()).map_err(storage)?;
        finished.insert(request.r#ref.clone(), Finished::of(&record));
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
        let filters = Filters::parse(&request.filter)?;
        // Subscribed before looking, so that nothing falls between.
        let live = (!request.early_exit).then(|| self.events.subscribe());
        let wanted = |record: &BuildHistoryRecord| {
            (request.r#ref.is_empty() || record.r#ref == request.r#ref) && filters.holds(record)
        };
        let event = |kind: BuildHistoryEventType, record| BuildHistoryEvent {
            r#type: kind as i32,
            record: Some(record),
        };
        let mut active: HashMap<String, BuildHistoryRecord> =
            self.active.iter().map(|entry| (entry.key().clone(), entry.value().clone())).collect();
        let mut stored = Vec::new();
        if !request.active_only {
            stored = self.stored()?;
            // A build that ended meanwhile was found twice, and one that runs takes the place of its former run.
            stored.retain(|record| match active.get(&record.r#ref) {
                Some(running) if time(&running.created_at) > time(&record.created_at) => false,
                Some(_) => active.remove(&record.r#ref).is_some(),
                None => true,
            });
            stored.retain(wanted);
            if limit > 0 {
                stored.sort_by_key(|record| std::cmp::Reverse(time(&record.created_at)));
                stored.truncate(limit);
            }
        }
        let active = active.into_values().filter(wanted);
        let events = active
            .map(|record| event(BuildHistoryEventType::Started, record))
            .chain(stored.into_iter().map(|record| event(BuildHistoryEventType::Complete, record)))
            .collect();
        Ok((events, live))
    }
}

/// A later build under its name was faster.
fn is_former(finished: &HashMap<String, Finished>, record: &BuildHistoryRecord) -> bool {
    finished.get(&record.r#ref).is_some_and(|other| other.created > time(&record.created_at))
}

fn time(timestamp: &Option<prost_types::Timestamp>) -> SystemTime {
    timestamp.and_then(|time| SystemTime::try_from(time).ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Each message with its length before it.
fn encode_log(log: &[StatusResponse]) -> std::io::Result<Packed> {
    let mut content = Content::new()?;
    for message in log {
        let bytes = message.encode_to_vec();
        content.write_all(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes())?;
        content.write_all(&bytes)?;
    }
    content.finish()
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
