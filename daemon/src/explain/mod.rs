//! Why steps of finished builds were not cached. Each build is compared with the most similar one of
//! the last ones when it has been answered, and leaves its own graph for those that come. Kept as
//! long as the history keeps the build.

mod graph;
mod pairing;
mod reasons;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use dashmap::DashMap;
use kiln_cache::contenthash::ContentChange;
use kiln_cache::{Eviction, StoreError, Values};
use kiln_proto::explain::Explanation;
use kiln_solver::explain::VertexExplanation;
use prost::Message;
use tokio::sync::watch;
use tonic::Code;

use crate::engine::Engine;
use crate::error::BuildError;
use graph::Graph;
use reasons::{Comparison, Facts};

/// Records of builds by ref.
const RECORDS: &str = "explain-record";
/// Graphs by digest.
const GRAPHS: &str = "explain-graph";
/// Explanations by ref.
const RESULTS: &str = "explain-result";

/// Graphs of so many builds are kept; of older ones only what was explained.
const COMPARABLE: usize = 32;
/// So much counts the same Dockerfile, target and directory, in hashes of a sketch.
const SAME_PROJECT: usize = 8;
/// After so many graphs were dropped, what only they referred to is dropped too.
const SWEEP: usize = 16;

/// The explanations of all builds that are remembered.
pub(crate) struct Explanations {
    engine: Arc<Engine>,
    values: Values,
    /// Builds whose explanation is being made.
    pending: DashMap<String, watch::Receiver<()>>,
    state: Mutex<State>,
}

struct State {
    /// In the order in which they ended; `None` until they are read.
    records: Option<Vec<(String, Record)>>,
    /// How many graphs were dropped since the last sweep.
    dropped: usize,
}

impl Default for State {
    /// What an earlier daemon dropped, or left when it was killed, was not counted: the first sweep comes at once.
    fn default() -> Self {
        Self { records: None, dropped: SWEEP }
    }
}

/// What is kept of a build to find it by.
#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(int64, tag = "1")]
    ended: i64,
    /// Digest of its graph; empty when that was dropped.
    #[prost(string, tag = "2")]
    graph: String,
    #[prost(fixed64, repeated, tag = "3")]
    sketch: Vec<u64>,
    #[prost(bytes = "vec", tag = "4")]
    project: Vec<u8>,
    /// Fingerprint of the decisions.
    #[prost(bytes = "vec", tag = "5")]
    decisions: Vec<u8>,
}

/// A build that ended.
pub(crate) struct Ended {
    /// Its ref.
    pub(crate) id: String,
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
}

impl Explanations {
    /// Over the engine's values.
    pub(crate) fn new(engine: Arc<Engine>) -> Arc<Self> {
        let values = engine.values();
        Arc::new(Self { engine, values, pending: DashMap::new(), state: Mutex::default() })
    }

    /// Explains a build in the background. Who asks for it from now on waits until that is done.
    pub(crate) fn add(self: &Arc<Self>, ended: Ended) {
        let (done, waiting) = watch::channel(());
        self.pending.insert(ended.id.clone(), waiting);
        let this = self.clone();
        tokio::task::spawn_blocking(move || {
            let id = ended.id.clone();
            match this.store(ended) {
                Ok(()) | Err(StoreError::Closed) => {}
                Err(error) => tracing::warn!(%error, build = id, "the build is not explained"),
            }
            this.pending.remove(&id);
            drop(done);
        });
    }

    /// Waits until all builds that ended are explained.
    pub(crate) async fn idle(&self) {
        let waiting: Vec<_> = self.pending.iter().map(|entry| entry.value().clone()).collect();
        for mut done in waiting {
            // The other end never sends; it goes.
            let _ = done.changed().await;
        }
    }

    /// The explanation of a build; the empty ref is the build that ended last.
    pub(crate) async fn get(self: &Arc<Self>, id: &str) -> Result<Explanation, BuildError> {
        match self.pending.get(id).map(|entry| entry.value().clone()) {
            Some(mut done) => drop(done.changed().await),
            None if id.is_empty() => self.idle().await,
            None => {}
        }
        let (this, id) = (self.clone(), id.to_owned());
        let found = tokio::task::spawn_blocking(move || this.load(&id)).await;
        found.map_err(|error| BuildError::new(Code::Internal, format!("task failed: {error}")))?
    }

