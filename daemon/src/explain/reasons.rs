//! Why a step was not cached, against the same step of an earlier build.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use kiln_cache::Eviction;
use kiln_cache::contenthash::{ChangeKind, ContentChange, ContentQuery};
use kiln_proto::explain::{FileChange, Reason, Step};
use kiln_proto::pattern;
use kiln_solver::explain::{Found, Outcome, VertexExplanation};

use super::graph::{Graph, Input};

/// So many reasons of one step are told.
const REASONS: usize = 64;

/// Files that are named; the others are counted.
const NAMED: usize = 10;
/// Root causes that are named for one step.
const CAUSES: usize = 3;

/// What the store knows beside the builds.
pub(super) trait Facts {
    /// What changed between two content digests; `None` if that can't be told.
    fn changes(&self, before: &[u8], after: &[u8]) -> Option<Vec<ContentChange>>;
    /// What removed a result.
    fn eviction(&self, result: &str) -> Option<Eviction>;
}

/// Compares one build with an earlier one.
pub(super) struct Comparison<'a> {
    pub(super) vertices: &'a [VertexExplanation],
    pub(super) new: &'a Graph,
    /// The earlier build, and for each vertex of the new one its counterpart there.
    pub(super) old: Option<(&'a Graph, &'a [Option<usize>])>,
    pub(super) facts: &'a dyn Facts,
}

/// A part by its name: where it stands in the list, its values before, and now.
#[derive(Clone)]
struct Changed<'a> {
    order: usize,
    name: &'a str,
    old: Vec<&'a str>,
    new: Vec<&'a str>,
}

impl Changed<'_> {
    /// Nothing but digests.
    fn is_bare(&self) -> bool {
        self.old.iter().chain(&self.new).all(|value| value.starts_with("blake3:"))
    }

    fn is_one_sided(&self) -> bool {
        self.old.is_empty() != self.new.is_empty()
    }

    /// The same value each time, only more or less often.
    fn is_alike(&self) -> bool {
        !self.old.is_empty()
            && !self.new.is_empty()
            && self.old.iter().chain(&self.new).all(|value| *value == self.old[0])
    }
}

/// Why a vertex is what it is.
#[derive(Default, Clone)]
struct Verdict {
    /// Its own reasons.
    own: Vec<Reason>,
    /// The vertices whose own reasons are its reasons.
    causes: Vec<usize>,
}

