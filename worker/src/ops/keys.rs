//! Digests of operations: what may change a result, named part by part so that a miss can be explained.

use kiln_solver::op::{CacheMap, InputMap, Part, Parts, Tell};

/// Builds the digest of an operation out of named values; order and names count.
pub(crate) struct KeyBuilder<'a> {
    hasher: blake3::Hasher,
    notes: Notes<'a>,
}

/// What becomes of the parts' names and values.
enum Notes<'a> {
    /// They are not wanted.
    None,
    /// They are kept.
    Kept(Vec<Part>),
    /// They are told, and nothing else is wanted.
    Told(&'a mut Tell<'a>),
}

impl<'a> KeyBuilder<'a> {
    /// Starts the key of one kind of operation. A new `kind` never equals an older one's keys.
    pub(crate) fn new(kind: &str) -> Self {
        Self::with(kind, Notes::Kept(Vec::new()))
    }

    fn with(kind: &str, notes: Notes<'a>) -> Self {
        let mut hasher = blake3::Hasher::new();
        absorb(&mut hasher, kind.as_bytes());
        let mut key = Self { hasher, notes };
        key.note("operation", kind);
        key
    }

    /// Parts are noted.
    pub(crate) fn notes(&self) -> bool {
        !matches!(self.notes, Notes::None)
    }

    /// Adds a value that people can read.
    pub(crate) fn part(&mut self, name: impl AsRef<str>, value: impl AsRef<str>) {
        let (name, value) = (name.as_ref(), value.as_ref());
        self.unseen(name, value);
        self.note(name, value);
    }

    /// Adds a value that tells people nothing.
    pub(crate) fn unseen(&mut self, name: &str, value: &str) {
        self.absorb(name, value.as_bytes());
    }

    /// Adds bytes that are shown by their digest.
    pub(crate) fn bytes(&mut self, name: &str, value: &[u8]) {
        self.absorb(name, value);
        self.note_digest(name, value);
    }

    fn absorb(&mut self, name: &str, value: &[u8]) {
        if !matches!(self.notes, Notes::Told(_)) {
            absorb(&mut self.hasher, name.as_bytes());
            absorb(&mut self.hasher, value);
        }
    }

    /// Names something that the digest covers already, as a piece of what [`Self::bytes`] added or by what it
    /// stands for: so that people see more than two digests.
    pub(crate) fn note(&mut self, name: impl AsRef<str>, value: impl AsRef<str>) {
        match &mut self.notes {
            Notes::None => {}
            Notes::Kept(parts) => parts.push((name.as_ref().to_owned(), value.as_ref().to_owned())),
            Notes::Told(tell) => tell(name.as_ref(), value.as_ref()),
        }
    }

    /// Notes bytes by their digest.
    pub(crate) fn note_digest(&mut self, name: &str, value: &[u8]) {
        if self.notes() {
            let digest = blake3::hash(value).to_hex();
            self.note(name, ["blake3:", digest.as_str()].concat());
        }
    }

    /// The finished map for an operation with these inputs.
    pub(crate) fn finish(self, inputs: Vec<InputMap>, persistent: bool) -> CacheMap {
        let parts = match self.notes {
            Notes::Kept(parts) => Parts::from(parts),
            Notes::None | Notes::Told(_) => Parts::default(),
        };
        CacheMap { digest: self.hasher.finalize(), inputs, persistent, parts }
    }
}

/// The map of an operation of which a build may have many: `describe` tells a builder all that it is made of, once for
/// the digest and again when somebody asks for the parts.
pub(crate) fn described(
    kind: &'static str,
    inputs: Vec<InputMap>,
    describe: impl Fn(&mut KeyBuilder<'_>) + Send + Sync + 'static,
) -> CacheMap {
    let mut key = KeyBuilder::with(kind, Notes::None);
    describe(&mut key);
    let parts = Parts::new(move |tell| describe(&mut KeyBuilder::with(kind, Notes::Told(tell))));
    CacheMap { parts, ..key.finish(inputs, true) }
}

/// Length first: no two sequences of values can be confused.
fn absorb(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}
