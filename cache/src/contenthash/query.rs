//! Which entries a query selects, and the digest of the selection.
//!
//! A plain path counts as the entry with all below it. With wildcards or include and exclude
//! patterns, the selected entries count one by one with their paths, directories without what is
//! below them, so that what is left out can't matter.

use kiln_proto::pattern::{self, MatchInfo, PatternMatcher};
use rustix::fs::FileType;

use super::entry::{Hasher, Item};
use super::manifest::Listing;
use super::{ContentPath, ContentQuery, tagged, update};
use crate::error::{Result, StoreError};
use crate::layerview::{LayerView, Node};

/// The name under which the answer to a query is remembered.
pub(super) fn fingerprint(query: &ContentQuery) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    let list = |hasher: &mut blake3::Hasher, items: &[String]| {
        hasher.update(&(items.len() as u64).to_le_bytes());
        items.iter().for_each(|item| update(hasher, item.as_bytes()));
    };
    for path in &query.paths {
        update(&mut hasher, path.path.as_bytes());
        hasher.update(&[path.wildcard.into(), path.follow_symlink.into(), path.must_exist.into()]);
        list(&mut hasher, &path.include);
        list(&mut hasher, &path.exclude);
        list(&mut hasher, &path.required);
    }
    let mut name = b"query".to_vec();
    name.extend_from_slice(hasher.finalize().as_bytes());
    name
}

/// `hasher`: `None` is the empty root. What was selected is listed.
pub(super) fn digest(
    mut hasher: Option<Hasher<'_>>,
    query: &ContentQuery,
    listing: &mut Listing,
) -> Result<blake3::Hash> {
    let mut out = blake3::Hasher::new();
    update(&mut out, b"query");
    for (part, path) in (0..).zip(&query.paths) {
        listing.part = part;
        let found = match &mut hasher {
            Some(hasher) => one(hasher, path, listing)?,
            None => in_nothing(path)?,
        };
        match found {
            Some(digest) => update(&mut out, digest.as_bytes()),
            None if path.must_exist => {
                return Err(StoreError::PathNotFound(pattern::clean(&rooted(&path.path))));
            }
            None => update(&mut out, b"absent"),
        }
    }
    Ok(out.finalize())
}

fn is_list(path: &ContentPath) -> bool {
    has_wildcard(path) || !path.include.is_empty() || !path.exclude.is_empty()
}

fn has_wildcard(path: &ContentPath) -> bool {
    path.wildcard && pattern::has_wildcard(&path.path)
}

/// The answer for the empty root: only the root itself is there.
fn in_nothing(path: &ContentPath) -> Result<Option<blake3::Hash>> {
    if let Some(required) = path.required.first() {
        return Err(StoreError::PathNotFound(required.clone()));
    }
    let is_root = pattern::clean(&rooted(&path.path)) == "/";
    if is_list(path) {
        return Ok((has_wildcard(path) || is_root).then(|| list_digest(&[])));
    }
    Ok((pattern::clean(&rooted(&path.path)) == "/")
        .then(|| tagged(b"dir", &[tagged(b"entry", &[b""]).as_bytes()])))
}

/// The digest of what one path selects; `None` if a plain path isn't there.
fn one(hasher: &mut Hasher<'_>, path: &ContentPath, listing: &mut Listing) -> Result<Option<blake3::Hash>> {
    if !is_list(path) {
        return match hasher.view().resolve(path.path.as_bytes(), path.follow_symlink)? {
            Some(node) => hasher.digest(&node, listing).map(Some),
            None => Ok(None),
        };
    }
    let (bases, prefix) = bases(hasher.view(), path)?;
    if bases.is_empty() && !has_wildcard(path) {
        return Ok(None);
    }
    let selected = select(hasher, path, &bases)?;
    for required in &path.required {
        let required = pattern::clean(&rooted(required));
        if !selected.iter().any(|entry| is_at_or_below(&entry.path, required.as_bytes())) {
            return Err(StoreError::PathNotFound(required));
        }
    }
    if let [only] = selected.as_slice()
        && base_name(&only.path) == base_name(path.path.trim_end_matches('/').as_bytes())
    {
        listing.add(b"", &only.item);
        return Ok(Some(only.digest));
    }
    let mut entries = Vec::with_capacity(selected.len());
    for entry in &selected {
        let path = entry.path.strip_prefix(prefix.as_bytes()).unwrap_or(&entry.path);
        listing.add(path, &entry.item);
        entries.push((path, entry.digest));
    }
    Ok(Some(list_digest(&entries)))
}

fn list_digest(entries: &[(&[u8], blake3::Hash)]) -> blake3::Hash {
    let mut out = blake3::Hasher::new();
    update(&mut out, b"list");
    for (path, digest) in entries {
        update(&mut out, path);
        update(&mut out, digest.as_bytes());
    }
    out.finalize()
}

/// An entry that counts, by the path under which the query sees it.
struct Selected {
    path: Vec<u8>,
    digest: blake3::Hash,
    item: Item,
}

/// A place where the selection starts, by the path under which the query sees it.
type Start = (Vec<u8>, Node);

