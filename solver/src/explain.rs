//! What was decided about a vertex and from what, recorded as it happens.

use std::sync::Arc;

use crate::op::{CacheMap, Key};

/// The decisions about one vertex of a build.
#[derive(Debug, Clone)]
pub struct VertexExplanation {
    /// Digest of the vertex.
    pub vertex: Arc<str>,
    /// Its display name.
    pub name: Arc<str>,
    /// What the operation depends on, as it tells it; `None` if it was not asked or failed to say.
    pub map: Option<Arc<CacheMap>>,
    /// The build asked for a new run.
    pub ignore_cache: bool,
    /// What became of it.
    pub outcome: Outcome,
    /// Its definition key, where it has one.
    pub definition: Option<Key>,
    /// Its content key, where it was made.
    pub content: Option<Key>,
    /// Its inputs in order.
    pub inputs: Vec<InputExplanation>,
    /// The look-ups, in the order in which they were made.
    pub lookups: Vec<Lookup>,
}

/// What became of a vertex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nobody needed its result, or the build ended before its turn.
    NotReached,
    /// A record of an earlier build answered.
    Cached,
    /// It was made, by this build or another one at the same time.
    Made,
    /// It failed.
    Failed,
    /// It was begun, and stopped because nobody needed it any longer.
    Stopped,
}

/// One input of a vertex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputExplanation {
    /// Place of the input's vertex in the list of all; always before its consumer's.
    pub vertex: usize,
    /// Which of its outputs.
    pub output: u32,
    /// Digest of the part that the operation reads, where it says so and that was computed.
    pub content: Option<Key>,
}

/// One look-up of one key.
#[derive(Debug, Clone)]
pub struct Lookup {
    /// Which of the vertex's keys.
    pub kind: KeyKind,
    /// The key.
    pub key: Key,
    /// What was found.
    pub found: Found,
}

/// What an input counts by in a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// By its own definition.
    Definition,
    /// By the content that the operation reads, where it says so; else by its own content key.
    Content,
    /// By the content that the operation reads, where it says so; else by the digest of its output.
    Output,
}

/// What a look-up found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A result of an earlier build.
    Record,
    /// The same work in flight, for this or another build.
    InFlight,
    /// A record, now dropped, of these results, one of which is gone.
    Gone(Vec<String>),
    /// Nothing.
    Nothing,
    /// The store could not be read.
    Unreadable(String),
}
