//! Imported caches in a build: which of their records correspond to which outputs of the graph, by BuildKit's rules,
//! and taking results from them. Also the reverse, what a cache is told. A build without them never comes here.
//!
//! A record corresponds to an output if it has the digest that follows from the operation, and each of its inputs may
//! be what the vertex has there: a record that corresponds to that input, or the content that is read of it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use fixedbitset::FixedBitSet;
use kiln_cache::{KeyRecord, MISSING_RESULT};
use petgraph::graph::NodeIndex;
use rustc_hash::FxBuildHasher;

use super::arena::{Definition, InputPart, Step, Tried, Vertex};
use super::{Edge, Event, Owner, RecordFound};
use crate::explain::{Found, KeyKind};
use crate::export::{Described, ExportInput, ExportVertex, Importable, Sources};
use crate::import::{self, ImportedCache, record_digest};
use crate::op::{Key, OpError};
use crate::produced::{Opened, Produced, is_partial, record_lacks};
use crate::work::guarded;

/// A record of one of the caches.
type Place = (u32, u32);

type Lineages = HashMap<Edge, Arc<[Place]>, FxBuildHasher>;

pub(super) struct Imports<R> {
    caches: Vec<Arc<dyn ImportedCache<R>>>,
    /// What corresponds to an output by definitions alone.
    by_definition: Lineages,
    /// What does when the content that is read is known.
    by_content: Lineages,
}

impl<R> Default for Imports<R> {
    fn default() -> Self {
        Self { caches: Vec::new(), by_definition: Lineages::default(), by_content: Lineages::default() }
    }
}

impl<R> Imports<R> {
    pub(super) fn add(&mut self, cache: Arc<dyn ImportedCache<R>>) {
        self.caches.push(cache);
        self.by_definition.clear();
        self.by_content.clear();
    }

    fn cache(&self, record: Place) -> &Arc<dyn ImportedCache<R>> {
        &self.caches[record.0 as usize]
    }

    fn known(&self, kind: KeyKind) -> &Lineages {
        match kind {
            KeyKind::Definition => &self.by_definition,
            KeyKind::Content | KeyKind::Output => &self.by_content,
        }
    }
}

