//! The engine for tests: ordered maps behind a lock.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Batch, Cf, Change, Kv, Visit};
use crate::error::Result;

type Map = BTreeMap<(Cf, Vec<u8>), Vec<u8>>;

/// Keeps everything in memory and forgets it when dropped.
#[derive(Debug, Default)]
pub struct MemKv {
    map: Mutex<Map>,
}

impl MemKv {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kv for MemKv {
    fn blocks(&self) -> bool {
        false
    }

    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.lock().get(&(cf, key.to_vec())).cloned())
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>> {
        let map = self.lock();
        Ok(keys.iter().map(|key| map.get(&(cf, key.to_vec())).cloned()).collect())
    }

    fn write(&self, batch: Batch) -> Result<()> {
        let mut map = self.lock();
        for change in batch.changes {
            match change {
                Change::Put(cf, key, value) => {
                    map.insert((cf, key), value);
                }
                Change::Delete(cf, key) => {
                    map.remove(&(cf, key));
                }
            }
        }
        Ok(())
    }

    fn write_durable(&self, batch: Batch) -> Result<()> {
        self.write(batch)
    }

    fn scan(&self, cf: Cf, prefix: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        let found: Vec<_> = self
            .lock()
            .range((cf, prefix.to_vec())..)
            .take_while(|((c, key), _)| *c == cf && key.starts_with(prefix))
            .map(|((_, key), value)| (key.clone(), value.clone()))
            .collect();
        for (key, value) in found {
            if !visit(&key, &value)? {
                break;
            }
        }
        Ok(())
    }
}
