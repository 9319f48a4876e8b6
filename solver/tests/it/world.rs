//! Fake operations and stores, and what a test needs to build graphs of them and watch them run.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use kiln_cache::kv::MemKv;
use kiln_cache::{KeyChange, KeyRecord, KeyStorage, KeyStore, OpRecord};
use kiln_proto::{llb, pb};
use kiln_solver::op::{
    CacheMap, ContentPath, ContentQuery, Failure, InputMap, Key, Op, OpClass, OpContext, OpError, OpFactory,
    OpVertex, Remains, ResultStore,
};
use kiln_solver::progress::{Event, ProgressSink, VertexState};
use kiln_solver::{Build, BuildOptions, SolveError, Solver, SolverOptions};
use tokio::sync::Semaphore;

/// Files and their contents.
pub(crate) type Files = BTreeMap<String, String>;

/// A fake result: files under a name in the fake store.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tree {
    pub(crate) id: String,
    pub(crate) files: Arc<Files>,
}

type Make = Arc<dyn Fn(&[Files]) -> Vec<Files> + Send + Sync>;

/// What an operation does.
#[derive(Clone)]
pub(crate) struct Recipe {
    text: String,
    reads: HashMap<usize, String>,
    persistent: bool,
    class: OpClass,
    make: Option<Make>,
    fails: Option<OpError>,
    map_fails: Option<String>,
    panics: bool,
    map_panics: bool,
    gate: Option<Arc<Semaphore>>,
    map_gate: Option<Arc<Semaphore>>,
    logs: Vec<String>,
    yields: usize,
    alone: bool,
}

/// An operation whose digest is made of `text`.
pub(crate) fn recipe(text: &str) -> Recipe {
    Recipe {
        text: text.to_owned(),
        reads: HashMap::new(),
        persistent: true,
        class: OpClass::Run,
        make: None,
        fails: None,
        map_fails: None,
        panics: false,
        map_panics: false,
        gate: None,
        map_gate: None,
        logs: Vec::new(),
        yields: 0,
        alone: false,
    }
}

impl Recipe {
    /// It reads only this file of an input.
    pub(crate) fn reads(mut self, input: usize, path: &str) -> Self {
        self.reads.insert(input, path.to_owned());
        self
    }

    /// Like a client's directory.
    pub(crate) fn ephemeral(mut self) -> Self {
        self.persistent = false;
        self
    }

    pub(crate) fn io(mut self) -> Self {
        self.class = OpClass::Io;
        self
    }

    pub(crate) fn makes(mut self, make: impl Fn(&[Files]) -> Vec<Files> + Send + Sync + 'static) -> Self {
        self.make = Some(Arc::new(make));
        self
    }

    /// It makes these files, whatever its inputs are.
    pub(crate) fn files(self, files: &[(&str, &str)]) -> Self {
        let files: Files = files.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        self.makes(move |_| vec![files.clone()])
    }

    pub(crate) fn fails(self, text: &str) -> Self {
        self.fails_with(OpError { exit_code: Some(7), ..OpError::new(text) })
    }

    pub(crate) fn fails_with(mut self, error: OpError) -> Self {
        self.fails = Some(error);
        self
    }

    pub(crate) fn map_fails(mut self, text: &str) -> Self {
        self.map_fails = Some(text.to_owned());
        self
    }

    pub(crate) fn panics(mut self) -> Self {
        self.panics = true;
        self
    }

    /// Asked what it depends on.
    pub(crate) fn map_panics(mut self) -> Self {
        self.map_panics = true;
        self
    }

