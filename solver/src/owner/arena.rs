//! The arena: the vertices of a build, what is known of each, and who uses whom.

use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::time::Duration;

use petgraph::Direction;
use petgraph::graph::{DefaultIx, DiGraph, NodeIndex, WalkNeighbors};

use super::Edge;
use super::report::{MapProgress, Watched};
use crate::error::SolveError;
use crate::explain::{Found, KeyKind, Lookup};
use crate::keys::Part;
use crate::op::{CacheMap, Failure, Key, Op};
use crate::produced::Produced;
use crate::progress::VertexState;
use crate::work::Work;

/// The vertices of a build. Inputs are always added first, so the order of indices is topological.
pub(super) struct Arena<R> {
    vertices: Vec<Vertex<R>>,
    /// An edge leads from a vertex to one of its inputs and weighs its position. Walks over it stay in little memory:
    /// vertices are large.
    edges: DiGraph<(), u32>,
}

impl<R> Arena<R> {
    pub(super) fn new() -> Self {
        Self { vertices: Vec::new(), edges: DiGraph::new() }
    }

    /// Makes room for this many more.
    pub(super) fn reserve(&mut self, vertices: usize, inputs: usize) {
        self.edges.reserve_exact_edges(inputs);
        self.vertices.reserve_exact(vertices);
        self.edges.reserve_exact_nodes(vertices);
    }

    pub(super) fn add(&mut self, vertex: Vertex<R>) -> NodeIndex {
        let place = self.edges.add_node(());
        for (position, edge) in vertex.inputs.iter().enumerate() {
            self.edges.add_edge(place, edge.vertex, position as u32);
        }
        self.vertices.push(vertex);
        place
    }

    pub(super) fn places(&self) -> impl Iterator<Item = NodeIndex> + use<R> {
        self.edges.node_indices()
    }

    pub(super) fn vertices(&self) -> &[Vertex<R>] {
        &self.vertices
    }

    /// The uses of a vertex, to be walked with [`Self::next_use`].
    pub(super) fn uses(&self, vertex: NodeIndex) -> WalkNeighbors<DefaultIx> {
        self.edges.neighbors_directed(vertex, Direction::Incoming).detach()
    }

    /// The next use: by whom, and as which of its inputs.
    pub(super) fn next_use(&self, uses: &mut WalkNeighbors<DefaultIx>) -> Option<(NodeIndex, usize)> {
        let (edge, above) = uses.next(&self.edges)?;
        Some((above, self.edges[edge] as usize))
    }
}

impl<R> Index<NodeIndex> for Arena<R> {
    type Output = Vertex<R>;

    fn index(&self, place: NodeIndex) -> &Vertex<R> {
        &self.vertices[place.index()]
    }
}

impl<R> IndexMut<NodeIndex> for Arena<R> {
    fn index_mut(&mut self, place: NodeIndex) -> &mut Vertex<R> {
        &mut self.vertices[place.index()]
    }
}

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
    pub(super) namesake: Option<NodeIndex>,
    pub(super) announced: bool,
    /// Everything below was reported as done.
    pub(super) reported_below: bool,

    pub(super) map: Map,
    pub(super) definition: Definition,
    pub(super) definition_missing: u32,
    pub(super) content: Option<Content>,
    /// For each input, what it contributes to the content key.
    pub(super) parts: Vec<InputPart>,
    pub(super) content_missing: u32,
    pub(super) output_key: Option<Key>,

    pub(super) step: Step<R>,
    /// Counts steps taken back, to tell answers that are no longer waited for.
    pub(super) epoch: u64,
    pub(super) tried: Tried,
    /// The recorder's moment before the first look-up of this attempt.
    pub(super) looked_up: u64,
    /// How many consumers and requests want the result.
    pub(super) wanted: u32,
    pub(super) inputs_wanted: bool,
    pub(super) inputs_missing: u32,
    pub(super) outputs_missing: u32,
    /// Longest path from its start to the end of the build, once ranked; until then, the
    /// longest below its consumers.
    pub(super) remaining: Duration,
    /// The look-ups that found something, and those that failed.
    pub(super) lookups: Vec<Lookup>,
}

/// What the operation says it depends on.
pub(super) enum Map {
    Unasked,
    /// The operation needs no asking, but nothing has been made of its answer.
    Told(Arc<CacheMap>),
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

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InputPart {
    Unknown,
    Asked,
    /// The input's own content key.
    Edge,
    /// A digest of what it is or of a part of it.
    Digest(Box<Part>),
}

/// Which keys of a vertex just became known, or were found not to be.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct News {
    pub(super) definition: bool,
    pub(super) content: bool,
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
    /// A record was found; its results are being loaded. What was at work below waits for the outcome: if they are
    /// gone, it is needed.
    Opening(Vec<Arc<Work<R>>>),
    /// Somebody is at it.
    Working(Watched<R>),
    Done(Arc<Produced<R>>),
    Failed(Arc<SolveError<R>>),
}

/// Which keys were looked up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tried {
    pub(super) definition: bool,
    pub(super) content: bool,
    pub(super) output: bool,
    /// In imported caches, by what corresponds to the definition or content key.
    pub(super) imported_definition: bool,
    pub(super) imported_content: bool,
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
            Map::Unasked | Map::Told(_) | Map::Asked(_) => None,
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

    /// The operation is still to be asked what it depends on.
    pub(super) fn is_unasked(&self) -> bool {
        matches!(self.map, Map::Unasked | Map::Told(_)) && !self.is_settled()
    }

    /// Digest of the content that the operation reads of this input, if it says what that is.
    pub(super) fn content_read(&self, input: usize) -> Option<Key> {
        match &self.parts[input] {
            InputPart::Digest(part) => match **part {
                Part::Query(digest) => Some(digest),
                Part::Edge(..) | Part::Output(_) => None,
            },
            InputPart::Unknown | InputPart::Asked | InputPart::Edge => None,
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        matches!(self.step, Step::Done(_) | Step::Failed(_))
    }

    /// The look-ups of this vertex, those for nothing among them.
    pub(super) fn all_lookups(&self) -> Vec<Lookup> {
        let definition = match self.definition {
            Definition::Known(key) if !self.fresh => Some(key),
            _ => None,
        };
        let content = self.content.map(|content| content.key);
        let mut all = Vec::new();
        for (kind, tried, key) in [
            (KeyKind::Definition, self.tried.definition, definition),
            (KeyKind::Content, self.tried.content, content),
            (KeyKind::Output, self.tried.output, self.output_key),
        ] {
            let known = all.len();
            all.extend(self.lookups.iter().filter(|lookup| lookup.kind == kind).cloned());
            if all.len() == known && tried {
                all.extend(key.map(|key| Lookup { kind, key, found: Found::Nothing }));
            }
        }
        all
    }

    pub(super) fn error(&self, failure: Failure<R>) -> SolveError<R> {
        SolveError::new(self.state.digest.clone(), self.state.name.clone(), failure)
    }
}
