//! Collects operations and turns the part that an output needs into a [`pb::Definition`].

use std::collections::{BTreeMap, HashMap};

use prost::Message;

use super::{caps, digest, encode_op};
use crate::pb;

/// Collects operations by digest. An operation may only name inputs that were added before it, so
/// insertion order is a topological order.
#[derive(Debug, Default)]
pub struct Builder {
    vertices: Vec<Vertex>,
    index: HashMap<String, usize>,
    infos: Vec<pb::SourceInfo>,
}

#[derive(Debug)]
struct Vertex {
    digest: String,
    bytes: Vec<u8>,
    inputs: Vec<usize>,
    metadata: pb::OpMetadata,
    locations: Vec<pb::Location>,
}

impl Builder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an operation and returns its digest. The same operation added twice is one vertex: caps
    /// are united, other metadata of the later call wins where it is set.
    pub fn add(&mut self, op: &pb::Op, metadata: pb::OpMetadata) -> String {
        let bytes = encode_op(op);
        let digest = digest(&bytes);
        if let Some(&at) = self.index.get(&digest) {
            merge_metadata(&mut self.vertices[at].metadata, metadata);
            return digest;
        }
        let inputs = op.inputs.iter().filter_map(|i| self.index.get(&i.digest).copied()).collect();
        self.index.insert(digest.clone(), self.vertices.len());
        self.vertices.push(Vertex { digest: digest.clone(), bytes, inputs, metadata, locations: Vec::new() });
        digest
    }

    /// Registers a source file; the answer is the `source_index` for [`Builder::locate`].
    pub fn source_info(&mut self, info: pb::SourceInfo) -> i32 {
        self.infos.push(info);
        i32::try_from(self.infos.len() - 1).unwrap_or(i32::MAX)
    }

    /// Says which lines of a registered source file a vertex comes from.
    pub fn locate(&mut self, digest: &str, source_index: i32, ranges: Vec<pb::Range>) {
        if let Some(&at) = self.index.get(digest) {
            let location = pb::Location { source_index, ranges };
            if !self.vertices[at].locations.contains(&location) {
                self.vertices[at].locations.push(location);
            }
        }
    }

    /// The definition of `output` and everything it needs, ending with the terminal pseudo-operation.
    pub fn finish(&self, output: &pb::Input) -> pb::Definition {
        let mut needed = vec![false; self.vertices.len()];
        let mut todo: Vec<usize> = self.index.get(&output.digest).copied().into_iter().collect();
        while let Some(at) = todo.pop() {
            if !std::mem::replace(&mut needed[at], true) {
                todo.extend(&self.vertices[at].inputs);
            }
        }
        let mut def = pb::Definition::default();
        let mut source = pb::Source { infos: self.infos.clone(), ..Default::default() };
        let mut terminal_caps: BTreeMap<String, bool> =
            [caps::CONSTRAINTS, caps::PLATFORM].into_iter().map(|c| (c.to_string(), true)).collect();
        for vertex in self.vertices.iter().zip(&needed).filter_map(|(v, n)| n.then_some(v)) {
            let metadata = &vertex.metadata;
            for (present, cap) in [
                (metadata.ignore_cache, caps::META_IGNORE_CACHE),
                (!metadata.description.is_empty(), caps::META_DESCRIPTION),
                (metadata.export_cache.is_some(), caps::META_EXPORT_CACHE),
            ] {
                if present {
                    terminal_caps.insert(cap.to_string(), true);
                }
            }
            def.def.push(vertex.bytes.clone());
            def.metadata.insert(vertex.digest.clone(), metadata.clone());
            if !vertex.locations.is_empty() {
                source
                    .locations
                    .insert(vertex.digest.clone(), pb::Locations { locations: vertex.locations.clone() });
            }
        }
        // The terminal operation is not a vertex: Go clients write its input and nothing else.
        let terminal = pb::Op { inputs: vec![output.clone()], ..Default::default() }.encode_to_vec();
        def.metadata.insert(digest(&terminal), pb::OpMetadata { caps: terminal_caps, ..Default::default() });
        def.def.push(terminal);
        def.source = Some(source);
        def
    }
}

fn merge_metadata(into: &mut pb::OpMetadata, from: pb::OpMetadata) {
    into.ignore_cache |= from.ignore_cache;
    into.caps.extend(from.caps);
    into.description.extend(from.description);
    if from.export_cache.is_some() {
        into.export_cache = from.export_cache;
    }
    if from.progress_group.is_some() {
        into.progress_group = from.progress_group;
    }
    if from.linux_resources.is_some() {
        into.linux_resources = from.linux_resources;
    }
}
