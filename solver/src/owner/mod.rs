//! The task that owns a build: it alone holds the graph and its state, takes [`Event`]s one at a
//! time and hands out work. For a given order of events it always does the same.
//!
//! Each vertex that is wanted goes the same way: its operation says what it depends on; its
//! definition key is looked up; on a miss its inputs are wanted, and as soon as what it reads of
//! them is known its content key is looked up; when all inputs are there and an earlier build
//! knew a like operation, its output key is looked up; then it runs. [`probe`] is that way.
//!
//! Point reads of the key store are made in place: they take microseconds, less than a hop to
//! another task. Everything longer runs beside the loop.

mod arena;
mod demand;
mod graph;
mod imports;
mod probe;
mod report;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use futures::FutureExt;
use petgraph::graph::NodeIndex;
use rustc_hash::FxBuildHasher;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::error::SolveError;
use crate::explain::{self, InputExplanation, KeyKind, VertexExplanation};
use crate::export::Described;
use crate::import::ImportedCache;
use crate::op::{CacheMap, Key, OpError};
use crate::prepare::Prepared;
use crate::produced::Opened;
use crate::progress::ProgressSink;
use crate::solver::Shared;
use crate::work::{Outcome, Work};
use arena::{Arena, Definition, OutputDigest, Step, Vertex};
use imports::Imports;

/// After this many events in a row the loop lets other tasks run.
const EVENTS_PER_TURN: usize = 128;

/// After this many vertices in a row the loop takes in what came of it.
const VERTICES_PER_EVENT: usize = 64;

/// One output of one vertex of a build's graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Edge {
    vertex: NodeIndex,
    output: u32,
}

/// All that can happen to a build.
pub(crate) enum Event<R> {
    /// A definition arrived.
    Load { prepared: Prepared<R>, reply: oneshot::Sender<Result<Option<Edge>, SolveError<R>>> },
    /// A cache from elsewhere is to be looked into.
    Import { cache: Arc<dyn ImportedCache<R>> },
    /// A result is wanted.
    Request { id: u64, edge: Edge, reply: oneshot::Sender<Result<R, SolveError<R>>> },
    /// It is no longer wanted.
    Withdraw { id: u64 },
    /// An operation said what it depends on.
    Mapped { vertex: NodeIndex, map: Result<CacheMap, OpError> },
    /// A record's results were loaded, or are gone. `epoch` tells a stale answer.
    Opened { vertex: NodeIndex, epoch: u64, found: RecordFound, result: Result<Opened<R>, OpError> },
    /// What a vertex reads of one of its inputs was digested.
    ContentDigest { vertex: NodeIndex, input: usize, digest: Result<Key, OpError> },
    /// A whole output was digested.
    OutputDigest { edge: Edge, digest: Result<Key, OpError> },
    /// Work that a vertex waits for began.
    Started { vertex: NodeIndex, epoch: u64, at: SystemTime },
    /// Work that a vertex waits for ended.
    Worked { vertex: NodeIndex, epoch: u64, outcome: Outcome<R> },
    /// The decisions so far are asked for.
    Explain { reply: oneshot::Sender<Vec<VertexExplanation>> },
    /// What a cache is to be told of a result and all below it is asked for.
    Describe { edge: Edge, reply: oneshot::Sender<Described<R>> },
    /// What has been made or found so far is asked for.
    Results { reply: oneshot::Sender<HashMap<Arc<str>, Vec<R>>> },
    /// Nobody is left who could ask for anything.
    Shutdown,
}

/// The key under which a record was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecordFound {
    kind: KeyKind,
    key: Key,
    imported: bool,
}

struct Request<R> {
    edge: Edge,
    reply: oneshot::Sender<Result<R, SolveError<R>>>,
}

struct Owner<R> {
    shared: Arc<Shared<R>>,
    progress: Arc<dyn ProgressSink>,
    /// Number of this build, for fairness between builds.
    id: u64,
    graph: Arena<R>,
    by_digest: HashMap<Arc<str>, NodeIndex, FxBuildHasher>,
    requests: HashMap<u64, Request<R>>,
    requested: HashMap<NodeIndex, Vec<u64>, FxBuildHasher>,
    output_digests: HashMap<Edge, OutputDigest, FxBuildHasher>,
    /// Vertices that may be able to go on. Consumers go first: what they find, their inputs need
    /// not look for.
    ready: BTreeSet<NodeIndex>,
    /// Wanted vertices without a priority yet.
    unranked: Vec<NodeIndex>,
    /// How many found records are being loaded.
    opening: usize,
    /// Work to be joined again by vertices that are ready, or will be when it is clear what is above them.
    held: Vec<Arc<Work<R>>>,
    /// Caches from elsewhere, if there are any.
    imports: Option<Box<Imports<R>>>,
    /// Events that arose in the loop itself.
    local: VecDeque<Event<R>>,
    events: mpsc::UnboundedSender<Event<R>>,
    tasks: JoinSet<()>,
}

/// Starts the owner of a new build and answers how to reach it.
pub(crate) fn start<R: Clone + Send + Sync + 'static>(
    shared: Arc<Shared<R>>,
    progress: Arc<dyn ProgressSink>,
) -> mpsc::UnboundedSender<Event<R>> {
    let (events, inbox) = mpsc::unbounded_channel();
    let owner = Owner {
        id: shared.next_build(),
        shared: shared.clone(),
        progress,
        graph: Arena::new(),
        by_digest: HashMap::default(),
        requests: HashMap::new(),
        requested: HashMap::default(),
        output_digests: HashMap::default(),
        ready: BTreeSet::new(),
        unranked: Vec::new(),
        opening: 0,
        held: Vec::new(),
        imports: None,
        local: VecDeque::new(),
        events: events.clone(),
        tasks: JoinSet::new(),
    };
    shared.tasks.spawn(owner.run(inbox));
    events
}

