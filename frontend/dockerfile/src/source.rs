//! The text of a Dockerfile as logical lines: continuations joined, comments and parser directives
//! taken out, keyword and flags split off, heredocs collected, every character's place remembered.
//! Knows which keywords may carry a heredoc, and nothing else about instructions.

use crate::error::{Fault, Lines, Pos, Result};
use crate::expand::{Lexer, NoEnv};

/// Larger files are refused.
const MAX_SIZE: usize = 16 << 20;

/// A file split into logical lines.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) lines: Vec<Line>,
    /// `\` or, by `# escape=`, `` ` ``.
    pub(crate) escape: char,
    /// Lines at which an empty line within a continuation was skipped.
    pub(crate) empty_continuations: Vec<u32>,
    /// Value of `# check=`.
    pub(crate) check: Option<String>,
}

/// One instruction, before its meaning is known.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// As it is written.
    pub(crate) keyword: String,
    pub(crate) flags: Vec<Flag>,
    /// What follows the flags, trimmed.
    pub(crate) args: String,
    /// The logical line, trimmed; without heredocs.
    pub(crate) text: String,
    pub(crate) lines: Lines,
    /// Where the keyword starts.
    pub(crate) start: Pos,
    /// Where [`Line::args`] starts.
    pub(crate) args_at: Pos,
    /// Comment lines directly before.
    pub(crate) comments: Vec<String>,
    pub(crate) heredocs: Vec<Heredoc>,
}

/// A word before the arguments that starts with `--`, unquoted.
#[derive(Debug, Clone)]
pub(crate) struct Flag {
    pub(crate) text: String,
    pub(crate) at: Pos,
}

/// A here-document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heredoc {
    pub(crate) name: String,
    /// Variables are expanded: the name was not quoted.
    pub(crate) expand: bool,
    /// Leading tabs do not count (`<<-`).
    pub(crate) chomp: bool,
    /// The lines with their ends; leading tabs are still there.
    pub(crate) content: String,
}

impl Heredoc {
    /// The content, without leading tabs if they do not count.
    pub(crate) fn body(&self) -> String {
        if !self.chomp {
            return self.content.clone();
        }
        self.content.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

/// Splits a file. Bytes that are not UTF-8 are replaced.
pub(crate) fn read(file: &[u8]) -> Result<Source> {
    if file.is_empty() {
        return Err("the Dockerfile cannot be empty".into());
    }
    if file.len() > MAX_SIZE {
        return Err(Fault::new(format!("the Dockerfile is larger than {MAX_SIZE} bytes")));
    }
    let text = String::from_utf8_lossy(file);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let mut reader = Reader {
        raw: text.split_inclusive('\n').collect(),
        next: 0,
        directives: Directives { escape: '\\', check: None, seen: Vec::new(), done: false },
        empty_continuations: Vec::new(),
    };
    let mut lines = Vec::new();
    let mut comments: Vec<String> = Vec::new();
    while let Some((number, raw)) = reader.next_line() {
        let trimmed = raw.trim_start();
        if let Some(comment) = trimmed.strip_prefix('#') {
            if !reader.directives.take(trimmed, number)? {
                match comment.trim() {
                    "" => comments.clear(),
                    comment => comments.push(comment.to_string()),
                }
            }
            continue;
        }
        reader.directives.done = true;
        if let Some(mut line) = reader.logical_line(number, raw)? {
            line.comments = std::mem::take(&mut comments);
            lines.push(line);
        }
    }
    if lines.is_empty() {
        return Err("file with no instructions".into());
    }
    let Directives { escape, check, .. } = reader.directives;
    Ok(Source { lines, escape, empty_continuations: reader.empty_continuations, check })
}

/// One instruction that stands alone, as an image's ONBUILD triggers do; the default escape character applies.
pub(crate) fn read_trigger(text: &str) -> Result<Line> {
    let mut source = read(text.as_bytes())?;
    match source.lines.pop() {
        Some(line) if source.lines.is_empty() => Ok(line),
        _ => Err("onbuild trigger should be a single expression".into()),
    }
}

/// The image named by a `# syntax=` directive (also as `//syntax=` or `{"syntax": …}`), if any, and its line.
pub(crate) fn syntax(file: &[u8]) -> Option<(String, u32)> {
    let text = String::from_utf8_lossy(file);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let (text, first) = match text.strip_prefix("#!") {
        Some(rest) => (rest.split_once('\n')?.1, 2),
        None => (text, 1),
    };
    for comment in ["#", "//"] {
        for (number, line) in (first..).zip(text.lines()) {
            let Some((name, value)) = line.strip_prefix(comment).and_then(directive) else { break };
            if name == "syntax" {
                return Some((value, number));
            }
        }
    }
    let json: serde_json::Value =
        serde_json::Deserializer::from_str(text).into_iter::<serde_json::Value>().next()?.ok()?;
    Some((json.get("syntax")?.as_str()?.to_string(), first))
}

/// `name = value` of a known directive, the comment sign already taken off.
fn directive(comment: &str) -> Option<(String, String)> {
    let (name, value) = comment.trim_start().split_once('=')?;
    let (name, value) = (name.trim_end().to_ascii_lowercase(), value.trim());
    (matches!(name.as_str(), "escape" | "syntax" | "check") && !value.is_empty())
        .then(|| (name, value.to_string()))
}

struct Directives {
    escape: char,
    check: Option<String>,
    seen: Vec<String>,
    done: bool,
}

impl Directives {
    /// Whether the line is a directive. The first line that is none ends them.
    fn take(&mut self, line: &str, number: u32) -> Result<bool> {
        let found = line.strip_prefix('#').filter(|_| !self.done).and_then(directive);
        let Some((name, value)) = found else {
            self.done = true;
            return Ok(false);
        };
        let fault = |message: String| Fault::new(message).within(Lines { start: number, end: number });
        if self.seen.contains(&name) {
            return Err(fault(format!("only one {name} parser directive can be used")));
        }
        match name.as_str() {
            "escape" => match value.as_str() {
                "\\" => self.escape = '\\',
                "`" => self.escape = '`',
                _ => return Err(fault(format!("invalid escape token '{value}' does not match ` or \\"))),
            },
            "check" => self.check = Some(value),
            _ => {}
        }
        self.seen.push(name);
        Ok(true)
    }
}

struct Reader<'a> {
    /// With line ends.
    raw: Vec<&'a str>,
    next: usize,
    directives: Directives,
    empty_continuations: Vec<u32>,
}

impl<'a> Reader<'a> {
    /// The next line without its end, and its number.
    fn next_line(&mut self) -> Option<(u32, &'a str)> {
        let raw = *self.raw.get(self.next)?;
        self.next += 1;
        Some((self.number(), raw.trim_end_matches(['\r', '\n'])))
    }

