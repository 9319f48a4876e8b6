//! Thousands of short lives of a daemon, each the same whenever its seed is: graphs that change, builds at the same
//! time, failing steps, builds that give up, and crashes at any moment, held against an evaluator that knows no cache.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::{Node, below, definition, evaluate, name, node_recipe};
use crate::world::{Files, Record, World};

const CASES: u64 = 10_000;

/// A build of a few nodes that takes so many turns never ends.
const HANGS: usize = 100_000;

/// SplitMix64: the same everywhere, for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn version(&mut self) -> u8 {
        u8::try_from(self.below(Node::VERSIONS.into())).unwrap()
    }

    fn nodes(&mut self) -> Vec<Node> {
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

/// One build, or as much of it as its patience lets happen.
struct Wanted {
    root: usize,
    patience: Option<usize>,
}

struct Settled {
    root: usize,
    /// `None`: it gave up.
    result: Option<Result<Files, String>>,
    record: Arc<Record>,
}

struct Life {
    seed: u64,
    world: Arc<World>,
    nodes: Vec<Node>,
}

impl Life {
    /// Runs builds at the same time in a new process, as it were; `None` if that crashes after so many turns before
    /// all are done. The records tell in either case.
    fn process(&self, wanted: &[Wanted], crash: Option<usize>) -> (Option<Vec<Settled>>, Vec<Arc<Record>>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let mut records = Vec::new();
        let settled = runtime.block_on(async {
            let solver = self.world.limited_solver(2);
            let builds: Vec<_> = wanted
                .iter()
                .map(|wanted| {
                    let (build, record) = self.world.build(&solver);
                    records.push(record.clone());
                    let definition = definition(&self.nodes, wanted.root);
                    async move {
                        let solving = async { Some(build.solve(&definition).await) };
                        let result = tokio::select! {
                            result = solving => result,
                            () = turns(wanted.patience) => None,
                        };
                        let files =
                            |tree: Option<crate::world::Tree>| (*tree.expect("not scratch").files).clone();
                        let result = result.map(|result| result.map(files).map_err(|e| e.to_string()));
                        Settled { root: wanted.root, result, record }
                    }
                })
                .collect();
            tokio::select! {
                settled = futures::future::join_all(builds) => {
                    solver.idle().await;
                    Some(settled)
                }
                () = turns(crash) => None,
                () = turns(Some(HANGS)) => panic!("seed {}: running for ever: {:?}", self.seed, self.world.running()),
            }
        });
        (settled, records)
    }

    /// True if the node, or one below it, runs in every build.
    fn forced(&self, node: usize) -> bool {
        below(&self.nodes, node).iter().any(|&at| self.nodes[at].ignore_cache)
    }

    fn check(&self, settled: &[Settled], runs: &[String]) {
        let seed = self.seed;
        let expected = evaluate(&self.nodes);
        for Settled { root, result, .. } in settled {
            match (result, &expected[*root]) {
                (None, _) => {}
                (Some(Ok(files)), Some(expected)) => assert_eq!(files, expected, "seed {seed}, node {root}"),
                (Some(Err(text)), None) => assert_eq!(text, "broken", "seed {seed}, node {root}"),
                (Some(result), expected) => panic!("seed {seed}, node {root}: {result:?}, not {expected:?}"),
            }
        }
        assert!(self.world.running().is_empty(), "seed {seed}: something still runs");
        let wanted: BTreeSet<usize> =
            settled.iter().flat_map(|settled| below(&self.nodes, settled.root)).collect();
        let undisturbed = settled.iter().all(|settled| matches!(settled.result, Some(Ok(_))));
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for run in runs {
            *counts.entry(run).or_default() += 1;
        }
        for (i, node) in self.nodes.iter().enumerate() {
            let count = counts.get(&*name(i)).copied().unwrap_or(0);
            assert!(count == 0 || wanted.contains(&i), "seed {seed}: {i} ran, but nothing needs it");
            if undisturbed && !self.forced(i) && !node.ephemeral {
                assert!(count <= 1, "seed {seed}: {i} ran {count} times");
            }
        }
        for Settled { record, .. } in settled {
            for i in 0..self.nodes.len() {
                assert!(
                    !record.shows_running(&name(i)),
                    "seed {seed}: {i} is shown as running: {:?}",
                    record.words(&name(i))
                );
            }
        }
    }

    /// What `record`s say was made, and what may therefore not be made again.
    fn made(&self, records: &[Arc<Record>]) -> BTreeSet<usize> {
        let lasts = |i: &usize| !self.forced(*i) && !self.nodes[*i].ephemeral && !self.nodes[*i].io;
        let made = |i: &usize| {
            let completed =
                |record: &Arc<Record>| record.words(&name(*i)).iter().any(|word| word == "completed");
            records.iter().any(completed)
        };
        (0..self.nodes.len()).filter(lasts).filter(made).collect()
    }

    /// Builds the roots once more, with nothing changed: nothing in `made` may run.
    fn again(&self, wanted: &[Wanted], made: &BTreeSet<usize>) {
        for &Wanted { root, .. } in wanted {
            let (settled, _) = self.process(&[Wanted { root, patience: None }], None);
            let runs = self.world.take_runs();
            self.check(&settled.expect("no crash"), &runs);
            for run in runs {
                let at: usize = run[1..].parse().expect("a node");
                assert!(!made.contains(&at), "seed {}: {run} was made before and ran again", self.seed);
            }
        }
    }
}

async fn turns(count: Option<usize>) {
    match count {
        Some(count) => {
            for _ in 0..count {
                tokio::task::yield_now().await;
            }
        }
        None => std::future::pending().await,
    }
}

fn live(seed: u64) {
    let mut random = Random(seed);
    let mut life = Life { seed, world: World::new(), nodes: random.nodes() };
    for session in 0..1 + random.below(3) {
        for _ in 0..random.below(3) {
            let at = random.below(life.nodes.len());
            life.nodes[at].version = random.version();
        }
        for (i, node) in life.nodes.iter().enumerate() {
            life.world.set(&name(i), node_recipe(i, node, session));
        }
        let wanted: Vec<Wanted> = (0..1 + random.below(3))
            .map(|_| Wanted {
                root: random.below(life.nodes.len()),
                patience: random.chance(25).then(|| random.below(40)),
            })
            .collect();
        let crash = random.chance(30).then(|| random.below(60));
        let (settled, records) = life.process(&wanted, crash);
        let runs = life.world.take_runs();
        let made = life.made(&records);
        match settled {
            Some(settled) => life.check(&settled, &runs),
            // What was cut off is gone with the process, but not what was done.
            None => assert!(life.world.running().is_empty(), "seed {seed}"),
        }
        life.again(&wanted, &made);
        let (_, records) = life.process(&wanted, None);
        life.world.take_runs();
        life.again(&wanted, &life.made(&records));
    }
}

#[test]
fn ten_thousand_lives_agree_with_a_naive_evaluator() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
    std::thread::scope(|scope| {
        for first in 0..threads {
            scope.spawn(move || (first..CASES).step_by(threads as usize).for_each(live));
        }
    });
}
