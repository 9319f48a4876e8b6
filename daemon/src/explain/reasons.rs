//! Why a step was not cached, against the same step of an earlier build.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::SystemTime;

use kiln_cache::contenthash::{ChangeKind, ContentChange};
use kiln_cache::{Eviction, StoreError};
use kiln_proto::explain::{FileChange, Reason, Step};
use kiln_proto::pattern;
use kiln_solver::explain::{Found, Outcome, VertexExplanation};

use super::graph::{Graph, Input, ReadPath};
use super::pairing;

/// So many reasons of one step are told.
const REASONS: usize = 64;

/// Files that are named; the others are counted.
const NAMED: usize = 10;
/// Root causes that are named for one step.
const CAUSES: usize = 3;
/// Longer texts of a part are cut; and how much is told of what two of them have in common.
const TOLD: usize = 4096;
const IN_COMMON: usize = 256;

/// What the store knows beside the builds.
pub(super) trait Facts: Send + Sync {
    /// What changed between two content digests; `None` if that can't be told.
    fn changes(&self, before: &[u8], after: &[u8]) -> Option<Vec<ContentChange>>;
    /// What removed a result.
    fn eviction(&self, result: &str) -> Option<Eviction>;
    /// Forgets what content digests were made of that are not wanted.
    fn forget_contents(&self, wanted: &HashSet<[u8; 32]>) -> Result<(), StoreError>;
}

/// A vertex that could have been cached and was not: what is known of that beside the graph.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Missed {
    /// Its place in the graph.
    #[prost(uint32, tag = "1")]
    at: u32,
    #[prost(string, tag = "2")]
    digest: String,
    /// The build asked for a new run.
    #[prost(bool, tag = "3")]
    ignored: bool,
    /// It had a result that is gone.
    #[prost(message, optional, tag = "4")]
    evicted: Option<Evicted>,
    /// It was in the making already, by this or another build.
    #[prost(bool, tag = "5")]
    shared: bool,
}

/// What removed a result; empty where that is no longer known.
#[derive(Clone, PartialEq, prost::Message)]
struct Evicted {
    #[prost(string, tag = "1")]
    rule: String,
    #[prost(string, tag = "2")]
    at: String,
}

impl Missed {
    /// Those of a build, in the order of its graph.
    pub(super) fn of(vertices: &[VertexExplanation], facts: &dyn Facts) -> Vec<Self> {
        let missed = vertices.iter().enumerate().filter(|(_, vertex)| is_missed(vertex));
        let note = |(at, vertex): (usize, &VertexExplanation)| Self {
            at: u32::try_from(at).unwrap_or(u32::MAX),
            digest: vertex.vertex.to_string(),
            ignored: vertex.ignore_cache,
            evicted: evicted(vertex, facts),
            shared: vertex.lookups.iter().any(|lookup| lookup.found == Found::InFlight),
        };
        missed.map(note).collect()
    }
}

fn evicted(vertex: &VertexExplanation, facts: &dyn Facts) -> Option<Evicted> {
    let mut gone = vertex.lookups.iter().filter_map(|lookup| match &lookup.found {
        Found::Gone(results) => Some(results),
        _ => None,
    });
    let first = gone.next()?;
    let note = first.iter().chain(gone.flatten()).find_map(|result| facts.eviction(result));
    Some(note.map_or_else(Evicted::default, |note| Evicted { rule: note.rule, at: timestamp(note.at) }))
}