    fn number(&self) -> u32 {
        u32::try_from(self.next).unwrap_or(u32::MAX)
    }

    /// Joins continuations, starting with `first`; nothing if only blanks remain.
    fn logical_line(&mut self, start: u32, first: &str) -> Result<Option<Line>> {
        let mut joined = Joined::default();
        let (body, mut more) = self.continuation(first.trim_start());
        joined.push(body, start, first.len() - first.trim_start().len(), first);
        if !more && body.is_empty() {
            return Ok(None);
        }
        let mut empty = false;
        while more {
            let Some((number, raw)) = self.next_line() else { break };
            let trimmed = raw.trim_start();
            if trimmed.starts_with('#') {
                continue;
            }
            if trimmed.is_empty() {
                empty = true;
                continue;
            }
            let (body, again) = self.continuation(raw);
            joined.push(body, number, 0, raw);
            more = again;
        }
        if empty {
            self.empty_continuations.push(self.number());
        }
        if joined.text.trim().is_empty() {
            return Ok(None);
        }
        let fault_lines = Lines { start, end: self.number() };
        let mut line = self.split(&joined).map_err(|f| f.within(fault_lines))?;
        line.heredocs = self.heredocs(&line).map_err(|f| f.within(fault_lines))?;
        line.lines = Lines { start, end: self.number() };
        Ok(Some(line))
    }

    /// The line without its continuation character, and whether it had one: the escape character as
    /// the last that is not blank, not itself escaped.
    fn continuation<'l>(&self, line: &'l str) -> (&'l str, bool) {
        let escape = self.directives.escape;
        match line.trim_end_matches([' ', '\t']).strip_suffix(escape) {
            Some(body) if !body.ends_with(escape) => (body, true),
            _ => (line, false),
        }
    }

    /// Keyword, flags, arguments.
    fn split(&self, joined: &Joined) -> Result<Line> {
        let text = joined.text.as_str();
        let blank = |c: char| matches!(c, '\t' | '\x0b' | '\x0c' | '\r' | ' ');
        let start = text.len() - text.trim_start().len();
        let end = text.trim_end().len();
        let keyword_end = text[start..end].find(blank).map_or(end, |i| start + i);
        let mut at = keyword_end;
        let mut flags = Vec::new();
        while let Some((flag, next)) = self.flag(&text[..end], at) {
            let from = text[at..].find(|c: char| !c.is_whitespace()).map_or(at, |i| at + i);
            at = next;
            if flag == "--" {
                break;
            }
            flags.push(Flag { text: flag, at: joined.place(from) });
        }
        let args_at = text[at..end].find(|c: char| !c.is_whitespace()).map_or(end, |i| at + i);
        Ok(Line {
            keyword: text[start..keyword_end].to_string(),
            flags,
            args: text[args_at..end].to_string(),
            text: text[start..end].to_string(),
            lines: Lines { start: 0, end: 0 },
            start: joined.place(start),
            args_at: joined.place(if args_at < end { args_at } else { start }),
            comments: Vec::new(),
            heredocs: Vec::new(),
        })
    }