impl Comparison<'_> {
    /// The steps that were not cached, with reasons.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut verdicts: Vec<Verdict> = Vec::with_capacity(self.vertices.len());
        let mut steps = Vec::new();
        for (at, vertex) in self.vertices.iter().enumerate() {
            let missed = self.is_missed(at);
            let verdict = match missed || self.differs(at) {
                true => self.judge(at, &verdicts),
                false => Verdict::default(),
            };
            if missed {
                let mut reasons = verdict.own.clone();
                for cause in &verdict.causes {
                    self.because(*cause, &verdicts[*cause], &mut reasons);
                }
                if reasons.is_empty() {
                    reasons.push(self.otherwise(at));
                }
                let was = self.counterpart(at).map(|(old, at)| old.nodes[at].name.clone());
                steps.push(Step {
                    vertex: vertex.vertex.to_string(),
                    name: vertex.name.to_string(),
                    was: was.filter(|was| **was != *vertex.name).unwrap_or_default(),
                    reasons,
                });
            }
            verdicts.push(verdict);
        }
        steps
    }

    fn counterpart(&self, at: usize) -> Option<(&Graph, usize)> {
        let (old, pairs) = self.old?;
        Some((old, (*pairs.get(at)?)?))
    }

    fn is_missed(&self, at: usize) -> bool {
        is_missed(&self.vertices[at])
    }

    /// It is not what it was in the earlier build, whether cached or not.
    fn differs(&self, at: usize) -> bool {
        self.counterpart(at).is_none_or(|(old, before)| !self.new.nodes[at].is_like(&old.nodes[before]))
    }

    fn judge(&self, at: usize, below: &[Verdict]) -> Verdict {
        let vertex = &self.vertices[at];
        let own = |reason: Reason| Verdict { own: vec![reason], causes: Vec::new() };
        let missed = self.is_missed(at);
        if missed && vertex.ignore_cache {
            return own(reason("no-cache"));
        }
        if missed && let Some(evicted) = self.evicted(vertex) {
            return own(evicted);
        }
        let Some((old, before)) = self.counterpart(at) else {
            return own(reason("never-built"));
        };
        let mut verdict = Verdict::default();
        if self.new.nodes[at].op != old.nodes[before].op {
            verdict.own = self.parts(at, old, before);
        }
        let (inputs, former) = (&self.new.nodes[at].inputs, &old.nodes[before].inputs);
        let mut by_vertex = HashMap::new();
        if inputs.len() != former.len() {
            for former in former {
                by_vertex.entry(former.vertex as usize).or_insert(former);
            }
        }
        for (place, input) in inputs.iter().enumerate() {
            // Where there are more or fewer than before, places don't say which is which.
            let paired = self.counterpart(input.vertex as usize).map(|(_, at)| at);
            let former = match inputs.len() == former.len() {
                true => former.get(place),
                false => paired.and_then(|paired| by_vertex.get(&paired).copied()),
            };
            let Some(former) = former else { continue };
            self.input(vertex, place, (input, former), old, below, &mut verdict);
        }
        if verdict.own.is_empty() && verdict.causes.is_empty() && missed {
            // All is as it was, but something below was made anew.
            for input in inputs.iter().filter(|input| input.content.is_empty()) {
                self.blame(input.vertex as usize, below, &mut verdict);
            }
        }
        verdict
    }

    /// Why a vertex that is what it was had nothing to be found by.
    fn otherwise(&self, at: usize) -> Reason {
        match self.counterpart(at) {
            Some((old, before)) if !old.nodes[before].done => reason("unfinished"),
            _ => reason("lost"),
        }
    }

    fn evicted(&self, vertex: &VertexExplanation) -> Option<Reason> {
        let results = vertex.lookups.iter().filter_map(|lookup| match &lookup.found {
            Found::Gone(results) => Some(results),
            _ => None,
        });
        let results: Vec<&String> = results.flatten().collect();
        if !vertex.lookups.iter().any(|lookup| matches!(lookup.found, Found::Gone(_))) {
            return None;
        }
        let note = results.into_iter().find_map(|result| self.facts.eviction(result));
        Some(match note {
            Some(note) => Reason { rule: note.rule, at: timestamp(note.at), ..reason("evicted") },
            None => reason("evicted"),
        })
    }

    /// What of an operation itself differs.
    fn parts(&self, at: usize, old: &Graph, before: usize) -> Vec<Reason> {
        let mut values: BTreeMap<&str, Changed<'_>> = BTreeMap::new();
        let all =
            old.parts(before).map(|part| (part, false)).chain(self.new.parts(at).map(|part| (part, true)));
        for (order, (part, new)) in all.enumerate() {
            let name = part.name.as_str();
            let entry =
                values.entry(name).or_insert(Changed { order, name, old: Vec::new(), new: Vec::new() });
            if new { entry.new.push(&part.value) } else { entry.old.push(&part.value) }
        }
        // The whole that a detail belongs to: `mount /c` of `mount /c type`.
        let whole =
            |part: &Changed<'_>| values.get(part.name.rsplit_once(' ')?.0).filter(|whole| whole.is_bare());
        let mut changed: Vec<_> = values.values().filter(|part| part.old != part.new).cloned().collect();
        // Details count with their whole only, and one that is new or gone is told in one line.
        changed
            .retain(|part| whole(part).is_none_or(|whole| whole.old != whole.new && !whole.is_one_sided()));
        let detailed = changed.iter().any(|part| !part.is_bare());
        changed.retain(|part| {
            !part.is_bare() || !detailed || (part.is_one_sided() && part.name.starts_with("mount "))
        });
        // Several actions of which there are more or fewer now, all alike in this.
        if changed.iter().any(|part| !part.is_alike()) {
            changed.retain(|part| !part.is_alike());
        }
        // An image is told by its digest where that is known.
        if changed.iter().any(|part| part.name == "base image digest") {
            changed.retain(|part| part.name != "image layers");
        }
        changed.sort_by_key(|part| part.order);
        for part in changed.iter_mut().filter(|part| part.is_one_sided() && part.is_bare()) {
            // What it is says more than a digest.
            if let Some(kind) = values.get(format!("{} type", part.name).as_str()) {
                (part.old, part.new) = (kind.old.clone(), kind.new.clone());
            }
        }
        changed.iter().map(|changed| part(changed.name, &changed.old, &changed.new)).collect()
    }

    /// Compares an input that was known in the earlier build.
    fn input(
        &self,
        vertex: &VertexExplanation,
        place: usize,
        (input, former): (&Input, &Input),
        old: &Graph,
        below: &[Verdict],
        verdict: &mut Verdict,
    ) {
        // A vertex may have any number of inputs, and nobody reads on for ever.
        if verdict.own.len() >= REASONS {
            return;
        }
        let (at, before) = (input.vertex as usize, former.vertex as usize);
        let paired = self.counterpart(at).map(|(_, at)| at);
        let instead = |how: &str, verdict: &mut Verdict| {
            let (before, after) = (old.nodes[before].name.clone(), self.new.nodes[at].name.clone());
            verdict.own.push(Reason { name: how.to_owned(), before, after, ..reason("order") });
        };
        if !input.content.is_empty() && !former.content.is_empty() {
            if input.content == former.content {
                return;
            }
            if paired != Some(before) {
                return instead("reads", verdict);
            }
            if input.paths != former.paths {
                if verdict.own.iter().all(|reason| reason.name != "source") {
                    let (before, after): (Vec<_>, Vec<_>) =
                        (former.paths.split('\n').collect(), input.paths.split('\n').collect());
                    verdict.own.push(part("source", &before, &after));
                }
                return;
            }
            let query = vertex.map.as_ref().and_then(|map| map.inputs.get(place)?.content.as_ref());
            return verdict.own.extend(self.files(query, input, former, old));
        }
        if self.new.nodes[at].is_like(&old.nodes[before]) && input.output == former.output {
            return;
        }
        match paired {
            Some(paired) if paired != before && !self.is_missed(at) => instead("stands on", verdict),
            _ if below[at].own.is_empty() && below[at].causes.is_empty() && !self.is_missed(at) => {}
            _ => self.blame(at, below, verdict),
        }
    }

    /// Adds what is behind a vertex below to the causes.
    fn blame(&self, at: usize, below: &[Verdict], verdict: &mut Verdict) {
        let found = &below[at];
        let missed = self.is_missed(at);
        let follows = found.own.is_empty() && !found.causes.is_empty();
        let causes = match follows && (!missed || found.causes.iter().all(|cause| self.is_missed(*cause))) {
            true => found.causes.clone(),
            false if found.own.is_empty() && !missed => Vec::new(),
            false => vec![at],
        };
        for cause in causes {
            if verdict.causes.len() < CAUSES && !verdict.causes.contains(&cause) {
                verdict.causes.push(cause);
            }
        }
    }

    /// Names a cause. One that was cached, so that nothing else is said of it, comes with its reasons.
    fn because(&self, cause: usize, verdict: &Verdict, reasons: &mut Vec<Reason>) {
        let step = self.new.nodes[cause].name.clone();
        if self.is_missed(cause) || verdict.own.is_empty() {
            reasons.push(Reason { step, ..reason("input") });
        } else {
            reasons.extend(verdict.own.iter().map(|reason| Reason {
                step: if reason.step.is_empty() { step.clone() } else { reason.step.clone() },
                ..reason.clone()
            }));
        }
    }

    /// Which files of an input changed, and the patterns that choose them.
    fn files(&self, query: Option<&ContentQuery>, input: &Input, former: &Input, old: &Graph) -> Vec<Reason> {
        let (at, before) = (input.vertex as usize, former.vertex as usize);
        let step = self.new.nodes[at].name.clone();
        let changes = self.facts.changes(&former.content, &input.content).unwrap_or_default();
        let mut reasons = Vec::new();
        if changes.iter().any(|change| matches!(change.kind, ChangeKind::Added | ChangeKind::Removed)) {
            for name in ["include", "exclude"] {
                let (old, new): (Vec<_>, Vec<_>) =
                    (old.part(before, name).collect(), self.new.part(at, name).collect());
                if old != new {
                    let name = format!("{name} pattern");
                    reasons.push(Reason { step: step.clone(), ..part(&name, &old, &new) });
                }
            }
        }
        reasons.push(Reason {
            step,
            count: u32::try_from(changes.len()).unwrap_or(u32::MAX),
            changes: changes.iter().take(NAMED).map(|change| file(query, change)).collect(),
            ..reason("files")
        });
        reasons
    }
}

