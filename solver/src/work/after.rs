//! What is worked out once nobody waits for it: the output keys of finished work, by which builds
//! find it whose inputs are made in another way but come out the same.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_cache::KeyChange;

use super::JobInput;
use super::run::guarded;
use crate::keys::{OUTPUT_KEY, Part, vertex_key};
use crate::op::Key;
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
    pub(super) produced: Arc<Produced<R>>,
    pub(super) op_digest: Key,
    pub(super) inputs: Vec<JobInput<R>>,
}

/// The queue of all builds.
pub(crate) struct After<R> {
    state: Mutex<State<R>>,
}

struct State<R> {
    queue: VecDeque<Unkeyed<R>>,
    runners: usize,
}

impl<R> Default for After<R> {
    fn default() -> Self {
        Self { state: Mutex::new(State { queue: VecDeque::new(), runners: 0 }) }
    }
}

impl<R> After<R> {
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

pub(super) fn key_later<R: Clone + Send + Sync + 'static>(shared: &Arc<Shared<R>>, unkeyed: Unkeyed<R>) {
    {
        let mut state = shared.after.lock();
        state.queue.push_back(unkeyed);
        if state.runners >= RUNNERS {
            return;
        }
        state.runners += 1;
    }
    shared.tasks.spawn(run(shared.clone()));
}

async fn run<R: Clone + Send + Sync + 'static>(shared: Arc<Shared<R>>) {
    let mut changes = Vec::new();
    let mut since = Instant::now();
    loop {
        let next = shared.after.next();
        if changes.len() >= GROUP || next.is_none() || (!changes.is_empty() && since.elapsed() > PATIENCE) {
            let entry = Entry { changes: std::mem::take(&mut changes), then: None };
            if !entry.changes.is_empty() && shared.recorder.push(entry) {
                shared.recorder.write_out();
            }
            tokio::task::yield_now().await;
        }
        let Some(next) = next else { return };
        if changes.is_empty() {
            since = Instant::now();
        }
        changes.extend(output_key(&shared, next).await);
    }
}

async fn output_key<R: Clone + Send + Sync + 'static>(
    shared: &Shared<R>,
    unkeyed: Unkeyed<R>,
) -> Option<KeyChange> {
    let Unkeyed { produced, op_digest, inputs } = unkeyed;
    let mut parts = Vec::with_capacity(inputs.len());
    for input in &inputs {
        let part = match input.part {
            Some(part @ Part::Query(_)) => part,
            _ => match guarded(input.produced.output_digest(shared, input.output)).await {
                Ok(digest) => Part::Output(digest),
                Err(error) => {
                    tracing::warn!(vertex = &*produced.name(), %error, "an output digest could not be computed");
                    return None;
                }
            },
        };
        parts.push((part, input.selector.as_deref()));
    }
    let key = vertex_key(OUTPUT_KEY, &op_digest, parts.into_iter());
    produced.add_keys(&[key], None)
}
