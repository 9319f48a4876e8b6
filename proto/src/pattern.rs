//! Path patterns: those of `.dockerignore` and of include/exclude lists (`**`, `!`, a pattern
//! covers what is below it), and single shell-style globs. Pure; walks no file system.

use std::borrow::Cow;
use std::ops::RangeInclusive;

/// A pattern that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A lone `!`.
    #[error("illegal exclusion pattern: \"!\"")]
    LoneExclusion,
    /// An open bracket, an empty class or a trailing backslash.
    #[error("syntax error in pattern: {0}")]
    Syntax(String),
}

/// An ordered list of patterns; later ones override earlier ones, `!` takes back.
#[derive(Debug, Clone, Default)]
pub struct PatternMatcher {
    patterns: Vec<Pattern>,
}

/// What a directory's match says about what is below it; see [`PatternMatcher::matches_below`].
#[derive(Debug, Clone, Default)]
pub struct MatchInfo {
    matched: Vec<bool>,
}

#[derive(Debug, Clone)]
struct Pattern {
    text: String,
    negated: bool,
    glob: Glob,
}

impl PatternMatcher {
    /// Compiles the patterns. Blank ones are skipped; `a/../b` and the like are cleaned.
    pub fn new<S: AsRef<str>>(patterns: impl IntoIterator<Item = S>) -> Result<Self, PatternError> {
        let mut out = Vec::new();
        for raw in patterns {
            let raw = raw.as_ref().trim();
            if raw.is_empty() {
                continue;
            }
            let cleaned = clean(raw);
            let (negated, text) = match cleaned.strip_prefix('!') {
                Some("") => return Err(PatternError::LoneExclusion),
                Some(rest) => (true, rest),
                None => (false, cleaned.as_str()),
            };
            out.push(Pattern { text: text.to_string(), negated, glob: Glob::compile(text, true)? });
        }
        Ok(Self { patterns: out })
    }

    /// True if there is no pattern at all.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// True if some pattern starts with `!`.
    pub fn has_exclusions(&self) -> bool {
        self.patterns.iter().any(|p| p.negated)
    }

    /// The cleaned patterns without their `!`, and whether they had one.
    pub fn patterns(&self) -> impl Iterator<Item = (&str, bool)> {
        self.patterns.iter().map(|p| (p.text.as_str(), p.negated))
    }

    /// Whether `path` (slash-separated, relative, clean), or a directory above it, is matched.
    pub fn matches(&self, path: &str) -> bool {
        self.matches_below(path, None).0
    }

    /// [`PatternMatcher::matches`] for walks: `parent` is what this gave for the directory that holds
    /// `path`, so that its ancestors are not matched again.
    pub fn matches_below(&self, path: &str, parent: Option<&MatchInfo>) -> (bool, MatchInfo) {
        let mut info = MatchInfo { matched: vec![false; self.patterns.len()] };
        let mut matched = false;
        let parent = parent.filter(|p| p.matched.len() == self.patterns.len());
        for (i, pattern) in self.patterns.iter().enumerate() {
            let mut hit = parent.is_some_and(|p| p.matched[i]);
            if !hit {
                // Only a pattern that would change the answer is evaluated.
                if pattern.negated != matched {
                    continue;
                }
                hit = pattern.glob.matches(path);
                if !hit && parent.is_none() {
                    hit = path.match_indices('/').any(|(at, _)| pattern.glob.matches(&path[..at]));
                }
            }
            info.matched[i] = hit;
            if hit {
                matched = !pattern.negated;
            }
        }
        (matched, info)
    }

    /// Whether something below directory `dir` may be matched by a pattern without `!`. A walk over
    /// an include list may skip directories for which this and [`PatternMatcher::matches`] are false.
    pub fn may_match_below(&self, dir: &str) -> bool {
        self.patterns.iter().any(|p| !p.negated && p.glob.may_match_below(dir))
    }

    /// Whether something below directory `dir` may be taken back by a pattern with `!`. A walk over
    /// an exclude list may skip matched directories for which this is false.
    pub fn may_reinclude_below(&self, dir: &str) -> bool {
        self.patterns.iter().any(|p| p.negated && p.glob.may_match_below(dir))
    }
}