    /// What comes of it does not depend on the client that it runs for.
    pub(crate) fn needs_no_client(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Once started it waits for a permit.
    pub(crate) fn gate(mut self, gate: &Arc<Semaphore>) -> Self {
        self.gate = Some(gate.clone());
        self
    }

    /// Its cache map waits for a permit.
    pub(crate) fn map_gate(mut self, gate: &Arc<Semaphore>) -> Self {
        self.map_gate = Some(gate.clone());
        self
    }

    pub(crate) fn logs(mut self, text: &str) -> Self {
        self.logs.push(text.to_owned());
        self
    }

    pub(crate) fn yields(mut self, times: usize) -> Self {
        self.yields = times;
        self
    }

    /// What it makes of its inputs; only the parts that it reads count.
    pub(crate) fn apply(&self, name: &str, inputs: &[Files]) -> Vec<Files> {
        let seen: Vec<Files> = inputs
            .iter()
            .enumerate()
            .map(|(i, files)| match self.reads.get(&i) {
                Some(path) => files.get(path).map(|f| (path.clone(), f.clone())).into_iter().collect(),
                None => files.clone(),
            })
            .collect();
        if let Some(make) = &self.make {
            return make(&seen);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.text.as_bytes());
        hasher.update(format!("{seen:?}").as_bytes());
        let mut files: Files = seen.into_iter().flatten().collect();
        files.insert(format!("/{name}"), hasher.finalize().to_hex()[..8].to_owned());
        vec![files]
    }
}

/// Everything fake that outlives a build.
pub(crate) struct World {
    pub(crate) recipes: Mutex<HashMap<String, Recipe>>,
    pub(crate) keys: Arc<dyn KeyStorage>,
    stored: Mutex<BTreeMap<String, Arc<Files>>>,
    made: AtomicUsize,
    /// Names of the vertices that ran, in the order in which they started.
    runs: Mutex<Vec<String>>,
    /// For each vertex that is running now: its name.
    running: Mutex<Vec<String>>,
    pub(crate) most_running: AtomicUsize,
    pub(crate) loads: AtomicUsize,
    pub(crate) content_digests: AtomicUsize,
    pub(crate) output_digests: AtomicUsize,
    /// How many turns cache maps, loads and digests take at most.
    pub(crate) delays: AtomicUsize,
    delayed: AtomicUsize,
    /// Every result is gone.
    pub(crate) forgetful: AtomicBool,
    changed: tokio::sync::Notify,
}

impl World {
    pub(crate) fn new() -> Arc<Self> {
        Self::with_keys(Arc::new(KeyStore::new(Arc::new(MemKv::new()))))
    }

    pub(crate) fn with_keys(keys: Arc<dyn KeyStorage>) -> Arc<Self> {
        Arc::new(Self {
            recipes: Mutex::default(),
            keys,
            stored: Mutex::default(),
            made: AtomicUsize::new(0),
            runs: Mutex::default(),
            running: Mutex::default(),
            most_running: AtomicUsize::new(0),
            loads: AtomicUsize::new(0),
            content_digests: AtomicUsize::new(0),
            output_digests: AtomicUsize::new(0),
            delays: AtomicUsize::new(0),
            delayed: AtomicUsize::new(0),
            forgetful: AtomicBool::new(false),
            changed: tokio::sync::Notify::new(),
        })
    }

    pub(crate) fn solver(self: &Arc<Self>) -> Solver<Tree> {
        self.limited_solver(0)
    }

    pub(crate) fn limited_solver(self: &Arc<Self>, max_parallelism: usize) -> Solver<Tree> {
        Solver::new(self.keys.clone(), Arc::new(Store(self.clone())), SolverOptions { max_parallelism })
    }

    pub(crate) fn build(self: &Arc<Self>, solver: &Solver<Tree>) -> (Build<Tree>, Arc<Record>) {
        let record = Arc::new(Record::default());
        let factory = Arc::new(Factory(self.clone()));
        (solver.build(BuildOptions { factory, progress: record.clone() }), record)
    }

    /// One build of one definition with nothing else going on.
    pub(crate) async fn run(
        self: &Arc<Self>,
        solver: &Solver<Tree>,
        definition: &pb::Definition,
    ) -> Result<Files, SolveError<Tree>> {
        let (build, _record) = self.build(solver);
        let result = build.solve(definition).await.map(|tree| (*tree.expect("a result").files).clone());
        drop(build);
        solver.idle().await;
        result
    }

    /// What ran since the last call.
    pub(crate) fn take_runs(&self) -> Vec<String> {
        std::mem::take(&mut *self.runs.lock().unwrap())
    }

    pub(crate) fn running(&self) -> Vec<String> {
        self.running.lock().unwrap().clone()
    }

