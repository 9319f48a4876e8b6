//! What all builds of a daemon share. Owns the table of work in flight, the limit on parallel
//! steps and the background tasks; knows no build's graph.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use kiln_cache::KeyStorage;
use tokio_util::task::TaskTracker;

use crate::build::{Build, BuildOptions};
use crate::limit::Limiter;
use crate::op::ResultStore;
use crate::record::{Entry, Recorder};
use crate::work::{self, After, InFlight};

/// Settings of a [`Solver`].
#[derive(Debug, Clone, Default)]
pub struct SolverOptions {
    /// How many operations of [`OpClass::Run`](crate::op::OpClass::Run) run at once over all
    /// builds; 0 means no limit.
    pub max_parallelism: usize,
}

/// Solves definitions for any number of builds; cheap to clone.
pub struct Solver<R> {
    shared: Arc<Shared<R>>,
}

impl<R> Clone for Solver<R> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<R: Clone + Send + Sync + 'static> Solver<R> {
    /// A solver that remembers keys in `keys` and results in `results`.
    pub fn new(keys: Arc<dyn KeyStorage>, results: Arc<dyn ResultStore<R>>, options: SolverOptions) -> Self {
        let shared = Shared {
            recorder: Recorder::new(keys.clone()),
            keys,
            results,
            in_flight: InFlight::default(),
            limiter: Limiter::new(options.max_parallelism),
            after: After::default(),
            tasks: TaskTracker::new(),
            next_build: AtomicU64::new(1),
            builds: AtomicUsize::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Starts a build. Must be called on a tokio runtime; dropping the answer (and the handles
    /// that came from it) gives the build up.
    pub fn build(&self, options: BuildOptions<R>) -> Build<R> {
        Build::start(self.shared.clone(), options)
    }

    /// Waits until nothing that this solver started is running: neither cancelled work that is
    /// still being torn down nor digests computed after a build. To be called once no build is left.
    pub async fn idle(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.tasks.reopen();
    }
}

pub(crate) struct Shared<R> {
    pub(crate) keys: Arc<dyn KeyStorage>,
    pub(crate) results: Arc<dyn ResultStore<R>>,
    pub(crate) in_flight: InFlight<R>,
    pub(crate) limiter: Limiter,
    pub(crate) recorder: Recorder,
    pub(crate) after: After<R>,
    pub(crate) tasks: TaskTracker,
    next_build: AtomicU64,
    builds: AtomicUsize,
}

impl<R: Clone + Send + Sync + 'static> Shared<R> {
    /// A number for a build that begins; [`Self::build_ended`] is to be called for it.
    pub(crate) fn next_build(&self) -> u64 {
        self.builds.fetch_add(1, Ordering::Relaxed);
        let build = self.next_build.fetch_add(1, Ordering::Relaxed);
        self.after.build_began(build);
        build
    }

    /// Has an entry written.
    pub(crate) fn record(self: &Arc<Self>, entry: Entry) {
        self.recorder.push(entry);
        self.record_queued();
    }

    /// Has what is queued written; [`Solver::idle`] waits for that.
    pub(crate) fn record_queued(self: &Arc<Self>) {
        if !self.recorder.begin() {
            return;
        }
        let shared = self.clone();
        if self.keys.blocks() {
            self.tasks.spawn_blocking(move || shared.recorder.write_out());
        } else {
            self.tasks.spawn(async move { shared.recorder.write_out() });
        }
    }

    pub(crate) fn build_ended(self: &Arc<Self>, build: u64) {
        work::build_ended(self, build);
        if self.builds.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.recorder.forget_recent();
        }
    }
}
