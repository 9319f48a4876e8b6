//! Digests of operations: what may change a result, named part by part so that a miss can be explained.

use kiln_solver::op::{CacheMap, InputMap};

/// Builds the digest of an operation out of named values; order and names count.
pub(crate) struct KeyBuilder {
    hasher: blake3::Hasher,
    parts: Vec<(String, String)>,
}

impl KeyBuilder {
    /// Starts the key of one kind of operation. A new `kind` never equals an older one's keys.
    pub(crate) fn new(kind: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        absorb(&mut hasher, kind.as_bytes());
        Self { hasher, parts: vec![("operation".to_owned(), kind.to_owned())] }
    }

    /// Adds a value that people can read.
    pub(crate) fn part(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let (name, value) = (name.into(), value.into());
        self.unseen(&name, &value);
        self.parts.push((name, value));
    }

    /// Adds a value that tells people nothing.
    pub(crate) fn unseen(&mut self, name: &str, value: &str) {
        absorb(&mut self.hasher, name.as_bytes());
        absorb(&mut self.hasher, value.as_bytes());
    }

    /// Adds bytes that are shown by their digest.
    pub(crate) fn bytes(&mut self, name: impl Into<String>, value: &[u8]) {
        let name = name.into();
        absorb(&mut self.hasher, name.as_bytes());
        absorb(&mut self.hasher, value);
        self.parts.push((name, format!("blake3:{}", blake3::hash(value).to_hex())));
    }

    /// Names something that the digest covers already, as a piece of what [`Self::bytes`] added or by what it
    /// stands for: so that people see more than two digests.
    pub(crate) fn note(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.parts.push((name.into(), value.into()));
    }

    /// The finished map for an operation with these inputs.
    pub(crate) fn finish(self, inputs: Vec<InputMap>, persistent: bool) -> CacheMap {
        CacheMap { digest: self.hasher.finalize(), inputs, persistent, parts: self.parts }
    }
}

/// Length first: no two sequences of values can be confused.
fn absorb(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}