    /// Waits until the names of what is running fit.
    pub(crate) async fn until(&self, what: &str, fits: impl Fn(&[String]) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if fits(&self.running()) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), wait).await.is_err() {
            panic!("{what} never happened; running: {:?}", self.running());
        }
    }

    fn keep(&self, files: Files) -> Tree {
        let id = format!("r{}", self.made.fetch_add(1, Ordering::Relaxed));
        let files = Arc::new(files);
        self.stored.lock().unwrap().insert(id.clone(), files.clone());
        Tree { id, files }
    }

    /// The files of a result.
    pub(crate) fn files(&self, id: &str) -> Option<Arc<Files>> {
        self.stored.lock().unwrap().get(id).cloned()
    }

    /// Collects a result, whichever `random` names.
    pub(crate) fn collect(&self, random: usize) {
        let mut stored = self.stored.lock().unwrap();
        let id = stored.keys().nth(random % stored.len().max(1)).cloned();
        id.and_then(|id| stored.remove(&id));
    }

    /// Takes its time: up to [`World::delays`] turns, another number each time.
    async fn delay(&self) {
        let delays = self.delays.load(Ordering::Relaxed);
        for _ in 0..self.delayed.fetch_add(1, Ordering::Relaxed) % (delays + 1) {
            tokio::task::yield_now().await;
        }
    }

    /// Sets what the vertex of this name does.
    pub(crate) fn set(&self, name: &str, recipe: Recipe) {
        self.recipes.lock().unwrap().insert(name.to_owned(), recipe);
    }
}

/// A key store whose content a test can see.
#[derive(Default)]
pub(crate) struct OpenKeys {
    records: Mutex<HashMap<[u8; 32], KeyRecord>>,
    ops: Mutex<HashMap<[u8; 32], OpRecord>>,
}

impl OpenKeys {
    pub(crate) fn records(&self) -> HashMap<[u8; 32], KeyRecord> {
        self.records.lock().unwrap().clone()
    }
}

impl KeyStorage for OpenKeys {
    // Written in place: whether the threads of a runtime get their turn is not for a simulation to depend on.
    fn blocks(&self) -> bool {
        false
    }

    fn get(&self, key: &[u8; 32]) -> kiln_cache::Result<Option<KeyRecord>> {
        Ok(self.records.lock().unwrap().get(key).cloned())
    }

    fn op(&self, digest: &[u8; 32]) -> kiln_cache::Result<Option<OpRecord>> {
        Ok(self.ops.lock().unwrap().get(digest).copied())
    }

    fn write(&self, changes: &[KeyChange]) -> kiln_cache::Result<()> {
        let mut records = self.records.lock().unwrap();
        for change in changes {
            match change {
                KeyChange::Record { keys, record } => {
                    records.extend(keys.iter().map(|key| (*key, KeyRecord::clone(record))));
                }
                KeyChange::Op { digest, record } => {
                    self.ops.lock().unwrap().insert(*digest, *record);
                }
            }
        }
        Ok(())
    }

    fn remove(&self, key: &[u8; 32], results: &[String]) -> kiln_cache::Result<bool> {
        let mut records = self.records.lock().unwrap();
        if records.get(key).is_some_and(|record| record.results != results) {
            return Ok(false);
        }
        records.remove(key);
        Ok(true)
    }
}

struct Store(Arc<World>);

impl ResultStore<Tree> for Store {
    fn id(&self, result: &Tree) -> String {
        result.id.clone()
    }

    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Tree>, OpError>> {
        async move {
            self.0.loads.fetch_add(1, Ordering::Relaxed);
            self.0.delay().await;
            if self.0.forgetful.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let files = self.0.stored.lock().unwrap().get(id).cloned();
            Ok(files.map(|files| Tree { id: id.to_owned(), files }))
        }
        .boxed()
    }

    fn content_digest<'a>(
        &'a self,
        result: &'a Tree,
        query: &'a ContentQuery,
    ) -> BoxFuture<'a, Result<Key, OpError>> {
        async move {
            self.0.content_digests.fetch_add(1, Ordering::Relaxed);
            self.0.delay().await;
            let mut hasher = blake3::Hasher::new();
            for path in &query.paths {
                match result.files.get(&path.path) {
                    Some(content) => hasher.update(format!("{}={content};", path.path).as_bytes()),
                    None if path.must_exist => {
                        return Err(OpError::new(format!("{:?}: not found", path.path)));
                    }
                    None => hasher.update(b"absent;"),
                };
            }
            Ok(hasher.finalize())
        }
        .boxed()
    }

    fn output_digest<'a>(&'a self, result: &'a Tree) -> BoxFuture<'a, Result<Key, OpError>> {
        async move {
            self.0.output_digests.fetch_add(1, Ordering::Relaxed);
            self.0.delay().await;
            Ok(blake3::hash(format!("{:?}", result.files).as_bytes()))
        }
        .boxed()
    }
}