impl<R: Clone + Send + Sync + 'static> Owner<R> {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Event<R>>) {
        let shared = self.shared.clone();
        let mut turn = 0;
        // Vertices that get ready together compete for free slots together.
        let mut gathering = None;
        loop {
            let full = !self.ready.is_empty() && shared.recorder.is_full();
            if full || (self.ready.is_empty() && self.local.is_empty()) {
                gathering = None;
            }
            let event = match self.local.pop_front() {
                Some(event) => Some(event),
                None if full => tokio::select! {
                    biased;
                    event = inbox.recv() => event,
                    () = shared.recorder.room() => None,
                },
                None if self.ready.is_empty() => inbox.recv().await,
                None => inbox.try_recv().ok(),
            };
            match event {
                Some(Event::Shutdown) => break,
                Some(event) => self.handle(event),
                None => {}
            }
            if gathering.is_none() && !self.ready.is_empty() {
                gathering = shared.limiter.gather();
            }
            for _ in 0..VERTICES_PER_EVENT {
                if shared.recorder.is_full() {
                    break;
                }
                let Some(vertex) = self.ready.pop_last() else { break };
                self.advance(vertex);
            }
            if self.ready.is_empty() && self.local.is_empty() && self.opening == 0 {
                self.held.clear();
            }
            shared.record_queued();
            while self.tasks.try_join_next().is_some() {}
            turn += 1;
            if turn % EVENTS_PER_TURN == 0 {
                gathering = None;
                tokio::task::yield_now().await;
            }
        }
        // Leaving shared work cancels what only this build wanted; what else it had going on is
        // taken down before the build counts as gone.
        self.tasks.shutdown().await;
        self.report_end();
        shared.build_ended(self.id);
    }

    fn handle(&mut self, event: Event<R>) {
        match event {
            Event::Load { prepared, reply } => {
                let _ = reply.send(self.load(prepared));
            }
            Event::Import { cache } => self.imports.get_or_insert_default().add(cache),
            Event::Request { id, edge, reply } => self.request(id, edge, reply),
            Event::Withdraw { id } => self.withdraw(id),
            Event::Mapped { vertex, map } => {
                let news = self.mapped(vertex, map);
                self.spread(vertex, news);
            }
            Event::Opened { vertex, epoch, found, result } => {
                self.opening -= 1;
                self.opened(vertex, epoch, found, result);
            }
            Event::ContentDigest { vertex, input, digest } => self.content_digest(vertex, input, digest),
            Event::OutputDigest { edge, digest } => self.output_digest(edge, digest),
            Event::Started { vertex, epoch, at } => self.started(vertex, epoch, at),
            Event::Worked { vertex, epoch, outcome } => self.worked(vertex, epoch, outcome),
            Event::Explain { reply } => {
                let _ = reply.send(self.explain());
            }
            Event::Describe { edge, reply } => {
                let _ = reply.send(self.describe(edge));
            }
            Event::Results { reply } => {
                let made = self.graph.vertices().iter().filter_map(|vertex| match &vertex.step {
                    Step::Done(produced) => {
                        // Places count, so what comes after a missing one is left out.
                        let outputs = produced.outputs.iter().map_while(Clone::clone).collect();
                        Some((vertex.state.digest.clone(), outputs))
                    }
                    _ => None,
                });
                let _ = reply.send(made.collect());
            }
            Event::Shutdown => {}
        }
    }

    /// Runs `future` beside the loop and feeds its answer back.
    fn spawn(&mut self, future: impl Future<Output = Event<R>> + Send + 'static) {
        let events = self.events.clone();
        self.tasks.spawn(async move {
            let _ = events.send(future.await);
        });
    }

    /// Like [`Self::spawn`] for what is mostly done at once: then it costs no task, and the caller sees to the event.
    fn spawn_unless_ready(
        &mut self,
        future: impl Future<Output = Event<R>> + Send + 'static,
    ) -> Option<Event<R>> {
        let mut future = Box::pin(future);
        let event = (&mut future).now_or_never();
        if event.is_none() {
            self.spawn(future);
        }
        event
    }

    fn explain(&self) -> Vec<VertexExplanation> {
        let input = |vertex: &Vertex<R>, at: usize| InputExplanation {
            vertex: vertex.inputs[at].vertex.index(),
            output: vertex.inputs[at].output,
            content: vertex.content_read(at),
        };
        let explain = |vertex: &Vertex<R>| VertexExplanation {
            vertex: vertex.state.digest.clone(),
            name: vertex.state.name.clone(),
            map: vertex.map().cloned(),
            ignore_cache: vertex.ignore_cache,
            outcome: match vertex.step {
                Step::Done(_) if vertex.state.cached => explain::Outcome::Cached,
                Step::Done(_) => explain::Outcome::Made,
                // Others failed with it: it was its own error if it names this one, or was reported here.
                Step::Failed(ref error)
                    if error.vertex.as_ref() == Some(&vertex.state.digest) || vertex.shows_own_error() =>
                {
                    explain::Outcome::Failed
                }
                _ if vertex.was_stopped() => explain::Outcome::Stopped,
                _ => explain::Outcome::NotReached,
            },
            definition: match vertex.definition {
                Definition::Known(key) => Some(key),
                Definition::Unknown | Definition::Absent => None,
            },
            content: vertex.content.map(|content| content.key),
            inputs: (0..vertex.inputs.len()).map(|at| input(vertex, at)).collect(),
            lookups: vertex.all_lookups(),
        };
        self.graph.vertices().iter().map(explain).collect()
    }
}