/// It can be cached at all: a client's directory can't.
pub(super) fn is_persistent(vertex: &VertexExplanation) -> bool {
    vertex.map.as_ref().is_none_or(|map| map.persistent)
}

/// It could have been cached and was not.
pub(super) fn is_missed(vertex: &VertexExplanation) -> bool {
    is_persistent(vertex) && matches!(vertex.outcome, Outcome::Made | Outcome::Failed)
}

fn reason(kind: &str) -> Reason {
    Reason { kind: kind.to_owned(), ..Reason::default() }
}

/// A part by its name, with what differs of its values.
fn part(name: &str, old: &[&str], new: &[&str]) -> Reason {
    let name = match name {
        "arg" => "command",
        "cwd" => "working directory",
        other => other,
    };
    let (before, after) = match name {
        "command" => (old.join(" "), new.join(" ")),
        _ => {
            let (old, new) = (&alike(old), &alike(new));
            let without = |these: &[&str], others: &[&str]| -> String {
                let left: Vec<&str> = these.iter().filter(|value| !others.contains(value)).copied().collect();
                left.join(", ")
            };
            match (without(old, new), without(new, old)) {
                // Only their order or number.
                (before, after) if before.is_empty() && after.is_empty() => (old.join(", "), new.join(", ")),
                differing => differing,
            }
        }
    };
    Reason { name: name.to_owned(), before, after, ..reason("part") }
}

