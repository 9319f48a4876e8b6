//! What is known of a build's vertices, from the status messages so far. Shows nothing itself.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;

use kiln_proto::control::{StatusResponse, Vertex, VertexStatus};
use prost_types::Timestamp;

/// Lines of output kept of each vertex, for when it fails.
const TAIL: usize = 20;

/// Nanoseconds since the epoch, by the daemon's clock.
pub(super) type Nanos = i64;

/// A piece of a vertex's output, usually a line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    /// Seconds since the vertex started.
    pub(super) seconds: f64,
    pub(super) text: String,
}

impl Line {
    /// With its time in front, as precise as fits four digits.
    pub(super) fn timed(&self) -> String {
        let precision = match self.seconds {
            s if s < 10.0 => 3,
            s if s < 100.0 => 2,
            _ => 1,
        };
        format!("{:.precision$} {}", self.seconds, self.text)
    }
}

/// A transfer or sub-step.
#[derive(Debug, Clone)]
pub(super) struct Status {
    pub(super) id: String,
    pub(super) current: i64,
    pub(super) total: i64,
    pub(super) timestamp: Nanos,
    pub(super) started: Option<Nanos>,
    pub(super) completed: Option<Nanos>,
}

/// A step as it is shown: a vertex, or a group of vertices that is shown as one.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub(super) name: String,
    /// When it ran, by start: a step may be checked in the cache, end, and start again.
    runs: BTreeMap<Nanos, Option<Nanos>>,
    pub(super) cached: bool,
    pub(super) error: String,
    /// A group of which nothing worth showing has started.
    pub(super) hidden: bool,
    pub(super) statuses: Vec<Status>,
    pub(super) warnings: Vec<String>,
    pub(super) tail: VecDeque<Line>,
    /// Output after the last newline.
    partial: Option<Line>,
    members: HashMap<String, Member>,

    /// What a printer has not shown yet; taken by it.
    pub(super) fresh: Fresh,
}

/// Changes of a step since they were last taken.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    /// It started, ended, or changed otherwise.
    pub(super) state: bool,
    pub(super) lines: Vec<Line>,
    /// Indices of changed statuses, in order, each once.
    pub(super) statuses: Vec<usize>,
    pub(super) warnings: Vec<String>,
}

#[derive(Debug)]
struct Member {
    vertex: Vertex,
    weak: bool,
}

impl Step {
    pub(super) fn started(&self) -> Option<Nanos> {
        self.runs.first_key_value().map(|(start, _)| *start)
    }

    pub(super) fn is_running(&self) -> bool {
        self.runs.values().any(Option::is_none)
    }

    pub(super) fn is_completed(&self) -> bool {
        !self.runs.is_empty() && !self.is_running()
    }

    /// When it ended, if it has.
    pub(super) fn ended(&self) -> Option<Nanos> {
        if self.is_running() { None } else { self.runs.values().flatten().max().copied() }
    }

    pub(super) fn is_canceled(&self) -> bool {
        self.error.ends_with("context canceled")
    }

    /// Seconds that it ran in all; runs that overlap count once, one that still runs counts until `now`.
    pub(super) fn seconds(&self, now: Nanos) -> f64 {
        let mut total = 0;
        let mut covered = Nanos::MIN;
        for (start, stop) in &self.runs {
            let stop = stop.unwrap_or(now);
            total += (stop - (*start).max(covered)).max(0);
            covered = covered.max(stop);
        }
        total as f64 / 1e9
    }

    /// Lines of the error block: the last output, with what came after the last newline.
    fn last_output(&self) -> impl Iterator<Item = &Line> {
        self.tail.iter().chain(&self.partial)
    }

    /// Makes a line of output that was not ended by a newline fresh, because no more comes.
    pub(super) fn end_partial(&mut self) {
        if let Some(line) = self.partial.take() {
            self.push(line);
        }
    }

