//! Locks by key.

use std::sync::{Arc, Weak};

use dashmap::DashMap;

/// Locks of any kind by key, kept while somebody holds or waits for one.
pub(crate) struct Locks<T>(DashMap<String, Weak<T>>);

impl<T> Default for Locks<T> {
    fn default() -> Self {
        Self(DashMap::new())
    }
}

impl<T: Default> Locks<T> {
    /// The lock of a key.
    pub(crate) fn of(&self, key: &str) -> Arc<T> {
        self.0.retain(|_, lock| lock.strong_count() > 0);
        let mut entry = self.0.entry(key.to_owned()).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let lock = Arc::default();
            *entry = Arc::downgrade(&lock);
            lock
        })
    }
}
