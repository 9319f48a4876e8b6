//! The graph of a build as it is kept for comparison with later ones: what each step depended on,
//! with equal values written once.

use std::collections::HashMap;

use kiln_solver::explain::{Outcome, VertexExplanation};
use kiln_solver::op::{InputMap, Key};

/// Longer values of parts are cut; their digest then stands for the rest.
const VALUE: usize = 1024;
/// How much of a value that is cut is kept.
const SHOWN: usize = 256;
/// Bytes of a key that are kept: enough to tell two keys of one history apart.
const KEY: usize = 16;

/// A build's graph. Inputs come before their consumers.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Graph {
    #[prost(message, repeated, tag = "1")]
    pub(super) nodes: Vec<Node>,
    #[prost(message, repeated, tag = "2")]
    parts: Vec<Part>,
}

/// What an operation's digest was made of.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub(super) struct Part {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) value: String,
}

/// A vertex.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Node {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    /// Digest of the operation alone; empty if it was never resolved.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) op: Vec<u8>,
    /// Definition key; empty if there is none.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) definition: Vec<u8>,
    /// Content key; empty if it was not made.
    #[prost(bytes = "vec", tag = "4")]
    pub(super) content: Vec<u8>,
    /// Its result was there at the end, or in an earlier build with the same key.
    #[prost(bool, tag = "5")]
    pub(super) done: bool,
    /// It can be cached at all: a client's directory can't.
    #[prost(bool, tag = "6")]
    pub(super) persistent: bool,
    /// By their places in the graph's list.
    #[prost(uint32, repeated, tag = "7")]
    parts: Vec<u32>,
    #[prost(message, repeated, tag = "8")]
    pub(super) inputs: Vec<Input>,
}

/// An input of a vertex.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Input {
    #[prost(uint32, tag = "1")]
    pub(super) vertex: u32,
    #[prost(uint32, tag = "2")]
    pub(super) output: u32,
    /// Digest of what is read of it, where the operation says so and that was computed.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) content: Vec<u8>,
    /// The paths that are read, one in each line; empty if all of it counts.
    #[prost(string, tag = "4")]
    pub(super) paths: String,
}

impl Graph {
    /// What is worth keeping of a build's decisions.
    pub(super) fn new(vertices: &[VertexExplanation]) -> Self {
        let mut table: HashMap<Part, u32> = HashMap::new();
        let mut parts = Vec::new();
        let mut place = |part: Part| {
            *table.entry(part).or_insert_with_key(|part| {
                parts.push(part.clone());
                index(parts.len() - 1)
            })
        };
        let nodes = vertices
            .iter()
            .map(|vertex| {
                let map = vertex.map.as_deref();
                let input = |(at, input): (usize, &kiln_solver::explain::InputExplanation)| Input {
                    vertex: index(input.vertex),
                    output: input.output,
                    content: input.content.map(|digest| digest.as_bytes().to_vec()).unwrap_or_default(),
                    paths: map.and_then(|map| map.inputs.get(at)).map(paths).unwrap_or_default(),
                };
                let part = |(name, value): &(String, String)| Part { name: name.clone(), value: cut(value) };
                Node {
                    name: vertex.name.to_string(),
                    op: map.map(|map| short(&map.digest)).unwrap_or_default(),
                    definition: vertex.definition.as_ref().map(short).unwrap_or_default(),
                    content: vertex.content.as_ref().map(short).unwrap_or_default(),
                    done: matches!(vertex.outcome, Outcome::Cached | Outcome::Made),
                    persistent: map.is_none_or(|map| map.persistent),
                    parts: map.iter().flat_map(|map| &map.parts).map(|pair| place(part(pair))).collect(),
                    inputs: vertex.inputs.iter().enumerate().map(input).collect(),
                }
            })
            .collect();
        Self { nodes, parts }
    }

    /// The parts of a vertex in their order.
    pub(super) fn parts(&self, vertex: usize) -> impl Iterator<Item = &Part> {
        self.nodes[vertex].parts.iter().filter_map(|part| self.parts.get(*part as usize))
    }

    /// The values of a part of a vertex.
    pub(super) fn part<'a>(&'a self, vertex: usize, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.parts(vertex).filter(move |part| part.name == name).map(|part| part.value.as_str())
    }

    /// What sort of operation a vertex is; empty if that was never resolved.
    pub(super) fn kind(&self, vertex: usize) -> &str {
        self.parts(vertex).next().map(|part| part.value.as_str()).unwrap_or_default()
    }

    /// False for bytes that some other version wrote.
    pub(super) fn is_sound(&self) -> bool {
        self.nodes.iter().enumerate().all(|(at, node)| {
            node.inputs.iter().all(|input| (input.vertex as usize) < at)
                && node.parts.iter().all(|part| (*part as usize) < self.parts.len())
        })
    }

    /// Digests of all that was read of inputs.
    pub(super) fn contents(&self) -> impl Iterator<Item = [u8; 32]> {
        self.nodes
            .iter()
            .flat_map(|node| &node.inputs)
            .filter_map(|input| input.content.as_slice().try_into().ok())
    }

    /// A few hashes that stand for the whole: two graphs share about as many as they share steps.
    pub(super) fn sketch(&self) -> Vec<u64> {
        const SIZE: usize = 64;
        let hash = |bytes: &[u8]| {
            let hash = blake3::hash(bytes);
            hash.as_bytes()[..8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let mut hashes: Vec<u64> = self
            .nodes
            .iter()
            .flat_map(|node| [hash(&node.op), hash(super::pairing::plain(&node.name).as_bytes())])
            .collect();
        hashes.sort_unstable();
        hashes.dedup();
        hashes.truncate(SIZE);
        hashes
    }
}

impl Node {
    /// True if both have a key, and the same.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (!self.definition.is_empty() && self.definition == other.definition)
            || (!self.content.is_empty() && self.content == other.content)
    }
}

fn index(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

fn short(key: &Key) -> Vec<u8> {
    key.as_bytes()[..KEY].to_vec()
}

fn paths(input: &InputMap) -> String {
    let paths = input.content.iter().flat_map(|query| &query.paths).map(|path| path.path.as_str());
    paths.collect::<Vec<_>>().join("\n")
}

fn cut(value: &str) -> String {
    if value.len() <= VALUE {
        return value.to_owned();
    }
    let mut end = SHOWN;
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let digest = blake3::hash(value.as_bytes()).to_hex();
    format!("{}… ({} bytes, blake3:{})", &value[..end], value.len(), &digest[..16])
}