    /// The word at `at`, unquoted, if it starts with `--`, and where it ends.
    fn flag(&self, text: &str, at: usize) -> Option<(String, usize)> {
        let from = at + text[at..].find(|c: char| !c.is_whitespace())?;
        if !text[from..].starts_with("--") {
            return None;
        }
        let mut word = String::new();
        let mut quote = None;
        let mut chars = text[from..].char_indices();
        while let Some((i, c)) = chars.next() {
            if c == self.directives.escape {
                word.extend(chars.next().map(|(_, c)| c));
            } else if quote == Some(c) {
                quote = None;
            } else if quote.is_none() && matches!(c, '\'' | '"') {
                quote = Some(c);
            } else if quote.is_none() && c.is_whitespace() {
                return Some((word, from + i));
            } else {
                word.push(c);
            }
        }
        Some((word, text.len()))
    }

    fn heredocs(&mut self, line: &Line) -> Result<Vec<Heredoc>> {
        let takes_heredocs =
            |keyword: &str| matches!(keyword.to_ascii_uppercase().as_str(), "ADD" | "COPY" | "RUN");
        let trigger = line.args.split_whitespace().next().unwrap_or_default();
        let allowed = takes_heredocs(&line.keyword)
            || (line.keyword.eq_ignore_ascii_case("ONBUILD") && takes_heredocs(trigger));
        if !allowed || !line.text.contains("<<") {
            return Ok(Vec::new());
        }
        let lexer = Lexer { raw_quotes: true, raw_escapes: true, keep_unset: true, ..Lexer::new('\\') };
        // A line that is no shell words holds no heredoc; its own parser will complain.
        let words = lexer.expand(&line.text, &NoEnv).map(|e| e.words).unwrap_or_default();
        let mut out = Vec::new();
        for word in words {
            let Some(mut doc) = parse_heredoc(&word)? else { continue };
            loop {
                let Some(raw) = self.raw.get(self.next) else {
                    return Err(Fault::new("unterminated heredoc").at(line.start));
                };
                self.next += 1;
                let candidate = raw.trim_end_matches(['\r', '\n']);
                let candidate = if doc.chomp { candidate.trim_start_matches('\t') } else { candidate };
                if candidate == doc.name {
                    break;
                }
                doc.content.push_str(raw);
            }
            out.push(doc);
        }
        Ok(out)
    }
}

/// Reads one shell word as the start of a heredoc (`<<NAME`, `3<<-"NAME"`); the content is empty.
pub(crate) fn parse_heredoc(word: &str) -> Result<Option<Heredoc>> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit());
    let Some(rest) = rest.strip_prefix("<<") else { return Ok(None) };
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest.trim_start()),
        None => (false, rest.trim_start()),
    };
    // Parentheses end a shell word: this is arithmetic, such as `$((1 << 2))`.
    if rest.is_empty() || rest.contains(['<', '(', ')']) {
        return Ok(None);
    }
    let lexer = Lexer { keep_unset: true, ..Lexer::new('\\') };
    let words = lexer.expand(rest, &NoEnv)?.words;
    let [name] = words.as_slice() else { return Ok(None) };
    let raw = Lexer { raw_quotes: true, ..lexer }.expand(rest, &NoEnv)?.words;
    let quotes = |s: &str| s.chars().filter(|c| matches!(c, '\'' | '"')).count();
    let expand = raw.len() == 1 && quotes(name) == quotes(&raw[0]);
    Ok(Some(Heredoc { name: name.clone(), expand, chomp, content: String::new() }))
}

/// A logical line and where its pieces come from.
#[derive(Default)]
struct Joined {
    text: String,
    /// Offset in `text`, and the place of that character; `raw` is what precedes it counted in characters.
    pieces: Vec<(usize, Pos)>,
}

impl Joined {
    /// Appends `body`, which starts `skipped` bytes into the raw line.
    fn push(&mut self, body: &str, line: u32, skipped: usize, raw: &str) {
        let column = raw[..skipped].chars().count() + 1;
        self.pieces.push((self.text.len(), Pos { line, column: u32::try_from(column).unwrap_or(u32::MAX) }));
        self.text.push_str(body);
    }

