//! Errors of the compiler: a text, where in the file, and what caused it.

use kiln_proto::pb;

use crate::lint::LintWarning;

/// What a resolver failed with; kept as the source of the [`CompileError`] so that a daemon can
/// recover its own details.
pub type ResolveError = Box<dyn std::error::Error + Send + Sync>;

/// Why a Dockerfile does not compile.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CompileError {
    /// The text for the user, e.g. `dockerfile parse error on line 2: unknown instruction: RUNN (did you mean RUN?)`.
    pub message: String,
    /// The file as it was named by the client.
    pub file: String,
    /// Line of the error, from 1; 0 when it concerns no line.
    pub line: u32,
    /// Column of the error within the line, in characters from 1; 0 when only the line is known.
    pub column: u32,
    /// The lines of the instruction. `character` is the column (from 1) where it is known, else 0.
    pub ranges: Vec<pb::Range>,
    /// The resolver's error, when one caused this.
    #[source]
    pub cause: Option<ResolveError>,
    /// What the checks had found until then.
    pub warnings: Vec<LintWarning>,
}

impl CompileError {
    /// `file:line:column`, as far as known.
    pub fn position(&self) -> String {
        match (self.line, self.column) {
            (0, _) => self.file.clone(),
            (line, 0) => format!("{}:{line}", self.file),
            (line, column) => format!("{}:{line}:{column}", self.file),
        }
    }
}

/// A place in the file. Lines and columns count from 1; column 0 means the whole line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pos {
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// The lines of an instruction, both inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lines {
    pub(crate) start: u32,
    pub(crate) end: u32,
}

impl Lines {
    /// One range for each line, as the source map of LLB has them.
    pub(crate) fn ranges(self) -> Vec<pb::Range> {
        (self.start..=self.end.max(self.start)).map(|line| range(line, 0)).collect()
    }
}

fn range(line: u32, column: u32) -> pb::Range {
    let position = |character: u32| pb::Position {
        line: i32::try_from(line).unwrap_or(i32::MAX),
        character: i32::try_from(character).unwrap_or(i32::MAX),
    };
    pb::Range { start: Some(position(column)), end: Some(position(0)) }
}

/// An error on its way out of the compiler; gains its place as it passes through.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) message: String,
    pub(crate) at: Option<Pos>,
    pub(crate) lines: Option<Lines>,
    pub(crate) cause: Option<ResolveError>,
}

pub(crate) type Result<T, E = Fault> = std::result::Result<T, E>;

impl Fault {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), at: None, lines: None, cause: None }
    }

    pub(crate) fn caused_by(mut self, cause: ResolveError) -> Self {
        self.cause = Some(cause);
        self
    }

    /// The exact place, unless a more exact one is known already.
    pub(crate) fn at(mut self, pos: Pos) -> Self {
        self.at.get_or_insert(pos);
        self
    }

    /// The lines, unless known already.
    pub(crate) fn within(mut self, lines: Lines) -> Self {
        self.lines.get_or_insert(lines);
        self
    }

    /// Puts `context: ` before the text.
    pub(crate) fn context(mut self, context: impl std::fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    pub(crate) fn into_error(self, file: &str) -> CompileError {
        let pos = self.at.or(self.lines.map(|l| Pos { line: l.start, column: 0 }));
        let mut ranges = match (self.lines, pos) {
            (Some(lines), _) => lines.ranges(),
            (None, Some(pos)) => vec![range(pos.line, 0)],
            (None, None) => Vec::new(),
        };
        if let Some(pos) = pos {
            for r in &mut ranges {
                if let Some(start) = r.start.as_mut().filter(|s| u32::try_from(s.line) == Ok(pos.line)) {
                    start.character = i32::try_from(pos.column).unwrap_or(i32::MAX);
                }
            }
        }
        CompileError {
            message: self.message,
            file: file.to_string(),
            line: pos.map_or(0, |p| p.line),
            column: pos.map_or(0, |p| p.column),
            ranges,
            cause: self.cause,
            warnings: Vec::new(),
        }
    }
}

impl From<String> for Fault {
    fn from(message: String) -> Self {
        Self::new(message)
    }
}

impl From<&str> for Fault {
    fn from(message: &str) -> Self {
        Self::new(message)
    }
}
