//! Why steps of finished builds were not cached. When a build has ended, its graph and what was not cached are kept, and
//! some of the most similar of the last builds; it is compared when somebody asks, with the closest. Kept as long as the
//! history keeps the build; the graph of a project's last build longer, for the next one.

mod graph;
mod pairing;
mod pending;
mod reasons;
mod retired;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use kiln_cache::contenthash::ContentChange;
use kiln_cache::{Eviction, StoreError, Values};
use kiln_proto::explain::Explanation;
use kiln_solver::explain::{Outcome, VertexExplanation};
use prost::Message;
use tokio::sync::Semaphore;
use tonic::Code;

use crate::engine::Engine;
use crate::error::BuildError;
use graph::Graph;
pub(crate) use pending::Expected;
use pending::Pending;
use reasons::{Comparison, Facts, Missed};

/// Records of builds by ref.
const RECORDS: &str = "explain-record";
/// Graphs by digest.
const GRAPHS: &str = "explain-graph";
/// What was not cached, by ref.
const OUTLINES: &str = "explain-outline";

/// Builds are compared with one of so many before them.
const COMPARABLE: usize = 1024;
/// Of equally similar builds so many are kept for comparison, whatever becomes of their own records.
const CLOSER: usize = 4;
/// So many steps of earlier builds are looked at to find the closest one.
const COMPARED: usize = 1 << 18;
/// So much counts the same Dockerfile, target and directory, in hashes of a sketch.
const SAME_PROJECT: usize = 8;
/// After so many graphs were dropped, what only they referred to is dropped too.
const SWEEP: usize = 16;
/// So many vertices of builds that ended wait to be added; builds that end then wait with their answer.
const WAITING: usize = 8192;

/// The explanations of all builds that are remembered.
pub(crate) struct Explanations {
    facts: Arc<dyn Facts>,
    values: Values,
    /// Builds that are being added.
    pending: Arc<Pending>,
    /// For each vertex that waits to be added.
    room: Arc<Semaphore>,
    /// Never held while graphs are read, made or compared.
    state: Mutex<State>,
    /// Read by who reads or adds graphs, written by who drops them. Taken before `state`.
    graphs: RwLock<()>,
    /// Held by who drops graphs, so that those that were to stay do. Taken before `graphs`.
    dropping: Mutex<()>,
    /// Graphs are about to be dropped.
    asked_to_drop: AtomicBool,
}

struct State {
    /// In the order in which they ended; `None` until they are read.
    records: Option<Vec<(String, Record)>>,
    /// Digests of graphs that may no longer be referred to.
    loose: Vec<String>,
    /// How many graphs were dropped since the last sweep.
    dropped: usize,
}

impl Default for State {
    /// What an earlier daemon dropped, or left when it was killed, was not counted: the first drop sweeps.
    fn default() -> Self {
        Self { records: None, loose: Vec::new(), dropped: SWEEP }
    }
}

/// What is kept of a build to find it by.
#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(int64, tag = "1")]
    ended: i64,
    /// Digest of its graph.
    #[prost(string, tag = "2")]
    graph: String,
    #[prost(fixed64, repeated, tag = "3")]
    sketch: Vec<u64>,
    #[prost(bytes = "vec", tag = "4")]
    project: Vec<u8>,
    /// Digests of the graphs that it may be compared with.
    #[prost(string, repeated, tag = "5")]
    before: Vec<String>,
    /// Equal for builds of the same steps on the same sources.
    #[prost(bytes = "vec", tag = "6")]
    steps: Vec<u8>,
    /// How large its graph is.
    #[prost(uint32, tag = "7")]
    vertices: u32,
    /// It is there for comparison only.
    #[prost(bool, tag = "8")]
    retired: bool,
}

impl Record {
    fn graphs(self) -> impl Iterator<Item = String> {
        self.before.into_iter().chain([self.graph])
    }
}

