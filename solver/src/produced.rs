//! The results of one vertex together with what the key store knows of them. Shared by all builds
//! that got them from the same run; keeps the results alive.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_cache::{KeyRecord, KeyStorage};
use tokio::sync::OnceCell;

use crate::op::{Key, OpError};
use crate::solver::Shared;

pub(crate) struct Produced<R> {
    pub(crate) outputs: Vec<R>,
    digests: Vec<OnceCell<Key>>,
    recorded: Mutex<Recorded>,
}

struct Recorded {
    record: KeyRecord,
    /// Under which keys the store has `record`.
    keys: BTreeSet<[u8; 32]>,
}

impl<R: Clone + Send + Sync + 'static> Produced<R> {
    /// Results that a run just made; nothing is stored yet.
    pub(crate) fn executed(outputs: Vec<R>, record: KeyRecord) -> Self {
        Self::new(outputs, record, BTreeSet::new())
    }

    /// Results of an earlier build, found under `key`.
    pub(crate) fn opened(outputs: Vec<R>, record: KeyRecord, key: &Key) -> Self {
        let keys = [Some(*key.as_bytes()), record.content_key].into_iter().flatten().collect();
        Self::new(outputs, record, keys)
    }

    fn new(outputs: Vec<R>, record: KeyRecord, keys: BTreeSet<[u8; 32]>) -> Self {
        let known = |i: usize| record.output_content.get(i).copied().flatten().map(Key::from);
        let digests = (0..outputs.len()).map(|i| OnceCell::new_with(known(i))).collect();
        Self { outputs, digests, recorded: Mutex::new(Recorded { record, keys }) }
    }

    /// The content key that the record carries.
    pub(crate) fn content_key(&self) -> Option<Key> {
        self.lock().record.content_key.map(Key::from)
    }

    /// Name of the vertex that made the results first.
    pub(crate) fn name(&self) -> String {
        self.lock().record.name.clone()
    }

    /// The digest of an output, if it was computed.
    pub(crate) fn digest(&self, output: usize) -> Option<Key> {
        self.digests.get(output)?.get().copied()
    }

    /// True if the store has the record under each of `keys`.
    pub(crate) fn has_keys(&self, keys: &[Key]) -> bool {
        let recorded = self.lock();
        keys.iter().all(|key| recorded.keys.contains(key.as_bytes()))
    }

    /// Stores the record under those of `keys` that it is not stored under. A store that can't
    /// be written costs a later build time, but doesn't make this one wrong: it is only reported.
    pub(crate) fn add_keys(&self, store: &dyn KeyStorage, keys: &[Key], content_key: Option<Key>) {
        let mut recorded = self.lock();
        let new: Vec<[u8; 32]> =
            keys.iter().map(|key| *key.as_bytes()).filter(|key| !recorded.keys.contains(key)).collect();
        if new.is_empty() {
            return;
        }
        if let Some(key) = content_key {
            recorded.record.content_key = Some(*key.as_bytes());
        }
        match store.put(&new, &recorded.record) {
            Ok(()) => recorded.keys.extend(new),
            Err(error) => {
                tracing::warn!(vertex = recorded.record.vertex, %error, "a result was not recorded")
            }
        }
    }

    /// The digest of an output, computed once for all who ask and then stored with the record.
    pub(crate) async fn output_digest(&self, shared: &Shared<R>, output: usize) -> Result<Key, OpError> {
        let (Some(cell), Some(result)) = (self.digests.get(output), self.outputs.get(output)) else {
            return Err(no_such_output(output, self.outputs.len(), &self.name()));
        };
        let compute = async {
            let digest = shared.results.output_digest(result).await?;
            self.store_digest(&*shared.keys, output, digest);
            Ok(digest)
        };
        cell.get_or_try_init(|| compute).await.copied()
    }

    fn store_digest(&self, store: &dyn KeyStorage, output: usize, digest: Key) {
        let mut recorded = self.lock();
        if recorded.record.output_content.len() < self.outputs.len() {
            recorded.record.output_content.resize(self.outputs.len(), None);
        }
        recorded.record.output_content[output] = Some(*digest.as_bytes());
        if recorded.keys.is_empty() {
            return;
        }
        let keys: Vec<[u8; 32]> = recorded.keys.iter().copied().collect();
        if let Err(error) = store.put(&keys, &recorded.record) {
            tracing::warn!(vertex = recorded.record.vertex, %error, "an output digest was not recorded");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn no_such_output(output: usize, outputs: usize, name: &str) -> OpError {
    OpError::new(format!("invalid output index {output}: {name} has {outputs} outputs"))
}

/// Turns a record into results; `None` if one of them is gone.
pub(crate) async fn open<R: Clone + Send + Sync + 'static>(
    shared: &Shared<R>,
    key: &Key,
    record: KeyRecord,
) -> Result<Option<Produced<R>>, OpError> {
    let mut outputs = Vec::with_capacity(record.results.len());
    for id in &record.results {
        match shared.results.load(id).await? {
            Some(result) => outputs.push(result),
            None => return Ok(None),
        }
    }
    Ok(Some(Produced::opened(outputs, record, key)))
}
