//! The way of a wanted vertex: definition key, inputs, content key, output key, run. Each call
//! of [`Owner::advance`] goes on from what is known by now and stops where something is missing.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use petgraph::graph::NodeIndex;

use super::arena::{Definition, InputPart, News, OutputDigest, Step, Vertex};
use super::report::{BuildWatcher, Watched};
use super::{Event, Owner, RecordFound};
use crate::explain::{Found, KeyKind, Lookup};
use crate::keys::{OUTPUT_KEY, Part, vertex_key};
use crate::op::{CacheMap, Failure, Key, OpError, Remains};
use crate::produced::{Opened, open};
use crate::work::{self, Job, JobInput, Outcome, Started, Work, guarded};

impl<R: Clone + Send + Sync + 'static> Owner<R> {
    /// An operation said what it depends on; the answer says which keys that gave.
    pub(super) fn mapped(&mut self, place: NodeIndex, map: Result<CacheMap, OpError>) -> News {
        self.report_mapped(place, map.as_ref().err());
        match map {
            Ok(_) if self.graph[place].is_settled() => {}
            Err(error) if self.graph[place].is_settled() => self.report_failed(place, &error.message),
            Ok(map) => return self.know_map(place, Arc::new(map)),
            Err(mut error) => {
                error.message = format!("failed to load cache key: {}", error.message);
                self.fail_op(place, error);
            }
        }
        News::default()
    }

    pub(super) fn advance(&mut self, place: NodeIndex) {
        let vertex = &self.graph[place];
        let Some(map) = vertex.map() else { return };
        if vertex.wanted == 0 || !matches!(vertex.step, Step::Waiting) {
            return;
        }
        let persistent = map.persistent;
        if !vertex.tried.definition {
            let definition = vertex.definition;
            self.graph[place].looked_up = self.shared.recorder.moment();
            match definition {
                Definition::Unknown => return,
                Definition::Known(key) if !self.graph[place].fresh => {
                    if self.look_up(place, KeyKind::Definition, key) {
                        return;
                    }
                }
                Definition::Known(_) | Definition::Absent => {}
            }
            self.graph[place].tried.set(KeyKind::Definition);
        }
        if self.imports.is_some() && self.try_imports(place, KeyKind::Definition) {
            return;
        }
        if !self.graph[place].inputs_wanted {
            self.want_inputs(place);
        }
        let vertex = &self.graph[place];
        if vertex.is_settled() {
            return;
        }
        if let Some(content) = vertex.content
            && !vertex.tried.content
            && content.distinct
            && !content.fresh
            && self.look_up(place, KeyKind::Content, content.key)
        {
            return;
        }
        if self.imports.is_some() && self.try_imports(place, KeyKind::Content) {
            return;
        }
        let vertex = &self.graph[place];
        if vertex.inputs_missing > 0 || (persistent && vertex.content.is_none()) {
            return;
        }
        if vertex.tried.output || self.try_output_key(place) {
            self.run_vertex(place);
        }
    }

    /// Looks for what an earlier build made of inputs that came out the same, where one might
    /// have; false if there is something to wait for.
    fn try_output_key(&mut self, place: NodeIndex) -> bool {
        let vertex = &self.graph[place];
        let Some(map) = vertex.map() else { return false };
        if vertex.outputs_missing > 0 {
            return false;
        }
        let reads_whole = |input: &usize| !vertex.reads_part(*input);
        let mut whole =
            (0..vertex.inputs.len()).filter(reads_whole).map(|input| vertex.inputs[input]).peekable();
        let mut possible = whole.peek().is_some() && map.persistent && !vertex.ignore_cache;
        let mut missing = Vec::new();
        for edge in whole {
            match self.output_digests.get(&edge) {
                Some(OutputDigest::Known(_)) => {}
                Some(OutputDigest::Asked) | None => missing.push(edge),
                Some(OutputDigest::Failed) => possible = false,
            }
        }
        let expected = || {
            let known = self.shared.keys.op(map.digest.as_bytes());
            known.is_ok_and(|known| known.is_some_and(|known| known.follows_outputs))
        };
        if !possible || (!missing.is_empty() && !expected()) {
            self.graph[place].tried.set(KeyKind::Output);
            return true;
        }
        if !missing.is_empty() {
            self.graph[place].outputs_missing = missing.len() as u32;
            for edge in missing {
                self.ask_output_digest(edge);
            }
            return false;
        }
        let key = self.make_output_key(vertex, map);
        self.graph[place].output_key = Some(key);
        !self.look_up(place, KeyKind::Output, key)
    }

    fn make_output_key(&self, vertex: &Vertex<R>, map: &CacheMap) -> Key {
        let parts = vertex.inputs.iter().enumerate().filter_map(|(input, edge)| {
            let part = match vertex.content_read(input) {
                Some(digest) => Part::Query(digest),
                None => match self.output_digests.get(edge) {
                    Some(OutputDigest::Known(digest)) => Part::Output(*digest),
                    _ => return None,
                },
            };
            Some((part, map.inputs.get(input).and_then(|input| input.selector.as_deref())))
        });
        vertex_key(OUTPUT_KEY, &map.digest, parts)
    }

    fn kind_of(&self, place: NodeIndex, key: Key) -> KeyKind {
        let vertex = &self.graph[place];
        match vertex.definition {
            Definition::Known(definition) if definition == key => KeyKind::Definition,
            _ if vertex.output_key == Some(key) => KeyKind::Output,
            _ => KeyKind::Content,
        }
    }

    /// Looks a key up among the work in flight, then in the store; true if something was found
    /// and the vertex waits for that.
    fn look_up(&mut self, place: NodeIndex, kind: KeyKind, key: Key) -> bool {
        self.graph[place].tried.set(kind);
        // In this order: work that ends in between has recorded its result before it leaves the table.
        if let Some(work) = self.shared.in_flight.join(&key) {
            self.note(place, kind, key, Found::InFlight);
            self.work_on(place, work, false);
            return true;
        }
        match self.shared.keys.get(key.as_bytes()) {
            Ok(Some(record)) if self.is_lacking(place, &record) => false,
            Ok(Some(record)) => {
                self.note(place, kind, key, Found::Record);
                let below = self.release_inputs(place);
                let vertex = &mut self.graph[place];
                vertex.step = Step::Opening(below);
                self.opening += 1;
                let epoch = vertex.epoch;
                let shared = self.shared.clone();
                let opened = self.spawn_unless_ready(async move {
                    let result = guarded(open(&shared, &key, record, kind == KeyKind::Definition)).await;
                    Event::Opened {
                        vertex: place,
                        epoch,
                        found: RecordFound { kind, key, imported: false },
                        result,
                    }
                });
                self.local.extend(opened);
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(vertex = &*self.graph[place].state.digest, %error, "a key could not be looked up");
                self.note(place, kind, key, Found::Unreadable(error.to_string()));
                false
            }
        }
    }

    pub(super) fn note(&mut self, place: NodeIndex, kind: KeyKind, key: Key, found: Found) {
        let lookups = &mut self.graph[place].lookups;
        lookups.reserve_exact(1);
        lookups.push(Lookup { kind, key, found });
    }

    pub(super) fn opened(
        &mut self,
        place: NodeIndex,
        epoch: u64,
        found: RecordFound,
        result: Result<Opened<R>, OpError>,
    ) {
        let vertex = &mut self.graph[place];
        if vertex.epoch != epoch || !matches!(vertex.step, Step::Opening(_)) {
            return;
        }
        let opening = std::mem::replace(&mut vertex.step, Step::Waiting);
        match result {
            Ok(Opened::Found(produced)) => {
                self.report_cached(place, SystemTime::now());
                return self.finish(place, Arc::new(produced));
            }
            Ok(Opened::Gone(_)) if found.imported => {}
            Ok(Opened::Gone(results)) => {
                match self.shared.keys.remove(found.key.as_bytes(), &results) {
                    Ok(true) => {}
                    // Somebody has made it anew.
                    Ok(false) => self.graph[place].tried.clear(found.kind),
                    Err(error) => {
                        tracing::warn!(vertex = &*self.graph[place].state.digest, %error, "a stale record was not removed");
                    }
                }
                self.note(place, found.kind, found.key, Found::Gone(results));
            }
            Err(error) => self.note(place, found.kind, found.key, Found::Unreadable(error.message)),
        }
        if let Step::Opening(below) = opening {
            self.held.extend(below);
        }
        self.ready.insert(place);
    }

    pub(super) fn content_digest(&mut self, place: NodeIndex, input: usize, digest: Result<Key, OpError>) {
        match digest {
            _ if self.graph[place].is_settled() => {}
            Ok(digest) => {
                self.know_part(place, input, InputPart::Digest(Box::new(Part::Query(digest))));
                self.ready.insert(place);
            }
            Err(mut error) => {
                error.message = format!("failed to compute cache key: {}", error.message);
                let edge = self.graph[place].inputs[input];
                let read = self.graph[edge.vertex].produced().and_then(|made| made.output(edge.output));
                let remains = read.map(|read| Arc::new(Remains::Key { input: read.clone(), index: input }));
                self.fail_op(place, Failure { error, remains });
            }
        }
    }

    pub(super) fn output_digest(&mut self, edge: super::Edge, digest: Result<Key, OpError>) {
        let known = digest.as_ref().map_or(OutputDigest::Failed, |digest| OutputDigest::Known(*digest));
        self.output_digests.insert(edge, known);
        let counts_by_output = self.graph[edge.vertex].content.is_none();
        let mut uses = self.graph.uses(edge.vertex);
        while let Some((above, input)) = self.graph.next_use(&mut uses) {
            let vertex = &self.graph[above];
            if vertex.inputs[input] != edge || vertex.reads_part(input) || vertex.map().is_none() {
                continue;
            }
            if counts_by_output {
                match &digest {
                    Ok(digest) => {
                        self.know_part(above, input, InputPart::Digest(Box::new(Part::Output(*digest))));
                    }
                    Err(error) if self.graph[above].inputs_wanted => {
                        let message = format!("failed to compute cache key: {}", error.message);
                        self.fail_op(above, OpError { message, ..error.clone() });
                    }
                    Err(_) => {}
                }
            }
            let vertex = &mut self.graph[above];
            vertex.outputs_missing = vertex.outputs_missing.saturating_sub(1);
            self.ready.insert(above);
        }
    }

    /// The keys under which the result of a vertex is remembered.
    pub(super) fn recorded_under(&self, place: NodeIndex) -> impl Iterator<Item = Key> + use<R> {
        let vertex = &self.graph[place];
        let definition = match vertex.definition {
            Definition::Known(key) => Some(key),
            Definition::Unknown | Definition::Absent => None,
        };
        let content = vertex.content.filter(|content| content.distinct).map(|content| content.key);
        definition.into_iter().chain(content).chain(vertex.output_key)
    }

    fn run_vertex(&mut self, place: NodeIndex) {
        let priority = self.priority(place);
        let keys: Vec<Key> = self.recorded_under(place).collect();
        let vertex = &self.graph[place];
        let Some(map) = vertex.map() else { return };
        let mut inputs = Vec::with_capacity(vertex.inputs.len());
        for (input, edge) in vertex.inputs.iter().enumerate() {
            let Some(produced) = self.graph[edge.vertex].produced() else { return };
            inputs.push(JobInput {
                produced: produced.clone(),
                output: edge.output,
                content: vertex.content_read(input).map(Box::new),
            });
        }
        let reads_whole = (0..vertex.inputs.len()).any(|input| !vertex.reads_part(input));
        let content_fresh = vertex.content.is_some_and(|content| content.fresh);
        // A forced run answers no one else, and a key that stands for something that was forced
        // below is not one to be found by.
        let shared_by = keys
            .iter()
            .filter(|key| match vertex.output_key {
                _ if vertex.ignore_cache => false,
                Some(output_key) if output_key == **key => true,
                _ if vertex.definition == Definition::Known(**key) => !vertex.fresh,
                _ => !content_fresh,
            })
            .copied()
            .collect();
        let job = Job {
            vertex: vertex.state.digest.clone(),
            name: vertex.state.name.clone(),
            op: vertex.op.clone(),
            map: map.clone(),
            ignore_cache: vertex.ignore_cache,
            inputs,
            shared_by,
            content_key: vertex.content.filter(|content| content.distinct).map(|content| content.key),
            output_key_pending: reads_whole && vertex.output_key.is_none(),
            keys,
            build: self.id,
            priority,
            looked_up: vertex.looked_up,
        };
        match work::start(&self.shared, job) {
            Started::Begun(work) => self.work_on(place, work, true),
            Started::Joined(work, key) => {
                self.note(place, self.kind_of(place, key), key, Found::InFlight);
                self.work_on(place, work, false);
            }
            Started::Ended { told: (began, events), outcome } => {
                if let Some(at) = began {
                    self.note_started(place, at);
                    self.report(place, |_| {});
                }
                for event in events {
                    self.progress.event(event);
                }
                self.ended(place, true, outcome);
            }
        }
    }

    fn work_on(&mut self, place: NodeIndex, work: Arc<Work<R>>, starter: bool) {
        let priority = self.priority(place);
        let vertex = &mut self.graph[place];
        let started = Arc::new(OnceLock::new());
        let watcher = BuildWatcher {
            state: vertex.state.clone(),
            sink: self.progress.clone(),
            events: self.events.clone(),
            place,
            epoch: vertex.epoch,
            started: started.clone(),
        };
        let asker = work.ask(Arc::new(watcher), (self.id, priority), starter);
        self.graph[place].step = Step::Working(Watched { asker, started });
        self.release_inputs(place);
    }

    pub(super) fn started(&mut self, place: NodeIndex, epoch: u64, at: SystemTime) {
        if self.graph[place].epoch == epoch {
            self.note_started(place, at);
        }
    }

    pub(super) fn worked(&mut self, place: NodeIndex, epoch: u64, outcome: Outcome<R>) {
        match &self.graph[place].step {
            Step::Working(watched) if self.graph[place].epoch == epoch => {
                let ours = watched.asker.is_ours();
                self.ended(place, ours, outcome);
            }
            _ => {}
        }
    }

    /// A process ended by itself, and nothing that it was given came from a client.
    fn is_own_failure(&self, place: NodeIndex, error: &OpError) -> bool {
        error.exit_code.is_some() && !self.graph[place].op.needs_client()
    }

    /// Work for a vertex ended; `ours` if it was this build's.
    fn ended(&mut self, place: NodeIndex, ours: bool, outcome: Outcome<R>) {
        match outcome.result {
            Ok(produced) => {
                if outcome.cached {
                    self.report_cached(place, SystemTime::now());
                } else {
                    self.report_completed(place);
                }
                self.finish(place, produced);
            }
            // It may have failed for want of what the other build had; this one tries for itself.
            Err(failure)
                if (outcome.orphaned && !self.is_own_failure(place, &failure.error))
                    || (!ours && failure.error.is_transient()) =>
            {
                self.start_over(place);
                self.ready.insert(place);
            }
            Err(failure) => self.fail_op(place, failure),
        }
    }
}
