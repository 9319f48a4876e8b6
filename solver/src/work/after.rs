//! What is worked out once nobody waits for it: the output keys of finished work, by which builds
//! find it whose inputs are made in another way but come out the same.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use kiln_cache::KeyChange;

use super::JobInput;
use super::run::guarded;
use crate::keys::{OUTPUT_KEY, Part, vertex_key};
use crate::op::CacheMap;
use crate::produced::Produced;
use crate::record::Entry;
use crate::solver::Shared;

/// How many output digests that nobody waits for are computed at once.
const RUNNERS: usize = 2;

/// How many keys are recorded together, and for how long the first may wait.
const GROUP: usize = 128;
const PATIENCE: Duration = Duration::from_millis(50);

/// Finished work without its output key.
pub(super) struct Unkeyed<R> {
    /// The build for which the work was done.
    pub(super) build: u64,
    pub(super) produced: Arc<Produced<R>>,
    pub(super) map: Arc<CacheMap>,
    pub(super) inputs: Vec<JobInput<R>>,
}

/// The queue of all builds.
pub(crate) struct After<R> {
    state: Mutex<State<R>>,
}

struct State<R> {
    queue: VecDeque<Unkeyed<R>>,
    runners: usize,
    /// What was made by builds that are still going on: its turn comes after them.
    waiting: HashMap<u64, Vec<Unkeyed<R>>>,
}

impl<R> Default for After<R> {
    fn default() -> Self {
        Self { state: Mutex::new(State { queue: VecDeque::new(), runners: 0, waiting: HashMap::new() }) }
    }
}

impl<R> After<R> {
    pub(crate) fn build_began(&self, build: u64) {
        self.lock().waiting.insert(build, Vec::new());
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next one; without one the caller is no longer counted as a runner.
    fn next(&self) -> Option<Unkeyed<R>> {
        let mut state = self.lock();
        let next = state.queue.pop_front();
        if next.is_none() {
            state.runners -= 1;
            state.queue.shrink_to(GROUP);
        }
        next
    }
}

/// What is left of a build that ended.
pub(crate) fn build_ended<R: Clone + Send + Sync + 'static>(shared: &Arc<Shared<R>>, build: u64) {
    let waiting = shared.after.lock().waiting.remove(&build);
    start(shared, waiting.unwrap_or_default());
}

/// Has the output key made once the build is over for which the work was done.
pub(super) fn key_later<R: Clone + Send + Sync + 'static>(shared: &Arc<Shared<R>>, unkeyed: Unkeyed<R>) {
    if let Some(waiting) = shared.after.lock().waiting.get_mut(&unkeyed.build) {
        return waiting.push(unkeyed);
    }
    start(shared, vec![unkeyed]);
}

fn start<R: Clone + Send + Sync + 'static>(shared: &Arc<Shared<R>>, unkeyed: Vec<Unkeyed<R>>) {
    let mut state = shared.after.lock();
    state.queue.extend(unkeyed);
    // Those there are have something to do.
    let more = (RUNNERS - state.runners).min(state.queue.len());
    state.runners += more;
    for _ in 0..more {
        shared.tasks.spawn(run(shared.clone()));
    }
}

async fn run<R: Clone + Send + Sync + 'static>(shared: Arc<Shared<R>>) {
    let mut changes = Vec::new();
    let mut since = Instant::now();
    while let Some(next) = shared.after.next() {
        if changes.is_empty() {
            since = Instant::now();
        }
        let mut key = pin!(output_key(&shared, next));
        let change = match key.as_mut().now_or_never() {
            Some(change) => change,
            None => {
                // Nothing waits for a large output to be digested.
                record(&shared, &mut changes);
                key.await
            }
        };
        changes.extend(change);
        if changes.len() >= GROUP || since.elapsed() > PATIENCE {
            record(&shared, &mut changes);
            tokio::task::yield_now().await;
        }
    }
    record(&shared, &mut changes);
}

fn record<R: Clone + Send + Sync + 'static>(shared: &Arc<Shared<R>>, changes: &mut Vec<KeyChange>) {
    if !changes.is_empty() {
        shared.record(Entry { changes: std::mem::take(changes), then: None });
    }
}

async fn output_key<R: Clone + Send + Sync + 'static>(
    shared: &Shared<R>,
    unkeyed: Unkeyed<R>,
) -> Option<KeyChange> {
    let Unkeyed { produced, map, inputs, .. } = unkeyed;
    let mut parts = Vec::with_capacity(inputs.len());
    for (at, input) in inputs.iter().enumerate() {
        let part = match &input.content {
            Some(digest) => Part::Query(**digest),
            None => match guarded(input.produced.output_digest(shared, input.output as usize)).await {
                Ok(digest) => Part::Output(digest),
                Err(error) => {
                    tracing::warn!(vertex = &*produced.name(), %error, "an output digest could not be computed");
                    return None;
                }
            },
        };
        parts.push((part, map.inputs.get(at).and_then(|input| input.selector.as_deref())));
    }
    let key = vertex_key(OUTPUT_KEY, &map.digest, parts.into_iter());
    produced.add_keys([key], None)
}