    fn place(&self, offset: usize) -> Pos {
        let piece = self.pieces.iter().rev().find(|(from, _)| *from <= offset);
        let Some(&(from, pos)) = piece else { return Pos { line: 0, column: 0 } };
        let moved = self.text[from..offset].chars().count();
        Pos { line: pos.line, column: pos.column.saturating_add(u32::try_from(moved).unwrap_or(u32::MAX)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<Line> {
        read(text.as_bytes()).unwrap_or_else(|f| panic!("{}", f.message)).lines
    }

    fn fault(text: &str) -> (String, Option<Pos>, Option<Lines>) {
        let f = read(text.as_bytes()).err().unwrap_or_else(|| panic!("no error"));
        (f.message, f.at, f.lines)
    }

    #[test]
    fn continuations_comments_and_places() {
        let l = lines(
            "# hello\n\nFROM a\n  RUN  --mount=x \\\n  # inside\n\n  --network='no ne' \\  \n  echo \\\\\\\n b\\\\\nCMD x",
        );
        assert_eq!(l.len(), 4);
        assert_eq!(l[0].comments, ["hello"]);
        let run = &l[1];
        assert_eq!(run.keyword, "RUN");
        assert_eq!(
            run.flags.iter().map(|f| f.text.as_str()).collect::<Vec<_>>(),
            ["--mount=x", "--network=no ne"]
        );
        assert_eq!(run.flags[0].at, Pos { line: 4, column: 8 });
        assert_eq!(run.flags[1].at, Pos { line: 7, column: 3 });
        assert_eq!(run.start, Pos { line: 4, column: 3 });
        // An escape that is itself preceded by one continues nothing.
        assert_eq!(run.args, "echo \\\\\\");
        assert_eq!(run.args_at, Pos { line: 8, column: 3 });
        assert_eq!(run.lines, Lines { start: 4, end: 8 });
        assert_eq!(l[2].keyword, "b\\\\");
    }

    #[test]
    fn directives_come_first() {
        let s = read(b"# escape=`\n# check=skip=all\nFROM a\nRUN a `\n b\\\n").expect("reads");
        assert_eq!((s.escape, s.check.as_deref()), ('`', Some("skip=all")));
        assert_eq!(s.lines[1].args, "a  b\\");
        assert_eq!(read(b"# x\n# escape=`\nFROM a\n").map(|s| s.escape).ok(), Some('\\'));
        assert_eq!(fault("# escape=x\nFROM a").0, "invalid escape token 'x' does not match ` or \\");
        assert_eq!(fault("# escape=`\n#escape=`\nFROM a").0, "only one escape parser directive can be used");
        assert_eq!(fault("# escape=`\n#escape=`\nFROM a").2, Some(Lines { start: 2, end: 2 }));
        let named = |image: &str, line| Some((image.to_string(), line));
        assert_eq!(syntax(b"#!/usr/bin/x\n# syntax = a/b:1 \n"), named("a/b:1", 2));
        assert_eq!(syntax(b"# check=skip=all\n# syntax=x\nFROM a"), named("x", 2));
        assert_eq!(syntax(b"//syntax=x\n{}"), named("x", 1));
        assert_eq!(syntax(b"{\"syntax\":\"j\"}"), named("j", 1));
        assert_eq!(syntax(b"FROM a\n# syntax=x"), None);
    }

    #[test]
    fn heredocs_are_collected() {
        let l = lines(
            "FROM a\nRUN <<EOF cat - 3<<-\"X Y\"\na\n  EOF\nEOF\n\tb\n\tX Y\nCOPY <<a <<b /d/\n1\na\n2\r\nb\nCMD <<EOF\n",
        );
        assert_eq!(l.len(), 4);
        let [first, second] = l[1].heredocs.as_slice() else { panic!("two heredocs") };
        assert_eq!((first.name.as_str(), first.expand, first.content.as_str()), ("EOF", true, "a\n  EOF\n"));
        assert_eq!((second.name.as_str(), second.expand, second.body().as_str()), ("X Y", false, "b\n"));
        assert_eq!(l[1].lines, Lines { start: 2, end: 7 });
        assert_eq!(l[2].heredocs.iter().map(|h| h.content.as_str()).collect::<Vec<_>>(), ["1\n", "2\r\n"]);
        assert!(l[3].heredocs.is_empty());
        assert_eq!(fault("FROM a\nRUN <<EOF\nx").0, "unterminated heredoc");
        assert!(lines("FROM a\nRUN cat <<< x\nRUN echo $((1 << 2))")[1].heredocs.is_empty());
        assert_eq!(lines("FROM a\nONBUILD RUN <<E\nx\nE\n")[1].heredocs.len(), 1);
    }

    #[test]
    fn nothing_to_build() {
        assert_eq!(fault("").0, "the Dockerfile cannot be empty");
        assert_eq!(fault("# only\n\n").0, "file with no instructions");
        assert_eq!(lines("\u{feff}FROM a").len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in "(FROM a|RUN|COPY|\n|\\\\|`| |<<|-|E|#|escape=|'|\"|é|--){0,40}") {
            let _ = read(text.as_bytes());
        }
    }
}
