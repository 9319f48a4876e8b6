//! Small graphs that a test can draw at random and change, and a naive evaluator that knows no cache.

use kiln_proto::pb;

use crate::world::{Files, Graph, Recipe, recipe};

#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// Indices of earlier nodes.
    pub(crate) inputs: Vec<usize>,
    /// Of which inputs only one file is read.
    pub(crate) narrow: Vec<bool>,
    /// Whether its output hides what came in, so that changes below may not be seen above.
    pub(crate) coarse: bool,
    pub(crate) ephemeral: bool,
    pub(crate) version: u8,
    pub(crate) yields: usize,
    pub(crate) ignore_cache: bool,
    /// Fails in its last version.
    pub(crate) fragile: bool,
    /// Takes no slot.
    pub(crate) io: bool,
}

impl Node {
    pub(crate) const VERSIONS: u8 = 3;

    pub(crate) fn fails(&self) -> bool {
        self.fragile && self.version + 1 == Self::VERSIONS
    }

    /// Its inputs, and whether it reads only a part of each.
    pub(crate) fn uses(&self) -> impl Iterator<Item = (usize, bool)> + Clone {
        self.inputs.iter().copied().zip(self.narrow.iter().copied())
    }
}

/// SplitMix64: the same everywhere, for ever.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn version(&mut self) -> u8 {
        u8::try_from(self.below(Node::VERSIONS.into())).unwrap()
    }

    /// A graph.
    pub(crate) fn nodes(&mut self) -> Vec<Node> {
        let mut nodes = Vec::new();
        for index in 0..2 + self.below(8) {
            let count = if index == 0 { 0 } else { self.below(index.min(3) + 1) };
            let inputs: Vec<usize> = (0..count).map(|_| self.below(index)).collect();
            nodes.push(Node {
                ephemeral: inputs.is_empty() && self.chance(30),
                inputs,
                narrow: (0..3).map(|_| self.chance(50)).collect(),
                coarse: self.chance(50),
                version: self.version(),
                yields: self.below(4),
                ignore_cache: self.chance(10),
                fragile: self.chance(15),
                io: self.chance(20),
            });
        }
        nodes
    }
}

/// The file that readers of a part read.
pub(crate) const PART: &str = "/part";

pub(crate) fn node_recipe(index: usize, node: &Node, session: usize) -> Recipe {
    let identity = if node.ephemeral { format!("session {session}") } else { String::new() };
    let text = format!("{index} v{} {identity}", node.version);
    let mut made = recipe(&text).yields(node.yields);
    for (position, (_, narrow)) in node.uses().enumerate() {
        if narrow {
            made = made.reads(position, PART);
        }
    }
    if node.ephemeral {
        made = made.ephemeral();
    }
    if node.io {
        made = made.io();
    }
    if node.fails() {
        made = made.fails("broken");
    }
    let (version, coarse) = (node.version, node.coarse);
    made.makes(move |inputs| {
        // Coarse nodes see only a bit of what came in and of their own version.
        let all = blake3::hash(format!("{index} {version} {inputs:?}").as_bytes());
        let part = if coarse { format!("{}", all.as_bytes()[0] % 2) } else { all.to_hex()[..8].to_owned() };
        let rest = if coarse { "-".to_owned() } else { all.to_hex()[8..16].to_owned() };
        vec![Files::from([(PART.to_owned(), part), ("/rest".to_owned(), rest)])]
    })
}

pub(crate) fn name(index: usize) -> String {
    format!("n{index}")
}

pub(crate) fn definition(nodes: &[Node], root: usize) -> pb::Definition {
    let forced: Vec<String> =
        nodes.iter().enumerate().filter(|(_, node)| node.ignore_cache).map(|(i, _)| name(i)).collect();
    let mut graph = Graph::ignoring(&forced.iter().map(String::as_str).collect::<Vec<_>>());
    let mut places: Vec<pb::Input> = Vec::new();
    for (i, node) in nodes.iter().enumerate() {
        let inputs: Vec<pb::Input> = node.inputs.iter().map(|&input| places[input].clone()).collect();
        let inputs: Vec<&pb::Input> = inputs.iter().collect();
        places.push(if inputs.is_empty() { graph.source(&name(i)) } else { graph.step(&name(i), &inputs) });
    }
    graph.finish(&places[root])
}

/// What each node is, worked out without any cache; nothing where it or something below fails.
pub(crate) fn evaluate(nodes: &[Node]) -> Vec<Option<Files>> {
    let mut results: Vec<Option<Files>> = Vec::new();
    for (i, node) in nodes.iter().enumerate() {
        let inputs: Option<Vec<Files>> = node.inputs.iter().map(|&input| results[input].clone()).collect();
        let made = |inputs: Vec<Files>| node_recipe(i, node, 0).apply(&name(i), &inputs).swap_remove(0);
        results.push(inputs.filter(|_| !node.fails()).map(made));
    }
    results
}
