//! The face of one build: hands requests to the task that owns the build's graph.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_proto::pb;
use tokio::sync::{mpsc, oneshot};

use crate::error::SolveError;
use crate::explain::VertexExplanation;
use crate::export::{self, ExportVertex};
use crate::import::ImportedCache;
use crate::op::OpFactory;
use crate::owner::{self, Edge, Event};
use crate::prepare::prepare;
use crate::progress::ProgressSink;
use crate::solver::Shared;

/// What a build brings along.
pub struct BuildOptions<R> {
    /// Makes this build's operations.
    pub factory: Arc<dyn OpFactory<R>>,
    /// Where its progress goes.
    pub progress: Arc<dyn ProgressSink>,
}

/// One build: any number of definitions solved over one graph, in which each vertex is resolved
/// and run at most once. Cheap to clone; when the last clone and the last [`LoadedHandle`] are
/// dropped, running work that no other build waits for is cancelled and all results are released.
pub struct Build<R> {
    inner: Arc<Inner<R>>,
}

struct Inner<R> {
    events: mpsc::UnboundedSender<Event<R>>,
    factory: Arc<dyn OpFactory<R>>,
    next_request: AtomicU64,
    shared: Arc<Shared<R>>,
}

impl<R> Drop for Inner<R> {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Shutdown);
    }
}

impl<R> Clone for Build<R> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<R: Clone + Send + Sync + 'static> Build<R> {
    pub(crate) fn start(shared: Arc<Shared<R>>, options: BuildOptions<R>) -> Self {
        let BuildOptions { factory, progress } = options;
        let events = owner::start(shared.clone(), progress);
        Self { inner: Arc::new(Inner { events, factory, next_request: AtomicU64::new(0), shared }) }
    }

    /// Loads a definition and builds its result; `None` for the empty definition (scratch).
    /// Dropping the future gives up what only it wanted.
    pub async fn solve(&self, definition: &pb::Definition) -> Result<Option<R>, SolveError<R>> {
        self.load(definition).await?.result().await
    }

    /// Checks a definition, adds it to the build's graph and announces its vertices; builds nothing.
    pub async fn load(&self, definition: &pb::Definition) -> Result<LoadedHandle<R>, SolveError<R>> {
        let prepared = prepare(definition, &*self.inner.factory)?;
        let (reply, answer) = oneshot::channel();
        self.send(Event::Load { prepared, reply })?;
        let edge = answer.await.map_err(|_| SolveError::canceled())??;
        Ok(LoadedHandle { build: self.clone(), edge })
    }

    /// Has what is solved from now on looked up in `cache`, too.
    pub fn import(&self, cache: Arc<dyn ImportedCache<R>>) {
        // A build that has ended looks nothing up.
        let _ = self.send(Event::Import { cache });
    }

    /// What was decided about each vertex so far, and from which keys; inputs come first.
    pub async fn explain(&self) -> Vec<VertexExplanation> {
        let (reply, answer) = oneshot::channel();
        match self.send(Event::Explain { reply }) {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    /// The outputs of each vertex that was made or found so far, by its digest.
    pub async fn results(&self) -> HashMap<Arc<str>, Vec<R>> {
        let (reply, answer) = oneshot::channel();
        match self.send(Event::Results { reply }) {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => HashMap::new(),
        }
    }

    fn send(&self, event: Event<R>) -> Result<(), SolveError<R>> {
        self.inner.events.send(event).map_err(|_| SolveError::canceled())
    }
}

/// A definition that was loaded and announced, to be built when its result is asked for.
pub struct LoadedHandle<R> {
    build: Build<R>,
    edge: Option<Edge>,
}

impl<R> Clone for LoadedHandle<R> {
    fn clone(&self) -> Self {
        Self { build: self.build.clone(), edge: self.edge }
    }
}

impl<R: Clone + Send + Sync + 'static> LoadedHandle<R> {
    /// Builds the result, or waits for it, or answers what is known; `None` is scratch. Dropping
    /// the future gives up what only it wanted. May be asked again at any time.
    pub async fn result(&self) -> Result<Option<R>, SolveError<R>> {
        let Some(edge) = self.edge else { return Ok(None) };
        let id = self.build.inner.next_request.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        self.build.send(Event::Request { id, edge, reply })?;
        let mut guard = Withdraw { events: &self.build.inner.events, id: Some(id) };
        let result = answer.await.map_err(|_| SolveError::canceled())?;
        guard.id = None;
        result.map(Some)
    }

    /// What a cache elsewhere can be told of the result and of all that it was made from: the last vertex is the one
    /// that made it. Nothing for scratch.
    pub async fn describe(&self) -> Vec<ExportVertex<R>> {
        let Some(edge) = self.edge else { return Vec::new() };
        let (reply, answer) = oneshot::channel();
        if self.build.send(Event::Describe { edge, reply }).is_err() {
            return Vec::new();
        }
        match answer.await {
            Ok(described) => export::complete(&self.build.inner.shared, described).await,
            Err(_) => Vec::new(),
        }
    }

    /// True for the empty definition, whose result is scratch.
    pub fn is_scratch(&self) -> bool {
        self.edge.is_none()
    }
}

/// Withdraws a request whose future was dropped before it was answered.
struct Withdraw<'a, R> {
    events: &'a mpsc::UnboundedSender<Event<R>>,
    id: Option<u64>,
}

impl<R> Drop for Withdraw<'_, R> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let _ = self.events.send(Event::Withdraw { id });
        }
    }
}