/// An explanation but for the comparison.
#[derive(Clone, PartialEq, prost::Message)]
struct Outline {
    /// The most similar earlier builds, the last one first: those of the graphs that the record names.
    #[prost(string, repeated, tag = "1")]
    compared_with: Vec<String>,
    /// How many steps there were.
    #[prost(uint32, tag = "2")]
    total: u32,
    #[prost(message, repeated, tag = "3")]
    missed: Vec<Missed>,
}

/// A build that ended.
pub(crate) struct Ended {
    /// What was built: equal for builds of the same target of the same Dockerfile.
    pub(crate) project: Vec<u8>,
    /// The decisions.
    pub(crate) vertices: Vec<VertexExplanation>,
}

fn storage(error: impl std::fmt::Display) -> BuildError {
    BuildError::new(Code::Internal, format!("explanations: {error}"))
}

impl Facts for Engine {
    fn changes(&self, before: &[u8], after: &[u8]) -> Option<Vec<ContentChange>> {
        let (before, after) = (before.try_into().ok()?, after.try_into().ok()?);
        self.content_changes(before, after).unwrap_or_else(|error| {
            tracing::warn!(%error, "changed files could not be looked up");
            None
        })
    }

    fn eviction(&self, result: &str) -> Option<Eviction> {
        Engine::eviction(self, result).ok().flatten()
    }

    fn forget_contents(&self, wanted: &HashSet<[u8; 32]>) -> Result<(), StoreError> {
        Engine::forget_contents(self, wanted)
    }
}

impl Explanations {
    /// Over the engine's values.
    pub(crate) fn new(engine: Arc<Engine>) -> Arc<Self> {
        Self::over(engine.values(), engine)
    }

    fn over(values: Values, facts: Arc<dyn Facts>) -> Arc<Self> {
        Arc::new(Self {
            facts,
            values,
            pending: Arc::default(),
            room: Arc::new(Semaphore::new(WAITING)),
            state: Mutex::default(),
            graphs: RwLock::default(),
            dropping: Mutex::default(),
            asked_to_drop: AtomicBool::default(),
        })
    }

    /// Announces a build that may be added. If it is forgotten from now on, it won't be.
    pub(crate) fn expect(&self, id: &str) -> Expected {
        self.pending.expect(id)
    }

    /// Adds a build in the background, after those that ended before; returns once there is room for it.
    pub(crate) async fn add(self: &Arc<Self>, expected: Expected, ended: Ended) {
        let vertices = u32::try_from(ended.vertices.len().min(WAITING)).unwrap_or(u32::MAX);
        let Ok(room) = self.room.clone().acquire_many_owned(vertices).await else { return };
        let (this, turn) = (self.clone(), expected.queue());
        tokio::spawn(async move {
            turn.await;
            let (id, forgotten) = (expected.id().to_owned(), expected.forgotten());
            match tokio::task::spawn_blocking(move || this.store(&id, &forgotten, ended)).await {
                Ok(Ok(()) | Err(StoreError::Closed)) => {}
                Ok(Err(error)) => tracing::warn!(%error, build = expected.id(), "the build is not explained"),
                Err(error) => tracing::error!(%error, build = expected.id(), "the build is not explained"),
            }
            drop((expected, room));
        });
    }

    /// Waits until all builds that ended are added.
    pub(crate) async fn idle(&self) {
        self.pending.idle().await;
    }

    /// Waits until a build is added, if it has ended.
    pub(crate) async fn added(&self, id: &str) {
        self.pending.wait(id).await;
    }

    /// The explanation of a build.
    pub(crate) async fn get(self: &Arc<Self>, id: &str) -> Result<Explanation, BuildError> {
        self.added(id).await;
        let (this, id) = (self.clone(), id.to_owned());
        let found = tokio::task::spawn_blocking(move || this.explain(&id)).await;
        found.map_err(|error| BuildError::new(Code::Internal, format!("task failed: {error}")))?
    }

