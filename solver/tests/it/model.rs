//! Random graphs, random changes, builds at the same time and builds that give up, held against
//! a naive evaluator that knows no cache.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use kiln_proto::pb;
use proptest::prelude::*;

use crate::world::{Files, Graph, Recipe, World, recipe};

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
}

fn node(index: usize) -> impl Strategy<Value = Node> {
    let inputs = prop::collection::vec(0..index.max(1), 0..=index.min(3));
    let flags = (any::<bool>(), prop::bool::weighted(0.3), prop::bool::weighted(0.1));
    (inputs, prop::collection::vec(any::<bool>(), 3), flags, 0..Node::VERSIONS, 0..4usize).prop_map(
        move |(inputs, narrow, (coarse, ephemeral, ignore_cache), version, yields)| Node {
            ephemeral: ephemeral && inputs.is_empty(),
            inputs,
            narrow,
            coarse,
            version,
            yields,
            ignore_cache,
            fragile: false,
            io: false,
        },
    )
}

fn nodes() -> impl Strategy<Value = Vec<Node>> {
    (2..10usize).prop_flat_map(|count| (0..count).map(node).collect::<Vec<_>>())
}

#[derive(Debug, Clone)]
struct Round {
    /// New versions of some nodes.
    changes: Vec<(prop::sample::Index, u8)>,
    /// Roots that are built at the same time, and which of them give up after how many turns.
    builds: Vec<(prop::sample::Index, Option<usize>)>,
}

fn round() -> impl Strategy<Value = Round> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), 0..Node::VERSIONS), 0..3);
    let builds =
        prop::collection::vec((any::<prop::sample::Index>(), prop::option::weighted(0.3, 0..40usize)), 1..4);
    (changes, builds).prop_map(|(changes, builds)| Round { changes, builds })
}

/// The file that readers of a part read.
const PART: &str = "/part";

pub(crate) fn node_recipe(index: usize, node: &Node, session: usize) -> Recipe {
    let identity = if node.ephemeral { format!("session {session}") } else { String::new() };
    let text = format!("{index} v{} {identity}", node.version);
    let mut made = recipe(&text).yields(node.yields);
    for (input, narrow) in node.narrow.iter().enumerate().take(node.inputs.len()) {
        if *narrow {
            made = made.reads(input, PART);
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

pub(crate) fn below(nodes: &[Node], root: usize) -> BTreeSet<usize> {
    let mut seen = BTreeSet::from([root]);
    let mut worklist = vec![root];
    while let Some(at) = worklist.pop() {
        worklist.extend(nodes[at].inputs.iter().filter(|&&input| seen.insert(input)));
    }
    seen
}

async fn play(mut nodes: Vec<Node>, rounds: Vec<Round>) -> Result<(), TestCaseError> {
    let world = World::new();
    let solver = world.limited_solver(2);
    for (session, round) in rounds.iter().enumerate() {
        for (which, version) in &round.changes {
            let at = which.index(nodes.len());
            nodes[at].version = *version;
        }
        for (i, node) in nodes.iter().enumerate() {
            world.set(&name(i), node_recipe(i, node, session));
        }
        let expected = evaluate(&nodes);
        let mut wanted = BTreeSet::new();
        let builds: Vec<_> = round
            .builds
            .iter()
            .map(|(which, patience)| {
                let root = which.index(nodes.len());
                wanted.extend(below(&nodes, root));
                let (build, record) = world.build(&solver);
                let definition = definition(&nodes, root);
                let solving = async move {
                    let solving = build.solve(&definition);
                    let patience = async {
                        match patience {
                            Some(turns) => {
                                for _ in 0..*turns {
                                    tokio::task::yield_now().await;
                                }
                            }
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        result = solving => Some(result),
                        () = patience => None,
                    }
                };
                async move { (root, solving.await, record) }
            })
            .collect();
        let settled = tokio::time::timeout(Duration::from_secs(20), futures::future::join_all(builds)).await;
        let Ok(settled) = settled else {
            return Err(TestCaseError::fail(format!(
                "a build hangs in round {session}; running: {:?}",
                world.running()
            )));
        };
        let gave_up = settled.iter().any(|(_, result, _)| result.is_none());
        for (root, result, _) in &settled {
            if let Some(result) = result {
                let tree = result.as_ref().map_err(|e| TestCaseError::fail(e.to_string()))?.as_ref();
                prop_assert_eq!(
                    Some(&*tree.expect("not scratch").files),
                    expected[*root].as_ref(),
                    "node {}",
                    root
                );
            }
        }
        solver.idle().await;
        prop_assert!(world.running().is_empty());

        // Nothing ran that nobody wanted; and nothing twice, unless it was forced or given up.
        let mut counts: HashMap<String, usize> = HashMap::new();
        for run in world.take_runs() {
            *counts.entry(run).or_default() += 1;
        }
        for (i, node) in nodes.iter().enumerate() {
            let count = counts.get(&name(i)).copied().unwrap_or(0);
            prop_assert!(count == 0 || wanted.contains(&i), "{} ran, but nothing needs it", i);
            let forced = below(&nodes, i).iter().any(|&input| nodes[input].ignore_cache);
            if !gave_up && !forced && !node.ephemeral {
                prop_assert!(count <= 1, "node {} ran {} times", i, count);
            }
        }
        // Every vertex that was shown as running was also shown as ended.
        for (_, _, record) in &settled {
            for i in 0..nodes.len() {
                prop_assert!(
                    !record.shows_running(&name(i)),
                    "node {} is shown as running: {:?}",
                    i,
                    record.words(&name(i))
                );
            }
        }
        // Once more: only forced vertices and sources without identity run.
        for (which, _) in &round.builds {
            let root = which.index(nodes.len());
            world
                .run(&solver, &definition(&nodes, root))
                .await
                .map_err(|e| TestCaseError::fail(e.to_string()))?;
            world.take_runs();
            let files = world
                .run(&solver, &definition(&nodes, root))
                .await
                .map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(Some(&files), expected[root].as_ref());
            for run in world.take_runs() {
                let at: usize = run[1..].parse().expect("a node");
                let allowed = nodes[at].ephemeral || nodes[at].ignore_cache;
                prop_assert!(allowed, "{} ran again though nothing changed", run);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn builds_agree_with_a_naive_evaluator(nodes in nodes(), rounds in prop::collection::vec(round(), 1..4)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(play(nodes, rounds))?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn so_they_do_on_several_threads(nodes in nodes(), rounds in prop::collection::vec(round(), 1..4)) {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(3).enable_all().build().expect("a runtime").block_on(play(nodes, rounds))?;
    }
}
