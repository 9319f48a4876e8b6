//! Follow-paths: which paths of a directory must be sent so that a path still resolves at the other end, i.e. every
//! link on its way and what they lead to. Never looks outside the directory, where an absolute link means its root.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::BorrowedFd;

use kiln_proto::pattern;

use super::fsops::{self, EntryType};
use super::{TransferError, path};

/// Links followed for one request before giving up on it, as a kernel would.
const MAX_LINKS: usize = 255;

struct Pending {
    /// Resolved so far; no links in it.
    done: String,
    rest: VecDeque<String>,
    links: usize,
}

/// Include patterns for `paths`; `None` if one of them is the root, so everything takes part. Paths that do not exist
/// are kept as they are: their absence is found at the other end.
pub(super) fn resolve(root: BorrowedFd<'_>, paths: &[String]) -> Result<Option<Vec<String>>, TransferError> {
    let mut found = BTreeSet::new();
    let mut queue: Vec<Pending> = Vec::new();
    for raw in paths {
        let rest = components(raw);
        queue.push(Pending { done: String::new(), rest, links: 0 });
    }
    while let Some(mut item) = queue.pop() {
        let Some(part) = item.rest.pop_front() else {
            if item.done.is_empty() {
                return Ok(None);
            }
            found.insert(escape(&item.done));
            continue;
        };
        match part.as_str() {
            ".." => {
                item.done = path::split(&item.done).0.to_owned();
                queue.push(item);
            }
            part if pattern::has_wildcard(part) => expand(root, &item, part, &mut queue, &mut found)?,
            part => step(root, item, &unescape(part), &mut queue, &mut found),
        }
    }
    Ok(Some(without_covered(found)))
}

/// Goes one plain component further, through a link if it is one.
fn step(
    root: BorrowedFd<'_>,
    mut item: Pending,
    name: &str,
    queue: &mut Vec<Pending>,
    found: &mut BTreeSet<String>,
) {
    let here = path::join(&item.done, name);
    match fsops::read_link(root, &here) {
        Some(target) if item.links < MAX_LINKS => {
            found.insert(escape(&here));
            if target.starts_with('/') {
                item.done.clear();
            }
            // A link's target is literal text: nothing in it is a wildcard.
            let target =
                components(&target).into_iter().map(|part| if part == ".." { part } else { escape(&part) });
            item.rest = target.chain(item.rest).collect();
            item.links += 1;
        }
        _ => item.done = here,
    }
    queue.push(item);
}

/// Replaces a component with wildcards by every entry that it matches.
fn expand(
    root: BorrowedFd<'_>,
    item: &Pending,
    part: &str,
    queue: &mut Vec<Pending>,
    found: &mut BTreeSet<String>,
) -> Result<(), TransferError> {
    let mut any = false;
    for (name, kind) in fsops::names(root, &item.done).unwrap_or_default() {
        let last = item.rest.is_empty();
        if pattern::glob_match(part, &name)? && (last || kind != EntryType::File) {
            any = true;
            let next = Pending { done: item.done.clone(), rest: item.rest.clone(), links: item.links };
            step(root, next, &name, queue, found);
        }
    }
    if !any {
        let rest = item.rest.iter().map(String::as_str);
        found.insert(
            std::iter::once(escape(&item.done).as_str())
                .filter(|d| !d.is_empty())
                .chain([part])
                .chain(rest)
                .collect::<Vec<_>>()
                .join("/"),
        );
    }
    Ok(())
}

fn components(text: &str) -> VecDeque<String> {
    text.split('/').filter(|part| !matches!(*part, "" | ".")).map(str::to_owned).collect()
}

/// A literal path as a pattern.
fn escape(literal: &str) -> String {
    let mut out = String::with_capacity(literal.len());
    for c in literal.chars() {
        if matches!(c, '*' | '?' | '[' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn unescape(part: &str) -> String {
    let mut out = String::with_capacity(part.len());
    let mut chars = part.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    out
}

/// Drops paths that lie below another one.
fn without_covered(found: BTreeSet<String>) -> Vec<String> {
    let mut sorted: Vec<String> = found.into_iter().collect();
    sorted.sort_by(|a, b| path::compare(a, b));
    let mut kept: Vec<String> = Vec::new();
    for path in sorted {
        let covered = kept
            .last()
            .is_some_and(|last| path.strip_prefix(last.as_str()).is_some_and(|rest| rest.starts_with('/')));
        if !covered {
            kept.push(path);
        }
    }
    kept
}
