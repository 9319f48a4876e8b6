//! Thousands of short lives of a daemon, each the same whenever its seed is: graphs that change, builds at the same
//! time, failing steps, builds that give up, and crashes at any moment. What comes out, what ran, what was found and
//! what is remembered afterwards must be what the reference says.

use std::collections::{HashMap, HashSet};
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kiln_cache::KeyRecord;
use kiln_solver::Solver;
use kiln_solver::explain::{Found, KeyKind, Outcome, VertexExplanation};
use tokio::runtime::{Builder, Runtime};

use crate::model::{Node, Random, definition, name, node_recipe};
use crate::reference::{Expected, Reference, Symbol, Way};
use crate::world::{Files, OpenKeys, Record, Tree, World};

const CASES: u64 = 10_000;

/// Lives on several threads, which no seed makes the same again.
const THREADED_CASES: u64 = 300;

/// A build of a few nodes that takes so many turns never ends.
const HANGS: usize = 100_000;

/// One build, or as much of it as its patience lets happen.
struct Wanted {
    root: usize,
    patience: Option<usize>,
}

struct Settled {
    /// `None`: it gave up.
    result: Option<Result<Files, String>>,
    explained: Vec<VertexExplanation>,
}

/// Builds that were started at the same time, and what came of them.
struct Session<'a> {
    wanted: &'a [Wanted],
    expected: Vec<Expected>,
    /// `None`: the process crashed before all were done.
    settled: Option<Vec<Settled>>,
    records: Vec<Arc<Record>>,
    runs: HashMap<usize, usize>,
}

impl Session<'_> {
    fn undisturbed(&self) -> bool {
        let done = |settled: &Settled| matches!(settled.result, Some(Ok(_)));
        self.settled.as_ref().is_some_and(|settled| settled.iter().all(done))
    }

    /// In how many of the builds a vertex is to run: at least and at most.
    fn runs_of(&self, at: usize) -> (usize, usize) {
        let runs = |expected: &&Expected| matches!(expected.ways.get(&at), Some(Way::Runs | Way::Fails));
        let least =
            self.expected.iter().filter(runs).filter(|expected| expected.needed.contains(&at)).count();
        (least, self.expected.iter().filter(runs).count())
    }
}

/// What was checked, to see that it says something.
#[derive(Debug, Default)]
struct Tally {
    undisturbed: usize,
    /// Of these, the ones in which it is certain what runs.
    exact: usize,
    ran: usize,
    found: [usize; 3],
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.undisturbed += other.undisturbed;
        self.exact += other.exact;
        self.ran += other.ran;
        for (here, there) in self.found.iter_mut().zip(other.found) {
            *here += there;
        }
    }
}

/// Which key of the solver stands for which symbol; each for one and no other.
#[derive(Default)]
struct Dictionary {
    keys: HashMap<Symbol, [u8; 32]>,
    symbols: HashMap<[u8; 32], Symbol>,
}

impl Dictionary {
    fn learn(&mut self, symbol: Symbol, key: [u8; 32]) -> bool {
        *self.keys.entry(symbol).or_insert(key) == key && *self.symbols.entry(key).or_insert(symbol) == symbol
    }
}

type Process = (Runtime, Solver<Tree>);

struct Life {
    seed: u64,
    threaded: bool,
    keys: Arc<OpenKeys>,
    world: Arc<World>,
    nodes: Vec<Node>,
    reference: Reference,
    dictionary: Dictionary,
    /// What is in `keys` and can be loaded.
    known: HashSet<Symbol>,
    tally: Tally,
}

impl Life {
    fn new(seed: u64, threaded: bool, nodes: Vec<Node>) -> Self {
        let keys = Arc::new(OpenKeys::default());
        Self {
            seed,
            threaded,
            world: World::with_keys(keys.clone()),
            keys,
            reference: Reference::new(&nodes),
            nodes,
            dictionary: Dictionary::default(),
            known: HashSet::new(),
            tally: Tally::default(),
        }
    }

    /// A process of its own, as it were.
    fn process(&self) -> Process {
        let mut runtime = match self.threaded {
            true => Builder::new_multi_thread(),
            false => Builder::new_current_thread(),
        };
        let runtime = runtime.worker_threads(3).enable_time().build().expect("a runtime");
        (runtime, self.world.limited_solver(2))
    }

