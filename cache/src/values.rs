//! Small named values, grouped by namespace. Whose they are and what they hold is the caller's.

use std::sync::Arc;

use crate::error::Result;
use crate::kv::{Batch, Cf};
use crate::store::Shared;

/// Access to named values.
#[derive(Clone)]
pub struct Values {
    shared: Arc<Shared>,
}

impl Values {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The value of a name.
    pub fn get(&self, namespace: &str, name: &str) -> Result<Option<Vec<u8>>> {
        self.shared.kv.get(Cf::Values, &key(b'n', namespace, name))
    }

    /// Sets a value.
    pub fn put(&self, namespace: &str, name: &str, value: &[u8]) -> Result<()> {
        self.shared.check_open()?;
        let mut batch = Batch::new();
        batch.put(Cf::Values, key(b'n', namespace, name), value);
        self.shared.kv.write(batch)
    }

    /// Removes a name, if it is there.
    pub fn delete(&self, namespace: &str, name: &str) -> Result<()> {
        self.shared.check_open()?;
        let mut batch = Batch::new();
        batch.delete(Cf::Values, key(b'n', namespace, name));
        self.shared.kv.write_freeing(batch)
    }

    /// Removes those names of a namespace whose value is not to be kept; gives their number.
    pub fn retain(
        &self,
        namespace: &str,
        keep: &mut dyn FnMut(&str, &[u8]) -> Result<bool>,
    ) -> Result<usize> {
        let mut count = 0;
        for (name, value) in self.list(namespace)? {
            // One that was set anew meanwhile stays until the next time.
            if !keep(&name, &value)? && self.get(namespace, &name)?.as_ref() == Some(&value) {
                self.delete(namespace, &name)?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// All names of a namespace with their values, in byte order.
    pub fn list(&self, namespace: &str) -> Result<Vec<(String, Vec<u8>)>> {
        self.scan(namespace, |name, value| (name, value.to_vec()))
    }

    /// All names of a namespace, in byte order.
    pub fn names(&self, namespace: &str) -> Result<Vec<String>> {
        self.scan(namespace, |name, _| name)
    }

    fn scan<T>(&self, namespace: &str, each: impl Fn(String, &[u8]) -> T) -> Result<Vec<T>> {
        let prefix = key(b'n', namespace, "");
        let mut out = Vec::new();
        self.shared.kv.scan(Cf::Values, &prefix, &mut |key, value| {
            out.push(each(String::from_utf8_lossy(&key[prefix.len()..]).into_owned(), value));
            Ok(true)
        })?;
        Ok(out)
    }
}

/// `kind`, then the namespace with its length in front, then the name: no two can be confused.
pub(crate) fn key(kind: u8, namespace: &str, name: &str) -> Vec<u8> {
    let length = u32::try_from(namespace.len()).unwrap_or(u32::MAX);
    let mut key = Vec::with_capacity(5 + namespace.len() + name.len());
    key.push(kind);
    key.extend_from_slice(&length.to_be_bytes());
    key.extend_from_slice(namespace.as_bytes());
    key.extend_from_slice(name.as_bytes());
    key
}