struct Factory(Arc<World>);

impl OpFactory<Tree> for Factory {
    fn op(&self, vertex: OpVertex) -> Result<Arc<dyn Op<Tree>>, OpError> {
        let name = match &vertex.op.op {
            Some(pb::op::Op::Source(source)) => source.identifier.trim_start_matches("test://").to_owned(),
            Some(pb::op::Op::Passthrough(pass)) => pass.id.clone(),
            other => return Err(OpError::new(format!("unsupported: {other:?}"))),
        };
        if name == "forbidden" {
            return Err(OpError::new("security.insecure is not allowed"));
        }
        let recipe = self.0.recipes.lock().unwrap().get(&name).cloned().unwrap_or_else(|| recipe(&name));
        Ok(Arc::new(FakeOp { world: self.0.clone(), inputs: vertex.op.inputs.len(), name, recipe }))
    }
}

struct FakeOp {
    world: Arc<World>,
    name: String,
    recipe: Recipe,
    inputs: usize,
}

/// Notes that an operation runs for as long as its future lives.
struct Running<'a>(&'a World, &'a str);

impl<'a> Running<'a> {
    fn new(world: &'a World, name: &'a str) -> Self {
        world.runs.lock().unwrap().push(name.to_owned());
        let mut running = world.running.lock().unwrap();
        running.push(name.to_owned());
        world.most_running.fetch_max(running.len(), Ordering::Relaxed);
        drop(running);
        world.changed.notify_waiters();
        Self(world, name)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut running = self.0.running.lock().unwrap();
        let at = running.iter().position(|name| name == self.1).expect("noted");
        running.remove(at);
        drop(running);
        self.0.changed.notify_waiters();
    }
}

impl FakeOp {
    fn map(&self) -> CacheMap {
        let input = |i: usize| match self.recipe.reads.get(&i) {
            None => InputMap::default(),
            Some(path) => InputMap {
                selector: Some(path.clone()),
                content: Some(ContentQuery {
                    paths: vec![ContentPath {
                        path: path.clone(),
                        must_exist: true,
                        ..ContentPath::default()
                    }],
                }),
            },
        };
        CacheMap {
            digest: blake3::hash(self.recipe.text.as_bytes()),
            inputs: (0..self.inputs).map(input).collect(),
            persistent: self.recipe.persistent,
            parts: vec![("text".to_owned(), self.recipe.text.clone())].into(),
        }
    }
}

impl Op<Tree> for FakeOp {
    fn known_map(&self) -> Option<CacheMap> {
        // Half of them, always the same.
        let known = blake3::hash(self.recipe.text.as_bytes()).as_bytes()[0] < 128;
        assert!(!(known && self.recipe.map_panics), "boom");
        let open = self.recipe.map_gate.is_some() || self.recipe.map_fails.is_some();
        (known && !open).then(|| self.map())
    }

    fn cache_map<'a>(&'a self, _ctx: &'a OpContext) -> BoxFuture<'a, Result<CacheMap, OpError>> {
        async move {
            self.world.delay().await;
            assert!(!self.recipe.map_panics, "boom");
            if let Some(gate) = &self.recipe.map_gate {
                gate.acquire().await.expect("open").forget();
            }
            if let Some(text) = &self.recipe.map_fails {
                return Err(OpError::new(text));
            }
            Ok(self.map())
        }
        .boxed()
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        inputs: Vec<Tree>,
    ) -> BoxFuture<'a, Result<Vec<Tree>, Failure<Tree>>> {
        async move {
            let _running = Running::new(&self.world, &self.name);
            for log in &self.recipe.logs {
                ctx.progress.log(1, log.as_bytes());
            }
            if let Some(gate) = &self.recipe.gate {
                gate.acquire().await.expect("open").forget();
            }
            for _ in 0..self.recipe.yields {
                tokio::task::yield_now().await;
            }
            assert!(!self.recipe.panics, "boom");
            if let Some(error) = &self.recipe.fails {
                let remains = Remains::Run { inputs, states: Vec::new() };
                return Err(Failure { error: error.clone(), remains: Some(Arc::new(remains)) });
            }
            let inputs: Vec<Files> = inputs.iter().map(|tree| (*tree.files).clone()).collect();
            Ok(self
                .recipe
                .apply(&self.name, &inputs)
                .into_iter()
                .map(|files| self.world.keep(files))
                .collect())
        }
        .boxed()
    }

    fn needs_client(&self) -> bool {
        !self.recipe.alone
    }

    fn class(&self) -> OpClass {
        self.recipe.class
    }
}

