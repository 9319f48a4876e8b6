//! Pairing and comparing of made-up graphs.

mod keeping;

use std::collections::HashSet;
use std::sync::Arc;

use kiln_cache::contenthash::{ChangeKind, ContentChange};
use kiln_cache::{Eviction, StoreError};
use kiln_solver::explain::{Found, InputExplanation, KeyKind, Lookup, Outcome, VertexExplanation};
use kiln_solver::op::{CacheMap, InputMap};
use prost::Message;

use super::graph::Graph;
use super::reasons::{Comparison, Facts, Missed};

struct NoFacts;

impl Facts for NoFacts {
    fn changes(&self, _: &[u8], _: &[u8]) -> Option<Vec<ContentChange>> {
        Some(vec![ContentChange { part: 0, path: "f".into(), kind: ChangeKind::Added }])
    }

    fn eviction(&self, _: &str) -> Option<Eviction> {
        None
    }

    fn forget_contents(&self, _: &HashSet<[u8; 32]>) -> Result<(), StoreError> {
        Ok(())
    }
}

impl super::Explanations {
    /// For tests of what stands on this.
    pub(crate) fn without_facts(values: kiln_cache::Values) -> Arc<Self> {
        Self::over(values, Arc::new(NoFacts))
    }
}

/// A step: name, value of its one part, inputs.
type Made<'a> = (&'a str, &'a str, &'a [usize]);

