//! The graph of a build as it is kept for comparison with later ones: what each step depended on. In columns,
//! with equal texts written once: it is made and read with every build, and compared when somebody asks.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::ops::Range;

use hashbrown::HashTable;
use kiln_solver::explain::{Outcome, VertexExplanation};
use kiln_solver::op::{InputMap, Key};

/// Longer values of parts are cut; their digest then stands for the rest.
const VALUE: usize = 1024;
/// How much of a value that is cut is kept.
const SHOWN: usize = 256;
/// Bytes of a key that are kept: enough to tell two keys of one history apart.
const KEY: usize = 16;
/// What begins a value that is a digest, and how many of its hexadecimal digits are kept.
const DIGEST: (&str, usize) = ("blake3:", 16);
/// Bytes of a content digest, by which its manifest is found.
const CONTENT: usize = 32;
/// Numbers that describe an input: its vertex, its output, the text of its paths.
const INPUT: usize = 3;

/// How many names and values of parts a vertex usually has, and how many bytes a text.
const PARTS: usize = 10;
const TEXT: usize = 24;

/// The result was there at the end, or in an earlier build with the same key.
const DONE: u8 = 1;
/// It can be cached at all: a client's directory can't.
const PERSISTENT: u8 = 2;

/// A build's graph. Inputs come before their consumers. A key that is not known is zero.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Graph {
    /// All texts, one after the other.
    #[prost(string, tag = "1")]
    texts: String,
    /// Where each text ends.
    #[prost(uint32, repeated, tag = "2")]
    text_ends: Vec<u32>,
    /// Each vertex's name.
    #[prost(uint32, repeated, tag = "3")]
    names: Vec<u32>,
    /// Each vertex's digest of the operation alone.
    #[prost(bytes = "vec", tag = "4")]
    ops: Vec<u8>,
    /// Each vertex's definition key.
    #[prost(bytes = "vec", tag = "5")]
    definitions: Vec<u8>,
    /// Each vertex's content key.
    #[prost(bytes = "vec", tag = "6")]
    contents: Vec<u8>,
    /// Each vertex's flags.
    #[prost(bytes = "vec", tag = "7")]
    flags: Vec<u8>,
    /// What operations were made of: names and values in turn.
    #[prost(uint32, repeated, tag = "8")]
    parts: Vec<u32>,
    /// Where each vertex's parts end.
    #[prost(uint32, repeated, tag = "9")]
    part_ends: Vec<u32>,
    /// Inputs, by [`INPUT`] numbers each.
    #[prost(uint32, repeated, tag = "10")]
    inputs: Vec<u32>,
    /// Where each vertex's inputs end.
    #[prost(uint32, repeated, tag = "11")]
    input_ends: Vec<u32>,
    /// Each input's digest of what is read of it.
    #[prost(bytes = "vec", tag = "12")]
    reads: Vec<u8>,
}

/// An input of a vertex.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input<'a> {
    /// Place of its vertex.
    pub(super) vertex: usize,
    /// Which of its outputs.
    pub(super) output: u32,
    /// Digest of what is read of it, where the operation says so and that was computed; else empty.
    pub(super) content: &'a [u8],
    /// The paths that are read, each with a mark and an end; empty if all of it counts.
    paths: &'a str,
}

/// A path that an operation reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadPath<'a> {
    pub(super) path: &'a str,
    pub(super) wildcard: bool,
}

impl<'a> Input<'a> {
    /// The paths that are read.
    pub(super) fn paths(&self) -> impl Iterator<Item = ReadPath<'a>> + use<'a> {
        self.paths.split_terminator('\0').map(|text| match text.strip_prefix('*') {
            Some(path) => ReadPath { path, wildcard: true },
            None => ReadPath { path: text.get(1..).unwrap_or_default(), wildcard: false },
        })
    }
}

/// Texts by their place among all.
#[derive(Default)]
struct Texts {
    /// Those that may come again.
    places: HashTable<u32>,
    hasher: foldhash::fast::RandomState,
    all: String,
    ends: Vec<u32>,
}

/// The text at a place, in a column of texts.
fn text<'a>(all: &'a str, ends: &[u32], place: u32) -> &'a str {
    let place = place as usize;
    let start = place.checked_sub(1).map_or(0, |before| ends[before]);
    &all[start as usize..ends[place] as usize]
}