/// What patterns see of a name that may be any bytes: each byte that is not UTF-8 is U+FFFD.
pub fn text(name: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(name) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(name.len() * 2);
    for chunk in name.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    Cow::Owned(out)
}

/// Whether `name` matches one shell-style `pattern`: `*` and `?` stop at slashes, `[…]` and `\` as
/// usual, `**` is nothing special.
pub fn glob_match(pattern: &str, name: &str) -> Result<bool, PatternError> {
    Ok(Glob::compile(pattern, false)?.matches(name))
}

/// Whether the text holds a character that makes it a glob (`*`, `?`, `[` not escaped).
pub fn has_wildcard(text: &str) -> bool {
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '*' | '?' | '[' => return true,
            _ => {}
        }
    }
    false
}

/// Reads a `.dockerignore` file into patterns for [`PatternMatcher::new`]: a byte order mark, comments
/// and blank lines are dropped, leading slashes removed, paths cleaned. It is taken as [`text`] shows it, like names.
pub fn parse_ignore_file(bytes: &[u8]) -> Vec<String> {
    let text = text(bytes);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let mut out = Vec::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let line = line.trim();
        let (bang, pattern) = match line.strip_prefix('!') {
            Some(rest) => ("!", rest.trim()),
            None => ("", line),
        };
        if pattern.is_empty() && bang.is_empty() {
            continue;
        }
        let cleaned = if pattern.is_empty() { String::new() } else { clean(pattern) };
        let relative = match cleaned.strip_prefix('/') {
            Some(rest) if !rest.is_empty() => rest,
            _ => &cleaned,
        };
        out.push(format!("{bang}{relative}"));
    }
    out
}

/// The shortest equivalent of a slash-separated path, by its text alone: no `.`, `//` or inner `..`.
/// An empty result is `.`.
pub fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => match parts.last() {
                Some(&last) if last != ".." => {
                    parts.pop();
                }
                _ if rooted => {}
                _ => parts.push(".."),
            },
            part => parts.push(part),
        }
    }
    match (rooted, parts.is_empty()) {
        (true, _) => format!("/{}", parts.join("/")),
        (false, true) => ".".to_string(),
        (false, false) => parts.join("/"),
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Char(char),
    /// `?`: one character, no slash.
    One,
    /// `*`: any number of characters, no slash.
    Star,
    /// Any number of characters.
    All,
    /// Nothing, or anything that ends with a slash.
    Dirs,
    Class {
        negated: bool,
        ranges: Vec<RangeInclusive<char>>,
    },
}

/// A compiled pattern, matched by advancing the set of reachable token positions: linear in
/// pattern times text, whatever the pattern.
#[derive(Debug, Clone)]
struct Glob {
    tokens: Vec<Token>,
}

impl Glob {
    /// With `recursive`, two stars cross directories.
    fn compile(pattern: &str, recursive: bool) -> Result<Self, PatternError> {
        let syntax = || PatternError::Syntax(pattern.to_string());
        let chars: Vec<char> = pattern.chars().collect();
        let mut tokens = Vec::new();
        let mut i = 0;
        while i < chars.len() {
            match chars[i] {
                '*' if recursive && chars.get(i + 1) == Some(&'*') => {
                    let leading = i == 0;
                    i += 2;
                    let slash = chars.get(i) == Some(&'/');
                    if slash {
                        i += 1;
                    }
                    let literal_rest = !chars[i..].iter().any(|c| "*?[]\\".contains(*c));
                    // A leading `**` before plain text also matches inside a component: `**foo` takes `xfoo`.
                    let token = if i == chars.len() || (leading && !slash && literal_rest) {
                        Token::All
                    } else {
                        Token::Dirs
                    };
                    tokens.push(token);
                    continue;
                }
                '*' => tokens.push(Token::Star),
                '?' => tokens.push(Token::One),
                '[' => {
                    let (token, next) = class(&chars, i).ok_or_else(syntax)?;
                    tokens.push(token);
                    i = next;
                    continue;
                }
                '\\' => {
                    i += 1;
                    tokens.push(Token::Char(*chars.get(i).ok_or_else(syntax)?));
                }
                c => tokens.push(Token::Char(c)),
            }
            i += 1;
        }
        Ok(Self { tokens })
    }