    /// Builds everything where nothing is known and nothing fails: tells which key is which.
    fn learn_keys(&mut self, session: usize) {
        let seed = self.seed;
        let keys = Arc::new(OpenKeys::default());
        let world = World::with_keys(keys.clone());
        let sound = |node: &Node| Node { fragile: false, ignore_cache: false, yields: 0, ..node.clone() };
        let mut nodes: Vec<Node> = self.nodes.iter().map(sound).collect();
        for (at, node) in nodes.iter().enumerate() {
            world.set(&name(at), node_recipe(at, node, session));
        }
        let all = nodes.len();
        nodes.push(Node {
            inputs: (0..all).collect(),
            narrow: vec![false; all],
            ephemeral: false,
            ..nodes[0].clone()
        });
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let explained = runtime.block_on(async {
            let solver = world.solver();
            let (build, _) = world.build(&solver);
            build.solve(&definition(&nodes, all)).await.expect("nothing fails");
            let explained = build.explain().await;
            drop(build);
            solver.idle().await;
            explained
        });
        let mut recorded: HashMap<Arc<str>, HashSet<[u8; 32]>> = HashMap::new();
        for (key, record) in keys.records() {
            recorded.entry(record.name).or_default().insert(key);
        }
        for (at, keys) in self.reference.keys.iter().enumerate() {
            let explained = explained.iter().find(|vertex| *vertex.name == *name(at)).expect("explained");
            let mut recorded = recorded.remove(&*name(at)).unwrap_or_default();
            let told = [
                (keys.definition, explained.definition),
                (keys.distinct_content(), explained.content.filter(|_| keys.distinct_content().is_some())),
            ];
            for (symbol, key) in told {
                let key = key.map(|key| *key.as_bytes());
                assert_eq!(
                    symbol.is_some(),
                    key.is_some(),
                    "seed {seed}: keys of {at}: {keys:?}, {explained:?}"
                );
                if let (Some(symbol), Some(key)) = (symbol, key) {
                    assert!(recorded.remove(&key), "seed {seed}: {at} is not recorded under a key: {keys:?}");
                    assert!(self.dictionary.learn(symbol, key), "seed {seed}: keys of {at} are mixed up");
                }
            }
            // What is left can only be the output key.
            assert_eq!(recorded.len(), usize::from(keys.output.is_some()), "seed {seed}: output key of {at}");
            if let (Some(symbol), Some(key)) = (keys.output, recorded.into_iter().next()) {
                assert!(self.dictionary.learn(symbol, key), "seed {seed}: output keys of {at} are mixed up");
            }
        }
    }

    /// Builds at the same time; a crash comes after so many turns. Answers the process if it lives on.
    fn session(&mut self, process: Process, wanted: &[Wanted], crash: Option<usize>) -> Option<Process> {
        let (runtime, solver) = &process;
        let mut records = Vec::new();
        let settled = runtime.block_on(async {
            let builds: Vec<_> = wanted
                .iter()
                .map(|wanted| {
                    let (build, record) = self.world.build(solver);
                    records.push(record);
                    let definition = definition(&self.nodes, wanted.root);
                    async move {
                        let solving = async { Some(build.solve(&definition).await) };
                        let result = tokio::select! {
                            biased;
                            result = solving => result,
                            () = turns(wanted.patience) => None,
                        };
                        let files = |tree: Option<Tree>| (*tree.expect("not scratch").files).clone();
                        let result = result.map(|result| result.map(files).map_err(|e| e.to_string()));
                        Settled { result, explained: build.explain().await }
                    }
                })
                .collect();
            tokio::select! {
                biased;
                settled = futures::future::join_all(builds) => {
                    solver.idle().await;
                    Some(settled)
                }
                () = turns(crash) => None,
                () = self.hangs() => panic!("seed {}: running for ever: {:?}", self.seed, self.world.running()),
            }
        });
        let process = settled.is_some().then_some(process);
        let expected = wanted.iter().map(|wanted| self.reference.expect(wanted.root, &self.known)).collect();
        let mut runs = HashMap::new();
        for run in self.world.take_runs() {
            *runs.entry(run[1..].parse().expect("a node")).or_default() += 1;
        }
        let session = Session { wanted, expected, settled, records, runs };
        self.check(&session);
        process
    }

    async fn hangs(&self) {
        match self.threaded {
            true => tokio::time::sleep(Duration::from_secs(20)).await,
            false => turns(Some(HANGS)).await,
        }
    }

    /// What is remembered, without records of results that are gone: those are found out when somebody asks.
    fn records(&self) -> HashMap<[u8; 32], KeyRecord> {
        let mut records = self.keys.records();
        records.retain(|_, record| record.results.iter().all(|id| self.world.files(id).is_some()));
        records
    }