    fn explain(&self, id: &str) -> Result<Explanation, BuildError> {
        let missing = || unknown(id);
        let (compared_with, total, missed, found) = {
            let _graphs = self.graphs.read().unwrap_or_else(PoisonError::into_inner);
            let (record, others) = self.find(id)?;
            let outline = self.values.get(OUTLINES, id).map_err(storage)?.ok_or_else(missing)?;
            let Outline { compared_with, total, missed } = Outline::decode(&outline[..]).map_err(storage)?;
            let known = compared_with.iter().cloned().zip(record.before);
            let known = known.map(|(id, graph)| Near { id, graph }).chain(others).collect();
            let found = match missed.is_empty() {
                true => None,
                false => {
                    let new = self.graph(&record.graph).map_err(storage)?.ok_or_else(missing)?;
                    let old = self.closest(&new, known).map_err(storage)?;
                    Some((new, old))
                }
            };
            (compared_with, total, missed, found)
        };
        let (compared_with, steps) = match found {
            None => (compared_with.into_iter().next(), Vec::new()),
            Some((new, old)) => {
                let (compared_with, old) = old.unzip();
                (compared_with, Comparison::new(&new, &missed, old.as_ref(), &*self.facts).steps())
            }
        };
        let compared_with = compared_with.unwrap_or_default();
        Ok(Explanation { r#ref: id.to_owned(), compared_with, total, steps })
    }

    /// A build, and those before it of which one may be the closest.
    fn find(&self, id: &str) -> Result<(Record, Vec<Near>), BuildError> {
        let mut state = self.lock();
        let records = self.records(&mut state).map_err(storage)?;
        let place = records.iter().position(|(other, _)| other == id).ok_or_else(|| unknown(id))?;
        let record = records[place].1.clone();
        let others = nearest(&records[..place], &record.sketch, &record.project, COMPARABLE);
        Ok((record, others))
    }

    /// The build that a build differs least from, and its graph; of equally close ones the first.
    fn closest(&self, new: &Graph, old: Vec<Near>) -> Result<Option<(String, Graph)>, StoreError> {
        let (mut seen, mut room) = (HashSet::new(), COMPARED);
        let mut closest: Option<(usize, String, Graph)> = None;
        for Near { id, graph } in old {
            if !seen.insert(graph.clone()) {
                continue;
            }
            let Some(earlier) = self.graph(&graph)? else { continue };
            let apart = new.apart(&earlier);
            room = room.saturating_sub(earlier.len());
            if closest.as_ref().is_none_or(|(least, ..)| apart < *least) {
                closest = Some((apart, id, earlier));
            }
            if apart == 0 || room == 0 {
                break;
            }
        }
        Ok(closest.map(|(_, id, graph)| (id, graph)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All records, read once.
    fn records<'a>(&self, state: &'a mut State) -> Result<&'a mut Vec<(String, Record)>, StoreError> {
        if state.records.is_none() {
            let mut records: Vec<_> = self
                .values
                .list(RECORDS)?
                .into_iter()
                // What another version wrote in another form is of no use.
                .filter_map(|(id, bytes)| Some((id, Record::decode(&bytes[..]).ok()?)))
                .collect();
            records.sort_by_key(|(_, record)| record.ended);
            state.records = Some(records);
        }
        Ok(state.records.get_or_insert_default())
    }

    /// Digests of all graphs that are referred to.
    fn wanted(&self, state: &mut State) -> Result<HashSet<String>, StoreError> {
        Ok(self.records(state)?.iter().flat_map(|(_, record)| record.clone().graphs()).collect())
    }

    fn graph(&self, digest: &str) -> Result<Option<Graph>, StoreError> {
        Ok(self.values.get(GRAPHS, digest)?.and_then(sound))
    }

    fn store(&self, id: &str, forgotten: &AtomicBool, ended: Ended) -> Result<(), StoreError> {
        let began = cpu_time();
        let Ended { project, vertices } = ended;
        let steps = fingerprint(&vertices);
        let missed = Missed::of(&vertices, &*self.facts);
        let _graphs = self.graphs.read().unwrap_or_else(PoisonError::into_inner);
        // The usual build that changes nothing has nothing to add.
        let same = match missed.is_empty() {
            true => {
                let mut state = self.lock();
                let mut records = self.records(&mut state)?.iter().rev();
                records.find(|(_, record)| record.steps == steps && record.project == project).cloned()
            }
            false => None,
        };
        let (outline, record) = match same {
            Some((compared_with, record)) => {
                let total = vertices.iter().filter(|vertex| reasons::is_persistent(vertex)).count();
                let total = u32::try_from(total).unwrap_or(u32::MAX);
                let record = Record { ended: now(), before: Vec::new(), retired: false, ..record };
                (Outline { compared_with: vec![compared_with], total, missed }, record)
            }
            None => self.add_graph(vertices, missed, project, steps)?,
        };
        let mut state = self.lock();
        let records = self.records(&mut state)?;
        if forgotten.load(Ordering::Relaxed) {
            state.loose.extend(record.graphs());
            return Ok(());
        }
        self.values.put(OUTLINES, id, &outline.encode_to_vec())?;
        self.values.put(RECORDS, id, &record.encode_to_vec())?;
        let former = records.iter().position(|(other, _)| other == id).map(|at| records.remove(at));
        records.push((id.to_owned(), record));
        state.loose.extend(former.into_iter().flat_map(|(_, record)| record.graphs()));
        tracing::debug!(build = id, cpu = ?cpu_time().saturating_sub(began), "added");
        Ok(())
    }

    /// Keeps the graph of a build, with what the most similar of the last builds knew of it.
    fn add_graph(
        &self,
        vertices: Vec<VertexExplanation>,
        missed: Vec<Missed>,
        project: Vec<u8>,
        steps: Vec<u8>,
    ) -> Result<(Outline, Record), StoreError> {
        let mut graph = Graph::new(&vertices);
        drop(vertices);
        let sketch = graph.sketch();
        let near = nearest(self.records(&mut self.lock())?, &sketch, &project, CLOSER);
        for near in &near {
            if graph.is_complete() {
                break;
            }
            if let Some(earlier) = self.graph(&near.graph)? {
                graph.carry_over(&earlier);
            }
        }
        let total = u32::try_from(graph.persistent()).unwrap_or(u32::MAX);
        let vertices = u32::try_from(graph.len()).unwrap_or(u32::MAX);
        let bytes = graph.encode_to_vec();
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let (compared_with, before): (Vec<_>, Vec<_>) =
            near.into_iter().map(|near| (near.id, near.graph)).unzip();
        if !before.contains(&digest) {
            self.values.put(GRAPHS, &digest, &bytes)?;
        }
        let record =
            Record { ended: now(), graph: digest, sketch, project, before, steps, vertices, retired: false };
        Ok((Outline { compared_with, total, missed }, record))
    }

    /// Forgets a build.
    pub(crate) fn forget(self: &Arc<Self>, id: &str) -> Result<(), StoreError> {
        let mut state = self.lock();
        self.pending.forget(id);
        self.values.delete(RECORDS, id)?;
        self.values.delete(OUTLINES, id)?;
        let records = self.records(&mut state)?;
        let Some(place) = records.iter().position(|(other, _)| other == id) else { return Ok(()) };
        let (_, record) = records.remove(place);
        state.loose.extend(record.graphs());
        drop(state);
        if !self.asked_to_drop.swap(true, Ordering::Relaxed) {
            let this = self.clone();
            tokio::task::spawn_blocking(move || match this.drop_loose() {
                Ok(()) | Err(StoreError::Closed) => {}
                Err(error) => tracing::warn!(%error, "graphs of forgotten builds are not dropped"),
            });
        }
        Ok(())
    }

    /// Drops graphs that nothing refers to any more and, now and then, what only they referred to.
    fn drop_loose(&self) -> Result<(), StoreError> {
        let _alone = self.dropping.lock().unwrap_or_else(PoisonError::into_inner);
        self.asked_to_drop.store(false, Ordering::Relaxed);
        let Some(left) = self.drop_graphs()? else { return Ok(()) };
        // What is added from now on knows of nothing older than what is left and than the last builds.
        let mut contents = HashSet::new();
        for digest in left {
            contents.extend(self.graph(&digest)?.iter().flat_map(Graph::read_contents));
        }
        self.facts.forget_contents(&contents)
    }

    /// Drops graphs; if it was time to look at all of them, gives those that are left.
    fn drop_graphs(&self) -> Result<Option<HashSet<String>>, StoreError> {
        let _graphs = self.graphs.write().unwrap_or_else(PoisonError::into_inner);
        let (wanted, mut unwanted, sweep) = {
            let mut state = self.lock();
            let wanted = self.wanted(&mut state)?;
            let mut loose = std::mem::take(&mut state.loose);
            loose.sort_unstable();
            loose.dedup();
            loose.retain(|digest| !wanted.contains(digest));
            state.dropped += loose.len();
            let sweep = state.dropped >= SWEEP;
            if sweep {
                state.dropped = 0;
            }
            (wanted, loose, sweep)
        };
        if sweep {
            unwanted = self.values.names(GRAPHS)?;
            unwanted.retain(|digest| !wanted.contains(digest));
        }
        for digest in unwanted {
            self.values.delete(GRAPHS, &digest)?;
        }
        Ok(sweep.then_some(wanted))
    }
}

fn unknown(id: &str) -> BuildError {
    BuildError::new(Code::NotFound, format!("no explanation of build {id}"))
}

/// A graph from its bytes, unless some other version wrote them.
fn sound(bytes: Vec<u8>) -> Option<Graph> {
    Graph::decode(&bytes[..]).ok().filter(Graph::is_sound)
}

/// What this thread has taken of a processor.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Nanoseconds since 1970.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

/// Equal for builds of the same steps on the same sources, whether they had to look at all of them or not.
fn fingerprint(vertices: &[VertexExplanation]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128 * vertices.len());
    for vertex in vertices.iter().filter(|vertex| reasons::is_persistent(vertex)) {
        bytes.extend_from_slice(&(vertex.name.len() as u64).to_le_bytes());
        bytes.extend_from_slice(vertex.name.as_bytes());
        // What an earlier build did not finish is told.
        bytes.push(u8::from(matches!(vertex.outcome, Outcome::Failed | Outcome::Stopped)));
        match &vertex.definition {
            Some(key) => {
                bytes.push(0);
                bytes.extend_from_slice(key.as_bytes());
            }
            // What stands on a client's directory is known by content alone.
            None => {
                let op = vertex.map.as_ref().map(|map| map.digest);
                let keys =
                    [op, vertex.content].into_iter().chain(vertex.inputs.iter().map(|input| input.content));
                for key in keys {
                    bytes.push(1 + u8::from(key.is_some()));
                    bytes.extend_from_slice(key.as_ref().map_or(&[], |key| key.as_bytes()));
                }
            }
        }
        for input in &vertex.inputs {
            bytes.extend_from_slice(&(input.vertex as u64).to_le_bytes());
            bytes.extend_from_slice(&input.output.to_le_bytes());
        }
    }
    blake3::hash(&bytes).as_bytes()[..16].to_vec()
}

/// An earlier build that a build may be compared with.
struct Near {
    id: String,
    /// Digest of its graph.
    graph: String,
}

/// The builds that a build may be compared with, of equally similar ones the last first. Which of them differs least is
/// looked at when somebody asks: all variants of a step look alike to a sketch.
fn nearest(records: &[(String, Record)], sketch: &[u64], project: &[u8], most: usize) -> Vec<Near> {
    let score = |record: &Record| {
        let shared = record.sketch.iter().filter(|hash| sketch.binary_search(hash).is_ok()).count();
        match (shared, record.project == project) {
            (0, _) => 0,
            (shared, true) => shared + SAME_PROJECT,
            (shared, false) => shared,
        }
    };
    let mut best = 1;
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for (id, record) in records.iter().rev().take(COMPARABLE) {
        let score = score(record);
        if score > best {
            found.clear();
            seen.clear();
        }
        best = best.max(score);
        if score == best && found.len() < most && seen.insert(&record.graph) {
            found.push(Near { id: id.clone(), graph: record.graph.clone() });
        }
    }
    // Where little is shared, so it is by chance.
    if 2 * best < sketch.len() {
        found.truncate(1);
    }
    found
}
