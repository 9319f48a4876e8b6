//! The results of one vertex together with what the key store knows of them. Shared by all builds
//! that got them from the same run; keeps the results alive.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kiln_cache::{KeyChange, KeyRecord};
use tokio::sync::OnceCell;

use crate::op::{Key, OpError};
use crate::solver::Shared;

pub(crate) struct Produced<R> {
    pub(crate) outputs: Vec<R>,
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
        Self::new(outputs, record, Vec::new())
    }

    /// Results of an earlier build, found under `key`. Where that is the definition key, the content key is taken to be
    /// stored, too; whoever came another way may have found that missing.
    pub(crate) fn opened(outputs: Vec<R>, record: KeyRecord, key: &Key, by_definition: bool) -> Self {
        let keys = [Some(*key), record.content_key.map(Key::from).filter(|_| by_definition)]
            .into_iter()
            .flatten()
            .collect();
        Self::new(outputs, record, keys)
    }

    fn new(outputs: Vec<R>, record: KeyRecord, keys: Vec<Key>) -> Self {
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
        let (Some(cell), Some(result)) = (digests.get(output), self.outputs.get(output)) else {
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
        match shared.results.load(id).await? {
            Some(result) => outputs.push(result),
            None => return Ok(Opened::Gone(record.results)),
        }
    }
    Ok(Opened::Found(Produced::opened(outputs, record, key, by_definition)))
}
