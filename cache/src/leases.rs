//! Who is held: a table of live handles by name. All handles to one thing share one value, and as
//! long as that lives the thing may not be removed.

use std::sync::{Arc, Weak};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

/// The table for one kind of thing.
pub(crate) struct Leases<T> {
    live: DashMap<String, Weak<T>>,
}

impl<T> Default for Leases<T> {
    fn default() -> Self {
        Self { live: DashMap::new() }
    }
}

impl<T> Leases<T> {
    pub(crate) fn is_held(&self, id: &str) -> bool {
        self.live.get(id).is_some_and(|weak| weak.strong_count() > 0)
    }

    /// The shared value of a live handle.
    pub(crate) fn get(&self, id: &str) -> Option<Arc<T>> {
        self.live.get(id)?.upgrade()
    }

    /// Enters a new value, unless another thread was first: then gives that one's.
    pub(crate) fn adopt(&self, id: &str, made: Arc<T>) -> Arc<T> {
        // A value's drop looks into this table: none may be dropped while the entry is locked.
        let first = match self.live.entry(id.to_owned()) {
            Entry::Occupied(mut entry) => {
                let first = entry.get().upgrade();
                if first.is_none() {
                    entry.insert(Arc::downgrade(&made));
                }
                first
            }
            Entry::Vacant(entry) => {
                entry.insert(Arc::downgrade(&made));
                None
            }
        };
        first.unwrap_or(made)
    }

    /// To be called when a value is dropped.
    pub(crate) fn release(&self, id: &str) {
        self.live.remove_if(id, |_, weak| weak.strong_count() == 0);
    }
}
