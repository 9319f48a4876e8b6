//! The arena: vertices, how definitions enter it, and how keys spread upwards from the sources.
//! Everything is a worklist: no recursion over the graph.

use std::sync::Arc;
use std::time::Duration;

use kiln_proto::llb;
use petgraph::Direction;
use petgraph::graph::{DefaultIx, NodeIndex, WalkNeighbors};

use super::report::{MapProgress, Watched};
use super::{Edge, Owner};
use crate::error::SolveError;
use crate::explain::{KeyKind, Lookup};
use crate::keys::{CONTENT_KEY, DEFINITION_KEY, Part, vertex_key};
use crate::op::{CacheMap, Key, Op, OpError, OpVertex};
use crate::produced::Produced;
use crate::progress::{Event as ProgressEvent, VertexState};

/// A vertex of a build. What is known of it only grows; [`Step`] is where it stands while wanted.
pub(super) struct Vertex<R> {
    pub(super) op: Arc<dyn Op<R>>,
    pub(super) inputs: Vec<Edge>,
    pub(super) ignore_cache: bool,
    /// It or something below it must run anew: its definition key says nothing about its result.
    pub(super) fresh: bool,
    /// Who it is, and what the progress stream says of it.
    pub(super) state: VertexState,
    /// Another vertex with the same digest.
    namesake: Option<NodeIndex>,
    pub(super) announced: bool,
    /// Everything below was reported as done.
    pub(super) reported_below: bool,

    pub(super) map: Map,
    pub(super) definition: Definition,
    definition_missing: usize,
    pub(super) content: Option<Content>,
    /// For each input, what it contributes to the content key.
    pub(super) parts: Vec<InputPart>,
    content_missing: usize,
    pub(super) output_key: Option<Key>,

    pub(super) step: Step<R>,
    /// Counts steps taken back, to tell answers that are no longer waited for.
    pub(super) epoch: u64,
    pub(super) tried: Tried,
    /// The recorder's moment before the first look-up of this attempt.
    pub(super) looked_up: u64,
    /// How many consumers and requests want the result.
    pub(super) wanted: usize,
    pub(super) inputs_wanted: bool,
    pub(super) inputs_missing: usize,
    pub(super) outputs_missing: usize,
    /// Longest path from its start to the end of the build, once ranked; until then, the
    /// longest below its consumers.
    pub(super) remaining: Duration,
    pub(super) lookups: Vec<Lookup>,
}