    fn matches(&self, text: &str) -> bool {
        self.run(text.chars())[self.tokens.len()]
    }

    fn may_match_below(&self, dir: &str) -> bool {
        if dir.is_empty() || dir == "." {
            return true;
        }
        self.run(dir.chars().chain(std::iter::once('/'))).iter().any(|&alive| alive)
    }

    /// The positions reachable after consuming `text`; position `tokens.len()` accepts.
    fn run(&self, text: impl Iterator<Item = char>) -> Vec<bool> {
        let mut now = vec![false; self.tokens.len() + 1];
        now[0] = true;
        self.close(&mut now);
        for c in text {
            // `Dirs` may be passed only where it starts or after a slash, so staying inside it does
            // not count as reaching it anew.
            let mut next = vec![false; self.tokens.len() + 1];
            let mut fresh = vec![false; self.tokens.len() + 1];
            for (i, token) in self.tokens.iter().enumerate().filter(|(i, _)| now[*i]) {
                match token {
                    Token::Char(want) if *want == c => fresh[i + 1] = true,
                    Token::One if c != '/' => fresh[i + 1] = true,
                    Token::Star if c != '/' => fresh[i] = true,
                    Token::All => fresh[i] = true,
                    Token::Dirs => {
                        next[i] = true;
                        if c == '/' {
                            fresh[i + 1] = true;
                        }
                    }
                    Token::Class { negated, ranges } if ranges.iter().any(|r| r.contains(&c)) != *negated => {
                        fresh[i + 1] = true;
                    }
                    _ => {}
                }
            }
            self.close(&mut fresh);
            for (n, f) in next.iter_mut().zip(fresh) {
                *n |= f;
            }
            now = next;
        }
        now
    }

    /// Adds the positions reachable without consuming anything.
    fn close(&self, set: &mut [bool]) {
        for (i, token) in self.tokens.iter().enumerate() {
            if set[i] && matches!(token, Token::Star | Token::All | Token::Dirs) {
                set[i + 1] = true;
            }
        }
    }
}

/// The class that starts at `chars[at] == '['`, and the position after it.
fn class(chars: &[char], at: usize) -> Option<(Token, usize)> {
    let mut i = at + 1;
    let negated = chars.get(i) == Some(&'^');
    if negated {
        i += 1;
    }
    let mut ranges = Vec::new();
    while ranges.is_empty() || chars.get(i)? != &']' {
        let low = class_char(chars, &mut i)?;
        let mut high = low;
        if chars.get(i) == Some(&'-') {
            i += 1;
            high = class_char(chars, &mut i)?;
        }
        ranges.push(low..=high);
    }
    Some((Token::Class { negated, ranges }, i + 1))
}

