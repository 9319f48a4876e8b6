//! Shell-like words: quotes, escapes and `$variable` expansion as Dockerfiles know them. Knows
//! nothing of instructions.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

/// Nested `${…}` deeper than this are refused instead of followed.
const MAX_DEPTH: usize = 64;

/// Where variables come from.
pub(crate) trait Env {
    fn get(&self, key: &str) -> Option<&str>;
}

/// Variables in the order in which they were last set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EnvList {
    entries: Vec<(String, String)>,
}

impl EnvList {
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.entries.retain(|(k, _)| k != key);
        self.entries.push((key.to_string(), value.to_string()));
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(k, _)| k.as_str())
    }

    /// `KEY=value` lines.
    pub(crate) fn to_vec(&self) -> Vec<String> {
        self.entries.iter().map(|(k, v)| format!("{k}={v}")).collect()
    }
}

impl Env for EnvList {
    fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

impl Env for BTreeMap<String, String> {
    fn get(&self, key: &str) -> Option<&str> {
        BTreeMap::get(self, key).map(String::as_str)
    }
}

/// An environment without variables.
pub(crate) struct NoEnv;

impl Env for NoEnv {
    fn get(&self, _: &str) -> Option<&str> {
        None
    }
}

/// What an expansion gave.
#[derive(Debug, Default)]
pub(crate) struct Expanded {
    /// The whole text.
    pub(crate) text: String,
    /// The text split at unquoted blanks.
    pub(crate) words: Vec<String>,
    /// Variables that were used and set.
    pub(crate) matched: BTreeSet<String>,
    /// Variables that were used and not set.
    pub(crate) unmatched: BTreeSet<String>,
}

/// How to expand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lexer {
    /// `\` or, by parser directive, `` ` ``.
    pub(crate) escape: char,
    /// Quotes stay in the result.
    pub(crate) raw_quotes: bool,
    /// Escape characters stay in the result.
    pub(crate) raw_escapes: bool,
    /// Quotes are plain characters.
    pub(crate) ignore_quotes: bool,
    /// References to unset variables stay as they are written.
    pub(crate) keep_unset: bool,
}

impl Lexer {
    pub(crate) fn new(escape: char) -> Self {
        Self { escape, raw_quotes: false, raw_escapes: false, ignore_quotes: false, keep_unset: false }
    }

    pub(crate) fn expand(&self, source: &str, env: &dyn Env) -> Result<Expanded, String> {
        let mut run = Run {
            lexer: *self,
            env,
            chars: source.chars().collect(),
            at: 0,
            depth: 0,
            raw_escapes: self.raw_escapes,
            out: Expanded::default(),
        };
        match run.until(None) {
            Ok((text, words)) => Ok(Expanded { text, words, ..run.out }),
            Err(e) => Err(format!("failed to process {}: {e}", crate::gofmt::quote(source))),
        }
    }
}

struct Run<'a> {
    lexer: Lexer,
    env: &'a dyn Env,
    chars: Vec<char>,
    at: usize,
    depth: usize,
    raw_escapes: bool,
    out: Expanded,
}

#[derive(Default)]
struct Words {
    done: Vec<String>,
    current: String,
}

impl Words {
    fn split(&mut self, text: &str) {
        for c in text.chars() {
            if c.is_whitespace() {
                if !self.current.is_empty() {
                    self.done.push(std::mem::take(&mut self.current));
                }
            } else {
                self.current.push(c);
            }
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.done.push(self.current);
        }
        self.done
    }
}

