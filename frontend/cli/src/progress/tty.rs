//! Progress as a live view: finished and running steps with their times, transfers with bars, and the last lines that
//! running steps wrote. Redrawn in place; what does not fit the terminal is left out, finished steps first.

use std::time::{Duration, Instant};

use kiln_proto::control::StatusResponse;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::model::{self, Model, Nanos, Status, Step};
use super::units;

const INTERVAL: Duration = Duration::from_millis(100);
/// Lines of output shown of each running step, if there is room.
const LOG_LINES: usize = 6;
/// Width of the screen from which transfers have bars.
const BAR_MIN: usize = 60;

const HIDE_CURSOR: &str = "\x1b[?25l";
const SHOW_CURSOR: &str = "\x1b[?25h";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    None,
    Done,
    Failed,
    Canceled,
    Faint,
}

impl Style {
    fn paint(self, text: &str) -> String {
        let code = match self {
            Self::None => return text.to_owned(),
            Self::Done => 34,
            Self::Failed => 31,
            Self::Canceled => 33,
            Self::Faint => 2,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

struct Row {
    left: String,
    /// The share that is done, shown as a bar.
    bar: Option<f64>,
    right: String,
    style: Style,
}

pub(super) struct Tty {
    model: Model,
    /// Lines on the screen that the next drawing replaces.
    drawn: usize,
    last: Option<Instant>,
    /// This machine's clock minus the daemon's.
    skew: Option<Nanos>,
    color: bool,
    /// A fixed size and time, in tests.
    fixed: Option<(usize, usize, Nanos)>,
}

impl Tty {
    pub(super) fn new() -> Self {
        let color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { model: Model::new(), drawn: 0, last: None, skew: None, color, fixed: None }
    }

    pub(super) fn update(&mut self, message: &StatusResponse) -> String {
        self.model.apply(message);
        for step in &mut self.model.steps {
            step.fresh = Default::default();
        }
        if self.skew.is_none() {
            self.skew =
                self.model.steps.iter().filter_map(Step::started).min().map(|start| self.clock() - start);
        }
        if self.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            return String::new();
        }
        self.refresh()
    }

    pub(super) fn refresh(&mut self) -> String {
        if self.model.steps.iter().all(|step| step.started().is_none()) {
            return String::new();
        }
        self.last = Some(Instant::now());
        let (width, height) = self.size();
        let rows = self.fitting(height.saturating_sub(2).max(3));
        let mut out = if self.drawn == 0 { HIDE_CURSOR.to_owned() } else { String::new() };
        out.push_str(&self.draw(&rows, width, false));
        out
    }

    /// The last drawing shows every step and leaves it on the screen.
    pub(super) fn finish(&mut self) -> String {
        if self.model.steps.iter().all(|step| step.started().is_none()) {
            return String::new();
        }
        for step in &mut self.model.steps {
            step.end_partial();
        }
        let (width, _) = self.size();
        let rows = self.rows(true, 0);
        let mut out = self.draw(&rows, width, true);
        self.drawn = 0;
        out.push_str(SHOW_CURSOR);
        out.push_str(&self.model.failures());
        out
    }

    fn clock(&self) -> Nanos {
        self.fixed.map_or_else(model::now, |(_, _, now)| now)
    }

    /// Now, by the daemon's clock.
    fn now(&self) -> Nanos {
        self.clock() - self.skew.unwrap_or(0)
    }

    fn size(&self) -> (usize, usize) {
        if let Some((width, height, _)) = self.fixed {
            return (width, height);
        }
        match rustix::termios::tcgetwinsize(std::io::stderr()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
            _ => (80, 24),
        }
    }

    fn shown(&self) -> Vec<&Step> {
        let mut steps: Vec<&Step> =
            self.model.steps.iter().filter(|step| !step.hidden && step.started().is_some()).collect();
        steps.sort_by_key(|step| step.started());
        steps
    }

    /// All rows: of finished steps with or without their transfers, of running ones with so many lines of output.
    fn rows(&self, transfers: bool, log_lines: usize) -> Vec<Row> {
        self.shown().into_iter().flat_map(|step| self.step(step, transfers, log_lines)).collect()
    }

    /// Rows that fit into `height` lines.
    fn fitting(&self, height: usize) -> Vec<Row> {
        for (transfers, log_lines) in [(true, LOG_LINES), (false, LOG_LINES), (false, 2), (false, 0)] {
            let rows = self.rows(transfers, log_lines);
            if rows.len() <= height {
                return rows;
            }
        }
        let steps = self.shown();
        let running: Vec<Row> = steps
            .iter()
            .filter(|step| step.is_running())
            .flat_map(|step| self.step(step, false, 0))
            .collect();
        let room = height.saturating_sub(running.len());
        let finished: Vec<&&Step> = steps.iter().filter(|step| !step.is_running()).collect();
        let latest = &finished[finished.len().saturating_sub(room)..];
        let mut rows: Vec<Row> = latest.iter().flat_map(|step| self.step(step, false, 0)).collect();
        rows.extend(running);
        rows.truncate(height);
        rows
    }

    fn step(&self, step: &Step, transfers: bool, log_lines: usize) -> Vec<Row> {
        let now = self.now();
        let (mark, style) = match step {
            step if step.is_canceled() => ("CANCELED ", Style::Canceled),
            step if !step.error.is_empty() => ("ERROR ", Style::Failed),
            step if step.cached => ("CACHED ", Style::Done),
            step if step.is_completed() => ("", Style::Done),
            _ => ("", Style::None),
        };
        let name = visible(&step.name.replace(['\n', '\r'], " "));
        let mut rows = vec![Row {
            left: format!(" => {mark}{name}"),
            bar: None,
            right: format!("{:.1}s", step.seconds(now)),
            style,
        }];
        if transfers || step.is_running() {
            rows.extend(step.statuses.iter().map(|status| transfer(status, step.is_running(), now)));
        }
        rows.extend(step.warnings.iter().map(|warning| Row {
            left: format!(" => => WARN: {}", visible(warning)),
            bar: None,
            right: String::new(),
            style: Style::Canceled,
        }));
        if step.is_running() {
            let skip = step.tail.len().saturating_sub(log_lines);
            rows.extend(step.tail.iter().skip(skip).map(|line| Row {
                left: format!(" => => # {}", visible(&line.text)),
                bar: None,
                right: String::new(),
                style: Style::Faint,
            }));
        }
        rows
    }

    fn draw(&mut self, rows: &[Row], width: usize, last: bool) -> String {
        let counted = self.model.steps.iter().filter(|step| !step.hidden);
        let total = counted.clone().count();
        let done = counted.filter(|step| step.is_completed()).count();
        let starts = self.model.steps.iter().filter_map(Step::started).min();
        let ends = if last { self.model.steps.iter().filter_map(Step::ended).max() } else { None };
        let seconds =
            starts.map_or(0.0, |start| (ends.unwrap_or_else(|| self.now()) - start).max(0) as f64 / 1e9);
        let finished = if last && done == total { " FINISHED" } else { "" };
        let mut out = String::new();
        if self.drawn > 0 {
            out.push_str(&format!("\x1b[{}A\r", self.drawn));
        }
        let header = format!("[+] Building {seconds:.1}s ({done}/{total}){finished}");
        for (line, style) in
            std::iter::once((cut(&header, width), if last { Style::Done } else { Style::None }))
                .chain(rows.iter().map(|row| (fill(row, width), row.style)))
        {
            out.push_str(&if self.color { style.paint(&line) } else { line });
            out.push_str("\x1b[K\n");
        }
        out.push_str("\x1b[J");
        self.drawn = rows.len() + 1;
        out
    }
}

fn transfer(status: &Status, running: bool, now: Nanos) -> Row {
    let under_way = running && status.completed.is_none();
    let bar = (under_way && status.total > 0)
        .then(|| (status.current as f64 / status.total as f64).clamp(0.0, 1.0));
    let amount = if status.total > 0 {
        format!("{} / {}   ", units::bytes(status.current), units::bytes(status.total))
    } else if status.current > 0 {
        format!("{}   ", units::bytes(status.current))
    } else {
        String::new()
    };
    let end = status.completed.unwrap_or(if running { now } else { status.timestamp });
    let seconds = status.started.map_or(0.0, |start| (end - start).max(0) as f64 / 1e9);
    let style = if under_way { Style::None } else { Style::Done };
    Row {
        left: format!(" => => {}", visible(&status.id)),
        bar,
        right: format!("{amount}{seconds:.1}s"),
        style,
    }
}

/// One screen line: the left part cut to leave room for the right one.
fn fill(row: &Row, width: usize) -> String {
    if row.right.is_empty() {
        return cut(&row.left, width);
    }
    let right = match row.bar {
        Some(share) if width >= BAR_MIN => {
            let bar = (width / 8).min(20);
            let filled = (share * bar as f64) as usize;
            format!("[{}{}] {}", "=".repeat(filled), " ".repeat(bar - filled), row.right)
        }
        _ => row.right.clone(),
    };
    let room = width.saturating_sub(right.width() + 1);
    let left = cut(&row.left, room);
    let pad = room.saturating_sub(left.width()) + 1;
    cut(&format!("{left}{}{}", " ".repeat(pad), right), width)
}

/// As much of the text as fits.
fn cut(text: &str, width: usize) -> String {
    let mut used = 0;
    let fits = |c: &char| {
        used += c.width().unwrap_or(0);
        used <= width
    };
    text.chars().take_while(fits).collect()
}

/// A line of output without what would move the cursor: escape sequences, control characters, and whatever a carriage
/// return would have overwritten.
fn visible(text: &str) -> String {
    let text = text.trim_end_matches('\r');
    let text = text.rsplit('\r').next().unwrap_or(text);
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => match chars.next() {
                // A control sequence ends at its first letter (or one of @ to ~).
                Some('[') => {
                    for c in chars.by_ref() {
                        if ('@'..='~').contains(&c) {
                            break;
                        }
                    }
                }
                // An operating system command ends with a bell or ESC \.
                Some(']') => {
                    while let Some(c) = chars.next() {
                        if c == '\x07' || (c == '\x1b' && chars.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                _ => {}
            },
            '\t' => out.push(' '),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::model::testing::*;
    use super::*;
    use kiln_proto::control::Vertex;
    use proptest::prelude::*;

    /// 2.5 s after the start of the test's clock.
    const NOW: Nanos = 1_002_500_000_000;

    fn tty(width: usize, height: usize) -> Tty {
        Tty { color: false, fixed: Some((width, height, NOW)), skew: Some(0), ..Tty::new() }
    }

    fn screen(text: &str) -> String {
        let text = text
            .replace("\x1b[K", "")
            .replace("\x1b[J", "")
            .replace(HIDE_CURSOR, "")
            .replace(SHOW_CURSOR, "");
        text.split_once("A\r").map_or(text.clone(), |(_, rest)| rest.to_owned())
    }

    fn sample(tty: &mut Tty) {
        let cached = Vertex { cached: true, ..vertex("b", Some(200), Some(200)) };
        for message in [
            vertices(vec![vertex("a", Some(0), None), vertex("z", None, None)]),
            status("a", "sha256:00", 2_000_000, 2_000_000, 150, true),
            vertices(vec![vertex("a", Some(0), Some(200)), cached, vertex("c", Some(300), None)]),
            status("c", "transferring context:", 500_000, 2_000_000, 400, false),
            log("c", 310, "progress 1%\rprogress 2%\r\n\x1b[31mred\x1b[0m and \x1b]0;title\x07plain\n"),
        ] {
            tty.update(&message);
        }
    }

    #[test]
    fn the_live_view() {
        let mut tty = tty(60, 24);
        sample(&mut tty);
        insta::assert_snapshot!(screen(&tty.refresh()));
    }

    #[test]
    fn a_small_terminal_shows_what_runs() {
        let mut tty = tty(40, 6);
        sample(&mut tty);
        let text = screen(&tty.refresh());
        assert!(text.lines().count() <= 5, "{text}");
        assert!(text.contains("[c] step"), "{text}");
    }

    #[test]
    fn the_last_drawing_stays_and_says_what_failed() {
        let mut tty = tty(60, 24);
        sample(&mut tty);
        let failed = Vertex { error: "exit code: 3".into(), ..vertex("c", Some(300), Some(420)) };
        tty.update(&vertices(vec![failed, vertex("z", Some(1), Some(2))]));
        insta::assert_snapshot!(screen(&tty.finish()));
    }

    proptest! {
        #[test]
        fn no_line_is_wider_than_the_screen_and_nothing_moves_the_cursor(
            name in "\\PC{0,40}", text in any::<String>(), width in 1usize..60,
        ) {
            let mut tty = tty(width, 12);
            tty.update(&vertices(vec![Vertex { name, ..vertex("a", Some(0), None) }]));
            tty.update(&log("a", 1, &text));
            tty.update(&log("a", 2, "\n"));
            for line in screen(&tty.refresh()).lines() {
                prop_assert!(line.width() <= width, "{line:?}");
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
        }
    }
}
