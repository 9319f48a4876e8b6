//! The solver alone: graphs of fake operations over the real key store, new and then cached. Needs no root.
//!
//! `cargo bench --workspace --bench graphs`. Each graph runs in a process of its own, so that memory is its own.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use kiln_cache::{Store, StoreOptions};
use kiln_proto::{llb, pb};
use kiln_solver::op::{
    CacheMap, ContentQuery, Failure, Key, Op, OpClass, OpContext, OpError, OpFactory, OpVertex, Parts,
    ResultStore,
};
use kiln_solver::progress::{Event, ProgressSink};
use kiln_solver::{BuildOptions, Solver, SolverOptions};

/// As in the daemon.
#[global_allocator]
static ALLOCATOR: kiln_alloc::Allocator = kiln_alloc::Allocator;

const ROUNDS: usize = 5;
const SIZES: [usize; 2] = [10_000, 100_000];
const SHAPES: [&str; 4] = ["chain", "wide", "grid", "random"];

/// Set for the process that runs one graph.
const CHILD: &str = "KILN_BENCH_GRAPH";

fn main() {
    if let Ok(what) = std::env::var(CHILD) {
        let (shape, count) = what.split_once(' ').expect("SHAPE COUNT");
        return child(shape, count.parse().expect("a count"));
    }
    println!("{:<8} {:>9} {:>10} {:>10} {:>14}", "graph", "vertices", "new ms", "cached ms", "bytes/vertex");
    for shape in SHAPES {
        // In turn: what else the machine does meets both.
        let rounds: Vec<_> = (0..ROUNDS).map(|_| SIZES.map(|size| run(shape, size))).collect();
        for (at, size) in SIZES.into_iter().enumerate() {
            report(shape, size, rounds.iter().map(|round| round[at]).collect());
        }
        let times = median(rounds.iter().map(|[small, large]| large[0] / small[0]).collect());
        println!("{shape:<8} 100,000 against 10,000 vertices: new {times:.1} times as long");
    }
    report("chain", 1_000_000, vec![run("chain", 1_000_000)]);
}

/// Runs a graph in a process of its own: milliseconds of the first and of the cached solve, bytes for each vertex.
fn run(shape: &str, count: usize) -> [f64; 3] {
    let program = std::env::current_exe().expect("this program");
    let output = Command::new(program).env(CHILD, format!("{shape} {count}")).output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().expect("three numbers")
}

/// Prints the median of each number.
fn report(shape: &str, count: usize, runs: Vec<[f64; 3]>) {
    let [new, cached, bytes] = [0, 1, 2].map(|at| median(runs.iter().map(|run| run[at]).collect()));
    println!("{shape:<8} {count:>9} {new:>10.1} {cached:>10.1} {bytes:>14.0}");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn child(shape: &str, count: usize) {
    let definition = definition(shape, count);
    let dir = tempfile::tempdir().expect("temporary directory");
    let store = Store::open(dir.path(), StoreOptions::default()).expect("store");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    let before = memory("VmRSS:");
    // So that the peak is that of the solve.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let new = runtime.block_on(solve(&store, &definition));
    let bytes = memory("VmHWM:").saturating_sub(before) as f64 / count as f64;
    let cached = runtime.block_on(solve(&store, &definition));
    println!("{} {} {bytes}", milliseconds(new), milliseconds(cached));
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A line of `/proc/self/status`, in bytes.
fn memory(line: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("status");
    let found = text.lines().find_map(|l| l.strip_prefix(line)).expect("the line");
    found.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

async fn solve(store: &Store, definition: &pb::Definition) -> Duration {
    let solver = Solver::new(store.keys(), Arc::new(Results), SolverOptions::default());
    let start = Instant::now();
    let build = solver.build(BuildOptions { factory: Arc::new(Factory), progress: Arc::new(Unseen) });
    build.solve(definition).await.expect("solved");
    let time = start.elapsed();
    drop(build);
    solver.idle().await;
    time
}

fn definition(shape: &str, count: usize) -> pb::Definition {
    let mut builder = llb::Builder::new();
    let mut digests: Vec<String> = Vec::with_capacity(count);
    // Whole rows, so that the last vertex needs all others.
    let longest = (count as f64).sqrt() as usize;
    let side = (1..=longest).rev().find(|&side| count.is_multiple_of(side)).unwrap_or(1);
    // A fixed seed: every run has the same graph.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for at in 0..count {
        let last = at + 1 == count;
        let inputs: Vec<usize> = match shape {
            "chain" => at.checked_sub(1).into_iter().collect(),
            "wide" if last => (0..at).collect(),
            "wide" => Vec::new(),
            "grid" => {
                let left = (at % side > 0).then(|| at - 1);
                left.into_iter().chain(at.checked_sub(side)).collect()
            }
            // Each hangs on the one before too, so that the last one needs all.
            _ if at < 2 => at.checked_sub(1).into_iter().collect(),
            _ => vec![at - 1, random(at - 1), random(at - 1)],
        };
        let op = pb::Op {
            inputs: inputs
                .iter()
                .map(|&from| pb::Input { digest: digests[from].clone(), index: 0 })
                .collect(),
            op: Some(pb::op::Op::Source(pb::SourceOp {
                identifier: format!("fake://{at}"),
                ..Default::default()
            })),
            ..Default::default()
        };
        digests.push(builder.add(&op, pb::OpMetadata::default()));
    }
    builder.finish(&pb::Input { digest: digests.pop().expect("a vertex"), index: 0 })
}

struct Factory;

impl OpFactory<u32> for Factory {
    fn op(&self, vertex: OpVertex) -> Result<Arc<dyn Op<u32>>, OpError> {
        let Some(pb::op::Op::Source(source)) = &vertex.op.op else { return Err(OpError::new("no source")) };
        let digest = blake3::hash(source.identifier.as_bytes());
        Ok(Arc::new(Fake { digest }))
    }
}

struct Fake {
    digest: Key,
}

impl Op<u32> for Fake {
    fn known_map(&self) -> Option<CacheMap> {
        Some(CacheMap { digest: self.digest, inputs: Vec::new(), persistent: true, parts: Parts::default() })
    }

    fn execute<'a>(&'a self, _: &'a OpContext, _: Vec<u32>) -> BoxFuture<'a, Result<Vec<u32>, Failure<u32>>> {
        std::future::ready(Ok(vec![1])).boxed()
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}

struct Results;

impl ResultStore<u32> for Results {
    fn id(&self, result: &u32) -> String {
        result.to_string()
    }

    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<u32>, OpError>> {
        std::future::ready(Ok(id.parse().ok())).boxed()
    }

    fn content_digest<'a>(&'a self, _: &'a u32, _: &'a ContentQuery) -> BoxFuture<'a, Result<Key, OpError>> {
        std::future::ready(Err(OpError::new("not asked for"))).boxed()
    }

    fn output_digest<'a>(&'a self, result: &'a u32) -> BoxFuture<'a, Result<Key, OpError>> {
        std::future::ready(Ok(blake3::hash(&result.to_le_bytes()))).boxed()
    }
}

struct Unseen;

impl ProgressSink for Unseen {
    fn event(&self, _: Event) {}
}