impl Texts {
    /// With room for the usual texts of so many vertices.
    fn of(vertices: usize) -> Self {
        let count = vertices * PARTS / 2;
        Self {
            places: HashTable::with_capacity(count),
            all: String::with_capacity(count * TEXT),
            ends: Vec::with_capacity(count),
            ..Self::default()
        }
    }

    fn place(&mut self, text: &str) -> u32 {
        let hash = self.hasher.hash_one(text);
        if let Some(place) = self.places.find(hash, |place| self::text(&self.all, &self.ends, *place) == text)
        {
            return *place;
        }
        let place = self.add(text);
        let Self { places, hasher, all, ends } = self;
        places.insert_unique(hash, place, |place| hasher.hash_one(self::text(all, ends, *place)));
        place
    }

    fn add(&mut self, text: &str) -> u32 {
        self.all.push_str(text);
        self.ends.push(index(self.all.len()));
        index(self.ends.len() - 1)
    }

    fn value(&mut self, value: &str) -> u32 {
        let digits = value.strip_prefix(DIGEST.0).filter(|digits| digits.len() == 2 * CONTENT);
        if digits.is_some_and(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit())) {
            self.place(&value[..DIGEST.0.len() + DIGEST.1])
        } else if value.len() <= VALUE {
            self.place(value)
        } else {
            self.add(&cut(value))
        }
    }

    fn paths(&mut self, input: &InputMap, buffer: &mut String) -> u32 {
        buffer.clear();
        for path in input.content.iter().flat_map(|query| &query.paths) {
            buffer.push(if path.wildcard { '*' } else { '=' });
            buffer.push_str(&path.path);
            buffer.push('\0');
        }
        if buffer.is_empty() { self.place("") } else { self.add(buffer) }
    }
}

impl Graph {
    /// What is worth keeping of a build's decisions.
    pub(super) fn new(vertices: &[VertexExplanation]) -> Self {
        let (mut texts, mut buffer) = (Texts::of(vertices.len()), String::new());
        let mut graph = Self::with_room(vertices);
        for vertex in vertices {
            let map = vertex.map.as_deref();
            graph.names.push(texts.place(&vertex.name));
            put::<KEY>(&mut graph.ops, map.map(|map| &map.digest));
            put::<KEY>(&mut graph.definitions, vertex.definition.as_ref());
            put::<KEY>(&mut graph.contents, vertex.content.as_ref());
            let done = matches!(vertex.outcome, Outcome::Cached | Outcome::Made);
            let persistent = super::reasons::is_persistent(vertex);
            graph.flags.push((u8::from(done) * DONE) | (u8::from(persistent) * PERSISTENT));
            if let Some(map) = map {
                map.parts
                    .each(&mut |name, value| graph.parts.extend([texts.place(name), texts.value(value)]));
            }
            graph.part_ends.push(index(graph.parts.len()));
            for (at, input) in vertex.inputs.iter().enumerate() {
                let paths = match map.and_then(|map| map.inputs.get(at)) {
                    Some(input) => texts.paths(input, &mut buffer),
                    None => texts.place(""),
                };
                graph.inputs.extend([index(input.vertex), input.output, paths]);
                put::<CONTENT>(&mut graph.reads, input.content.as_ref());
            }
            graph.input_ends.push(index(graph.inputs.len()));
        }
        (graph.texts, graph.text_ends) = (texts.all, texts.ends);
        graph
    }

    /// Empty columns that need not grow for the usual vertices.
    fn with_room(vertices: &[VertexExplanation]) -> Self {
        let count = vertices.len();
        let inputs: usize = vertices.iter().map(|vertex| vertex.inputs.len()).sum();
        Self {
            names: Vec::with_capacity(count),
            ops: Vec::with_capacity(count * KEY),
            definitions: Vec::with_capacity(count * KEY),
            contents: Vec::with_capacity(count * KEY),
            flags: Vec::with_capacity(count),
            parts: Vec::with_capacity(count * PARTS),
            part_ends: Vec::with_capacity(count),
            inputs: Vec::with_capacity(inputs * INPUT),
            input_ends: Vec::with_capacity(count),
            reads: Vec::with_capacity(inputs * CONTENT),
            ..Self::default()
        }
    }

