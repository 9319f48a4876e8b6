//! What the solver promises, said once more without its code: under which keys results are remembered, and from what
//! is remembered, which vertices of a build are found and by which key, which run, and what is remembered afterwards.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use kiln_solver::explain::KeyKind;

use crate::model::{Node, PART, evaluate};
use crate::world::Files;

/// Stands for a key of the solver: two are equal where the keys must be equal, and only there.
pub(crate) type Symbol = u64;

fn symbol(of: impl Hash) -> Symbol {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What one input counts by.
#[derive(Hash)]
enum Part<'a> {
    Key(Symbol),
    Read(&'a str),
    Whole(&'a Files),
}

/// The keys of a vertex, and which of them may not answer for it in a build that ignores some cache.
#[derive(Debug, Clone, Default)]
pub(crate) struct Keys {
    pub(crate) definition: Option<Symbol>,
    pub(crate) content: Option<Symbol>,
    pub(crate) output: Option<Symbol>,
    /// The content key says more than the definition key: only then it is remembered.
    distinct: bool,
    /// It, or something below it, runs in every build.
    fresh: bool,
    /// So does something that its content key stands for.
    content_fresh: bool,
}

impl Keys {
    /// Those under which a result is remembered.
    pub(crate) fn recorded(&self) -> impl Iterator<Item = Symbol> {
        [self.definition, self.distinct_content(), self.output].into_iter().flatten()
    }

    /// The content key, where it is remembered.
    pub(crate) fn distinct_content(&self) -> Option<Symbol> {
        self.content.filter(|_| self.distinct)
    }
}

/// How a wanted vertex comes by its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Found(KeyKind),
    Runs,
    Fails,
    /// Something below fails.
    Never,
}

/// A graph with everything that could be known of it.
pub(crate) struct Reference {
    nodes: Vec<Node>,
    pub(crate) keys: Vec<Keys>,
    /// What each vertex makes, or would make if nothing failed.
    pub(crate) made: Vec<Files>,
    /// The same, but nothing where it or something below fails.
    pub(crate) results: Vec<Option<Files>>,
}

/// What a build of one vertex does, if nothing disturbs it.
pub(crate) struct Expected {
    /// The vertices that are wanted at some time, and how each would come by its result.
    pub(crate) ways: BTreeMap<usize, Way>,
    /// Those that can't be done without. The others are given up when something above them is found by its content;
    /// how far they come until then is a matter of time.
    pub(crate) needed: BTreeSet<usize>,
}

impl Reference {
    pub(crate) fn new(nodes: &[Node]) -> Self {
        let sound: Vec<Node> = nodes.iter().map(|node| Node { fragile: false, ..node.clone() }).collect();
        let made: Vec<Files> = evaluate(&sound).into_iter().map(|files| files.expect("none fails")).collect();
        let mut keys: Vec<Keys> = Vec::new();
        for (at, node) in nodes.iter().enumerate() {
            keys.push(Self::keys_of(at, node, &keys, &made));
        }
        Self { nodes: nodes.to_vec(), keys, made, results: evaluate(nodes) }
    }

    fn keys_of(at: usize, node: &Node, below: &[Keys], made: &[Files]) -> Keys {
        if node.ephemeral {
            return Keys { fresh: node.ignore_cache, ..Keys::default() };
        }
        let op = (at, node.version);
        let by_definition = |(input, narrow): (usize, bool)| Some((below[input].definition?, narrow));
        let definitions: Option<Vec<_>> = node.uses().map(by_definition).collect();
        let by_content = |(input, narrow): (usize, bool)| match below[input].content {
            _ if narrow => Part::Read(&made[input][PART]),
            Some(content) => Part::Key(content),
            None => Part::Whole(&made[input]),
        };
        let by_output = |(input, narrow): (usize, bool)| match narrow {
            true => Part::Read(&made[input][PART]),
            false => Part::Whole(&made[input]),
        };
        let mut whole = node.uses().filter(|(_, narrow)| !narrow).map(|(input, _)| input);
        Keys {
            definition: definitions.map(|parts| symbol(("definition", op, parts))),
            content: Some(symbol(("content", op, node.uses().map(by_content).collect::<Vec<_>>()))),
            output: whole
                .clone()
                .next()
                .map(|_| symbol(("output", op, node.uses().map(by_output).collect::<Vec<_>>()))),
            distinct: node
                .uses()
                .any(|(input, narrow)| narrow || below[input].distinct || below[input].content.is_none()),
            fresh: node.ignore_cache || node.inputs.iter().any(|&input| below[input].fresh),
            content_fresh: node.ignore_cache || whole.any(|input| below[input].content_fresh),
        }
    }

    /// True if builds at the same time share one run.
    pub(crate) fn shared(&self, at: usize) -> bool {
        let keys = &self.keys[at];
        (keys.definition.is_some() && !keys.fresh) || (keys.distinct && !keys.content_fresh)
    }

    fn way(&self, at: usize, known: &HashSet<Symbol>) -> Way {
        let keys = &self.keys[at];
        let knows = |key: Option<Symbol>| key.is_some_and(|key| known.contains(&key));
        if !keys.fresh && knows(keys.definition) {
            Way::Found(KeyKind::Definition)
        } else if self.nodes[at].inputs.iter().any(|&input| self.results[input].is_none()) {
            Way::Never
        } else if !keys.content_fresh && knows(keys.distinct_content()) {
            Way::Found(KeyKind::Content)
        } else if !self.nodes[at].ignore_cache && knows(keys.output) {
            Way::Found(KeyKind::Output)
        } else if self.nodes[at].fails() {
            Way::Fails
        } else {
            Way::Runs
        }
    }

    /// What a build of `root` does when these keys are known.
    pub(crate) fn expect(&self, root: usize, known: &HashSet<Symbol>) -> Expected {
        let mut ways = BTreeMap::new();
        let mut wanted = BTreeSet::from([root]);
        while let Some(at) = wanted.pop_last() {
            let way = self.way(at, known);
            ways.insert(at, way);
            if way != Way::Found(KeyKind::Definition) {
                wanted.extend(&self.nodes[at].inputs);
            }
        }
        // Consumers come before their inputs.
        let (mut needed, mut needed_content) = (BTreeSet::from([root]), BTreeSet::new());
        for (&at, &way) in ways.iter().rev() {
            if way == Way::Found(KeyKind::Definition) {
                continue;
            }
            let by_content = way == Way::Found(KeyKind::Content);
            let (result, content) = (needed.contains(&at), needed_content.contains(&at));
            for (input, narrow) in self.nodes[at].uses() {
                let read = narrow || self.keys[input].content.is_none();
                if (result && !by_content) || ((result || content) && read) {
                    needed.insert(input);
                } else if (result || content) && self.keys[input].distinct {
                    needed_content.insert(input);
                }
            }
        }
        Expected { ways, needed }
    }

    /// Which keys are known afterwards, beside those that led to the result.
    pub(crate) fn adds(&self, at: usize, way: Way) -> Vec<Symbol> {
        let keys = &self.keys[at];
        match way {
            Way::Runs => keys.recorded().collect(),
            Way::Found(KeyKind::Output) => {
                keys.definition.into_iter().chain(keys.distinct_content()).collect()
            }
            Way::Found(KeyKind::Content) => keys.definition.into_iter().collect(),
            Way::Found(KeyKind::Definition) | Way::Fails | Way::Never => Vec::new(),
        }
    }
}