/// What the operation says it depends on.
pub(super) enum Map {
    Unasked,
    Asked(Arc<MapProgress>),
    Known(Arc<CacheMap>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Definition {
    Unknown,
    /// Something below has no identity beyond this build.
    Absent,
    Known(Key),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Content {
    pub(super) key: Key,
    /// It may recognise what the definition key does not.
    pub(super) distinct: bool,
    /// Something that it stands for must run anew.
    pub(super) fresh: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputPart {
    Unknown,
    Asked,
    Known(Part),
}

/// The digest of a done vertex's output, once it was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) enum OutputDigest {
    Asked,
    Known(Key),
    Failed,
}

pub(super) enum Step<R> {
    /// It isn't wanted, or waits for keys, inputs or digests.
    Waiting,
    /// A record was found; its results are being loaded.
    Opening,
    /// Somebody is at it.
    Working(Watched<R>),
    Done(Arc<Produced<R>>),
    Failed(Arc<SolveError>),
}

/// Which keys were looked up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tried {
    pub(super) definition: bool,
    pub(super) content: bool,
    pub(super) output: bool,
}

impl Tried {
    pub(super) fn set(&mut self, kind: KeyKind) {
        *self.of(kind) = true;
    }

    pub(super) fn clear(&mut self, kind: KeyKind) {
        *self.of(kind) = false;
    }

    fn of(&mut self, kind: KeyKind) -> &mut bool {
        match kind {
            KeyKind::Definition => &mut self.definition,
            KeyKind::Content => &mut self.content,
            KeyKind::Output => &mut self.output,
        }
    }
}

impl<R> Vertex<R> {
    pub(super) fn map(&self) -> Option<&Arc<CacheMap>> {
        match &self.map {
            Map::Known(map) => Some(map),
            Map::Unasked | Map::Asked(_) => None,
        }
    }

    pub(super) fn produced(&self) -> Option<&Arc<Produced<R>>> {
        match &self.step {
            Step::Done(produced) => Some(produced),
            _ => None,
        }
    }

    /// True if the operation reads a part of this input whose content stands for it.
    pub(super) fn reads_part(&self, input: usize) -> bool {
        self.map().is_some_and(|map| map.inputs.get(input).is_some_and(|input| input.content.is_some()))
    }

    pub(super) fn is_settled(&self) -> bool {
        matches!(self.step, Step::Done(_) | Step::Failed(_))
    }

    pub(super) fn error(&self, error: OpError) -> SolveError {
        SolveError { vertex: Some(self.state.digest.clone()), name: self.state.name.clone(), error }
    }
}

impl<R: Clone + Send + Sync + 'static> Owner<R> {
    /// Adds what is new of a definition and announces it.
    pub(super) fn load(&mut self, loaded: llb::Loaded) -> Result<Option<Edge>, SolveError> {
        let mut places: Vec<NodeIndex> = Vec::with_capacity(loaded.vertices.len());
        self.graph.reserve_exact_nodes(loaded.vertices.len());
        self.by_digest.reserve(loaded.vertices.len());
        for vertex in loaded.vertices {
            let refused =
                |text: &str| SolveError::load(Some(&vertex.digest), &vertex.name, OpError::new(text));
            let edge =
                |&(input, output): &(usize, u32)| places.get(input).map(|&vertex| Edge { vertex, output });
            let inputs = vertex.inputs.iter().map(edge).collect::<Option<Vec<Edge>>>();
            let inputs = inputs.ok_or_else(|| refused("invalid LLB: an input follows its consumer"))?;
            let place = match self.find(&vertex, &inputs) {
                Some(place) => place,
                None => self.add(vertex, inputs)?,
            };
            places.push(place);
        }
        for &place in &places {
            let vertex = &mut self.graph[place];
            if !std::mem::replace(&mut vertex.announced, true) {
                self.options.progress.event(ProgressEvent::Vertex(vertex.state.clone()));
            }
        }
        Ok(loaded.root.and_then(|(root, output)| Some(Edge { vertex: *places.get(root)?, output })))
    }

    /// The same operation on the same inputs with the same options.
    fn find(&self, vertex: &llb::LoadedVertex, inputs: &[Edge]) -> Option<NodeIndex> {
        let mut next = self.by_digest.get(&vertex.digest).copied();
        while let Some(place) = next {
            let known = &self.graph[place];
            if known.ignore_cache == vertex.metadata.ignore_cache && known.inputs == inputs {
                break;
            }
            next = known.namesake;
        }
        next
    }

    fn add(&mut self, vertex: llb::LoadedVertex, inputs: Vec<Edge>) -> Result<NodeIndex, SolveError> {
        let ignore_cache = vertex.metadata.ignore_cache;
        let (digest, name) = (vertex.digest.clone(), vertex.name.clone());
        let state = VertexState {
            digest: digest.clone(),
            inputs: inputs.iter().map(|edge| self.graph[edge.vertex].state.digest.clone()).collect(),
            name: name.clone(),
            group: vertex.metadata.progress_group.clone().map(Arc::new),
            ..VertexState::default()
        };
        let vertex =
            OpVertex { digest: vertex.digest, op: vertex.op, metadata: vertex.metadata, name: vertex.name };
        let op = self
            .options
            .factory
            .op(&vertex)
            .map_err(|error| SolveError::load(Some(&digest), &name, error))?;

        let below = |edge: &Edge| &self.graph[edge.vertex];
        // Without an input's keys none can be made here either.
        let hopeless = inputs.iter().find_map(|edge| match &below(edge).step {
            Step::Failed(error) if below(edge).definition == Definition::Unknown => Some(error.clone()),
            _ => None,
        });
        let fresh = ignore_cache || inputs.iter().any(|edge| below(edge).fresh);
        let absent = inputs.iter().any(|edge| below(edge).definition == Definition::Absent);
        let missing = inputs.iter().filter(|edge| below(edge).definition == Definition::Unknown).count();
        let node = Vertex {
            op,
            ignore_cache,
            fresh,
            state,
            namesake: None,
            announced: false,
            reported_below: false,
            map: Map::Unasked,
            definition: if absent { Definition::Absent } else { Definition::Unknown },
            definition_missing: missing,
            content: None,
            parts: vec![InputPart::Unknown; inputs.len()],
            content_missing: inputs.len(),
            output_key: None,
            step: hopeless.map_or(Step::Waiting, Step::Failed),
            epoch: 0,
            tried: Tried::default(),
            looked_up: 0,
            wanted: 0,
            inputs_wanted: false,
            inputs_missing: 0,
            outputs_missing: 0,
            remaining: Duration::ZERO,
            lookups: Vec::new(),
            inputs,
        };
        let place = self.graph.add_node(node);
        for position in 0..self.graph[place].inputs.len() {
            let below = self.graph[place].inputs[position].vertex;
            self.graph.add_edge(place, below, position as u32);
        }
        self.graph[place].namesake = self.by_digest.insert(digest, place);
        Ok(place)
    }

    /// The uses of a vertex, to be walked with [`Self::next_use`].
    pub(super) fn uses(&self, vertex: NodeIndex) -> WalkNeighbors<DefaultIx> {
        self.graph.neighbors_directed(vertex, Direction::Incoming).detach()
    }

    /// The next use: by whom, and as which of its inputs.
    pub(super) fn next_use(&self, uses: &mut WalkNeighbors<DefaultIx>) -> Option<(NodeIndex, usize)> {
        let (edge, above) = uses.next(&self.graph)?;
        Some((above, self.graph[edge] as usize))
    }

    /// Takes in what an operation depends on and spreads the keys that follow from it.
    pub(super) fn know_map(&mut self, place: NodeIndex, map: CacheMap) {
        let vertex = &mut self.graph[place];
        let persistent = map.persistent;
        vertex.map = Map::Known(Arc::new(map));
        if vertex.definition == Definition::Unknown {
            if !persistent {
                vertex.definition = Definition::Absent;
                self.spread_definition(place);
            } else if vertex.definition_missing == 0 {
                self.make_definition(place);
                self.spread_definition(place);
            }
        }
        for input in 0..self.graph[place].inputs.len() {
            let below = self.graph[place].inputs[input];
            if !self.graph[place].reads_part(input)
                && let Some(content) = self.graph[below.vertex].content
            {
                self.know_part(place, input, Part::Edge(content.key, below.output));
            }
        }
        if self.graph[place].inputs.is_empty() {
            self.make_content(place);
            self.spread_content(place);
        }
    }

    fn make_definition(&mut self, place: NodeIndex) {
        let vertex = &self.graph[place];
        let Some(map) = vertex.map() else { return };
        let parts = vertex.inputs.iter().enumerate().filter_map(|(i, edge)| {
            let Definition::Known(key) = self.graph[edge.vertex].definition else { return None };
            let selector = map.inputs.get(i).and_then(|input| input.selector.as_deref());
            Some((Part::Edge(key, edge.output), selector))
        });
        let key = vertex_key(DEFINITION_KEY, &map.digest, parts);
        self.graph[place].definition = Definition::Known(key);
    }

    /// `place` just got its definition key, or was found to have none: tells all above.
    fn spread_definition(&mut self, place: NodeIndex) {
        let mut worklist = vec![place];
        while let Some(place) = worklist.pop() {
            self.ready.insert(place);
            let absent = self.graph[place].definition == Definition::Absent;
            let mut uses = self.uses(place);
            while let Some((above, _)) = self.next_use(&mut uses) {
                let vertex = &mut self.graph[above];
                if vertex.definition != Definition::Unknown {
                    continue;
                }
                if absent {
                    vertex.definition = Definition::Absent;
                    worklist.push(above);
                    continue;
                }
                vertex.definition_missing -= 1;
                if vertex.definition_missing == 0 && vertex.map().is_some() {
                    self.make_definition(above);
                    worklist.push(above);
                }
            }
        }
    }

    /// Takes in what an input contributes to a content key; the first answer counts.
    pub(super) fn know_part(&mut self, place: NodeIndex, input: usize, part: Part) {
        if self.set_part(place, input, part) {
            self.spread_content(place);
        }
    }

    /// True if that completed the content key.
    fn set_part(&mut self, place: NodeIndex, input: usize, part: Part) -> bool {
        let vertex = &mut self.graph[place];
        if matches!(vertex.parts[input], InputPart::Known(_)) {
            return false;
        }
        vertex.parts[input] = InputPart::Known(part);
        vertex.content_missing -= 1;
        vertex.content_missing == 0 && self.make_content(place)
    }

    fn make_content(&mut self, place: NodeIndex) -> bool {
        let vertex = &self.graph[place];
        let Some(map) = vertex.map() else { return false };
        if !map.persistent || vertex.content.is_some() {
            return false;
        }
        let parts = vertex.parts.iter().enumerate().filter_map(|(i, part)| match part {
            InputPart::Known(part) => {
                Some((*part, map.inputs.get(i).and_then(|input| input.selector.as_deref())))
            }
            InputPart::Unknown | InputPart::Asked => None,
        });
        let key = vertex_key(CONTENT_KEY, &map.digest, parts);
        let mut content = Content { key, distinct: false, fresh: vertex.ignore_cache };
        for (edge, part) in vertex.inputs.iter().zip(&vertex.parts) {
            let below = self.graph[edge.vertex].content;
            match part {
                InputPart::Known(Part::Edge(..)) => {
                    content.distinct |= below.is_some_and(|below| below.distinct);
                    content.fresh |= below.is_some_and(|below| below.fresh);
                }
                _ => content.distinct = true,
            }
        }
        self.graph[place].content = Some(content);
        true
    }

    /// `place` just got its content key: tells those above that count it by that.
    pub(super) fn spread_content(&mut self, place: NodeIndex) {
        let mut worklist = vec![place];
        while let Some(place) = worklist.pop() {
            let Some(content) = self.graph[place].content else { continue };
            self.ready.insert(place);
            let mut uses = self.uses(place);
            while let Some((above, input)) = self.next_use(&mut uses) {
                let vertex = &self.graph[above];
                if vertex.map().is_none() || vertex.reads_part(input) {
                    continue;
                }
                let output = vertex.inputs[input].output;
                if self.set_part(above, input, Part::Edge(content.key, output)) {
                    worklist.push(above);
                }
            }
        }
    }
}
