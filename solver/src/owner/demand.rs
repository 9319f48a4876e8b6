//! Who wants what. A vertex is worked on while a request or a consumer wants it; when the last one
//! withdraws, what it has going on is cancelled and it may be wanted again later.

use std::sync::Arc;
use std::time::Duration;

use fixedbitset::FixedBitSet;
use petgraph::graph::NodeIndex;
use tokio::sync::oneshot;

use super::arena::{Content, InputPart, Map, News, OutputDigest, Step, Tried};
use super::report::MapProgress;
use super::{Edge, Event, Owner, Request};
use crate::error::SolveError;
use crate::keys::Part;
use crate::op::{Failure, OpClass, OpContext};
use crate::produced::{Produced, no_such_output};
use crate::progress::VertexProgress;
use crate::record::Entry;
use crate::work::{Work, guarded};

/// How long an operation that never ran is taken to last.
const UNKNOWN_RUN: Duration = Duration::from_secs(1);
const UNKNOWN_IO: Duration = Duration::from_millis(100);

impl<R: Clone + Send + Sync + 'static> Owner<R> {
    pub(super) fn request(&mut self, id: u64, edge: Edge, reply: oneshot::Sender<Result<R, SolveError<R>>>) {
        self.requests.insert(id, Request { edge, reply });
        self.requested.entry(edge.vertex).or_default().push(id);
        self.want(edge.vertex);
        self.complete(edge);
        self.ask_maps(edge.vertex);
        if self.graph[edge.vertex].is_settled() {
            self.answer_requests(edge.vertex);
        }
    }

    pub(super) fn withdraw(&mut self, id: u64) {
        let Some(request) = self.requests.remove(&id) else { return };
        if let Some(ids) = self.requested.get_mut(&request.edge.vertex) {
            ids.retain(|other| *other != id);
        }
        self.release(request.edge.vertex);
    }

    /// Answers the requests for a vertex that is done or has failed.
    fn answer_requests(&mut self, place: NodeIndex) {
        for id in self.requested.remove(&place).unwrap_or_default() {
            let Some(Request { edge, reply }) = self.requests.remove(&id) else { continue };
            let vertex = &self.graph[place];
            let output = edge.output as usize;
            let answer = match &vertex.step {
                Step::Done(produced) => produced.output(edge.output).cloned().ok_or_else(|| {
                    vertex.error(no_such_output(output, produced.outputs.len(), &vertex.state.name).into())
                }),
                Step::Failed(error) => Err(SolveError::clone(error)),
                Step::Waiting | Step::Opening(_) | Step::Working(..) => Err(SolveError::canceled()),
            };
            self.report_skipped(place);
            let _ = reply.send(answer);
            self.release(place);
        }
    }

    /// Asks all operations below for what they depend on.
    fn ask_maps(&mut self, root: NodeIndex) {
        // Whatever was asked before had everything below it asked, too.
        if !self.graph[root].is_unasked() {
            return;
        }
        let mut asked = Vec::new();
        let mut needed = FixedBitSet::with_capacity(root.index() + 1);
        needed.insert(root.index());
        for index in (0..=root.index()).rev() {
            let place = NodeIndex::new(index);
            if needed.contains(index) && self.graph[place].is_unasked() {
                asked.push(place);
                needed.extend(self.graph[place].inputs.iter().map(|edge| edge.vertex.index()));
            }
        }
        self.unranked.extend_from_slice(&asked);
        // In the order of the arena, so that inputs come before who uses them: those find the keys below them there,
        // and nobody above was asked earlier, so nobody needs to be told.
        for place in asked.into_iter().rev() {
            let vertex = &mut self.graph[place];
            // What an earlier one of these answered may have failed it.
            if !vertex.is_unasked() {
                continue;
            }
            if let Map::Told(map) = &vertex.map {
                let map = map.clone();
                let _ = self.know_map(place, map);
                self.consider(place);
                continue;
            }
            let progress = Arc::new(MapProgress::new(vertex.state.info.clone(), self.progress.clone()));
            vertex.map = Map::Asked(progress.clone());
            let context = OpContext {
                progress: VertexProgress::new(vertex.state.digest.clone(), progress),
                ignore_cache: vertex.ignore_cache,
            };
            let op = vertex.op.clone();
            let event = async move {
                let map = guarded(op.cache_map(&context)).await;
                Event::Mapped { vertex: place, map }
            };
            // Taken in at once: for a large graph the answers would fill the queue.
            if let Some(Event::Mapped { vertex, map }) = self.spawn_unless_ready(event) {
                let _ = self.mapped(vertex, map);
                self.consider(vertex);
            }
        }
    }

    fn want(&mut self, place: NodeIndex) {
        let vertex = &mut self.graph[place];
        vertex.wanted += 1;
        if vertex.wanted == 1 && !vertex.is_settled() {
            self.ready.insert(place);
        }
    }

    /// One who wanted a vertex no longer does. Dropping the answer cancels the work that nobody else holds.
    fn release(&mut self, place: NodeIndex) -> Vec<Arc<Work<R>>> {
        let mut held = Vec::new();
        let mut worklist = vec![place];
        while let Some(place) = worklist.pop() {
            let vertex = &mut self.graph[place];
            vertex.wanted -= 1;
            if vertex.wanted > 0 || vertex.is_settled() {
                continue;
            }
            if std::mem::take(&mut vertex.inputs_wanted) {
                worklist.extend(vertex.inputs.iter().map(|edge| edge.vertex));
            }
            if let Step::Working(watched) = &vertex.step {
                held.push(watched.asker.work().clone());
            }
            self.report_canceled(place);
            self.start_over(place);
        }
        held
    }

    /// Forgets what was going on, but not what is known. Drops the hold on shared work.
    pub(super) fn start_over(&mut self, place: NodeIndex) {
        let vertex = &mut self.graph[place];
        vertex.step = Step::Waiting;
        vertex.epoch += 1;
        vertex.tried = Tried::default();
        vertex.outputs_missing = 0;
    }

    pub(super) fn want_inputs(&mut self, place: NodeIndex) {
        let inputs = &self.graph[place].inputs;
        let missing = inputs.iter().filter(|edge| self.graph[edge.vertex].produced().is_none()).count();
        let count = inputs.len();
        let vertex = &mut self.graph[place];
        vertex.inputs_wanted = true;
        vertex.inputs_missing = missing as u32;
        for input in 0..count {
            let edge = self.graph[place].inputs[input];
            self.want(edge.vertex);
            self.complete(edge);
        }
        for input in 0..count {
            let edge = self.graph[place].inputs[input];
            match &self.graph[edge.vertex].step {
                Step::Failed(error) => {
                    let error = error.clone();
                    return self.fail(place, error);
                }
                Step::Done(_) => self.input_arrived(place, input),
                Step::Waiting | Step::Opening(_) | Step::Working(..) => {}
            }
            if self.graph[place].is_settled() {
                return;
            }
        }
    }

    /// Like [`Self::release`], for all inputs of a vertex.
    pub(super) fn release_inputs(&mut self, place: NodeIndex) -> Vec<Arc<Work<R>>> {
        let mut held = Vec::new();
        if std::mem::take(&mut self.graph[place].inputs_wanted) {
            for input in 0..self.graph[place].inputs.len() {
                held.append(&mut self.release(self.graph[place].inputs[input].vertex));
            }
        }
        held
    }

    /// An input of a vertex that waits for its inputs is there: has digested what the content key needs.
    fn input_arrived(&mut self, place: NodeIndex, input: usize) {
        let vertex = &self.graph[place];
        let edge = vertex.inputs[input];
        let below = &self.graph[edge.vertex];
        let (Some(produced), Some(map)) = (below.produced(), vertex.map()) else { return };
        let Some(result) = produced.output(edge.output) else {
            if produced.lacks(edge.output) {
                return self.complete(edge);
            }
            let error = no_such_output(edge.output as usize, produced.outputs.len(), &below.state.name);
            return self.fail_op(place, error);
        };
        if vertex.parts[input] != InputPart::Unknown {
            return;
        }
        if let Some(query) = map.inputs.get(input).and_then(|input| input.content.clone()) {
            let (shared, result) = (self.shared.clone(), result.clone());
            self.graph[place].parts[input] = InputPart::Asked;
            self.spawn(async move {
                let digest = guarded(shared.results.content_digest(&result, &query)).await;
                Event::ContentDigest { vertex: place, input, digest }
            });
        } else if below.content.is_none() && map.persistent {
            match self.output_digests.get(&edge) {
                Some(&OutputDigest::Known(digest)) => {
                    self.know_part(place, input, InputPart::Digest(Box::new(Part::Output(digest))));
                }
                _ => self.ask_output_digest(edge),
            }
        }
    }

    pub(super) fn ask_output_digest(&mut self, edge: Edge) {
        let Some(produced) = self.graph[edge.vertex].produced() else { return };
        if matches!(self.output_digests.get(&edge), Some(OutputDigest::Asked | OutputDigest::Known(_))) {
            return;
        }
        let (shared, produced) = (self.shared.clone(), produced.clone());
        self.output_digests.insert(edge, OutputDigest::Asked);
        self.spawn(async move {
            let digest = guarded(produced.output_digest(&shared, edge.output as usize)).await;
            Event::OutputDigest { edge, digest }
        });
    }

    /// The results of a vertex are there.
    pub(super) fn finish(&mut self, place: NodeIndex, produced: Arc<Produced<R>>) {
        let vertex = &mut self.graph[place];
        vertex.epoch += 1;
        let persistent = vertex.map().is_some_and(|map| map.persistent);
        let learned = match (vertex.content, produced.content_key()) {
            (None, Some(key)) if persistent => Some(Content { key, distinct: true, fresh: false }),
            _ => None,
        };
        vertex.content = vertex.content.or(learned);
        vertex.step = Step::Done(produced.clone());
        self.release_inputs(place);
        if learned.is_some() {
            self.spread(place, News { definition: false, content: true });
        }

        let keys = self.recorded_under(place);
        let content = self.graph[place].content.filter(|content| content.distinct).map(|content| content.key);
        if let Some(change) = produced.add_keys(keys, content) {
            self.shared.recorder.push(Entry { changes: vec![change], then: None });
        }
        let mut uses = self.graph.uses(place);
        while let Some((above, input)) = self.graph.next_use(&mut uses) {
            let vertex = &mut self.graph[above];
            if vertex.inputs_wanted && !vertex.is_settled() {
                vertex.inputs_missing -= 1;
                self.input_arrived(above, input);
                self.ready.insert(above);
            }
        }
        self.answer_requests(place);
    }

    /// The operation of a vertex failed: reports it on that vertex and fails what needs it.
    pub(super) fn fail_op(&mut self, place: NodeIndex, failure: impl Into<Failure<R>>) {
        let failure = failure.into();
        self.report_failed(place, &failure.error.message);
        let error = Arc::new(self.graph[place].error(failure));
        self.fail(place, error);
    }

    /// Fails a vertex and all that wait for it; stays so for the rest of the build. Without a
    /// cache map, keys above can't be made either: then all that is above fails.
    pub(super) fn fail(&mut self, place: NodeIndex, error: Arc<SolveError<R>>) {
        let unmapped = self.graph[place].map().is_none();
        let mut worklist = vec![place];
        while let Some(place) = worklist.pop() {
            if self.graph[place].is_settled() {
                continue;
            }
            self.report_canceled(place);
            let vertex = &mut self.graph[place];
            vertex.epoch += 1;
            vertex.step = Step::Failed(error.clone());
            self.release_inputs(place);
            let mut uses = self.graph.uses(place);
            while let Some((above, _)) = self.graph.next_use(&mut uses) {
                if unmapped || self.graph[above].inputs_wanted {
                    worklist.push(above);
                }
            }
            self.answer_requests(place);
        }
    }

    /// How long the longest path from the start of a vertex to the end of the build is, by what
    /// earlier builds took. Priorities are made for all vertices that became wanted since the last time.
    pub(super) fn priority(&mut self, place: NodeIndex) -> Duration {
        if !self.shared.limiter.is_limited() {
            return Duration::ZERO;
        }
        let mut unranked = std::mem::take(&mut self.unranked);
        // Consumers come before their inputs.
        unranked.sort_unstable_by(|a, b| b.cmp(a));
        for place in unranked {
            let vertex = &self.graph[place];
            let known =
                vertex.map().and_then(|map| self.shared.keys.op(map.digest.as_bytes()).ok().flatten());
            let own = known.map_or_else(
                || match vertex.op.class() {
                    OpClass::Run => UNKNOWN_RUN,
                    OpClass::Io => UNKNOWN_IO,
                },
                |known| known.duration,
            );
            let remaining = vertex.remaining.saturating_add(own);
            self.graph[place].remaining = remaining;
            for edge in self.graph[place].inputs.clone() {
                let below = &mut self.graph[edge.vertex].remaining;
                *below = remaining.max(*below);
            }
        }
        self.graph[place].remaining
    }
}
