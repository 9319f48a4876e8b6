//! Progress as numbered lines, in the form that `buildx` prints: one step's lines stay together, with `#N ...` where
//! the view leaves a step that still runs.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use kiln_proto::control::StatusResponse;

use super::model::{Model, Nanos, Status, Step};
use super::units;

/// How long a running step keeps the view while it has something to say and others wait.
const HOLD: Duration = Duration::from_secs(5);
/// How long it keeps the view when it has nothing to say.
const IDLE: Duration = Duration::from_secs(1);
/// A transfer that ends within this time prints once.
const STATUS_DELAY: Duration = Duration::from_millis(100);
/// A transfer prints again after this share of its size, or after this time.
const STATUS_SHARE: f64 = 0.05;
const STATUS_INTERVAL: Nanos = 5_000_000_000;

pub(super) struct Plain {
    model: Model,
    /// Numbers by step, given as steps first show.
    numbers: HashMap<usize, usize>,
    /// Transfers by step and index.
    transfers: HashMap<(usize, usize), Transfer>,
    current: Option<Current>,
    any: bool,
}

/// The running step that has the view.
struct Current {
    step: usize,
    since: Instant,
    spoke: Instant,
}

/// What was printed of a transfer.
struct Transfer {
    seen: Instant,
    /// Bytes and time when it was last printed.
    printed: Option<(i64, Nanos)>,
}

impl Plain {
    pub(super) fn new() -> Self {
        Self {
            model: Model::new(),
            numbers: HashMap::new(),
            transfers: HashMap::new(),
            current: None,
            any: false,
        }
    }

    pub(super) fn update(&mut self, message: &StatusResponse) -> String {
        self.model.apply(message);
        self.print(false)
    }

    pub(super) fn refresh(&mut self) -> String {
        self.print(false)
    }

    pub(super) fn finish(&mut self) -> String {
        let mut out = self.print(true);
        out.push_str(&self.model.failures());
        out
    }

    /// Prints what is due; all of it if `everything`.
    fn print(&mut self, everything: bool) -> String {
        let mut out = String::new();
        let mut completed = Vec::new();
        let mut running = Vec::new();
        for (index, step) in self.model.steps.iter().enumerate() {
            if step.hidden || step.started().is_none() || !speaks(step, index, &mut self.transfers) {
                continue;
            }
            if step.is_completed() { completed.push(index) } else { running.push(index) }
        }
        // What the cache answers ends from the result downwards; it reads better in the order of the graph.
        let cached = completed.iter().filter(|index| self.model.steps[**index].cached);
        let cached = cached.filter_map(|index| self.model.steps[*index].ended()).min();
        completed.sort_by_key(|index| {
            let step = &self.model.steps[*index];
            (if step.cached { cached } else { step.ended() }, *index)
        });
        if let Some(current) = &mut self.current {
            let step = current.step;
            if let Some(at) = completed.iter().position(|index| *index == step) {
                completed.remove(at);
                self.step(step, &mut out);
            } else if running.contains(&step) {
                current.spoke = Instant::now();
                running.retain(|index| *index != step);
                self.step(step, &mut out);
            }
        }
        for step in completed {
            self.step(step, &mut out);
        }
        for step in running {
            let free = self
                .current
                .as_ref()
                .is_none_or(|current| current.since.elapsed() > HOLD || current.spoke.elapsed() > IDLE);
            if free || everything {
                self.step(step, &mut out);
            }
        }
        out
    }

    /// Gives a step the view and prints what is new of it.
    fn step(&mut self, index: usize, out: &mut String) {
        let next = self.numbers.len() + 1;
        let number = *self.numbers.entry(index).or_insert(next);
        if self.current.as_ref().is_none_or(|current| current.step != index) {
            if let Some(left) = self.current.take() {
                let _ = writeln!(out, "#{} ...", self.numbers[&left.step]);
            }
            if self.any {
                out.push('\n');
            }
            self.any = true;
            let _ = writeln!(out, "#{number} {}", self.model.steps[index].name);
            let now = Instant::now();
            self.current = Some(Current { step: index, since: now, spoke: now });
        }
        let step = &mut self.model.steps[index];
        let completed = step.is_completed();
        if completed {
            step.end_partial();
        }
        let fresh = std::mem::take(&mut step.fresh);
        for changed in fresh.statuses {
            let status = &step.statuses[changed];
            let Some(known) = self.transfers.get_mut(&(index, changed)) else { continue };
            if completed || known.is_due(status) {
                let _ = writeln!(out, "#{number} {}", transfer(status));
                known.printed = Some((status.current, status.timestamp));
            } else if known.printed.is_none() {
                step.fresh.statuses.push(changed);
            }
        }
        for warning in fresh.warnings {
            let _ = writeln!(out, "#{number} WARN: {warning}");
        }
        for line in fresh.lines {
            let _ = writeln!(out, "#{number} {}", line.timed());
        }
        if completed {
            let _ = writeln!(out, "#{number} {}", ending(step));
            self.current = None;
        }
    }
}

fn ending(step: &Step) -> String {
    if step.is_canceled() {
        "CANCELED".into()
    } else if !step.error.is_empty() {
        format!("ERROR: {}", step.error)
    } else if step.cached {
        "CACHED".into()
    } else {
        format!("DONE {:.1}s", step.seconds(0))
    }
}

