//! The operations of one compilation, before their digests are known: the build context's source
//! is filled in last, when it is known which files are read.

use std::collections::HashMap;

use kiln_proto::{llb, pb};

use crate::error::{Fault, Lines, Result};

/// One output of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Out {
    node: usize,
    index: i64,
}

/// What goes with an operation but not into its digest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meta {
    /// Display name.
    pub(crate) name: String,
    /// The instruction's text, for user interfaces.
    pub(crate) command: Option<String>,
    pub(crate) caps: Vec<&'static str>,
    pub(crate) ignore_cache: bool,
    pub(crate) lines: Option<Lines>,
    pub(crate) group: Option<pb::ProgressGroup>,
    pub(crate) resources: Option<pb::LinuxResources>,
    /// Another use of the same operation has the better name.
    pub(crate) unnamed: bool,
}

impl Meta {
    pub(crate) fn named(name: impl Into<String>, caps: &[&'static str]) -> Self {
        Self { name: name.into(), caps: caps.to_vec(), ..Self::default() }
    }

    fn into_pb(self) -> pb::OpMetadata {
        let mut caps: Vec<&str> = self.caps;
        caps.extend([llb::caps::CONSTRAINTS, llb::caps::META_DESCRIPTION]);
        if self.ignore_cache {
            caps.push(llb::caps::META_IGNORE_CACHE);
        }
        let mut description = std::collections::BTreeMap::new();
        if !self.name.is_empty() {
            description.insert(llb::CUSTOM_NAME.to_string(), self.name);
        }
        if let Some(command) = self.command {
            description.insert("com.docker.dockerfile.v1.command".to_string(), command);
        }
        pb::OpMetadata {
            ignore_cache: self.ignore_cache,
            description,
            caps: caps.into_iter().map(|c| (c.to_string(), true)).collect(),
            progress_group: self.group,
            linux_resources: self.resources,
            ..Default::default()
        }
    }
}

#[derive(Debug, Default)]
struct Node {
    /// Without inputs.
    op: pb::Op,
    inputs: Vec<Out>,
    metadata: Vec<pb::OpMetadata>,
    lines: Vec<Lines>,
}

/// See the module. Equal operations on equal inputs are one node.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    nodes: Vec<Node>,
    index: HashMap<Vec<u8>, usize>,
}

/// The position of `out` among `inputs`, added if it is new; [`llb::EMPTY`] for scratch.
pub(crate) fn input_index(inputs: &mut Vec<Out>, out: Option<Out>) -> i64 {
    let Some(out) = out else { return llb::EMPTY };
    let at = inputs.iter().position(|i| *i == out).unwrap_or_else(|| {
        inputs.push(out);
        inputs.len() - 1
    });
    at as i64
}

impl Graph {
    /// Adds an operation; the answer is its first output.
    pub(crate) fn add(
        &mut self,
        op: pb::op::Op,
        platform: Option<&pb::Platform>,
        inputs: Vec<Out>,
        mut meta: Meta,
    ) -> Out {
        if platform.is_some() {
            meta.caps.push(llb::caps::PLATFORM);
        }
        let (lines, unnamed) = (meta.lines, meta.unnamed);
        let op = pb::Op { op: Some(op), platform: platform.cloned(), ..Default::default() };
        self.intern(op, inputs, meta.into_pb(), lines, unnamed)
    }

    fn intern(
        &mut self,
        op: pb::Op,
        inputs: Vec<Out>,
        metadata: pb::OpMetadata,
        lines: Option<Lines>,
        unnamed: bool,
    ) -> Out {
        let mut key = Vec::new();
        for input in &inputs {
            key.extend((input.node as u64).to_le_bytes());
            key.extend(input.index.to_le_bytes());
        }
        key.extend(llb::encode_op(&op));
        let nodes = &mut self.nodes;
        let node = *self.index.entry(key).or_insert_with(|| {
            nodes.push(Node { op, inputs, ..Node::default() });
            nodes.len() - 1
        });
        let node_ref = &mut self.nodes[node];
        // Where metadata differ, the last one counts.
        let at = if unnamed { 0 } else { node_ref.metadata.len() };
        node_ref.metadata.insert(at, metadata);
        node_ref.lines.extend(lines);
        Out { node, index: 0 }
    }

    /// An operation to be given later by [`Graph::fill`].
    pub(crate) fn reserve(&mut self) -> Out {
        self.nodes.push(Node::default());
        Out { node: self.nodes.len() - 1, index: 0 }
    }

    pub(crate) fn fill(&mut self, out: Out, op: pb::op::Op, meta: Meta) {
        let node = &mut self.nodes[out.node];
        node.op = pb::Op { op: Some(op), ..Default::default() };
        node.metadata = vec![meta.into_pb()];
    }

    /// Adds the operations of a definition; the answer is its result, `None` for scratch.
    pub(crate) fn import(&mut self, def: &pb::Definition) -> Result<Option<Out>> {
        let loaded = llb::load(def).map_err(|e| Fault::new(format!("invalid build context: {e}")))?;
        let mut outs: Vec<Out> = Vec::with_capacity(loaded.vertices.len());
        for vertex in loaded.vertices {
            let inputs =
                vertex.inputs.iter().map(|&(v, o)| Out { node: outs[v].node, index: i64::from(o) }).collect();
            let op = pb::Op { inputs: Vec::new(), ..*vertex.op };
            outs.push(self.intern(op, inputs, vertex.metadata.as_ref().clone(), None, false));
        }
        Ok(loaded.root.map(|(v, o)| Out { node: outs[v].node, index: i64::from(o) }))
    }

    /// The definition of `output`, with `source` as the file that its lines refer to.
    pub(crate) fn definition(&self, output: Out, source: pb::SourceInfo) -> pb::Definition {
        let mut builder = llb::Builder::new();
        let file = builder.source_info(source);
        let mut digests: Vec<String> = Vec::with_capacity(self.nodes.len());
        let edge =
            |digests: &[String], out: &Out| pb::Input { digest: digests[out.node].clone(), index: out.index };
        for node in &self.nodes {
            let mut op = node.op.clone();
            op.inputs = node.inputs.iter().map(|i| edge(&digests, i)).collect();
            let mut digest = String::new();
            for metadata in &node.metadata {
                digest = builder.add(&op, metadata.clone());
            }
            for lines in &node.lines {
                builder.locate(&digest, file, lines.ranges());
            }
            digests.push(digest);
        }
        builder.finish(&edge(&digests, &output))
    }
}