/// One of values that are all the same.
fn alike<'a>(values: &[&'a str]) -> Vec<&'a str> {
    match values {
        [first, rest @ ..] if rest.iter().all(|value| value == first) => vec![first],
        values => values.to_vec(),
    }
}

fn file(query: Option<&ContentQuery>, change: &ContentChange) -> FileChange {
    let dir = query.and_then(|query| query.paths.get(change.part)).map_or(String::new(), |path| {
        let parts: Vec<&str> = path.path.split('/').filter(|part| !part.is_empty()).collect();
        let literal = match path.wildcard {
            true => parts.iter().take_while(|part| !pattern::has_wildcard(part)).count(),
            false => parts.len(),
        };
        parts[..literal].join("/")
    });
    let full = |path: &str| match (dir.is_empty(), path.is_empty()) {
        (true, _) => path.to_owned(),
        (false, true) => dir.clone(),
        (false, false) => format!("{dir}/{path}"),
    };
    let owner = |(user, group): &(u32, u32)| format!("{user}:{group}");
    let (name, before, after) = match &change.kind {
        ChangeKind::Added => ("added", String::new(), String::new()),
        ChangeKind::Removed => ("removed", String::new(), String::new()),
        ChangeKind::Renamed(from) => ("renamed", full(from), String::new()),
        ChangeKind::Type => ("type", String::new(), String::new()),
        ChangeKind::Content => ("content", String::new(), String::new()),
        ChangeKind::Target(old, new) => ("target", old.clone(), new.clone()),
        ChangeKind::Mode(old, new) => ("mode", format!("{old:04o}"), format!("{new:04o}")),
        ChangeKind::Owner(old, new) => ("owner", owner(old), owner(new)),
        ChangeKind::Attributes => ("attributes", String::new(), String::new()),
    };
    FileChange { path: full(&change.path), change: name.to_owned(), before, after }
}

fn timestamp(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time)
        .map(|time| time.round(jiff::Unit::Second).unwrap_or(time).to_string())
        .unwrap_or_default()
}