/// Whether there is something to print of a step. Transfers that were not seen before are noted.
fn speaks(step: &Step, index: usize, transfers: &mut HashMap<(usize, usize), Transfer>) -> bool {
    let fresh = &step.fresh;
    let mut due = fresh.state || !fresh.lines.is_empty() || !fresh.warnings.is_empty();
    for changed in &fresh.statuses {
        let known = transfers.entry((index, *changed));
        let known = known.or_insert_with(|| Transfer { seen: Instant::now(), printed: None });
        due |= known.is_due(&step.statuses[*changed]);
    }
    due
}

impl Transfer {
    fn is_due(&self, status: &Status) -> bool {
        if status.completed.is_some() {
            return true;
        }
        let Some((current, timestamp)) = self.printed else { return self.seen.elapsed() >= STATUS_DELAY };
        let share =
            if status.total > 0 { (status.current - current) as f64 / status.total as f64 } else { 0.0 };
        share >= STATUS_SHARE || status.timestamp - timestamp >= STATUS_INTERVAL
    }
}

fn transfer(status: &Status) -> String {
    let mut line = status.id.clone();
    if status.total != 0 {
        let _ = write!(line, " {} / {}", units::bytes(status.current), units::bytes(status.total));
    } else if status.current != 0 {
        let _ = write!(line, " {}", units::bytes(status.current));
    }
    if let Some(started) = status.started {
        let seconds = (status.completed.unwrap_or(status.timestamp) - started) as f64 / 1e9;
        if seconds > 0.01 {
            let _ = write!(line, " {seconds:.1}s");
        }
    }
    if status.completed.is_some() {
        line.push_str(" done");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::super::model::testing::*;
    use super::*;
    use kiln_proto::control::Vertex;

    fn shown(messages: Vec<StatusResponse>) -> String {
        let mut plain = Plain::new();
        let mut out = String::new();
        for message in &messages {
            out.push_str(&plain.update(message));
        }
        out.push_str(&plain.finish());
        out
    }

    #[test]
    fn a_build_in_plain_lines() {
        let failed = Vertex { error: "exit code: 3".into(), ..vertex("c", Some(300), Some(420)) };
        let cached = Vertex { cached: true, ..vertex("b", Some(200), Some(200)) };
        insta::assert_snapshot!(shown(vec![
            vertices(vec![vertex("a", None, None), vertex("b", None, None), vertex("c", None, None)]),
            vertices(vec![vertex("a", Some(0), None)]),
            status("a", "sha256:00", 100, 2_000_000, 10, false),
            status("a", "sha256:00", 200, 2_000_000, 20, false),
            status("a", "sha256:00", 2_000_000, 2_000_000, 150, true),
            vertices(vec![vertex("a", Some(0), Some(200))]),
            vertices(vec![cached]),
            vertices(vec![vertex("c", Some(300), None)]),
            log("c", 310, "hello\nwor"),
            log("c", 320, "ld\nlast words"),
            warning("c", "careful"),
            vertices(vec![failed]),
        ]));
    }

    #[test]
    fn steps_that_run_at_once_do_not_interleave() {
        insta::assert_snapshot!(shown(vec![
            vertices(vec![vertex("a", Some(0), None), vertex("b", Some(0), None)]),
            log("a", 10, "a1\n"),
            log("b", 10, "b1\n"),
            log("a", 20, "a2\n"),
            vertices(vec![vertex("b", Some(0), Some(30))]),
            log("a", 40, "a3\n"),
            vertices(vec![vertex("a", Some(0), Some(50))]),
        ]));
    }

    #[test]
    fn a_transfer_that_takes_its_time_prints_while_it_runs() {
        let mut plain = Plain::new();
        plain.update(&vertices(vec![vertex("a", Some(0), None)]));
        assert_eq!(plain.update(&status("a", "x", 1, 100, 1, false)), "");
        for known in plain.transfers.values_mut() {
            known.seen -= STATUS_DELAY;
        }
        assert_eq!(plain.refresh(), "#1 x 1B / 100B\n");
        assert_eq!(plain.update(&status("a", "x", 2, 100, 2, false)), "");
        assert_eq!(plain.update(&status("a", "x", 7, 100, 3, false)), "#1 x 7B / 100B\n");
    }

    #[test]
    fn cached_steps_come_in_the_order_of_the_graph() {
        let cached = |digest: &str, at| Vertex { cached: true, ..vertex(digest, Some(at), Some(at)) };
        let text = shown(vec![
            vertices(vec![vertex("a", None, None), vertex("b", None, None), vertex("c", None, None)]),
            vertices(vec![cached("c", 1), cached("b", 3), cached("a", 2)]),
        ]);
        let ordered = "#1 [a] step\n#1 CACHED\n\n#2 [b] step\n#2 CACHED\n\n#3 [c] step\n#3 CACHED\n";
        assert_eq!(text, ordered);
        // As they come if all is known at once.
        assert_eq!(shown(vec![vertices(vec![cached("a", 3), cached("b", 1), cached("c", 2)])]), ordered);
    }

    #[test]
    fn a_canceled_step_says_so() {
        let canceled = Vertex { error: "process: context canceled".into(), ..vertex("a", Some(0), Some(9)) };
        let text = shown(vec![vertices(vec![vertex("a", Some(0), None)]), vertices(vec![canceled])]);
        assert_eq!(text, "#1 [a] step\n#1 CANCELED\n");
    }
}