/// What the solver would say of a chain of steps that all ran.
fn vertices(steps: &[Made<'_>]) -> Vec<VertexExplanation> {
    let mut out: Vec<VertexExplanation> = Vec::new();
    for (name, part, inputs) in steps {
        let digest = blake3::hash(part.as_bytes());
        let mut key = blake3::Hasher::new();
        key.update(digest.as_bytes());
        for input in *inputs {
            key.update(out[*input].definition.expect("made").as_bytes());
        }
        let kind = if inputs.is_empty() { "source" } else { "exec" };
        let map = CacheMap {
            digest,
            inputs: vec![InputMap::default(); inputs.len()],
            persistent: true,
            parts: vec![("operation".into(), kind.into()), ("arg".into(), (*part).into())].into(),
        };
        out.push(VertexExplanation {
            vertex: (*name).into(),
            name: (*name).into(),
            map: Some(Arc::new(map)),
            ignore_cache: false,
            outcome: Outcome::Made,
            definition: Some(key.finalize()),
            content: None,
            inputs: inputs
                .iter()
                .map(|vertex| InputExplanation { vertex: *vertex, output: 0, content: None })
                .collect(),
            lookups: Vec::new(),
        });
    }
    out
}

/// Compares two builds; of the second, what the first had is cached.
fn compare(old: &[Made<'_>], new: &[Made<'_>]) -> Vec<String> {
    let (old, mut new) = (vertices(old), vertices(new));
    for vertex in &mut new {
        if old.iter().any(|other| other.definition == vertex.definition) {
            vertex.outcome = Outcome::Cached;
        }
    }
    let (before, after, missed) = (Graph::new(&old), Graph::new(&new), Missed::of(&new, &NoFacts));
    let comparison = Comparison::new(&after, &missed, Some(&before), &NoFacts);
    let say = |reason: &kiln_proto::explain::Reason| {
        let fields = [&reason.kind, &reason.step, &reason.name, &reason.before, &reason.after];
        fields.into_iter().filter(|field| !field.is_empty()).cloned().collect::<Vec<_>>().join(" ")
    };
    let line = |step: &kiln_proto::explain::Step| {
        format!("{}: {}", step.name, step.reasons.iter().map(say).collect::<Vec<_>>().join("; "))
    };
    comparison.steps().iter().map(line).collect()
}

const BASE: &[Made<'_>] = &[
    ("[1/4] FROM x", "x", &[]),
    ("[2/4] RUN a", "a", &[0]),
    ("[3/4] RUN b", "b", &[1]),
    ("[4/4] RUN c", "c", &[2]),
];

#[test]
fn a_change_is_followed_to_its_cause() {
    let new = [BASE[0], ("[2/4] RUN A", "A", &[0][..]), BASE[2], BASE[3]];
    assert_eq!(
        compare(BASE, &new),
        ["[2/4] RUN A: part command a A", "[3/4] RUN b: input [2/4] RUN A", "[4/4] RUN c: input [2/4] RUN A",]
    );
}

#[test]
fn another_base_that_is_known_is_still_the_cause() {
    let old = [BASE[0], BASE[1], BASE[2], BASE[3], ("[other 1/1] FROM y", "y", &[][..])];
    let new = [("[1/4] FROM y", "y", &[][..]), BASE[1], BASE[2], BASE[3]];
    let said = compare(&old, &new);
    assert_eq!(said[0], "[2/4] RUN a: part [1/4] FROM y command x y");
    assert_eq!(said[1], "[3/4] RUN b: input [2/4] RUN a");
}

#[test]
fn new_removed_and_moved_steps() {
    let new = [BASE[0], ("[2/5] RUN new", "new", &[0][..]), ("[3/5] RUN a", "a", &[1][..])];
    assert_eq!(compare(BASE, &new), ["[2/5] RUN new: never-built", "[3/5] RUN a: input [2/5] RUN new"]);
    let removed = [BASE[0], ("[2/3] RUN b", "b", &[0][..]), ("[3/3] RUN c", "c", &[1][..])];
    assert_eq!(
        compare(BASE, &removed),
        ["[2/3] RUN b: order stands on [2/4] RUN a [1/4] FROM x", "[3/3] RUN c: input [2/3] RUN b"]
    );
    let swapped = [
        BASE[0],
        ("[2/4] RUN b", "b", &[0][..]),
        ("[3/4] RUN a", "a", &[1][..]),
        ("[4/4] RUN c", "c", &[2][..]),
    ];
    assert_eq!(
        compare(BASE, &swapped),
        [
            "[2/4] RUN b: order stands on [2/4] RUN a [1/4] FROM x",
            "[3/4] RUN a: input [2/4] RUN b",
            "[4/4] RUN c: input [2/4] RUN b",
        ]
    );
}

#[test]
fn a_graph_is_read_as_it_was_written_and_nothing_else_is_one() {
    let graph = Graph::new(&vertices(BASE));
    let bytes = graph.encode_to_vec();
    let read = Graph::decode(&bytes[..]).expect("a graph");
    assert!(read.is_sound());
    assert_eq!(read, graph);
    assert_eq!((read.len(), read.persistent(), read.name(2), read.kind(2)), (4, 4, BASE[2].0, "exec"));
    assert_eq!(read.parts(3).collect::<Vec<_>>(), [("operation", "exec"), ("arg", "c")]);
    assert_eq!(read.inputs(3).map(|input| input.vertex).collect::<Vec<_>>(), [2]);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut other = bytes.clone();
            other[at] ^= 1 << bit;
            // Whatever is taken for a graph can be read to its end.
            if let Some(graph) = Graph::decode(&other[..]).ok().filter(Graph::is_sound) {
                for vertex in 0..graph.len() {
                    let _ = (graph.name(vertex), graph.kind(vertex), graph.op(vertex), graph.is_done(vertex));
                    assert!(graph.parts(vertex).count() < 100);
                    assert!(graph.inputs(vertex).all(|input| input.paths().count() < 100));
                }
                let _ = (graph.sketch(), graph.read_contents().count());
            }
        }
    }
}