impl Run<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek();
        if c.is_some() {
            self.at += 1;
        }
        c
    }

    /// Expands up to `stop` (which is consumed) or the end.
    fn until(&mut self, stop: Option<char>) -> Result<(String, Vec<String>), String> {
        let mut text = String::new();
        let mut words = Words::default();
        while let Some(c) = self.peek() {
            if stop == Some(c) {
                self.at += 1;
                return Ok((text, words.finish()));
            }
            match c {
                '$' => {
                    let value = self.dollar()?;
                    words.split(&value);
                    text.push_str(&value);
                }
                '\'' | '"' if !self.lexer.ignore_quotes => {
                    let value = if c == '"' { self.double_quoted()? } else { self.single_quoted()? };
                    words.current.push_str(&value);
                    text.push_str(&value);
                }
                '<' => {
                    let value = self.maybe_heredoc();
                    words.current.push_str(&value);
                    text.push_str(&value);
                }
                c if c == self.lexer.escape => {
                    self.at += 1;
                    if self.raw_escapes {
                        words.current.push(c);
                        text.push(c);
                    }
                    // An escape character at the very end stands for nothing.
                    let Some(escaped) = self.next() else { break };
                    words.current.push(escaped);
                    text.push(escaped);
                }
                c => {
                    self.at += 1;
                    words.split(c.encode_utf8(&mut [0; 4]));
                    text.push(c);
                }
            }
        }
        match stop {
            Some(stop) => Err(format!("unexpected end of statement while looking for matching {stop}")),
            None => Ok((text, words.finish())),
        }
    }

    fn nested(&mut self, stop: char, raw_escapes: bool, missing: &str) -> Result<String, String> {
        if self.depth >= MAX_DEPTH {
            return Err("substitutions are nested too deeply".into());
        }
        self.depth += 1;
        let outer = std::mem::replace(&mut self.raw_escapes, raw_escapes);
        let result = self.until(Some(stop));
        self.raw_escapes = outer;
        self.depth -= 1;
        match result {
            Ok((text, _)) => Ok(text),
            Err(_) if self.peek().is_none() => Err(format!("syntax error: missing {missing}")),
            Err(e) => Err(e),
        }
    }

    fn single_quoted(&mut self) -> Result<String, String> {
        self.at += 1;
        let mut out = String::new();
        loop {
            match self.next() {
                None => {
                    return Err("unexpected end of statement while looking for matching single-quote".into());
                }
                Some('\'') if self.lexer.raw_quotes => return Ok(format!("'{out}'")),
                Some('\'') => return Ok(out),
                Some(c) => out.push(c),
            }
        }
    }

    fn double_quoted(&mut self) -> Result<String, String> {
        self.at += 1;
        let mut out = String::new();
        loop {
            match self.peek() {
                None => {
                    return Err("unexpected end of statement while looking for matching double-quote".into());
                }
                Some('"') => {
                    self.at += 1;
                    return Ok(if self.lexer.raw_quotes { format!("\"{out}\"") } else { out });
                }
                Some('$') => out.push_str(&self.dollar()?),
                Some(c) => {
                    self.at += 1;
                    if c != self.lexer.escape {
                        out.push(c);
                        continue;
                    }
                    if self.raw_escapes {
                        out.push(c);
                    }
                    // Within double quotes only these can be escaped; before others the escape stays.
                    match self.peek() {
                        Some(e) if e == '"' || e == '$' || e == self.lexer.escape => {
                            self.at += 1;
                            out.push(e);
                        }
                        Some(_) if !self.raw_escapes => out.push(c),
                        _ => {}
                    }
                }
            }
        }
    }

    /// `<<` keeps the blanks after it, so that `<< EOF` is one word.
    fn maybe_heredoc(&mut self) -> String {
        self.at += 1;
        if self.peek() != Some('<') {
            return "<".into();
        }
        self.at += 1;
        let mut out = String::from("<<");
        while let Some(c) = self.peek().filter(|c| matches!(c, ' ' | '\t' | '\r')) {
            out.push(c);
            self.at += 1;
        }
        out
    }

    fn lookup(&mut self, name: &str) -> Option<String> {
        let value = self.env.get(name).map(str::to_string);
        let seen = if value.is_some() { &mut self.out.matched } else { &mut self.out.unmatched };
        seen.insert(name.to_string());
        value
    }

    /// A name, a number, or one special parameter character.
    fn name(&mut self) -> String {
        let mut out = String::new();
        match self.peek() {
            Some(c) if c.is_ascii_digit() => {
                while let Some(c) = self.peek().filter(char::is_ascii_digit) {
                    out.push(c);
                    self.at += 1;
                }
            }
            Some(c) if "@*#?-$!".contains(c) => {
                out.push(c);
                self.at += 1;
            }
            _ => {
                while let Some(c) = self.peek().filter(|c| c.is_alphanumeric() || *c == '_') {
                    out.push(c);
                    self.at += 1;
                }
            }
        }
        out
    }

    fn dollar(&mut self) -> Result<String, String> {
        self.at += 1;
        if self.peek() != Some('{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".into());
            }
            return Ok(match self.lookup(&name) {
                Some(value) => value,
                None if self.lexer.keep_unset => format!("${name}"),
                None => String::new(),
            });
        }
        self.at += 1;
        match self.peek() {
            None => return Err("syntax error: missing '}'".into()),
            Some('{' | '}' | ':') => return Err("syntax error: bad substitution".into()),
            _ => {}
        }
        let name = self.name();
        let Some(modifier) = self.next() else { return Err("syntax error: missing '}'".into()) };
        match modifier {
            '}' => Ok(match self.lookup(&name) {
                Some(value) => value,
                None if self.lexer.keep_unset => format!("${{{name}}}"),
                None => String::new(),
            }),
            ':' => match self.next() {
                Some(op @ ('-' | '+' | '?')) => self.conditional(&name, op, true),
                Some(op) => Err(format!("unsupported modifier (:{op}) in substitution")),
                None => Err("syntax error: missing '}'".into()),
            },
            '-' | '+' | '?' => self.conditional(&name, modifier, false),
            '#' | '%' => self.trim(&name, modifier),
            '/' => self.replace(&name),
            op => Err(format!("unsupported modifier ({op}) in substitution")),
        }
    }

    /// `${x-w}`, `${x+w}`, `${x?w}` and their forms with a colon, for which empty counts as unset.
    fn conditional(&mut self, name: &str, op: char, colon: bool) -> Result<String, String> {
        let word = self.nested('}', false, "'}'")?;
        let value = self.lookup(name);
        if value.is_none() && self.lexer.keep_unset {
            let colon = if colon { ":" } else { "" };
            return Ok(format!("${{{name}{colon}{op}{word}}}"));
        }
        let unset = value.is_none();
        let usable = value.filter(|v| !(colon && v.is_empty()));
        match (op, usable) {
            ('-', Some(value)) => Ok(value),
            ('-', None) => Ok(word),
            ('+', Some(_)) => Ok(word),
            ('+', None) => Ok(String::new()),
            (_, Some(value)) => Ok(value),
            (_, None) if !word.is_empty() => Err(format!("{name}: {word}")),
            (_, None) if unset => Err(format!("{name}: is not allowed to be unset")),
            (_, None) => Err(format!("{name}: is not allowed to be empty")),
        }
    }

    /// `${x#p}`, `${x##p}`, `${x%p}`, `${x%%p}`.
    fn trim(&mut self, name: &str, op: char) -> Result<String, String> {
        let word = self.nested('}', true, "'}'")?;
        let value = self.lookup(name);
        let Some(value) = value else {
            return Ok(if self.lexer.keep_unset { format!("${{{name}{op}{word}}}") } else { String::new() });
        };
        let (longest, pattern) = match word.strip_prefix(op) {
            Some(rest) => (true, rest),
            None => (false, word.as_str()),
        };
        let whole =
            Regex::new(&format!("^(?s:{})$", glob_regex(pattern)?)).map_err(|e| invalid(pattern, &e))?;
        let cuts: Vec<usize> = value.char_indices().map(|(i, _)| i).chain([value.len()]).collect();
        let prefix = op == '#';
        let removed = |cut: usize| if prefix { &value[..cut] } else { &value[cut..] };
        // Candidates from the shortest removed part to the longest.
        let mut order: Box<dyn Iterator<Item = &usize>> =
            if prefix != longest { Box::new(cuts.iter()) } else { Box::new(cuts.iter().rev()) };
        Ok(match order.find(|&&cut| whole.is_match(removed(cut))) {
            Some(&cut) if prefix => value[cut..].to_string(),
            Some(&cut) => value[..cut].to_string(),
            None => value,
        })
    }

    /// `${x/p/r}` and `${x//p/r}`.
    fn replace(&mut self, name: &str) -> Result<String, String> {
        let all = self.peek() == Some('/');
        if all {
            self.at += 1;
        }
        let pattern = self.nested('/', true, "'/' in ${}")?;
        let replacement = self.nested('}', true, "'}'")?;
        let Some(value) = self.lookup(name) else {
            let slashes = if all { "//" } else { "/" };
            return Ok(if self.lexer.keep_unset {
                format!("${{{name}{slashes}{pattern}/{replacement}}}")
            } else {
                String::new()
            });
        };
        let found =
            Regex::new(&format!("(?s:{})", glob_regex(&pattern)?)).map_err(|e| invalid(&pattern, &e))?;
        let replacement = regex::NoExpand(&replacement);
        Ok(if all { found.replace_all(&value, replacement) } else { found.replace(&value, replacement) }
            .into_owned())
    }
}