/// Builds definitions whose vertices are named after recipes.
pub(crate) struct Graph {
    builder: llb::Builder,
    ignore_cache: Vec<String>,
}

impl Graph {
    pub(crate) fn new() -> Self {
        Self { builder: llb::Builder::new(), ignore_cache: Vec::new() }
    }

    /// Vertices of these names are built with `ignore_cache`.
    pub(crate) fn ignoring(names: &[&str]) -> Self {
        Self { builder: llb::Builder::new(), ignore_cache: names.iter().map(|n| n.to_string()).collect() }
    }

    fn add(&mut self, name: &str, op: pb::Op) -> pb::Input {
        let metadata = pb::OpMetadata {
            ignore_cache: self.ignore_cache.iter().any(|other| other == name),
            description: [(llb::CUSTOM_NAME.to_owned(), name.to_owned())].into(),
            ..Default::default()
        };
        pb::Input { digest: self.builder.add(&op, metadata), index: 0 }
    }

    pub(crate) fn source(&mut self, name: &str) -> pb::Input {
        let source = pb::SourceOp { identifier: format!("test://{name}"), ..Default::default() };
        self.add(name, pb::Op { op: Some(pb::op::Op::Source(source)), ..Default::default() })
    }

    pub(crate) fn step(&mut self, name: &str, inputs: &[&pb::Input]) -> pb::Input {
        let pass = pb::PassthroughOp { id: name.to_owned(), outputs: vec![0] };
        let inputs = inputs.iter().map(|&input| input.clone()).collect();
        self.add(name, pb::Op { inputs, op: Some(pb::op::Op::Passthrough(pass)), ..Default::default() })
    }

    pub(crate) fn finish(&self, root: &pb::Input) -> pb::Definition {
        self.builder.finish(root)
    }
}

/// A chain of steps on a source; the last one is the result.
pub(crate) fn chain(names: &[&str]) -> pb::Definition {
    let mut graph = Graph::new();
    let mut last = graph.source(names[0]);
    for name in &names[1..] {
        last = graph.step(name, &[&last]);
    }
    graph.finish(&last)
}

/// Keeps all progress events.
#[derive(Default)]
pub(crate) struct Record(pub(crate) Mutex<Vec<Event>>);

impl ProgressSink for Record {
    fn event(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

impl Record {
    /// The states that a vertex went through.
    pub(crate) fn states(&self, name: &str) -> Vec<VertexState> {
        let state = |event: &Event| match event {
            Event::Vertex(state) if *state.name == *name => Some(state.clone()),
            _ => None,
        };
        self.0.lock().unwrap().iter().filter_map(state).collect()
    }

    /// True if a vertex was last shown as begun and not ended.
    pub(crate) fn shows_running(&self, name: &str) -> bool {
        self.states(name).last().is_some_and(|state| state.started.is_some() && state.completed.is_none())
    }

    /// The same in words.
    pub(crate) fn words(&self, name: &str) -> Vec<String> {
        let word = |state: VertexState| match (state.started, state.completed, state.cached) {
            (None, None, false) => "announced".to_owned(),
            (Some(_), None, false) => "started".to_owned(),
            (Some(_), Some(_), true) => "cached".to_owned(),
            (Some(_), Some(_), false) if state.error.is_empty() => "completed".to_owned(),
            (Some(_), Some(_), false) => format!("error: {}", state.error),
            _ => format!("odd: {state:?}"),
        };
        self.states(name).into_iter().map(word).collect()
    }

    /// Output of the vertex of this name.
    pub(crate) fn log(&self, name: &str) -> String {
        let digest = self.states(name).first().map(|state| state.digest.clone()).unwrap_or_default();
        let text = |event: &Event| match event {
            Event::Log(log) if *log.vertex == *digest => {
                Some(String::from_utf8_lossy(&log.data).into_owned())
            }
            _ => None,
        };
        self.0.lock().unwrap().iter().filter_map(text).collect()
    }
}

/// A gate that is shut until permits are added.
pub(crate) fn gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(0))
}
