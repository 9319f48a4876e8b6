//! The results of one vertex together with what the key store knows of them. Shared by all builds
//! that got them from the same run; keeps the results alive.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kiln_cache::{KeyChange, KeyRecord, MISSING_RESULT};
use tokio::sync::OnceCell;

use crate::op::{Key, OpError};
use crate::solver::Shared;

pub(crate) struct Produced<R> {
    /// Only what came from an imported cache has outputs missing.
    pub(crate) outputs: Vec<Option<R>>,
    /// One for each output, once any was asked for.
    digests: OnceLock<Box<[OnceCell<Key>]>>,
    recorded: Mutex<Recorded>,
}

struct Recorded {
    record: Arc<KeyRecord>,
    /// Under which keys the store has `record`, or is about to.
    keys: Vec<Key>,
}

impl<R: Clone + Send + Sync + 'static> Produced<R> {
    /// Results that a run just made; nothing is stored yet.
    pub(crate) fn executed(outputs: Vec<R>, record: KeyRecord) -> Self {
        Self::new(outputs.into_iter().map(Some).collect(), record, Vec::new())
    }

    /// Results of an imported cache; nothing is stored yet.
    pub(crate) fn imported(outputs: Vec<Option<R>>, record: KeyRecord) -> Self {
        Self::new(outputs, record, Vec::new())
    }

    /// One of the outputs.
    pub(crate) fn output(&self, output: u32) -> Option<&R> {
        self.outputs.get(output as usize)?.as_ref()
    }

    /// True if there is such an output but for where this came from: it is to be made.
    pub(crate) fn lacks(&self, output: u32) -> bool {
        self.output(output).is_none() && self.outputs.iter().any(Option::is_none)
    }

    /// Results of an earlier build, found under `key`. Where that is the definition key, the content key is taken to be
    /// stored, too; whoever came another way may have found that missing.
    pub(crate) fn opened(outputs: Vec<Option<R>>, record: KeyRecord, key: &Key, by_definition: bool) -> Self {
        let keys = [Some(*key), record.content_key.map(Key::from).filter(|_| by_definition)]
            .into_iter()
            .flatten()
            .collect();
        Self::new(outputs, record, keys)
    }

    fn new(outputs: Vec<Option<R>>, record: KeyRecord, keys: Vec<Key>) -> Self {
        Self {
            outputs,
            digests: OnceLock::new(),
            recorded: Mutex::new(Recorded { record: Arc::new(record), keys }),
        }
    }

    /// The content key that the record carries.
    pub(crate) fn content_key(&self) -> Option<Key> {
        self.lock().record.content_key.map(Key::from)
    }

    /// Name of the vertex that made the results first.
    pub(crate) fn name(&self) -> Arc<str> {
        self.lock().record.name.clone()
    }

    /// What is to be stored so that the record is found under each of `keys`; from now on it counts as stored.
    pub(crate) fn add_keys(
        &self,
        keys: impl IntoIterator<Item = Key>,
        content_key: Option<Key>,
    ) -> Option<KeyChange> {
        let mut recorded = self.lock();
        let new: Vec<Key> = keys.into_iter().filter(|key| !recorded.keys.contains(key)).collect();
        if new.is_empty() {
            return None;
        }
        if let Some(key) = content_key
            && recorded.record.content_key != Some(*key.as_bytes())
        {
            Arc::make_mut(&mut recorded.record).content_key = Some(*key.as_bytes());
        }
        recorded.keys.reserve_exact(new.len());
        recorded.keys.extend_from_slice(&new);
        let keys = new.iter().map(|key| *key.as_bytes()).collect();
        Some(KeyChange::Record { keys, record: recorded.record.clone() })
    }

    /// The digest of an output, computed once for all who ask.
    pub(crate) async fn output_digest(&self, shared: &Shared<R>, output: usize) -> Result<Key, OpError> {
        let digests = self.digests.get_or_init(|| self.outputs.iter().map(|_| OnceCell::new()).collect());
        let result = self.outputs.get(output).and_then(Option::as_ref);
        let (Some(cell), Some(result)) = (digests.get(output), result) else {
            return Err(no_such_output(output, self.outputs.len(), &self.name()));
        };
        cell.get_or_try_init(|| shared.results.output_digest(result)).await.copied()
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn no_such_output(output: usize, outputs: usize, name: &str) -> OpError {
    OpError::new(format!("invalid output index {output}: {name} has {outputs} outputs"))
}

/// What became of a record.
pub(crate) enum Opened<R> {
    Found(Produced<R>),
    /// One of these results, which it names, is gone.
    Gone(Vec<String>),
}

/// Turns a record into results.
pub(crate) async fn open<R: Clone + Send + Sync + 'static>(
    shared: &Shared<R>,
    key: &Key,
    record: KeyRecord,
    by_definition: bool,
) -> Result<Opened<R>, OpError> {
    let mut outputs = Vec::with_capacity(record.results.len());
    for id in &record.results {
        if id == MISSING_RESULT {
            outputs.push(None);
            continue;
        }
        match shared.results.load(id).await? {
            Some(result) => outputs.push(Some(result)),
            None => return Ok(Opened::Gone(record.results)),
        }
    }
    Ok(Opened::Found(Produced::opened(outputs, record, key, by_definition)))
}

/// True if a record, for where it came from, may not have all outputs.
pub(crate) fn is_partial(record: &KeyRecord) -> bool {
    record.results.iter().any(|id| id == MISSING_RESULT)
}

/// True if a partial record lacks one of these outputs.
pub(crate) fn record_lacks(record: &KeyRecord, outputs: impl IntoIterator<Item = u32>) -> bool {
    let known = |output: u32| record.results.get(output as usize).is_some_and(|id| id != MISSING_RESULT);
    !outputs.into_iter().all(known)
}
