//! What was decided about a vertex and from what, recorded as it happens.

use serde::Serialize;

/// The decisions about one vertex of a build.
#[derive(Debug, Clone, Serialize)]
pub struct VertexExplanation {
    /// Digest of the vertex.
    pub vertex: String,
    /// Its display name.
    pub name: String,
    /// What the operation's own digest was made of, as the operation tells it.
    pub parts: Vec<(String, String)>,
    /// The look-ups, in the order in which they were made.
    pub lookups: Vec<Lookup>,
}

/// One look-up of one key.
#[derive(Debug, Clone, Serialize)]
pub struct Lookup {
    /// Which of the vertex's keys.
    pub kind: KeyKind,
    /// The key, hexadecimal.
    pub key: String,
    /// What was found.
    pub found: Found,
}

/// What an input counts by in a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyKind {
    /// By its own definition.
    Definition,
    /// By the content that the operation reads, where it says so; else by its own content key.
    Content,
    /// By the content that the operation reads, where it says so; else by the digest of its output.
    Output,
}

/// What a look-up found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// A result of an earlier build, made by the vertex with this name.
    Record(String),
    /// The same work in flight, for this or another build.
    InFlight,
    /// A record whose result is gone; the record was dropped.
    Gone,
    /// Nothing.
    Nothing,
    /// The store could not be read.
    Unreadable(String),
}