fn class_char(chars: &[char], i: &mut usize) -> Option<char> {
    match chars.get(*i)? {
        '-' | ']' => return None,
        '\\' => *i += 1,
        _ => {}
    }
    let c = *chars.get(*i)?;
    *i += 1;
    Some(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(patterns: &[&str]) -> PatternMatcher {
        PatternMatcher::new(patterns).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn single_patterns() {
        for (pattern, path, want) in [
            ("**", "file", true),
            ("**", "a/b", true),
            ("**/", "file", true),
            ("dir/**", "dir/file", true),
            ("dir/**", "dir", false),
            ("dir/**", "dir2/file", false),
            ("**/dir2/*", "dir/dir2/file", true),
            ("**/dir2/**", "dir/dir2/dir2/file", true),
            ("**file", "dir/xfile", true),
            ("**/file", "dir/xfile", false),
            ("**/file", "file", true),
            ("**/file", "dir/dir/file", true),
            ("**/f*.txt", "dir/foo.txt", true),
            ("a**b", "ab", true),
            ("a**b", "ax/b", true),
            ("a**b", "axb", false),
            ("a**/*.txt", "a/file.txt", true),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("a/**/b", "a/xb", false),
            ("a*b", "a/b", false),
            ("a?b", "a/b", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[\\]]x", "]x", true),
            ("\\*x", "*x", true),
            ("\\*x", "ax", false),
            ("a.b", "axb", false),
            ("dir", "dir/below/file", true),
            ("dir/", "dir/file", true),
            ("*/x", "a/x/y", true),
            ("./a/../b", "b", true),
            ("föö*", "fööbar", true),
            (".*", ".foo", true),
            ("", "x", false),
        ] {
            assert_eq!(matcher(&[pattern]).matches(path), want, "{pattern} {path}");
        }
    }

    #[test]
    fn later_patterns_override_and_walks_agree_with_single_questions() {
        let m = matcher(&["*", "!src", "src/*.o", "!src/keep.o", "**/tmp"]);
        let cases = [
            ("README", true),
            ("src", false),
            ("src/a.rs", false),
            ("src/a.o", true),
            ("src/keep.o", false),
            ("src/tmp", true),
            ("src/tmp/x/y", true),
            ("other/deep/file", true),
        ];
        for (path, want) in cases {
            assert_eq!(m.matches(path), want, "{path}");
            let mut info = MatchInfo::default();
            let mut result = false;
            let mut first = true;
            for end in path.match_indices('/').map(|(i, _)| i).chain([path.len()]) {
                (result, info) = m.matches_below(&path[..end], (!first).then_some(&info));
                first = false;
            }
            assert_eq!(result, want, "walk to {path}");
        }
        assert!(m.has_exclusions());
        assert!(m.may_reinclude_below("src"));
        assert!(!m.may_reinclude_below("other"));
    }

    #[test]
    fn walks_may_skip_what_cannot_match() {
        let m = matcher(&["a/b/*.txt", "x/**/z"]);
        for (dir, want) in
            [("a", true), ("a/b", true), ("a/c", false), ("b", false), ("x/y/w", true), ("", true)]
        {
            assert_eq!(m.may_match_below(dir), want, "{dir}");
        }
    }

    #[test]
    fn malformed_patterns_are_refused() {
        assert_eq!(PatternMatcher::new(["!"]).err(), Some(PatternError::LoneExclusion));
        for bad in ["[", "[]", "[^]", "[a", "a\\", "[a-]", "[-a]", "[\\"] {
            assert!(PatternMatcher::new([bad]).is_err(), "{bad}");
            assert!(glob_match(bad, "x").is_err(), "{bad}");
        }
    }

    #[test]
    fn globs_know_no_double_star() {
        assert_eq!(glob_match("**/x", "a/b/x"), Ok(false));
        assert_eq!(glob_match("**/x", "a/x"), Ok(true));
        assert_eq!(glob_match("*.t?t", "a.txt"), Ok(true));
        assert!(has_wildcard("a[b]") && !has_wildcard("a\\*b"));
    }

    #[test]
    fn ignore_files() {
        let text = b"\xef\xbb\xbf# comment\r\n\n  /abs/path \r\n!  ./keep/ \n #not a comment\n/\na/../b\n!";
        assert_eq!(parse_ignore_file(text), ["abs/path", "!keep", "#not a comment", "/", "b", "!"]);
    }

    #[test]
    fn names_that_are_no_text_match_byte_by_byte() {
        assert!(matches!(text("föö".as_bytes()), Cow::Borrowed("föö")));
        // The start of a longer character counts as two bytes, not as one damaged character.
        let name = text(b"caf\xe2\x82.txt");
        assert_eq!(name, "caf\u{fffd}\u{fffd}.txt");
        for (pattern, want) in [("*", true), ("caf??.txt", true), ("caf?.txt", false), ("caf[^a]*", true)] {
            assert_eq!(matcher(&[pattern]).matches(&name), want, "{pattern}");
        }
        let ignored = parse_ignore_file(b"caf\xe2\x82.txt\n");
        assert!(matcher(&[ignored[0].as_str()]).matches(&name));
    }

    #[test]
    fn a_hostile_pattern_takes_linear_time() {
        let pattern = "*a".repeat(200);
        assert!(!matcher(&[&pattern]).matches(&"b".repeat(4000)));
    }
}
