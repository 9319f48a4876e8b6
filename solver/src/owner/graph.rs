//! How definitions enter the arena, and how keys spread upwards from the sources.
//! Everything is a worklist: no recursion over the graph.

use std::sync::Arc;
use std::time::Duration;

use petgraph::graph::NodeIndex;

use super::arena::{Content, Definition, InputPart, Map, News, Step, Tried, Vertex};
use super::{Edge, Owner};
use crate::error::SolveError;
use crate::keys::{CONTENT_KEY, DEFINITION_KEY, Part, vertex_key};
use crate::op::{CacheMap, OpError};
use crate::prepare::{Prepared, PreparedVertex};
use crate::progress::{Event as ProgressEvent, VertexState};

impl<R: Clone + Send + Sync + 'static> Owner<R> {
    /// Adds what is new of a definition and announces it.
    pub(super) fn load(&mut self, prepared: Prepared<R>) -> Result<Option<Edge>, SolveError<R>> {
        let mut places: Vec<NodeIndex> = Vec::with_capacity(prepared.vertices.len());
        let first = self.by_digest.is_empty();
        if first {
            // Later definitions mostly repeat what the first brought.
            let inputs = prepared.vertices.iter().map(|vertex| vertex.inputs.len()).sum();
            self.graph.reserve(prepared.vertices.len(), inputs);
            self.by_digest.reserve(prepared.vertices.len());
        }
        for vertex in prepared.vertices {
            let info = &vertex.info;
            let refused = |text: &str| SolveError::load(Some(&info.digest), &info.name, OpError::new(text));
            let edge =
                |&(input, output): &(usize, u32)| places.get(input).map(|&vertex| Edge { vertex, output });
            let inputs = vertex.inputs.iter().map(edge).collect::<Option<Vec<Edge>>>();
            let inputs = inputs.ok_or_else(|| refused("invalid LLB: an input follows its consumer"))?;
            // A definition has no vertex twice.
            let known = if first { None } else { self.find(&vertex, &inputs) };
            let place = known.unwrap_or_else(|| self.add(vertex, inputs));
            places.push(place);
        }
        for &place in &places {
            let vertex = &mut self.graph[place];
            if !std::mem::replace(&mut vertex.announced, true) {
                self.progress.event(ProgressEvent::Vertex(vertex.state.clone()));
            }
        }
        Ok(prepared.root.and_then(|(root, output)| Some(Edge { vertex: *places.get(root)?, output })))
    }

    /// The same operation on the same inputs with the same options.
    fn find(&self, vertex: &PreparedVertex<R>, inputs: &[Edge]) -> Option<NodeIndex> {
        let mut next = self.by_digest.get(&vertex.info.digest).copied();
        while let Some(place) = next {
            let known = &self.graph[place];
            if known.ignore_cache == vertex.ignore_cache && known.inputs == inputs {
                break;
            }
            next = known.namesake;
        }
        next
    }

    fn add(&mut self, vertex: PreparedVertex<R>, inputs: Vec<Edge>) -> NodeIndex {
        let PreparedVertex { info, op, map, ignore_cache, .. } = vertex;
        let digest = info.digest.clone();
        let state = VertexState { info, ..VertexState::default() };
        let below = |edge: &Edge| &self.graph[edge.vertex];
        // Without an input's keys none can be made here either.
        let hopeless = inputs.iter().find_map(|edge| match &below(edge).step {
            Step::Failed(error) if below(edge).definition == Definition::Unknown => Some(error.clone()),
            _ => None,
        });
        let fresh = ignore_cache || inputs.iter().any(|edge| below(edge).fresh);
        let node = Vertex {
            op,
            ignore_cache,
            fresh,
            state,
            namesake: None,
            announced: false,
            reported_below: false,
            map: map.map_or(Map::Unasked, Map::Told),
            definition: Definition::Unknown,
            definition_missing: 0,
            content: None,
            parts: vec![InputPart::Unknown; inputs.len()],
            content_missing: 0,
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
        let place = self.graph.add(node);
        self.graph[place].namesake = self.by_digest.insert(digest, place);
        place
    }

    /// Takes in what an operation depends on and makes the keys for which that suffices. The caller tells those above.
    #[must_use]
    pub(super) fn know_map(&mut self, place: NodeIndex, map: Arc<CacheMap>) -> News {
        let persistent = map.persistent;
        let count = self.graph[place].inputs.len();
        self.graph[place].map = Map::Known(map);
        let (mut absent, mut missing, mut unknown) = (!persistent, 0, 0);
        for input in 0..count {
            let vertex = &self.graph[place];
            let below = &self.graph[vertex.inputs[input].vertex];
            match below.definition {
                Definition::Unknown => missing += 1,
                Definition::Absent => absent = true,
                Definition::Known(_) => {}
            }
            if below.content.is_some() && !vertex.reads_part(input) {
                self.graph[place].parts[input] = InputPart::Edge;
            } else {
                unknown += 1;
            }
        }
        let vertex = &mut self.graph[place];
        vertex.definition_missing = missing;
        vertex.content_missing = unknown;
        if absent {
            vertex.definition = Definition::Absent;
        } else if missing == 0 {
            self.make_definition(place);
        }
        News { definition: absent || missing == 0, content: unknown == 0 && self.make_content(place) }
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

    /// Takes in what an input contributes to a content key; the first answer counts.
    pub(super) fn know_part(&mut self, place: NodeIndex, input: usize, part: InputPart) {
        if self.set_part(place, input, part) {
            self.spread(place, News { definition: false, content: true });
        }
    }

    /// True if that completed the content key.
    fn set_part(&mut self, place: NodeIndex, input: usize, part: InputPart) -> bool {
        let vertex = &mut self.graph[place];
        if matches!(vertex.parts[input], InputPart::Edge | InputPart::Digest(_)) {
            return false;
        }
        vertex.parts[input] = part;
        vertex.content_missing -= 1;
        vertex.content_missing == 0 && self.make_content(place)
    }

    /// What an input counts by in the content key, once that is known.
    pub(super) fn part(&self, vertex: &Vertex<R>, input: usize) -> Option<Part> {
        match &vertex.parts[input] {
            InputPart::Unknown | InputPart::Asked => None,
            InputPart::Edge => {
                let edge = vertex.inputs[input];
                self.graph[edge.vertex].content.map(|content| Part::Edge(content.key, edge.output))
            }
            InputPart::Digest(part) => Some(**part),
        }
    }

    fn make_content(&mut self, place: NodeIndex) -> bool {
        let vertex = &self.graph[place];
        let Some(map) = vertex.map() else { return false };
        if !map.persistent || vertex.content.is_some() {
            return false;
        }
        let (mut distinct, mut fresh) = (false, vertex.ignore_cache);
        for (edge, part) in vertex.inputs.iter().zip(&vertex.parts) {
            match (part, self.graph[edge.vertex].content) {
                (InputPart::Edge, Some(below)) => {
                    distinct |= below.distinct;
                    fresh |= below.fresh;
                }
                _ => distinct = true,
            }
        }
        let key = match vertex.definition {
            // It says the same.
            Definition::Known(key) if !distinct => key,
            _ => {
                let selector =
                    |input: usize| map.inputs.get(input).and_then(|input| input.selector.as_deref());
                let parts = (0..vertex.inputs.len())
                    .filter_map(|input| Some((self.part(vertex, input)?, selector(input))));
                vertex_key(CONTENT_KEY, &map.digest, parts)
            }
        };
        self.graph[place].content = Some(Content { key, distinct, fresh });
        true
    }

    /// Tells those above of keys of `place`. Who doesn't know yet what their own operation depends on ask for
    /// the keys below them when they do.
    pub(super) fn spread(&mut self, place: NodeIndex, news: News) {
        let mut worklist = vec![(place, news)];
        while let Some((place, news)) = worklist.pop() {
            self.consider(place);
            let absent = self.graph[place].definition == Definition::Absent;
            let mut uses = self.graph.uses(place);
            while let Some((above, input)) = self.graph.next_use(&mut uses) {
                let vertex = &mut self.graph[above];
                if vertex.map().is_none() {
                    continue;
                }
                let mut made = News::default();
                if news.definition && vertex.definition == Definition::Unknown {
                    vertex.definition_missing -= 1;
                    made.definition = absent || vertex.definition_missing == 0;
                    if absent {
                        vertex.definition = Definition::Absent;
                    } else if made.definition {
                        self.make_definition(above);
                    }
                }
                if news.content && !self.graph[above].reads_part(input) {
                    made.content = self.set_part(above, input, InputPart::Edge);
                }
                if made.definition || made.content {
                    worklist.push((above, made));
                }
            }
        }
    }

    /// Has a vertex that somebody wants go on with what is known by now.
    pub(super) fn consider(&mut self, place: NodeIndex) {
        let vertex = &self.graph[place];
        if vertex.wanted > 0 && matches!(vertex.step, Step::Waiting) {
            self.ready.insert(place);
        }
    }
}