/// The entries that the path itself means, in order, and the part of their paths that doesn't count.
fn bases(view: &LayerView, path: &ContentPath) -> Result<(Vec<Start>, String)> {
    let full = pattern::clean(&rooted(&path.path));
    if !has_wildcard(path) {
        let start = view.resolve(full.as_bytes(), path.follow_symlink)?;
        let full = if full == "/" { String::new() } else { full };
        return Ok((start.map(|node| (full.clone().into_bytes(), node)).into_iter().collect(), full));
    }
    let parts: Vec<&str> = full.split('/').filter(|part| !part.is_empty()).collect();
    let literal = parts.iter().take_while(|part| !pattern::has_wildcard(part)).count();
    let prefix: String = parts[..literal].iter().flat_map(|part| ["/", part]).collect();
    let mut level: Vec<Start> = match view.resolve(prefix.as_bytes(), true)? {
        Some(node) => vec![(prefix.clone().into_bytes(), node)],
        None => Vec::new(),
    };
    for part in &parts[literal..] {
        let mut next = Vec::new();
        for (path, node) in level {
            for (name, child) in view.children(&node)? {
                if pattern::glob_match(part, &pattern::text(&name)).map_err(invalid)? {
                    next.push((join(&path, &name), child));
                }
            }
        }
        level = next;
    }
    Ok((level, prefix))
}

/// All entries that count, of all bases, in order.
fn select(hasher: &mut Hasher<'_>, path: &ContentPath, bases: &[Start]) -> Result<Vec<Selected>> {
    let include = match path.include.is_empty() {
        true => None,
        false => Some(PatternMatcher::new(&path.include).map_err(invalid)?),
    };
    let exclude = match path.exclude.is_empty() {
        true => None,
        false => Some(PatternMatcher::new(&path.exclude).map_err(invalid)?),
    };
    let patterns = Patterns { include, exclude };
    let skip_header = !has_wildcard(path) && path.path.ends_with('/') && path.path.len() > 1;
    let mut out = Vec::new();
    for (base, node) in bases {
        // What a followed symlink leads to counts under the symlink's name; if that is nothing, the
        // symlink itself counts.
        let target = match node.kind() {
            FileType::Symlink if path.follow_symlink => hasher.view().resolve(node.path(), true)?,
            _ => None,
        };
        let node = target.as_ref().unwrap_or(node);
        let items = hasher.walk(node)?;
        let (paths, mut counting) = patterns.choose(base, items, skip_header || base.is_empty());
        hasher.read_contents(&mut counting)?;
        out.extend(paths.into_iter().zip(counting).map(|(path, item)| Selected {
            path,
            digest: item.own_digest(),
            item,
        }));
    }
    Ok(out)
}

struct Patterns {
    include: Option<PatternMatcher>,
    exclude: Option<PatternMatcher>,
}

/// What the patterns said about a directory, which matters for what is below it.
#[derive(Default)]
struct Verdict {
    include: MatchInfo,
    exclude: MatchInfo,
}

/// A directory on the way to the current entry.
struct Ancestor {
    verdict: Verdict,
    /// Index behind its last entry.
    end: usize,
    path: Vec<u8>,
    /// Its own item, until it is known to count.
    item: Option<Item>,
}

impl Patterns {
    fn counts(&self, path: &str, parent: Option<&Verdict>) -> (bool, Verdict) {
        let mut verdict = Verdict::default();
        if let Some(include) = &self.include {
            let (matched, info) = include.matches_below(path, parent.map(|parent| &parent.include));
            verdict.include = info;
            if !matched {
                return (false, verdict);
            }
        }
        if let Some(exclude) = &self.exclude {
            let (matched, info) = exclude.matches_below(path, parent.map(|parent| &parent.exclude));
            verdict.exclude = info;
            return (!matched, verdict);
        }
        (true, verdict)
    }

    /// The items below `base` that count, with their paths. A directory counts if it is matched, or
    /// if something below it counts.
    fn choose(&self, base: &[u8], items: Vec<Item>, skip_base: bool) -> (Vec<Vec<u8>>, Vec<Item>) {
        let (mut paths, mut counting) = (Vec::new(), Vec::new());
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for (at, item) in items.into_iter().enumerate() {
            while ancestors.last().is_some_and(|ancestor| ancestor.end <= at) {
                ancestors.pop();
            }
            let (path, relative) = match ancestors.last() {
                None => (base.to_vec(), String::new()),
                Some(ancestor) => {
                    let path = join(&ancestor.path, &item.name);
                    let relative = pattern::text(&path[base.len() + 1..]).into_owned();
                    (path, relative)
                }
            };
            if at == 0 && skip_base {
                if item.node.is_dir() {
                    let end = at + 1 + item.below();
                    ancestors.push(Ancestor { verdict: Verdict::default(), end, path, item: None });
                }
                continue;
            }
            // The base's verdict is about the empty path and says nothing of what is below.
            let parent =
                if ancestors.len() > 1 { ancestors.last().map(|ancestor| &ancestor.verdict) } else { None };
            let (counts, verdict) = self.counts(&relative, parent);
            if counts {
                for ancestor in &mut ancestors {
                    if let Some(item) = ancestor.item.take() {
                        paths.push(ancestor.path.clone());
                        counting.push(item);
                    }
                }
            }
            let end = at + 1 + item.below();
            match (item.node.is_dir(), counts) {
                (true, true) => {
                    ancestors.push(Ancestor { verdict, end, path: path.clone(), item: None });
                    paths.push(path);
                    counting.push(item);
                }
                (true, false) => ancestors.push(Ancestor { verdict, end, path, item: Some(item) }),
                (false, true) => {
                    paths.push(path);
                    counting.push(item);
                }
                (false, false) => {}
            }
        }
        (paths, counting)
    }
}

fn rooted(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}

fn is_at_or_below(path: &[u8], dir: &[u8]) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest[0] == b'/' || dir.ends_with(b"/"))
}

fn base_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(dir.len() + 1 + name.len());
    path.extend_from_slice(dir);
    path.push(b'/');
    path.extend_from_slice(name);
    path
}

fn invalid(error: pattern::PatternError) -> StoreError {
    StoreError::Invalid(error.to_string())
}