    /// How many vertices there are.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    fn text(&self, place: u32) -> &str {
        text(&self.texts, &self.text_ends, place)
    }

    /// A vertex's name.
    pub(super) fn name(&self, vertex: usize) -> &str {
        self.text(self.names[vertex])
    }

    /// Digest of the operation alone; empty if it was never resolved.
    pub(super) fn op(&self, vertex: usize) -> &[u8] {
        get::<KEY>(&self.ops, vertex)
    }

    fn definition(&self, vertex: usize) -> &[u8] {
        get::<KEY>(&self.definitions, vertex)
    }

    fn content(&self, vertex: usize) -> &[u8] {
        get::<KEY>(&self.contents, vertex)
    }

    /// The result was there at the end, or in an earlier build with the same key.
    pub(super) fn is_done(&self, vertex: usize) -> bool {
        self.flags[vertex] & DONE != 0
    }

    /// How many vertices can be cached at all.
    pub(super) fn persistent(&self) -> usize {
        self.flags.iter().filter(|flags| **flags & PERSISTENT != 0).count()
    }

    /// The parts of a vertex in their order: names and values.
    pub(super) fn parts(&self, vertex: usize) -> impl Iterator<Item = (&str, &str)> {
        let parts = self.parts[range(&self.part_ends, vertex)].chunks_exact(2);
        parts.map(|part| (self.text(part[0]), self.text(part[1])))
    }

    /// The values of a part of a vertex.
    pub(super) fn part<'a>(&'a self, vertex: usize, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.parts(vertex).filter(move |part| part.0 == name).map(|part| part.1)
    }

    /// What sort of operation a vertex is; empty if that was never resolved.
    pub(super) fn kind(&self, vertex: usize) -> &str {
        self.parts(vertex).next().map(|part| part.1).unwrap_or_default()
    }

    /// The inputs of a vertex in their order.
    pub(super) fn inputs(&self, vertex: usize) -> impl ExactSizeIterator<Item = Input<'_>> {
        let range = range(&self.input_ends, vertex);
        let first = range.start / INPUT;
        self.inputs[range].chunks_exact(INPUT).enumerate().map(move |(at, input)| Input {
            vertex: input[0] as usize,
            output: input[1],
            content: get::<CONTENT>(&self.reads, first + at),
            paths: self.text(input[2]),
        })
    }

    /// True if a vertex has a key in both graphs, and the same.
    pub(super) fn is_like(&self, vertex: usize, other: &Self, its: usize) -> bool {
        let same = |mine: &[u8], its: &[u8]| !mine.is_empty() && mine == its;
        same(self.definition(vertex), other.definition(its)) || same(self.content(vertex), other.content(its))
    }

    /// False for bytes that some other version wrote.
    pub(super) fn is_sound(&self) -> bool {
        let vertices = self.names.len();
        let rising = |ends: &[u32], step: usize, total: usize| {
            ends.is_sorted()
                && ends.iter().all(|end| (*end as usize).is_multiple_of(step))
                && ends.last().map_or(0, |end| *end as usize) == total
        };
        let texts = self.text_ends.len();
        let known = |text: &u32| (*text as usize) < texts;
        let before = |vertex: usize| self.inputs(vertex).all(|input| input.vertex < vertex);
        [&self.ops, &self.definitions, &self.contents].iter().all(|column| column.len() == vertices * KEY)
            && self.flags.len() == vertices
            && self.part_ends.len() == vertices
            && self.input_ends.len() == vertices
            && self.reads.len() == self.inputs.len() / INPUT * CONTENT
            && rising(&self.text_ends, 1, self.texts.len())
            && self.text_ends.iter().all(|end| self.texts.is_char_boundary(*end as usize))
            && rising(&self.part_ends, 2, self.parts.len())
            && rising(&self.input_ends, INPUT, self.inputs.len())
            && self.names.iter().chain(&self.parts).all(known)
            && self.inputs.chunks_exact(INPUT).all(|input| known(&input[2]))
            && (0..vertices).all(before)
    }

    /// Digests of all that was read of inputs.
    pub(super) fn read_contents(&self) -> impl Iterator<Item = [u8; CONTENT]> {
        self.reads.as_chunks().0.iter().filter(|digest| **digest != [0; CONTENT]).copied()
    }

    /// A few hashes that stand for the whole: two graphs share about as many as they share steps.
    pub(super) fn sketch(&self) -> Vec<u64> {
        const SIZE: usize = 64;
        let head = |bytes: &[u8]| bytes.first_chunk().map(|head| u64::from_be_bytes(*head));
        let name = |at| head(blake3::hash(super::pairing::plain(self.name(at)).as_bytes()).as_bytes());
        let mut hashes: Vec<u64> =
            (0..self.len()).flat_map(|at| [head(self.op(at)), name(at)]).flatten().collect();
        hashes.sort_unstable();
        hashes.dedup();
        hashes.truncate(SIZE);
        hashes
    }

    /// How many parts of steps only one of two graphs has.
    pub(super) fn apart(&self, other: &Self) -> usize {
        let mut counts: HashMap<(&str, &str), isize, foldhash::fast::RandomState> = HashMap::default();
        for (graph, one) in [(self, 1), (other, -1)] {
            for part in graph.parts.chunks_exact(2) {
                *counts.entry((graph.text(part[0]), graph.text(part[1]))).or_default() += one;
            }
        }
        counts.values().map(|count| count.unsigned_abs()).sum()
    }

    /// The build made everything itself and knows all that there is to know.
    pub(super) fn is_complete(&self) -> bool {
        (0..self.len()).all(|at| self.is_done(at) && !self.content(at).is_empty())
    }

    /// What a build did not have to find out, because a step above was cached, is as the earlier build knew it.
    pub(super) fn carry_over(&mut self, old: &Self) {
        let mut by_key: Option<HashMap<&[u8], usize, foldhash::fast::RandomState>> = None;
        for at in 0..self.len() {
            let before = if at < old.len() && self.is_like(at, old, at) {
                Some(at)
            } else {
                let by_key = by_key.get_or_insert_with(|| {
                    let keys =
                        (0..old.len()).flat_map(|at| [(old.content(at), at), (old.definition(at), at)]);
                    keys.filter(|(key, _)| !key.is_empty()).collect()
                });
                [self.definition(at), self.content(at)].iter().find_map(|key| by_key.get(key)).copied()
            };
            let Some(before) = before else { continue };
            self.flags[at] |= old.flags[before] & DONE;
            if self.content(at).is_empty() {
                copy::<KEY>(&mut self.contents, at, &old.contents, before);
            }
            let (mine, its) = (range(&self.input_ends, at), range(&old.input_ends, before));
            for (mine, its) in mine.step_by(INPUT).zip(its.step_by(INPUT)) {
                let (mine, its) = (mine / INPUT, its / INPUT);
                if get::<CONTENT>(&self.reads, mine).is_empty() {
                    copy::<CONTENT>(&mut self.reads, mine, &old.reads, its);
                }
            }
        }
    }
}

/// What belongs to a vertex in a list of which it is told where each one's part ends.
fn range(ends: &[u32], vertex: usize) -> Range<usize> {
    vertex.checked_sub(1).map_or(0, |before| ends[before] as usize)..ends[vertex] as usize
}

fn put<const SIZE: usize>(column: &mut Vec<u8>, key: Option<&Key>) {
    match key {
        Some(key) => column.extend_from_slice(&key.as_bytes()[..SIZE]),
        None => column.extend_from_slice(&[0; SIZE]),
    }
}

/// The key at a place; empty if it is not known.
fn get<const SIZE: usize>(column: &[u8], at: usize) -> &[u8] {
    let key = &column[at * SIZE..][..SIZE];
    if key == [0; SIZE] { &[] } else { key }
}

fn copy<const SIZE: usize>(column: &mut [u8], at: usize, from: &[u8], before: usize) {
    column[at * SIZE..][..SIZE].copy_from_slice(&from[before * SIZE..][..SIZE]);
}

fn index(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

fn cut(value: &str) -> String {
    let mut end = SHOWN;
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let digest = blake3::hash(value.as_bytes()).to_hex();
    format!("{}… ({} bytes, blake3:{})", &value[..end], value.len(), &digest[..16])
}
