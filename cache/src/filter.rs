//! Filters of disk usage and prune requests: containerd's filter language over the fields of a
//! usage record. A filter is a list of selectors, all of which must hold: `type==regular`,
//! `id~=^abc`, `inuse` (is set), `description!="a, b"`, `labels."a:b"`. Of several filters one must hold.

use regex::Regex;

use crate::error::{Result, StoreError};
use crate::usage::UsageRecord;

/// Compiled filters.
#[derive(Debug, Default)]
pub struct Filter {
    any_of: Vec<Vec<Selector>>,
}

#[derive(Debug)]
struct Selector {
    field: String,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Compiles filters. None at all, or an empty one, match everything.
    pub fn parse(filters: &[String]) -> Result<Self> {
        let any_of = filters.iter().map(|text| parse(text)).collect::<Result<Vec<_>>>()?;
        Ok(Self { any_of })
    }

    /// The names of the fields that are looked at.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.any_of.iter().flatten().map(|selector| selector.field.as_str())
    }

    /// Whether a record passes.
    pub fn matches(&self, record: &UsageRecord) -> bool {
        self.holds(&|name| field(record, name))
    }

    /// Whether something passes whose set fields `field` gives by name.
    pub fn holds(&self, field: &dyn Fn(&str) -> Option<String>) -> bool {
        let all_hold =
            |all: &Vec<Selector>| all.iter().all(|selector| selector.matches(field(&selector.field)));
        self.any_of.is_empty() || self.any_of.iter().any(all_hold)
    }
}

impl Selector {
    fn matches(&self, value: Option<String>) -> bool {
        match (&self.test, value) {
            (Test::Present, value) => value.is_some(),
            (Test::Equal(wanted), value) => value.as_deref() == Some(wanted),
            (Test::NotEqual(unwanted), value) => value.as_deref() != Some(unwanted),
            (Test::Matches(regex), Some(value)) => regex.is_match(&value),
            (Test::Matches(_), None) => false,
        }
    }
}

/// A field's value; `None` if the record doesn't have it.
fn field(record: &UsageRecord, name: &str) -> Option<String> {
    let flag = |set: bool| set.then(String::new);
    match name {
        "id" => Some(record.id.clone()),
        "parents" => (!record.parents.is_empty()).then(|| record.parents.join(";")),
        "description" => (!record.description.is_empty()).then(|| record.description.clone()),
        "type" => Some(record.record_type.clone()),
        "inuse" => flag(record.in_use),
        "mutable" => flag(record.mutable),
        "immutable" => flag(!record.mutable),
        "shared" => flag(record.shared),
        "private" => flag(!record.shared),
        _ => None,
    }
}

fn parse(text: &str) -> Result<Vec<Selector>> {
    let fail = |what: &str| StoreError::Invalid(format!("invalid filter {text:?}: {what}"));
    let mut selectors = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (name, after) = name(rest).map_err(fail)?;
        if name.is_empty() {
            return Err(fail("expected a field name"));
        }
        rest = after;
        let operator = ["==", "!=", "~="].into_iter().find(|operator| rest.starts_with(operator));
        let test = match operator {
            None => Test::Present,
            Some(operator) => {
                let (value, after) = value(&rest[2..]).map_err(fail)?;
                rest = after;
                match operator {
                    "==" => Test::Equal(value),
                    "!=" => Test::NotEqual(value),
                    _ => Test::Matches(Regex::new(&value).map_err(|e| fail(&e.to_string()))?),
                }
            }
        };
        selectors.push(Selector { field: name, test });
        rest = match rest.strip_prefix(',') {
            Some("") => return Err(fail("expected a field name after the comma")),
            Some(after) => after,
            None if rest.is_empty() => rest,
            None => return Err(fail("expected an operator (==, !=, ~=) or a comma")),
        };
    }
    Ok(selectors)
}

/// A field's name, of which parts may be quoted, and what follows it.
fn name(text: &str) -> Result<(String, &str), &'static str> {
    let (mut out, mut rest) = (String::new(), text);
    loop {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
        let end = rest.find(|c| !plain(c)).unwrap_or(rest.len());
        out.push_str(&rest[..end]);
        rest = &rest[end..];
        if !(rest.starts_with('"') && (out.is_empty() || out.ends_with('.'))) {
            return Ok((out, rest));
        }
        let (part, after) = value(rest)?;
        out.push_str(&part);
        rest = after;
    }
}

/// A value, bare up to the next comma or quoted, and what follows it.
fn value(text: &str) -> Result<(String, &str), &'static str> {
    let Some(quote) = text.chars().next().filter(|c| matches!(c, '"' | '\'' | '|' | '/')) else {
        let end = text.find(',').unwrap_or(text.len());
        return Ok((text[..end].to_owned(), &text[end..]));
    };
    let mut out = String::new();
    let mut chars = text[1..].char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            _ if c == quote => return Ok((out, &text[at + 2..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => out.push('\n'),
                Some((_, 't')) => out.push('\t'),
                // In a regular expression other escapes keep their backslash.
                Some((_, other)) if other != quote && other != '\\' => out.extend(['\\', other]),
                Some((_, other)) => out.push(other),
                None => break,
            },
            _ => out.push(c),
        }
    }
    Err("unterminated quote")
}