    /// Some results are collected.
    fn collect(&mut self, random: &mut Random) {
        for _ in 0..1 + random.below(3) {
            self.world.collect(random.below(usize::MAX));
        }
        let records = self.records();
        self.known.retain(|symbol| records.contains_key(&self.dictionary.keys[symbol]));
    }

    fn check(&mut self, session: &Session<'_>) {
        self.check_results(session);
        self.check_runs(session);
        if let (true, [expected], Some([settled])) =
            (session.undisturbed(), &*session.expected, session.settled.as_deref())
        {
            self.check_ways(expected, settled);
        }
        self.check_keys(session);
    }

    fn check_results(&self, session: &Session<'_>) {
        let seed = self.seed;
        for (Wanted { root, .. }, settled) in session.wanted.iter().zip(session.settled.iter().flatten()) {
            match (&settled.result, &self.reference.results[*root]) {
                (None, _) => {}
                (Some(Ok(files)), Some(expected)) => assert_eq!(files, expected, "seed {seed}, node {root}"),
                (Some(Err(text)), None) => assert_eq!(text, "broken", "seed {seed}, node {root}"),
                (Some(result), expected) => panic!("seed {seed}, node {root}: {result:?}, not {expected:?}"),
            }
        }
        assert!(self.world.running().is_empty(), "seed {seed}: something still runs");
        if session.settled.is_some() {
            for (record, at) in
                session.records.iter().flat_map(|record| (0..self.nodes.len()).map(move |at| (record, at)))
            {
                let words = || record.words(&name(at));
                assert!(
                    !record.shows_running(&name(at)),
                    "seed {seed}: {at} is shown as running: {:?}",
                    words()
                );
            }
        }
    }

    fn check_runs(&self, session: &Session<'_>) {
        let seed = self.seed;
        for at in 0..self.nodes.len() {
            let count = session.runs.get(&at).copied().unwrap_or(0);
            let (least, most) = session.runs_of(at);
            assert!(count == 0 || most > 0, "seed {seed}: {at} ran, but nothing needs it to");
            if session.undisturbed() {
                let (least, most) = match self.reference.shared(at) {
                    true => (least.min(1), most.min(1)),
                    false if self.nodes[at].ephemeral || self.nodes[at].ignore_cache => (least, most),
                    // One build may have recorded its output key when the next one comes.
                    false => (least.min(1), most),
                };
                assert!(
                    (least..=most).contains(&count),
                    "seed {seed}: {at} ran {count} times, not {least} to {most}"
                );
            }
        }
    }

    /// Each vertex of an undisturbed build by itself came by its result as it had to.
    fn check_ways(&mut self, expected: &Expected, settled: &Settled) {
        let seed = self.seed;
        self.tally.undisturbed += 1;
        let certain = |(at, way): (&usize, &Way)| *way != Way::Runs || expected.needed.contains(at);
        self.tally.exact += usize::from(expected.ways.iter().all(certain));
        for at in 0..self.nodes.len() {
            let explained = settled.explained.iter().find(|vertex| *vertex.name == *name(at));
            let way = explained.and_then(way);
            let promised = expected.ways.get(&at).copied();
            let fits = way == promised || (way.is_none() && !expected.needed.contains(&at));
            assert!(fits, "seed {seed}: {at} should be {promised:?}, not {way:?}: {explained:?}");
            match way {
                Some(Way::Runs) => self.tally.ran += 1,
                Some(Way::Found(kind)) => self.tally.found[kind as usize] += 1,
                _ => {}
            }
        }
    }