#[test]
fn what_was_not_looked_at_is_as_it_was() {
    let first = vertices(BASE);
    let key = |text: &str| Some(blake3::hash(text.as_bytes()));
    let (mut known, mut cached) = (first.clone(), first);
    for vertex in &mut known {
        vertex.content = key(&vertex.name);
        vertex.inputs.iter_mut().for_each(|input| input.content = key("read"));
    }
    // The same but for one step in front, so that nothing stands where it stood.
    for vertex in &mut cached {
        vertex.outcome = Outcome::NotReached;
        vertex.inputs.iter_mut().for_each(|input| input.vertex += 1);
    }
    cached.splice(0..0, vertices(&[("[0/4] FROM z", "z", &[])]));
    cached[0].outcome = Outcome::Failed;
    let (known, mut graph) = (Graph::new(&known), Graph::new(&cached));
    assert_eq!(graph.read_contents().count(), 0);
    graph.carry_over(&known);
    assert_eq!(graph.read_contents().collect::<Vec<_>>(), known.read_contents().collect::<Vec<_>>());
    assert_eq!((0..5).map(|at| graph.is_done(at)).collect::<Vec<_>>(), [false, true, true, true, true]);
    assert!((1..5).all(|at| graph.is_like(at, &known, at - 1)));
    let mut again = Graph::new(&vertices(BASE));
    again.carry_over(&known);
    assert_eq!(again, known, "a build that changes nothing leaves nothing new");
}

#[test]
fn what_was_the_same_and_not_found_is_called_lost() {
    let mut new = vertices(BASE);
    new.truncate(2);
    new[0].outcome = Outcome::Cached;
    let (before, after, missed) = (Graph::new(&vertices(BASE)), Graph::new(&new), Missed::of(&new, &NoFacts));
    let steps = Comparison::new(&after, &missed, Some(&before), &NoFacts).steps();
    assert_eq!((steps.len(), steps[0].reasons[0].kind.as_str()), (1, "lost"));
}

#[test]
fn any_number_of_values_is_compared_and_some_are_told() {
    const MANY: usize = 100_000;
    let graph = |version: &str| {
        let mut made = vertices(BASE);
        let mut map = (**made[1].map.as_ref().expect("a map")).clone();
        map.digest = blake3::hash(version.as_bytes());
        let mut parts = map.parts.list();
        parts.extend((0..MANY).map(|at| ("option".into(), format!("{version} {at}"))));
        parts.extend((1..MANY).map(|_| ("arg".into(), "same".into())));
        parts.push(("arg".into(), version.into()));
        parts.extend((0..MANY).map(|at| (format!("env {at}"), version.into())));
        map.parts = parts.into();
        made[1].map = Some(Arc::new(map));
        made[1].definition = Some(blake3::hash(version.as_bytes()));
        (Graph::new(&made), Missed::of(&made, &NoFacts))
    };
    let ((before, _), (after, missed)) = (graph("old"), graph("new"));
    let steps = Comparison::new(&after, &missed, Some(&before), &NoFacts).steps();
    let reasons = &steps.iter().find(|step| step.name == BASE[1].0).expect("it is explained").reasons;
    assert!(reasons.len() < 100, "{} reasons", reasons.len());
    assert!(reasons.iter().all(|reason| reason.before.len().max(reason.after.len()) < 5000));
    let told = |name: &str| reasons.iter().find(|reason| reason.name == name).expect(name);
    assert!(told("option").before.starts_with("old 0, old 1, ") && told("option").before.ends_with('…'));
    assert!(told("command").before.starts_with('…') && told("command").before.ends_with("same old"));
    assert!(told("command").after.ends_with("same new"));
}

#[test]
fn a_step_that_another_build_was_making_says_so() {
    let (old, mut new) = (vertices(BASE), vertices(BASE));
    for at in [0, 1, 3] {
        new[at].outcome = Outcome::Cached;
    }
    new[2].lookups =
        vec![Lookup { kind: KeyKind::Definition, key: blake3::hash(b"key"), found: Found::InFlight }];
    let (before, after, missed) = (Graph::new(&old), Graph::new(&new), Missed::of(&new, &NoFacts));
    let steps = Comparison::new(&after, &missed, Some(&before), &NoFacts).steps();
    let step = steps.iter().find(|step| step.name == BASE[2].0).expect("it was not cached");
    assert_eq!(step.reasons.iter().map(|reason| &*reason.kind).collect::<Vec<_>>(), ["shared"]);
}
