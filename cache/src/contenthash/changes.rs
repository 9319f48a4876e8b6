//! What tells two content digests of the same query apart, by names.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use rustix::fs::FileType;

use super::manifest::{Entry, Manifest, load, load_chunk, load_tree};
use crate::error::Result;
use crate::kv::Kv;

/// A difference between what two digests of the same query stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentChange {
    /// Which of the query's paths selects the entry.
    pub part: usize,
    /// The entry, relative to that path, or to the directories before its first wildcard; empty for
    /// the path itself.
    pub path: String,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// How an entry changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It is what was called so before.
    Renamed(String),
    /// It is of another type.
    Type,
    /// It holds other bytes.
    Content,
    /// It points elsewhere: where to before, and now.
    Target(String, String),
    /// Permissions before and now.
    Mode(u32, u32),
    /// User and group before and now.
    Owner((u32, u32), (u32, u32)),
    /// Extended attributes or a device's number.
    Attributes,
}

/// Where an entry is: which of the query's paths selects it, and its own.
type Place = (u32, Vec<u8>);
type Entries = BTreeMap<Place, Entry>;

/// What changed between the contents of two digests, by path; `None` if what one of them was made of
/// is not known.
pub(crate) fn changes(
    kv: &dyn Kv,
    before: &[u8; 32],
    after: &[u8; 32],
) -> Result<Option<Vec<ContentChange>>> {
    let (Some(before), Some(after)) = (load(kv, before)?, load(kv, after)?) else { return Ok(None) };
    let mut found = Differing::default();
    let mut todo = vec![(None, before, after)];
    while let Some((dir, before, after)) = todo.pop() {
        let Some(pair) = apart(kv, before, after)? else { return Ok(None) };
        for (place, old, new) in found.add(dir.as_ref(), pair) {
            let list = |name: &[u8]| match name {
                b"" => Ok(Some(Manifest::default())),
                name => load_tree(kv, name),
            };
            let (Some(old), Some(new)) = (list(&old)?, list(&new)?) else { return Ok(None) };
            todo.push((Some(place), old, new));
        }
    }
    Ok(Some(compare(&found.old, &found.new)))
}

/// The entries of two lists that are not in chunks of both; `None` if a chunk is not there.
fn apart(kv: &dyn Kv, old: Manifest, new: Manifest) -> Result<Option<[Vec<Entry>; 2]>> {
    let (old_chunks, new_chunks) = (old.chunks(), new.chunks());
    let both: HashSet<_> = {
        let old: HashSet<_> = old_chunks.iter().copied().collect();
        new_chunks.iter().copied().filter(|name| old.contains(name)).collect()
    };
    let mut out = [old.entries, new.entries];
    for (entries, chunks) in out.iter_mut().zip([old_chunks, new_chunks]) {
        for name in chunks.iter().filter(|name| !both.contains(*name)) {
            let Some(chunk) = load_chunk(kv, name)? else { return Ok(None) };
            entries.extend(chunk);
        }
    }
    Ok(Some(out))
}

/// What is not the same before and after, as far as it was looked at.
#[derive(Default)]
struct Differing {
    old: Entries,
    new: Entries,
}

impl Differing {
    /// Takes in what differs in a directory (`None`: in the whole), and tells which directories in it have other lists
    /// now, with both names; one that is not there has no list.
    fn add(&mut self, dir: Option<&Place>, pair: [Vec<Entry>; 2]) -> Vec<(Place, Vec<u8>, Vec<u8>)> {
        let mut lists: BTreeMap<Place, [Vec<u8>; 2]> = BTreeMap::new();
        for (side, (entries, into)) in pair.into_iter().zip([&mut self.old, &mut self.new]).enumerate() {
            for mut entry in entries {
                let place = match dir {
                    None => (entry.part, entry.path.clone()),
                    Some((part, dir)) if dir.is_empty() => (*part, entry.path.clone()),
                    Some((part, dir)) => (*part, [dir, b"/".as_slice(), &entry.path].concat()),
                };
                lists.entry(place.clone()).or_default()[side] = std::mem::take(&mut entry.tree);
                into.insert(place, entry);
            }
        }
        let other = lists.into_iter().filter(|(_, [old, new])| old != new);
        other.map(|(place, [old, new])| (place, old, new)).collect()
    }
}

fn compare(old: &Entries, new: &Entries) -> Vec<ContentChange> {
    let moved = renames(old, new);
    let gone: HashSet<&Place> = moved.values().copied().collect();
    let mut out = Vec::new();
    let paths: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    for key in paths {
        let kind = match (old.get(key), new.get(key)) {
            (Some(_), None) if gone.contains(key) => continue,
            (Some(_), None) => ChangeKind::Removed,
            (None, _) => match moved.get(key) {
                Some((_, from)) => ChangeKind::Renamed(text(from)),
                None => ChangeKind::Added,
            },
            (Some(old), Some(new)) => match change(old, new) {
                Some(kind) => kind,
                None => continue,
            },
        };
        out.push(ContentChange { part: key.0 as usize, path: text(&key.1), kind });
    }
    out
}

/// New paths of files whose content was under exactly one other path before.
fn renames<'a>(old: &'a Entries, new: &'a Entries) -> HashMap<&'a Place, &'a Place> {
    type ByContent<'a> = HashMap<(u32, &'a [u8]), Vec<&'a Place>>;
    fn lone<'a>(these: &'a Entries, others: &Entries) -> ByContent<'a> {
        let mut out = ByContent::new();
        for (key, entry) in these {
            if !others.contains_key(key) && kind(entry) == FileType::RegularFile {
                out.entry((key.0, entry.content.as_slice())).or_default().push(key);
            }
        }
        out
    }
    let before = lone(old, new);
    let pairs = lone(new, old).into_iter().filter_map(|(content, after)| {
        match (before.get(&content)?.as_slice(), after.as_slice()) {
            ([from], [to]) => Some((*to, *from)),
            _ => None,
        }
    });
    pairs.collect()
}

fn kind(entry: &Entry) -> FileType {
    FileType::from_raw_mode(entry.mode)
}

fn change(old: &Entry, new: &Entry) -> Option<ChangeKind> {
    if old == new {
        None
    } else if kind(old) != kind(new) {
        Some(ChangeKind::Type)
    } else if old.content != new.content {
        Some(match kind(new) {
            FileType::Symlink => ChangeKind::Target(text(&old.content), text(&new.content)),
            _ => ChangeKind::Content,
        })
    } else if old.mode != new.mode && kind(new) != FileType::Symlink {
        Some(ChangeKind::Mode(old.mode & 0o7777, new.mode & 0o7777))
    } else if (old.uid, old.gid) != (new.uid, new.gid) {
        Some(ChangeKind::Owner((old.uid, old.gid), (new.uid, new.gid)))
    } else {
        (old.rest != new.rest).then_some(ChangeKind::Attributes)
    }
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