    /// Nothing was forgotten, what should be was remembered, and nothing else.
    fn check_keys(&mut self, session: &Session<'_>) {
        let seed = self.seed;
        let records = self.records();
        let known = |key| self.dictionary.symbols.get(key).copied();
        let after: Option<HashSet<Symbol>> = records.keys().map(known).collect();
        let after = after
            .unwrap_or_else(|| panic!("seed {seed}: something is remembered under a key that means nothing"));
        assert!(self.known.is_subset(&after), "seed {seed}: something was forgotten");

        let mut possible = HashSet::new();
        let undisturbed = session.undisturbed();
        for expected in &session.expected {
            for (&at, &way) in &expected.ways {
                let added = self.reference.adds(at, way);
                if undisturbed && expected.needed.contains(&at) {
                    let complete = added.iter().all(|key| after.contains(key));
                    assert!(complete, "seed {seed}: {at} ({way:?}) is not remembered under each of its keys");
                }
                possible.extend(added);
            }
        }
        let extra = after.difference(&self.known).find(|key| !possible.contains(*key));
        let vertex = |key: &Symbol| {
            self.reference.keys.iter().position(|keys| keys.recorded().any(|other| other == *key))
        };
        assert!(extra.is_none(), "seed {seed}: {:?} is remembered without reason", extra.map(vertex));

        for (at, keys) in self.reference.keys.iter().enumerate() {
            for record in keys.recorded().filter_map(|key| records.get(self.dictionary.keys.get(&key)?)) {
                let files = record.results.first().and_then(|id| self.world.files(id));
                assert_eq!(files.as_deref(), Some(&self.reference.made[at]), "seed {seed}: a record of {at}");
            }
            // Nobody hears of a result before it is recorded, unless making it took no waiting at all. What a crash
            // may take is the output key, which is worked out later.
            let crashed = session.settled.is_none();
            let completed =
                |record: &Arc<Record>| record.words(&name(at)).iter().any(|word| word == "completed");
            if !(crashed && self.nodes[at].io && self.nodes[at].yields == 0)
                && session.records.iter().any(completed)
            {
                let mut lasting = keys.recorded().filter(|key| !crashed || Some(*key) != keys.output);
                assert!(
                    lasting.all(|key| after.contains(&key)),
                    "seed {seed}: {at} was made, but not remembered"
                );
            }
        }
        self.known = after;
    }
}

/// How a vertex came by its result; nothing if it has none.
fn way(vertex: &VertexExplanation) -> Option<Way> {
    let found = |kind: Option<KeyKind>| Way::Found(kind.expect("found by some key"));
    let hit = vertex.lookups.iter().rfind(|lookup| lookup.found == Found::Record);
    match vertex.outcome {
        Outcome::Made => Some(Way::Runs),
        Outcome::Cached => Some(found(hit.map(|lookup| lookup.kind))),
        Outcome::Failed => Some(Way::Fails),
        Outcome::NotReached | Outcome::Stopped => None,
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

fn live(seed: u64, threaded: bool) -> Tally {
    let mut random = Random(seed);
    let mut life = Life::new(seed, threaded, random.nodes());
    life.world.delays.store(random.below(5).saturating_sub(1), Ordering::Relaxed);
    let mut process = life.process();
    for session in 0..1 + random.below(4) {
        for _ in 0..random.below(3) {
            let at = random.below(life.nodes.len());
            life.nodes[at].version = random.version();
        }
        for (at, node) in life.nodes.iter().enumerate() {
            life.world.set(&name(at), node_recipe(at, node, session));
        }
        if random.chance(20) {
            life.collect(&mut random);
        }
        life.reference = Reference::new(&life.nodes);
        life.learn_keys(session);

        let count = if random.chance(40) { 1 } else { 2 + random.below(2) };
        let wanted: Vec<Wanted> = (0..count)
            .map(|_| Wanted {
                root: random.below(life.nodes.len()),
                patience: random.chance(15).then(|| random.below(40)),
            })
            .collect();
        let crash = random.chance(25).then(|| random.below(80));
        let lives_on = life.session(process, &wanted, crash).filter(|_| random.chance(70));
        process = lives_on.unwrap_or_else(|| life.process());
        // Whatever happened: now each by itself.
        for Wanted { root, .. } in wanted {
            let alone = [Wanted { root, patience: None }];
            process = life.session(process, &alone, None).expect("no crash");
        }
    }
    life.tally
}

fn lives(seeds: impl Iterator<Item = u64>, threaded: bool) -> Tally {
    seeds.fold(Tally::default(), |mut tally, seed| {
        tally += live(seed, threaded);
        tally
    })
}

#[test]
fn ten_thousand_lives_agree_with_the_reference() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let lives: Vec<_> = (0..threads)
            .map(|first| scope.spawn(move || lives((first..CASES).step_by(threads as usize), false)))
            .collect();
        for lives in lives {
            tally += lives.join().expect("as the reference says");
        }
    });
    assert!(tally.exact * 1000 > tally.undisturbed * 999, "{tally:?}");
    assert!(tally.found.iter().all(|&found| found > 1000), "{tally:?}");
}

#[test]
fn so_they_do_on_several_threads() {
    lives(CASES..CASES + THREADED_CASES, true);
}