    fn push(&mut self, line: Line) {
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line.clone());
        self.fresh.lines.push(line);
    }

    fn log(&mut self, data: &[u8], at: Nanos) {
        let start = self.runs.last_key_value().map_or(at, |(start, _)| *start);
        let seconds = (at - start).max(0) as f64 / 1e9;
        let text = String::from_utf8_lossy(data);
        for piece in text.split_inclusive('\n') {
            let (text, whole) = match piece.strip_suffix('\n') {
                Some(text) => (text.strip_suffix('\r').unwrap_or(text), true),
                None => (piece, false),
            };
            let mut line = self.partial.take().unwrap_or(Line { seconds, text: String::new() });
            line.text.push_str(text);
            if whole {
                self.push(line);
            } else {
                self.partial = Some(line);
            }
        }
    }

    fn status(&mut self, status: &VertexStatus) {
        let known = self.statuses.iter().position(|other| other.id == status.id);
        let new = Status {
            id: status.id.clone(),
            current: status.current,
            total: status.total,
            timestamp: nanos(status.timestamp.as_ref()).unwrap_or_default(),
            started: nanos(status.started.as_ref()),
            completed: nanos(status.completed.as_ref()),
        };
        let index = match known {
            Some(index) => {
                self.statuses[index] = new;
                index
            }
            None => {
                self.statuses.push(new);
                self.statuses.len() - 1
            }
        };
        if !self.fresh.statuses.contains(&index) {
            self.fresh.statuses.push(index);
        }
    }

    fn run(&mut self, vertex: &Vertex) {
        if let Some(start) = nanos(vertex.started.as_ref()) {
            self.runs.insert(start, nanos(vertex.completed.as_ref()));
        }
    }

    fn vertex(&mut self, vertex: &Vertex) {
        let announced_again = vertex.started.is_none() && !self.runs.is_empty();
        if announced_again {
            return;
        }
        self.run(vertex);
        self.name.clone_from(&vertex.name);
        self.cached = vertex.cached;
        self.error.clone_from(&vertex.error);
        self.fresh.state |= !self.runs.is_empty();
    }

    fn member(&mut self, vertex: &Vertex, weak: bool) {
        let announced_again = vertex.started.is_none() && self.members.contains_key(&vertex.digest);
        if announced_again {
            return;
        }
        self.run(vertex);
        self.members.insert(vertex.digest.clone(), Member { vertex: vertex.clone(), weak });
        self.cached = self.members.values().all(|member| member.vertex.cached);
        let failed = self.members.values().find(|member| !member.vertex.error.is_empty());
        self.error = failed.map(|member| member.vertex.error.clone()).unwrap_or_default();
        let strong = self.members.values().any(|member| !member.weak && member.vertex.started.is_some());
        self.hidden = !strong && self.error.is_empty();
        self.fresh.state |= !self.runs.is_empty();
    }
}

/// All steps of a build.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// In the order of their announcement.
    pub(super) steps: Vec<Step>,
    by_digest: HashMap<String, usize>,
    by_group: HashMap<String, usize>,
}

impl Model {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Takes a status message. What refers to a vertex that was never announced is dropped.
    pub(super) fn apply(&mut self, message: &StatusResponse) {
        for vertex in &message.vertexes {
            match &vertex.progress_group {
                Some(group) if !group.id.is_empty() => {
                    let index = *self.by_group.entry(group.id.clone()).or_insert_with(|| {
                        self.steps.push(Step { name: group.name.clone(), hidden: true, ..Step::default() });
                        self.steps.len() - 1
                    });
                    self.by_digest.insert(vertex.digest.clone(), index);
                    self.steps[index].member(vertex, group.weak);
                }
                _ => {
                    let index = *self.by_digest.entry(vertex.digest.clone()).or_insert_with(|| {
                        self.steps.push(Step::default());
                        self.steps.len() - 1
                    });
                    self.steps[index].vertex(vertex);
                }
            }
        }
        for status in &message.statuses {
            if let Some(index) = self.by_digest.get(&status.vertex) {
                self.steps[*index].status(status);
            }
        }
        for warning in &message.warnings {
            if let Some(index) = self.by_digest.get(&warning.vertex) {
                let text = String::from_utf8_lossy(&warning.short).into_owned();
                self.steps[*index].warnings.push(text.clone());
                self.steps[*index].fresh.warnings.push(text);
            }
        }
        for log in &message.logs {
            if let Some(index) = self.by_digest.get(&log.vertex) {
                let at = nanos(log.timestamp.as_ref()).unwrap_or_default();
                self.steps[*index].log(&log.msg, at);
            }
        }
    }

    /// The last output of every step that failed, as a block for the end.
    pub(super) fn failures(&self) -> String {
        let mut out = String::new();
        for step in self.steps.iter().filter(|step| !step.error.is_empty() && !step.is_canceled()) {
            let _ = write!(out, "------\n > {}:\n", step.name);
            for line in step.last_output() {
                let _ = writeln!(out, "{}", line.timed());
            }
            out.push_str("------\n");
        }
        out
    }
}

fn nanos(timestamp: Option<&Timestamp>) -> Option<Nanos> {
    timestamp.map(|time| time.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(time.nanos)))
}