impl<R: Clone + Send + Sync + 'static> Owner<R> {
    /// By what an output can be recognised now.
    fn lineage_kind(&self, place: NodeIndex) -> Option<KeyKind> {
        let vertex = &self.graph[place];
        vertex.map().filter(|map| map.persistent)?;
        match vertex.definition {
            _ if vertex.content.is_some() => Some(KeyKind::Content),
            Definition::Known(_) => Some(KeyKind::Definition),
            Definition::Unknown | Definition::Absent => None,
        }
    }

    /// The records that correspond to an output. Each output is worked out once for each kind.
    fn lineage(&self, imports: &mut Imports<R>, edge: Edge, kind: KeyKind) -> Arc<[Place]> {
        let mut pending = vec![(edge, kind, false)];
        while let Some((edge, kind, below_known)) = pending.pop() {
            if imports.known(kind).contains_key(&edge) {
                continue;
            }
            let vertex = &self.graph[edge.vertex];
            let candidates = self.candidates(imports, edge);
            if !candidates.is_empty() && !below_known {
                pending.push((edge, kind, true));
                let below = vertex.inputs.iter();
                pending.extend(below.filter_map(|edge| Some((*edge, self.below(edge, kind)?, false))));
                continue;
            }
            let kept =
                candidates.into_iter().filter(|record| self.corresponds(imports, vertex, kind, *record));
            let kept: Arc<[Place]> = kept.collect();
            match kind {
                KeyKind::Definition => imports.by_definition.insert(edge, kept),
                KeyKind::Content | KeyKind::Output => imports.by_content.insert(edge, kept),
            };
        }
        imports.known(kind).get(&edge).cloned().unwrap_or_else(|| Arc::from([]))
    }

    /// How an input counts for what uses it.
    fn below(&self, edge: &Edge, kind: KeyKind) -> Option<KeyKind> {
        match kind {
            KeyKind::Definition => Some(KeyKind::Definition),
            KeyKind::Content | KeyKind::Output => self.lineage_kind(edge.vertex),
        }
    }

    /// Records with the right digest.
    fn candidates(&self, imports: &Imports<R>, edge: Edge) -> Vec<Place> {
        let Some(map) = self.graph[edge.vertex].map().filter(|map| map.persistent) else { return Vec::new() };
        let digest = record_digest(&import::operation(map), edge.output.into());
        let of = |(at, cache): (usize, &Arc<dyn ImportedCache<R>>)| {
            cache.records(&digest).iter().map(|record| (at as u32, *record)).collect::<Vec<_>>()
        };
        imports.caches.iter().enumerate().flat_map(of).collect()
    }

    fn corresponds(&self, imports: &Imports<R>, vertex: &Vertex<R>, kind: KeyKind, record: Place) -> bool {
        let cache = imports.cache(record);
        let inputs = cache.inputs(record.1);
        inputs.len() == vertex.inputs.len()
            && inputs.iter().enumerate().all(|(input, links)| {
                let edge = &vertex.inputs[input];
                let selector = selector(vertex, input).unwrap_or_default();
                let below = self.below(edge, kind).and_then(|kind| imports.known(kind).get(edge));
                let content = self.content_record(vertex, input);
                links.iter().any(|link| {
                    let is_below = below.is_some_and(|below| below.contains(&(record.0, link.record)));
                    let is_content = || {
                        let (digest, selector) = content.as_ref()?;
                        let leaf = cache.inputs(link.record).is_empty();
                        Some(leaf && link.selector == *selector && cache.digest(link.record)? == *digest)
                    };
                    is_below && link.selector == selector || is_content().unwrap_or_default()
                })
            })
    }

    /// The record of the content that is read of an input, if that is known.
    fn content_record(&self, vertex: &Vertex<R>, input: usize) -> Option<(import::RecordDigest, String)> {
        match &vertex.parts[input] {
            InputPart::Digest(part) => import::content(part, selector(vertex, input)),
            InputPart::Unknown | InputPart::Asked | InputPart::Edge => None,
        }
    }

    /// The outputs of a vertex that somebody waits for.
    fn outputs_wanted(&self, place: NodeIndex) -> BTreeSet<u32> {
        let requested = self.requested.get(&place).into_iter().flatten();
        let mut outputs: BTreeSet<u32> =
            requested.filter_map(|id| Some(self.requests.get(id)?.edge.output)).collect();
        let mut uses = self.graph.uses(place);
        while let Some((above, input)) = self.graph.next_use(&mut uses) {
            let vertex = &self.graph[above];
            if vertex.inputs_wanted && !vertex.is_settled() {
                outputs.insert(vertex.inputs[input].output);
            }
        }
        outputs
    }

    /// True if a record does not have what is wanted of a vertex.
    pub(super) fn is_lacking(&self, place: NodeIndex, record: &KeyRecord) -> bool {
        is_partial(record) && record_lacks(record, self.outputs_wanted(place))
    }

    /// Looks a vertex up in the imported caches, once for each kind of key; true if something was found and the vertex
    /// waits for that.
    pub(super) fn try_imports(&mut self, place: NodeIndex, kind: KeyKind) -> bool {
        let vertex = &mut self.graph[place];
        let (key, fresh, tried) = match (kind, vertex.definition, vertex.content) {
            (KeyKind::Definition, Definition::Known(key), _) => {
                (key, vertex.fresh, &mut vertex.tried.imported_definition)
            }
            (KeyKind::Content, _, Some(content)) if content.distinct => {
                (content.key, content.fresh, &mut vertex.tried.imported_content)
            }
            _ => return false,
        };
        if std::mem::replace(tried, true) || fresh {
            return false;
        }
        let Some(mut imports) = self.imports.take() else { return false };
        let wanted = self.outputs_wanted(place);
        let found: Option<Vec<_>> = wanted
            .into_iter()
            .map(|output| {
                let lineage = self.lineage(&mut imports, Edge { vertex: place, output }, kind);
                let with_result = |record: &&Place| imports.cache(**record).has_result(record.1);
                let results = lineage.iter().filter(with_result);
                let results: Vec<_> =
                    results.map(|record| (imports.cache(*record).clone(), record.1)).collect();
                (!results.is_empty()).then_some((output, results))
            })
            .collect();
        self.imports = Some(imports);
        let Some(found) = found.filter(|found| !found.is_empty()) else { return false };
        self.note(place, kind, key, Found::Record);
        let below = self.release_inputs(place);
        let vertex = &mut self.graph[place];
        vertex.step = Step::Opening(below);
        self.opening += 1;
        let (epoch, name, shared) = (vertex.epoch, vertex.state.name.clone(), self.shared.clone());
        let content = vertex.content.filter(|content| content.distinct);
        self.spawn(async move {
            let id = |result: &Option<R>| {
                result.as_ref().map_or_else(|| MISSING_RESULT.to_owned(), |result| shared.results.id(result))
            };
            let result = guarded(take(found)).await.map(|outputs| match outputs {
                Some(outputs) => {
                    let results = outputs.iter().map(id).collect();
                    let content_key = content.map(|content| *content.key.as_bytes());
                    Opened::Found(Produced::imported(outputs, KeyRecord { results, name, content_key }))
                }
                None => Opened::Gone(Vec::new()),
            });
            let found = RecordFound { kind, key, imported: true };
            Event::Opened { vertex: place, epoch, found, result }
        });
        true
    }

    /// Has a vertex run after all, of which an imported cache did not have the output that is now wanted.
    pub(super) fn complete(&mut self, edge: Edge) {
        let vertex = &mut self.graph[edge.vertex];
        if !vertex.produced().is_some_and(|produced| produced.lacks(edge.output)) {
            return;
        }
        vertex.step = Step::Waiting;
        vertex.epoch += 1;
        vertex.outputs_missing = 0;
        vertex.tried = Tried {
            definition: true,
            content: true,
            output: false,
            imported_definition: true,
            imported_content: true,
        };
        let mut uses = self.graph.uses(edge.vertex);
        while let Some((above, _)) = self.graph.next_use(&mut uses) {
            let above = &mut self.graph[above];
            if above.inputs_wanted && !above.is_settled() {
                above.inputs_missing += 1;
            }
        }
        self.ready.insert(edge.vertex);
    }

    /// What a cache elsewhere is told of a result: everything below it, inputs first.
    pub(super) fn describe(&mut self, root: Edge) -> Described<R> {
        let mut outputs: HashMap<NodeIndex, BTreeSet<u32>> = HashMap::new();
        let mut needed = FixedBitSet::with_capacity(root.vertex.index() + 1);
        needed.insert(root.vertex.index());
        outputs.entry(root.vertex).or_default().insert(root.output);
        for index in (0..=root.vertex.index()).rev() {
            if !needed.contains(index) {
                continue;
            }
            for edge in &self.graph[NodeIndex::new(index)].inputs {
                needed.insert(edge.vertex.index());
                outputs.entry(edge.vertex).or_default().insert(edge.output);
            }
        }
        let order: Vec<NodeIndex> = needed.ones().map(NodeIndex::new).collect();
        let places: HashMap<NodeIndex, usize> =
            order.iter().enumerate().map(|(at, place)| (*place, at)).collect();
        let mut imports = self.imports.take();
        let mut described = Described { vertices: Vec::new(), sources: Vec::new() };
        for place in order {
            let vertex = &self.graph[place];
            let mut found: HashMap<u32, Vec<Importable<R>>> = HashMap::new();
            if let (Some(imports), Some(kind)) = (&mut imports, self.lineage_kind(place)) {
                for output in &outputs[&place] {
                    let lineage = self.lineage(imports, Edge { vertex: place, output: *output }, kind);
                    let known = lineage.iter().map(|record| (imports.cache(*record).clone(), record.1));
                    found.insert(*output, known.collect());
                }
            }
            let input = |(at, edge): (usize, &Edge)| {
                let mut contents: Vec<_> = self.content_record(vertex, at).into_iter().collect();
                // What the imported cache knows by content stays known by it.
                for (cache, record) in found.values().flatten() {
                    for link in cache.inputs(*record).get(at).into_iter().flatten() {
                        if cache.inputs(link.record).is_empty()
                            && let Some(digest) = cache.digest(link.record)
                            && !contents.contains(&(digest, link.selector.clone()))
                        {
                            contents.push((digest, link.selector.clone()));
                        }
                    }
                }
                ExportInput {
                    vertex: places[&edge.vertex],
                    output: edge.output,
                    selector: selector(vertex, at).unwrap_or_default().to_owned(),
                    contents,
                }
            };
            let definition = match vertex.definition {
                Definition::Known(key) if !vertex.fresh => Some(key),
                _ => None,
            };
            let content = vertex.content.filter(|content| !content.fresh).map(|content| content.key);
            let keys: Vec<Key> = definition.into_iter().chain(content).collect();
            described.vertices.push(ExportVertex {
                operation: vertex.map().filter(|map| map.persistent).map(|map| import::operation(map)),
                inputs: vertex.inputs.iter().enumerate().map(input).collect(),
                outputs: outputs[&place].iter().map(|output| (*output, None)).collect(),
            });
            found.values_mut().for_each(|found| found.retain(|(cache, record)| cache.has_result(*record)));
            let produced = vertex.produced().cloned();
            let unread = |at: usize| {
                let known = matches!(vertex.parts[at], InputPart::Digest(_));
                let query = vertex.map()?.inputs.get(at)?.content.clone();
                Some((at, query.filter(|_| !known)?))
            };
            let unread = (0..vertex.inputs.len()).filter_map(unread).collect();
            described.sources.push(Sources { produced, keys, unread, imported: found });
        }
        self.imports = imports;
        described
    }
}

fn selector<R>(vertex: &Vertex<R>, input: usize) -> Option<&str> {
    vertex.map()?.inputs.get(input)?.selector.as_deref()
}

/// The first result that can be had, for each output; `None` if one has none.
async fn take<R: Send + 'static>(
    found: Vec<(u32, Vec<Importable<R>>)>,
) -> Result<Option<Vec<Option<R>>>, OpError> {
    let mut outputs: Vec<Option<R>> = Vec::new();
    for (output, records) in found {
        let mut result = None;
        for (cache, record) in records {
            match cache.load(record).await {
                Ok(Some(loaded)) => {
                    result = Some(loaded);
                    break;
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "a result of an imported cache could not be had"),
            }
        }
        let Some(result) = result else { return Ok(None) };
        let output = output as usize;
        outputs.resize_with(outputs.len().max(output + 1), || None);
        outputs[output] = Some(result);
    }
    // There may be more outputs than somebody asked for.
    outputs.push(None);
    Ok(Some(outputs))
}