    fn load(&self, id: &str) -> Result<Explanation, BuildError> {
        let not_found = |text: String| BuildError::new(Code::NotFound, text);
        let id = match id {
            "" => {
                let mut state = self.lock();
                let last = self.records(&mut state).map_err(storage)?.last().map(|(id, _)| id.clone());
                last.ok_or_else(|| not_found("no build is remembered".to_owned()))?
            }
            id => id.to_owned(),
        };
        match self.values.get(RESULTS, &id).map_err(storage)? {
            Some(bytes) => Explanation::decode(&bytes[..]).map_err(storage),
            None => Err(not_found(format!("no explanation of build {id}"))),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
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

    fn graph(&self, digest: &str) -> Result<Option<Graph>, StoreError> {
        let Some(bytes) = self.values.get(GRAPHS, digest)? else { return Ok(None) };
        Ok(Graph::decode(&bytes[..]).ok().filter(Graph::is_sound))
    }

    fn store(&self, ended: Ended) -> Result<(), StoreError> {
        let began = Instant::now();
        let Ended { id, project, vertices } = ended;
        let decisions = fingerprint(&vertices);
        let mut state = self.lock();
        if !vertices.iter().any(reasons::is_missed)
            && let Some(same) = self.records(&mut state)?.iter().rev().find(|(_, record)| {
                record.decisions == decisions && record.project == project && !record.graph.is_empty()
            })
        {
            // The usual build that changes nothing has nothing to add.
            let total = vertices.iter().filter(|vertex| reasons::is_persistent(vertex)).count();
            let (compared_with, record) = same.clone();
            let explanation = Explanation {
                r#ref: id.clone(),
                compared_with,
                total: u32::try_from(total).unwrap_or(u32::MAX),
                steps: Vec::new(),
            };
            self.put(&mut state, id, Record { ended: now(), ..record }, &explanation)?;
            return self.drop_surplus(&mut state);
        }
        let mut graph = Graph::new(&vertices);
        let sketch = graph.sketch();
        let nearest = nearest(self.records(&mut state)?, &sketch, &project);
        let mut compared = None;
        for (other, digest) in nearest {
            if let Some(earlier) = self.graph(&digest)? {
                compared = Some((other, earlier));
                break;
            }
        }
        let pairs = compared.as_ref().map(|(_, earlier)| pairing::pair(earlier, &graph));
        let old = compared.as_ref().zip(pairs.as_deref()).map(|((_, earlier), pairs)| (earlier, pairs));
        let comparison = Comparison { vertices: &vertices, new: &graph, old, facts: &*self.engine };
        let steps = comparison.steps();
        if let Some((earlier, pairs)) = old {
            carry_over(earlier, &mut graph, pairs);
        }
        let explanation = Explanation {
            r#ref: id.clone(),
            compared_with: compared.map(|(other, _)| other).unwrap_or_default(),
            total: u32::try_from(graph.nodes.iter().filter(|node| node.persistent).count())
                .unwrap_or(u32::MAX),
            steps,
        };
        let bytes = graph.encode_to_vec();
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let records = self.records(&mut state)?;
        if !records.iter().any(|(_, record)| record.graph == digest) {
            self.values.put(GRAPHS, &digest, &bytes)?;
        }
        let record = Record { ended: now(), graph: digest, sketch, project, decisions };
        tracing::debug!(build = id, time = ?began.elapsed(), graph = bytes.len(), "explained");
        self.put(&mut state, id, record, &explanation)?;
        self.drop_surplus(&mut state)
    }

    fn put(
        &self,
        state: &mut State,
        id: String,
        record: Record,
        explanation: &Explanation,
    ) -> Result<(), StoreError> {
        self.values.put(RECORDS, &id, &record.encode_to_vec())?;
        self.values.put(RESULTS, &id, &explanation.encode_to_vec())?;
        let records = self.records(state)?;
        records.retain(|(other, _)| *other != id);
        records.push((id, record));
        Ok(())
    }

    /// Forgets a build.
    pub(crate) fn forget(&self, id: &str) -> Result<(), StoreError> {
        let mut state = self.lock();
        self.values.delete(RECORDS, id)?;
        self.values.delete(RESULTS, id)?;
        let records = self.records(&mut state)?;
        let Some(place) = records.iter().position(|(other, _)| other == id) else { return Ok(()) };
        let (_, record) = records.remove(place);
        self.drop_graph(&mut state, &record.graph)?;
        self.sweep(&mut state)
    }

    fn drop_surplus(&self, state: &mut State) -> Result<(), StoreError> {
        let records = self.records(state)?;
        let surplus = records.len().saturating_sub(COMPARABLE);
        let mut graphs = Vec::new();
        for (id, record) in records[..surplus].iter_mut().filter(|(_, record)| !record.graph.is_empty()) {
            graphs.push(std::mem::take(&mut record.graph));
            (record.sketch, record.decisions) = (Vec::new(), Vec::new());
            self.values.put(RECORDS, id, &record.encode_to_vec())?;
        }
        for graph in graphs {
            self.drop_graph(state, &graph)?;
        }
        self.sweep(state)
    }

    fn drop_graph(&self, state: &mut State, digest: &str) -> Result<(), StoreError> {
        let shared = self.records(state)?.iter().any(|(_, record)| record.graph == digest);
        if !shared && !digest.is_empty() {
            self.values.delete(GRAPHS, digest)?;
            state.dropped += 1;
        }
        Ok(())
    }

    /// Drops what no graph refers to any more, now and then.
    fn sweep(&self, state: &mut State) -> Result<(), StoreError> {
        if state.dropped < SWEEP {
            return Ok(());
        }
        state.dropped = 0;
        let digests: HashSet<String> =
            self.records(state)?.iter().map(|(_, record)| record.graph.clone()).collect();
        for (digest, _) in self.values.list(GRAPHS)? {
            if !digests.contains(&digest) {
                self.values.delete(GRAPHS, &digest)?;
            }
        }
        let mut wanted = HashSet::new();
        for digest in digests {
            wanted.extend(self.graph(&digest)?.iter().flat_map(Graph::contents));
        }
        self.engine.forget_contents(&wanted)
    }
}

/// Nanoseconds since 1970.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

/// Equal for builds of which the same is known.
fn fingerprint(vertices: &[VertexExplanation]) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    for vertex in vertices.iter().filter(|vertex| reasons::is_persistent(vertex)) {
        hasher.update(&(vertex.name.len() as u64).to_le_bytes()).update(vertex.name.as_bytes());
        let keys = [vertex.map.as_ref().map(|map| map.digest), vertex.definition, vertex.content];
        for key in keys.into_iter().chain(vertex.inputs.iter().map(|input| input.content)) {
            match key {
                Some(key) => hasher.update(&[1]).update(key.as_bytes()),
                None => hasher.update(&[0]),
            };
        }
        for input in &vertex.inputs {
            hasher.update(&(input.vertex as u64).to_le_bytes()).update(&input.output.to_le_bytes());
        }
    }
    hasher.finalize().as_bytes()[..16].to_vec()
}

/// The builds to compare with, most similar first, of equal ones the latest first.
fn nearest(records: &[(String, Record)], sketch: &[u64], project: &[u8]) -> Vec<(String, String)> {
    let score = |record: &Record| {
        let shared = record.sketch.iter().filter(|hash| sketch.binary_search(hash).is_ok()).count();
        match (shared, record.project == project) {
            (0, _) => 0,
            (shared, true) => shared + SAME_PROJECT,
            (shared, false) => shared,
        }
    };
    let mut found: Vec<_> = records
        .iter()
        .rev()
        .filter(|(_, record)| !record.graph.is_empty())
        .map(|(id, record)| (score(record), id, &record.graph))
        .filter(|(score, ..)| *score > 0)
        .collect();
    found.sort_by_key(|(score, ..)| std::cmp::Reverse(*score));
    found.into_iter().map(|(_, id, graph)| (id.clone(), graph.clone())).collect()
}

/// What a build did not have to find out, because a step above was cached, is as the earlier build knew it.
fn carry_over(old: &Graph, new: &mut Graph, pairs: &[Option<usize>]) {
    for (node, pair) in new.nodes.iter_mut().zip(pairs) {
        let Some(before) = pair.map(|pair| &old.nodes[pair]).filter(|before| node.is_like(before)) else {
            continue;
        };
        node.done |= before.done;
        if node.content.is_empty() {
            node.content.clone_from(&before.content);
        }
        for (input, before) in node.inputs.iter_mut().zip(&before.inputs) {
            if input.content.is_empty() {
                input.content.clone_from(&before.content);
            }
        }
    }
}
