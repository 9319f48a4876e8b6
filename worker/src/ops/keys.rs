//! Digests of operations: what may change a result, named part by part so that a miss can be explained.

use kiln_solver::op::{CacheMap, InputMap, Part, Parts};

/// Builds the digest of an operation out of named values; order and names count.
pub(crate) struct KeyBuilder {
    hasher: blake3::Hasher,
    parts: Option<Vec<Part>>,
}

impl KeyBuilder {
    /// Starts the key of one kind of operation. A new `kind` never equals an older one's keys.
    pub(crate) fn new(kind: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        absorb(&mut hasher, kind.as_bytes());
        Self { hasher, parts: Some(vec![("operation".to_owned(), kind.to_owned())]) }
    }

    /// Parts are noted.
    pub(crate) fn notes(&self) -> bool {
        self.parts.is_some()
    }

    /// Adds a value that people can read.
    pub(crate) fn part(&mut self, name: impl AsRef<str>, value: impl AsRef<str>) {
        let (name, value) = (name.as_ref(), value.as_ref());
        self.unseen(name, value);
        self.note(name, value);
    }

    /// Adds a value that tells people nothing.
    pub(crate) fn unseen(&mut self, name: &str, value: &str) {
        absorb(&mut self.hasher, name.as_bytes());
        absorb(&mut self.hasher, value.as_bytes());
    }

    /// Adds bytes that are shown by their digest.
    pub(crate) fn bytes(&mut self, name: &str, value: &[u8]) {
        absorb(&mut self.hasher, name.as_bytes());
        absorb(&mut self.hasher, value);
        if self.notes() {
            self.note(name, format!("blake3:{}", blake3::hash(value).to_hex()));
        }
    }

    /// Names something that the digest covers already, as a piece of what [`Self::bytes`] added or by what it
    /// stands for: so that people see more than two digests.
    pub(crate) fn note(&mut self, name: impl Into<String>, value: impl Into<String>) {
        if let Some(parts) = &mut self.parts {
            parts.push((name.into(), value.into()));
        }
    }

    /// The finished map for an operation with these inputs.
    pub(crate) fn finish(self, inputs: Vec<InputMap>, persistent: bool) -> CacheMap {
        let parts = self.parts.map(Parts::from).unwrap_or_default();
        CacheMap { digest: self.hasher.finalize(), inputs, persistent, parts }
    }
}

/// The map of an operation of which a build may have many: `describe` tells a builder all that it is made of, once for
/// the digest and again when somebody asks for the parts.
pub(crate) fn described(
    kind: &'static str,
    inputs: Vec<InputMap>,
    describe: impl Fn(&mut KeyBuilder) + Send + Sync + 'static,
) -> CacheMap {
    let mut key = KeyBuilder { parts: None, ..KeyBuilder::new(kind) };
    describe(&mut key);
    let parts = Parts::new(move || {
        let mut key = KeyBuilder::new(kind);
        describe(&mut key);
        key.parts.unwrap_or_default()
    });
    CacheMap { parts, ..key.finish(inputs, true) }
}

/// Length first: no two sequences of values can be confused.
fn absorb(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}
