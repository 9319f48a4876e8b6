//! Follow-paths: which paths of a directory must be sent so that a path still resolves at the other end, i.e. every
//! link on its way and what they lead to. Never looks outside the directory, where an absolute link means its root.
//! Names are bytes until they become patterns.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::BorrowedFd;

use kiln_proto::pattern;

use super::fsops::{self, EntryType};
use super::{TransferError, path};

/// Links followed for one request before giving up on it, as a kernel would.
const MAX_LINKS: usize = 255;

struct Pending {
    /// Resolved so far; no links in it.
    done: Vec<u8>,
    rest: VecDeque<Vec<u8>>,
    links: usize,
}

/// Include patterns for `paths`; `None` if one of them is the root, so everything takes part. Paths that do not exist
/// are kept as they are: their absence is found at the other end.
pub(super) fn resolve(root: BorrowedFd<'_>, paths: &[String]) -> Result<Option<Vec<String>>, TransferError> {
    let mut found = BTreeSet::new();
    let mut queue: Vec<Pending> = Vec::new();
    for raw in paths {
        let rest = components(raw.as_bytes());
        queue.push(Pending { done: Vec::new(), rest, links: 0 });
    }
    while let Some(mut item) = queue.pop() {
        let Some(part) = item.rest.pop_front() else {
            if item.done.is_empty() {
                return Ok(None);
            }
            found.insert(escape(&item.done));
            continue;
        };
        if part == b".." {
            item.done = path::split(&item.done).0.to_owned();
            queue.push(item);
        } else if pattern::has_wildcard(&pattern::text(&part)) {
            expand(root, &item, &part, &mut queue, &mut found)?;
        } else {
            step(root, item, &unescape(&part), &mut queue, &mut found);
        }
    }
    let patterns = without_covered(found).into_iter().map(|path| pattern::text(&path).into_owned());
    Ok(Some(patterns.collect()))
}

/// Goes one plain component further, through a link if it is one.
fn step(
    root: BorrowedFd<'_>,
    mut item: Pending,
    name: &[u8],
    queue: &mut Vec<Pending>,
    found: &mut BTreeSet<Vec<u8>>,
) {
    let here = path::join(&item.done, name);
    match fsops::read_link(root, &here) {
        Some(target) if item.links < MAX_LINKS => {
            found.insert(escape(&here));
            if target.starts_with(b"/") {
                item.done.clear();
            }
            // A link's target is literal text: nothing in it is a wildcard.
            let target =
                components(&target).into_iter().map(|part| if part == b".." { part } else { escape(&part) });
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
    part: &[u8],
    queue: &mut Vec<Pending>,
    found: &mut BTreeSet<Vec<u8>>,
) -> Result<(), TransferError> {
    let mut any = false;
    let wanted = pattern::text(part);
    for (name, kind) in fsops::names(root, &item.done).unwrap_or_default() {
        let last = item.rest.is_empty();
        if pattern::glob_match(&wanted, &pattern::text(&name))? && (last || kind != EntryType::File) {
            any = true;
            let next = Pending { done: item.done.clone(), rest: item.rest.clone(), links: item.links };
            step(root, next, &name, queue, found);
        }
    }
    if !any {
        let rest = item.rest.iter().map(Vec::as_slice);
        let done = Some(escape(&item.done)).filter(|done| !done.is_empty());
        let parts = done.as_deref().into_iter().chain([part]).chain(rest);
        found.insert(parts.collect::<Vec<_>>().join(&b'/'));
    }
    Ok(())
}

fn components(path: &[u8]) -> VecDeque<Vec<u8>> {
    path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).map(<[u8]>::to_vec).collect()
}

/// A literal path as a pattern.
fn escape(literal: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(literal.len());
    for byte in literal {
        if matches!(byte, b'*' | b'?' | b'[' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out
}

fn unescape(part: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(part.len());
    let mut bytes = part.iter();
    while let Some(byte) = bytes.next() {
        out.push(if *byte == b'\\' { *bytes.next().unwrap_or(byte) } else { *byte });
    }
    out
}

/// Drops paths that lie below another one.
fn without_covered(found: BTreeSet<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut sorted: Vec<Vec<u8>> = found.into_iter().collect();
    sorted.sort_by(|a, b| path::compare(a, b));
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for path in sorted {
        let covered = kept.last().is_some_and(|last| {
            path.strip_prefix(last.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
        });
        if !covered {
            kept.push(path);
        }
    }
    kept
}