fn invalid(pattern: &str, why: &dyn std::fmt::Display) -> String {
    format!("invalid pattern ({pattern}) in substitution: {why}")
}

/// `*` and `?` as a regular expression; only they and the backslash may be escaped, and `}` and `/`
/// because the substitution ends with them.
fn glob_regex(pattern: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        let literal = match c {
            '*' => {
                out.push_str(".*");
                continue;
            }
            '?' => {
                out.push('.');
                continue;
            }
            '\\' => match chars.next() {
                Some(e @ ('*' | '?' | '\\' | '}' | '/')) => e,
                Some(e) => return Err(invalid(pattern, &format!("invalid escape '\\{e}'"))),
                None => return Err(invalid(pattern, &"trailing escape")),
            },
            c => c,
        };
        out.push_str(&regex::escape(literal.encode_utf8(&mut [0; 4])));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env() -> EnvList {
        let mut env = EnvList::default();
        for (k, v) in [
            ("FOO", "bar"),
            ("EMPTY", ""),
            ("P", "/usr/local/lib/x.tar.gz"),
            ("SP", "a b"),
            ("STAR", "a*b*c"),
            ("ÜML", "ok"),
        ] {
            env.set(k, v);
        }
        env
    }

    #[test]
    fn substitutions() {
        for (source, want) in [
            ("$FOO", "bar"),
            ("${FOO}x", "barx"),
            ("$FOOx", ""),
            ("a$", "a$"),
            ("$$", ""),
            ("$1abc", "abc"),
            ("$ÜML", "ok"),
            ("'$FOO'", "$FOO"),
            ("\"$FOO\"", "bar"),
            ("\\$FOO", "$FOO"),
            ("a\\", "a"),
            ("\"a\\\"b\\x\"", "a\"b\\x"),
            ("he'llo w'orld", "hello world"),
            ("${X:-def}", "def"),
            ("${EMPTY:-def}", "def"),
            ("${EMPTY-def}", ""),
            ("${X-$FOO}", "bar"),
            ("${X:-${Y:-${FOO}}}", "bar"),
            ("${FOO:+yes}", "yes"),
            ("${EMPTY:+yes}", ""),
            ("${EMPTY+yes}", "yes"),
            ("${X:+yes}", ""),
            ("${FOO:?gone}", "bar"),
            ("${P#*/}", "usr/local/lib/x.tar.gz"),
            ("${P##*/}", "x.tar.gz"),
            ("${P%.*}", "/usr/local/lib/x.tar"),
            ("${P%%.*}", "/usr/local/lib/x"),
            ("${P#nomatch}", "/usr/local/lib/x.tar.gz"),
            ("${P%.g?}", "/usr/local/lib/x.tar"),
            ("${STAR#a\\*}", "b*c"),
            ("${P/l*l/-}", "/usr/-ib/x.tar.gz"),
            ("${P//l/L}", "/usr/LocaL/Lib/x.tar.gz"),
            ("${P/\\/usr/$1}", "/local/lib/x.tar.gz"),
            ("${P//\\//_}", "_usr_local_lib_x.tar.gz"),
            ("${X#p}", ""),
            ("<< EOF", "<< EOF"),
        ] {
            let got = Lexer::new('\\').expand(source, &env()).map(|e| e.text);
            assert_eq!(got.as_deref(), Ok(want), "{source}");
        }
    }

    #[test]
    fn errors() {
        for (source, want) in [
            ("'x", "unexpected end of statement while looking for matching single-quote"),
            ("\"x", "unexpected end of statement while looking for matching double-quote"),
            ("${", "syntax error: missing '}'"),
            ("${}", "syntax error: bad substitution"),
            ("${FOO", "syntax error: missing '}'"),
            ("${FOO:-x", "syntax error: missing '}'"),
            ("${FOO/x", "syntax error: missing '/' in ${}"),
            ("${X?}", "X: is not allowed to be unset"),
            ("${EMPTY:?}", "EMPTY: is not allowed to be empty"),
            ("${X:?say so}", "X: say so"),
            ("${FOO:#x}", "unsupported modifier (:#) in substitution"),
            ("${FOO^}", "unsupported modifier (^) in substitution"),
            ("${FOO#\\x}", "invalid pattern (\\x) in substitution: invalid escape '\\x'"),
        ] {
            let got = Lexer::new('\\').expand(source, &env()).map(|e| e.text);
            assert_eq!(got, Err(format!("failed to process {}: {want}", crate::gofmt::quote(source))));
        }
        let deep = "${X:-".repeat(10_000);
        assert!(Lexer::new('\\').expand(&deep, &env()).is_err());
    }

    #[test]
    fn words_split_outside_quotes_only() {
        let words = |s: &str| Lexer::new('\\').expand(s, &env()).map(|e| e.words).unwrap_or_default();
        assert_eq!(words("a  $SP 'c d' \"$SP\" e\\ f"), ["a", "a", "b", "c d", "a b", "e f"]);
        assert_eq!(words("x${X:-y}z w"), ["xyz", "w"]);
        assert_eq!(words("cat << EOF >x"), ["cat", "<< EOF", ">x"]);
    }

    #[test]
    fn what_was_used_is_reported() {
        let e = Lexer::new('\\').expand("$FOO ${X:-1} $Y", &env()).expect("expands");
        assert_eq!(e.matched.into_iter().collect::<Vec<_>>(), ["FOO"]);
        assert_eq!(e.unmatched.into_iter().collect::<Vec<_>>(), ["X", "Y"]);
    }

    #[test]
    fn unset_references_can_stay() {
        let lexer = Lexer { keep_unset: true, raw_quotes: true, ..Lexer::new('\\') };
        let got = lexer.expand("echo \"$X\" ${Y:-z} ${Z%a} $FOO '$FOO'", &env()).map(|e| e.text);
        assert_eq!(got.as_deref(), Ok("echo \"$X\" ${Y:-z} ${Z%a} bar '$FOO'"));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(source in "[a-z$#{}:%/?*+'\"\\\\<\u{e9} -]{0,40}") {
            let _ = Lexer::new('\\').expand(&source, &env());
        }
    }
}