/// Compares one build with an earlier one.
pub(super) struct Comparison<'a> {
    pub(super) new: &'a Graph,
    /// The vertices that were not cached.
    missed: HashMap<usize, &'a Missed>,
    /// The earlier build, and for each vertex of the new one its counterpart there.
    old: Option<(&'a Graph, Vec<Option<usize>>)>,
    facts: &'a dyn Facts,
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

impl<'a> Comparison<'a> {
    pub(super) fn new(
        new: &'a Graph,
        missed: &'a [Missed],
        old: Option<&'a Graph>,
        facts: &'a dyn Facts,
    ) -> Self {
        let missed = missed.iter().map(|missed| (missed.at as usize, missed)).collect();
        let old = old.map(|old| (old, pairing::pair(old, new)));
        Self { new, missed, old, facts }
    }

    /// The steps that were not cached, with reasons.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut verdicts: Vec<Verdict> = Vec::with_capacity(self.new.len());
        let mut steps = Vec::new();
        for at in 0..self.new.len() {
            let missed = self.missed.get(&at).copied();
            let verdict = match missed.is_some() || self.differs(at) {
                true => self.judge(at, missed, &verdicts),
                false => Verdict::default(),
            };
            if let Some(missed) = missed {
                let mut reasons = verdict.own.clone();
                for cause in &verdict.causes {
                    self.because(*cause, &verdicts[*cause], &mut reasons);
                }
                if reasons.is_empty() {
                    reasons.push(self.otherwise(at));
                }
                let name = self.new.name(at);
                let was = self.counterpart(at).map(|(old, at)| old.name(at));
                steps.push(Step {
                    vertex: missed.digest.clone(),
                    name: name.to_owned(),
                    was: was.filter(|was| *was != name).unwrap_or_default().to_owned(),
                    reasons,
                });
            }
            verdicts.push(verdict);
        }
        steps
    }

    fn counterpart(&self, at: usize) -> Option<(&'a Graph, usize)> {
        let (old, pairs) = self.old.as_ref()?;
        Some((old, (*pairs.get(at)?)?))
    }

    fn is_missed(&self, at: usize) -> bool {
        self.missed.contains_key(&at)
    }

    /// It is not what it was in the earlier build, whether cached or not.
    fn differs(&self, at: usize) -> bool {
        self.counterpart(at).is_none_or(|(old, before)| !self.new.is_like(at, old, before))
    }

    fn judge(&self, at: usize, missed: Option<&Missed>, below: &[Verdict]) -> Verdict {
        let own = |reason: Reason| Verdict { own: vec![reason], causes: Vec::new() };
        match missed {
            Some(missed) if missed.ignored => return own(reason("no-cache")),
            Some(Missed { evicted: Some(Evicted { rule, at }), .. }) => {
                return own(Reason { rule: rule.clone(), at: at.clone(), ..reason("evicted") });
            }
            _ => {}
        }
        let Some((old, before)) = self.counterpart(at) else {
            return own(reason("never-built"));
        };
        let mut verdict = Verdict::default();
        if self.new.op(at) != old.op(before) {
            verdict.own = self.parts(at, old, before);
        }
        let (inputs, former): (Vec<_>, Vec<_>) =
            (self.new.inputs(at).collect(), old.inputs(before).collect());
        let mut by_vertex = HashMap::new();
        if inputs.len() != former.len() {
            for former in &former {
                by_vertex.entry(former.vertex).or_insert(former);
            }
        }
        for (place, input) in inputs.iter().enumerate() {
            // Where there are more or fewer than before, places don't say which is which.
            let paired = self.counterpart(input.vertex).map(|(_, at)| at);
            let former = match inputs.len() == former.len() {
                true => former.get(place),
                false => paired.and_then(|paired| by_vertex.get(&paired).copied()),
            };
            let Some(former) = former else { continue };
            self.input((input, former), old, below, &mut verdict);
        }
        if verdict.own.is_empty() && verdict.causes.is_empty() && missed.is_some() {
            // All is as it was, but something below was made anew.
            for input in inputs.iter().filter(|input| input.content.is_empty()) {
                self.blame(input.vertex, below, &mut verdict);
            }
        }
        verdict
    }

    /// Why a vertex that is what it was had nothing to be found by.
    fn otherwise(&self, at: usize) -> Reason {
        match self.counterpart(at) {
            _ if self.missed.get(&at).is_some_and(|missed| missed.shared) => reason("shared"),
            Some((old, before)) if !old.is_done(before) => reason("unfinished"),
            _ => reason("lost"),
        }
    }

    /// What of an operation itself differs.
    fn parts(&self, at: usize, old: &Graph, before: usize) -> Vec<Reason> {
        let mut values: BTreeMap<&str, Changed<'_>> = BTreeMap::new();
        let all =
            old.parts(before).map(|part| (part, false)).chain(self.new.parts(at).map(|part| (part, true)));
        for (order, ((name, value), new)) in all.enumerate() {
            let entry =
                values.entry(name).or_insert(Changed { order, name, old: Vec::new(), new: Vec::new() });
            if new { entry.new.push(value) } else { entry.old.push(value) }
        }
        // The whole that a detail belongs to: `mount /c` of `mount /c type`.
        let whole =
            |part: &Changed<'_>| values.get(part.name.rsplit_once(' ')?.0).filter(|whole| whole.is_bare());
        let mut changed: Vec<_> = values.values().filter(|part| part.old != part.new).cloned().collect();
        if changed.is_empty() {
            return self.order(at, old, before).into_iter().collect();
        }
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
        let told = changed.iter().take(REASONS);
        told.map(|changed| part(changed.name, &changed.old, &changed.new)).collect()
    }

    /// Parts that are all as they were, in another order.
    fn order(&self, at: usize, old: &Graph, before: usize) -> Option<Reason> {
        let (former, now): (Vec<_>, Vec<_>) = (
            old.parts(before).map(|(name, _)| name).collect(),
            self.new.parts(at).map(|(name, _)| name).collect(),
        );
        let first = former.iter().zip(&now).position(|(former, now)| former != now)?;
        let last = former.iter().zip(&now).rposition(|(former, now)| former != now)?;
        let told =
            |names: &[&str]| names[first..=last].iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        let (before, after) = (told(&former), told(&now));
        Some(Reason { name: "order".to_owned(), before, after, ..reason("part") })
    }

    /// Compares an input that was known in the earlier build.
    fn input(
        &self,
        (input, former): (&Input<'_>, &Input<'_>),
        old: &Graph,
        below: &[Verdict],
        verdict: &mut Verdict,
    ) {
        // A vertex may have any number of inputs, and nobody reads on for ever.
        if verdict.own.len() >= REASONS {
            return;
        }
        let (at, before) = (input.vertex, former.vertex);
        let paired = self.counterpart(at).map(|(_, at)| at);
        let instead = |how: &str, verdict: &mut Verdict| {
            let (before, after) = (old.name(before).to_owned(), self.new.name(at).to_owned());
            verdict.own.push(Reason { name: how.to_owned(), before, after, ..reason("order") });
        };
        if !input.content.is_empty() && !former.content.is_empty() {
            if input.content == former.content {
                return;
            }
            if paired != Some(before) {
                return instead("reads", verdict);
            }
            if !input.paths().eq(former.paths()) {
                if verdict.own.iter().all(|reason| reason.name != "source") {
                    let (before, after): (Vec<_>, Vec<_>) = (
                        former.paths().map(|read| read.path).collect(),
                        input.paths().map(|read| read.path).collect(),
                    );
                    verdict.own.push(part("source", &before, &after));
                }
                return;
            }
            return verdict.own.extend(self.files(input, former, old));
        }
        if self.new.is_like(at, old, before) && input.output == former.output {
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
        let step = self.new.name(cause).to_owned();
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
    fn files(&self, input: &Input<'_>, former: &Input<'_>, old: &Graph) -> Vec<Reason> {
        let (at, before) = (input.vertex, former.vertex);
        let step = self.new.name(at).to_owned();
        let changes = self.facts.changes(former.content, input.content).unwrap_or_default();
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
            changes: changes.iter().take(NAMED).map(|change| file(input, change)).collect(),
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
fn is_missed(vertex: &VertexExplanation) -> bool {
    is_persistent(vertex) && matches!(vertex.outcome, Outcome::Made | Outcome::Failed | Outcome::Stopped)
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
                let others: HashSet<&str> = others.iter().copied().collect();
                let left: Vec<&str> =
                    these.iter().filter(|value| !others.contains(*value)).copied().collect();
                left.join(", ")
            };
            match (without(old, new), without(new, old)) {
                // Only their order or number.
                (before, after) if before.is_empty() && after.is_empty() => (old.join(", "), new.join(", ")),
                differing => differing,
            }
        }
    };
    let (before, after) = readable(before, after);
    Reason { name: name.to_owned(), before, after, ..reason("part") }
}

/// What fits of two texts, where they differ.
fn readable(before: String, after: String) -> (String, String) {
    if before.len().max(after.len()) <= TOLD {
        return (before, after);
    }
    let same = before.bytes().zip(after.bytes()).take_while(|(before, after)| before == after).count();
    let start = same.saturating_sub(IN_COMMON);
    let cut = |text: &str| {
        let (start, end) = (text.floor_char_boundary(start), text.floor_char_boundary(start + TOLD));
        let mark = |there: bool| if there { "…" } else { "" };
        format!("{}{}{}", mark(start > 0), &text[start..end], mark(end < text.len()))
    };
    (cut(&before), cut(&after))
}

/// One of values that are all the same.
fn alike<'a>(values: &[&'a str]) -> Vec<&'a str> {
    match values {
        [first, rest @ ..] if rest.iter().all(|value| value == first) => vec![first],
        values => values.to_vec(),
    }
}

fn file(input: &Input<'_>, change: &ContentChange) -> FileChange {
    let dir = input.paths().nth(change.part).map_or(String::new(), |ReadPath { path, wildcard }| {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let literal = match wildcard {
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