/// Now, by this machine's clock.
pub(super) fn now() -> Nanos {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(super) mod testing {
    //! Short-hands for status messages; times are milliseconds.

    use kiln_proto::control::{StatusResponse, Vertex, VertexLog, VertexStatus, VertexWarning};
    use prost_types::Timestamp;

    pub(in super::super) fn at(ms: i64) -> Option<Timestamp> {
        Some(Timestamp {
            seconds: 1000 + ms.div_euclid(1000),
            nanos: (ms.rem_euclid(1000) * 1_000_000) as i32,
        })
    }

    pub(in super::super) fn vertex(digest: &str, started: Option<i64>, completed: Option<i64>) -> Vertex {
        Vertex {
            digest: digest.into(),
            name: format!("[{digest}] step"),
            started: started.and_then(at),
            completed: completed.and_then(at),
            ..Default::default()
        }
    }

    pub(in super::super) fn vertices(vertexes: Vec<Vertex>) -> StatusResponse {
        StatusResponse { vertexes, ..Default::default() }
    }

    pub(in super::super) fn log(digest: &str, ms: i64, text: &str) -> StatusResponse {
        let log = VertexLog { vertex: digest.into(), timestamp: at(ms), stream: 1, msg: text.into() };
        StatusResponse { logs: vec![log], ..Default::default() }
    }

    pub(in super::super) fn status(
        digest: &str,
        id: &str,
        current: i64,
        total: i64,
        ms: i64,
        done: bool,
    ) -> StatusResponse {
        let status = VertexStatus {
            id: id.into(),
            vertex: digest.into(),
            current,
            total,
            timestamp: at(ms),
            started: at(0),
            completed: done.then(|| at(ms)).flatten(),
            ..Default::default()
        };
        StatusResponse { statuses: vec![status], ..Default::default() }
    }

    pub(in super::super) fn warning(digest: &str, text: &str) -> StatusResponse {
        let warning = VertexWarning { vertex: digest.into(), short: text.into(), ..Default::default() };
        StatusResponse { warnings: vec![warning], ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use kiln_proto::pb::ProgressGroup;

    #[test]
    fn runs_that_overlap_count_once() {
        let mut model = Model::new();
        model.apply(&vertices(vec![vertex("a", Some(0), Some(100))]));
        model.apply(&vertices(vec![vertex("a", Some(50), Some(200))]));
        model.apply(&vertices(vec![vertex("a", Some(500), None)]));
        let step = &model.steps[0];
        assert!(step.is_running());
        let now = 1_000_600_000_000;
        assert!((step.seconds(now) - 0.3).abs() < 1e-9, "{}", step.seconds(now));
        model.apply(&vertices(vec![vertex("a", None, None)]));
        assert!(model.steps[0].is_running(), "a late announcement changes nothing");
    }

    #[test]
    fn output_is_cut_into_lines_wherever_messages_end() {
        let mut model = Model::new();
        model.apply(&vertices(vec![vertex("a", Some(0), None)]));
        for (ms, text) in [(10, "one\ntw"), (20, "o\r\n"), (30, "\nthree")] {
            model.apply(&log("a", ms, text));
        }
        model.apply(&log("unknown", 0, "dropped\n"));
        let lines: Vec<String> = model.steps[0].fresh.lines.iter().map(Line::timed).collect();
        assert_eq!(lines, ["0.010 one", "0.010 two", "0.030 "]);
        model.steps[0].end_partial();
        assert_eq!(model.steps[0].fresh.lines.last().map(Line::timed).as_deref(), Some("0.030 three"));
    }

    #[test]
    fn times_keep_four_digits() {
        let timed = |seconds| Line { seconds, text: "x".into() }.timed();
        assert_eq!([timed(1.23456), timed(12.3456), timed(123.456)], ["1.235 x", "12.35 x", "123.5 x"]);
    }

    #[test]
    fn a_group_of_weak_members_stays_hidden() {
        let mut model = Model::new();
        let member = |digest: &str, weak, started| Vertex {
            progress_group: Some(ProgressGroup { id: "g".into(), name: "group".into(), weak }),
            ..vertex(digest, started, None)
        };
        model.apply(&vertices(vec![member("copy", true, Some(0))]));
        assert!(model.steps[0].hidden);
        model.apply(&vertices(vec![member("merge", false, Some(5))]));
        assert_eq!(model.steps.len(), 1);
        assert!(!model.steps[0].hidden);
        assert_eq!(model.steps[0].name, "group");
    }

    #[test]
    fn failures_show_the_last_output() {
        let mut model = Model::new();
        let failed = Vertex { error: "exit code: 1".into(), ..vertex("a", Some(0), Some(9)) };
        let canceled = Vertex { error: "context canceled".into(), ..vertex("b", Some(0), Some(9)) };
        model.apply(&vertices(vec![vertex("a", Some(0), None), vertex("b", Some(0), None)]));
        for number in 0..30 {
            model.apply(&log("a", number, &format!("line {number}\n")));
        }
        model.apply(&log("a", 40, "no newline"));
        model.apply(&vertices(vec![failed, canceled]));
        let text = model.failures();
        assert!(text.starts_with("------\n > [a] step:\n0.010 line 10\n"), "{text}");
        assert!(text.ends_with("0.029 line 29\n0.040 no newline\n------\n"), "{text}");
        assert!(!text.contains("[b]"));
    }
}
