//! What a content digest was made of, entry by entry, so that two digests can be told apart by names.
//!
//! A manifest is kept under the digest that it explains. A long one is cut into chunks where the
//! hash of an entry's path says so: neighbours in time share all chunks in which nothing changed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use rustix::fs::FileType;

use super::entry::Item;
use crate::codec;
use crate::error::Result;
use crate::kv::{Batch, Cf, Kv};
use crate::store::Shared;
use crate::values;

/// Entries of a manifest that is not cut.
const INLINE: usize = 64;
/// A chunk ends at one path of so many, on average.
const CHUNK: u8 = u8::MAX;
/// How long a manifest stays that no record of a build refers to: the build may be running.
const GRACE: Duration = Duration::from_secs(3600);

/// What a query selected, while its digest is computed.
#[derive(Default)]
pub(super) struct Listing {
    entries: Vec<Entry>,
    /// Which of the query's paths is being listed.
    pub(super) part: u32,
}

/// One entry. Paths are relative to what the digest calls its root.
#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    #[prost(uint32, tag = "1")]
    part: u32,
    #[prost(bytes = "vec", tag = "2")]
    path: Vec<u8>,
    /// Type and permissions.
    #[prost(uint32, tag = "3")]
    mode: u32,
    #[prost(uint32, tag = "4")]
    uid: u32,
    #[prost(uint32, tag = "5")]
    gid: u32,
    /// Of a file: digest of its content, cut. Of a symlink: its target.
    #[prost(bytes = "vec", tag = "6")]
    content: Vec<u8>,
    /// Digest of what else describes it.
    #[prost(fixed64, tag = "7")]
    rest: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Chunk {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<Entry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Manifest {
    #[prost(int64, tag = "1")]
    created: i64,
    /// The whole of it, where it is short.
    #[prost(message, repeated, tag = "2")]
    entries: Vec<Entry>,
    /// Names of chunks, 16 bytes each.
    #[prost(bytes = "vec", tag = "3")]
    chunks: Vec<u8>,
}

impl Listing {
    /// Takes in an entry under the path by which the digest knows it.
    pub(super) fn add(&mut self, path: &[u8], item: &Item) {
        let stat = item.node.stat();
        let (content, rest) = item.described();
        self.entries.push(Entry {
            part: self.part,
            path: path.strip_prefix(b"/").unwrap_or(path).to_vec(),
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            content,
            rest,
        });
    }

    /// Takes in a walked tree; its first item is the root.
    pub(super) fn add_tree(&mut self, items: &[Item]) {
        // Ends and paths of the directories above the current item.
        let mut above: Vec<(usize, Vec<u8>)> = Vec::new();
        for (at, item) in items.iter().enumerate() {
            while above.last().is_some_and(|(end, _)| *end <= at) {
                above.pop();
            }
            let path = match above.last() {
                None => Vec::new(),
                Some((_, dir)) if dir.is_empty() => item.name.clone(),
                Some((_, dir)) => [dir, b"/".as_slice(), &item.name].concat(),
            };
            // What describes the root of a whole snapshot doesn't count.
            if !item.node.path().is_empty() {
                self.add(&path, item);
            }
            if item.node.is_dir() {
                above.push((at + 1 + item.below(), path));
            }
        }
    }

    /// Adds what is not kept yet to a batch, under the digest that it explains.
    pub(super) fn keep(self, kv: &dyn Kv, batch: &mut Batch, digest: &blake3::Hash) -> Result<()> {
        let mut manifest = Manifest { created: codec::nanos(SystemTime::now()), ..Manifest::default() };
        if self.entries.len() <= INLINE {
            manifest.entries = self.entries;
        } else {
            let chunks: Vec<(Vec<u8>, Vec<u8>)> = chunks(self.entries);
            let keys: Vec<&[u8]> = chunks.iter().map(|(key, _)| key.as_slice()).collect();
            let known = kv.multi_get(Cf::Content, &keys)?;
            manifest.chunks = chunks.iter().flat_map(|(key, _)| &key[key.len() - NAME..]).copied().collect();
            for ((key, value), known) in chunks.into_iter().zip(known) {
                if known.is_none() {
                    batch.put(Cf::Content, key, value);
                }
            }
        }
        batch.put(Cf::Content, manifest_key(digest.as_bytes()), codec::encode(&manifest));
        Ok(())
    }
}

/// Bytes in the name of a chunk.
const NAME: usize = 16;

/// Keys and values of chunks.
fn chunks(entries: Vec<Entry>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut out = Vec::new();
    let mut chunk = Chunk::default();
    let mut close = |chunk: &mut Chunk| {
        let value = codec::encode(chunk);
        out.push((chunk_key(&blake3::hash(&value).as_bytes()[..NAME]), value));
        chunk.entries.clear();
    };
    for entry in entries {
        let cut =
            entry.path.iter().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add((*byte).into()));
        chunk.entries.push(entry);
        // A mixed byte: the last ones of the hash follow the last letters of names.
        if cut.wrapping_mul(0x9E37_79B1).to_be_bytes()[0] == CHUNK {
            close(&mut chunk);
        }
    }
    if !chunk.entries.is_empty() {
        close(&mut chunk);
    }
    out
}

fn manifest_key(digest: &[u8]) -> Vec<u8> {
    let mut key = values::key(b'm', "manifest", "");
    key.extend_from_slice(digest);
    key
}

fn chunk_key(name: &[u8]) -> Vec<u8> {
    let mut key = values::key(b'm', "chunk", "");
    key.extend_from_slice(name);
    key
}

fn load(kv: &dyn Kv, digest: &[u8; 32]) -> Result<Option<Manifest>> {
    let key = manifest_key(digest);
    kv.get(Cf::Content, &key)?.map(|bytes| codec::decode("manifest", &key, &bytes)).transpose()
}

/// True if there is a manifest for a digest.
pub(super) fn is_kept(kv: &dyn Kv, digest: &blake3::Hash) -> Result<bool> {
    Ok(kv.get(Cf::Content, &manifest_key(digest.as_bytes()))?.is_some())
}

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

/// What changed between the contents of two digests, by path; `None` if what one of them was made of
/// is not known.
pub(crate) fn changes(
    kv: &dyn Kv,
    before: &[u8; 32],
    after: &[u8; 32],
) -> Result<Option<Vec<ContentChange>>> {
    let (Some(before), Some(after)) = (load(kv, before)?, load(kv, after)?) else { return Ok(None) };
    let names = |manifest: &Manifest| -> Vec<[u8; NAME]> {
        manifest.chunks.chunks_exact(NAME).filter_map(|name| name.try_into().ok()).collect()
    };
    let (old_chunks, new_chunks) = (names(&before), names(&after));
    let (old_set, new_set): (HashSet<_>, HashSet<_>) =
        (old_chunks.iter().copied().collect(), new_chunks.iter().copied().collect());
    let read =
        |manifest: Manifest, chunks: Vec<[u8; NAME]>, other: &HashSet<[u8; NAME]>| -> Result<Option<_>> {
            let mut entries = manifest.entries;
            for name in chunks.iter().filter(|name| !other.contains(*name)) {
                let key = chunk_key(name);
                let Some(bytes) = kv.get(Cf::Content, &key)? else { return Ok(None) };
                entries.extend(codec::decode::<Chunk>("manifest", &key, &bytes)?.entries);
            }
            let by_path: Entries =
                entries.into_iter().map(|entry| ((entry.part, entry.path.clone()), entry)).collect();
            Ok(Some(by_path))
        };
    let (Some(old), Some(new)) = (read(before, old_chunks, &new_set)?, read(after, new_chunks, &old_set)?)
    else {
        return Ok(None);
    };
    Ok(Some(compare(&old, &new)))
}

/// Where an entry is: which of the query's paths selects it, and its own.
type Place = (u32, Vec<u8>);
type Entries = BTreeMap<Place, Entry>;

fn compare(old: &Entries, new: &Entries) -> Vec<ContentChange> {
    let moved = renames(old, new);
    let gone: HashSet<&Place> = moved.values().copied().collect();
    let mut out = Vec::new();
    let paths: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
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

/// Forgets manifests that explain none of `wanted`, and chunks that are then in none.
pub(crate) fn sweep(shared: &Shared, wanted: &HashSet<[u8; 32]>) -> Result<()> {
    let _exclusive = shared.manifests.write();
    let kv = shared.kv.as_ref();
    let prefix = manifest_key(b"");
    let limit = SystemTime::now().checked_sub(GRACE).map_or(0, codec::nanos);
    let (mut batch, mut chunks) = (Batch::new(), HashSet::new());
    kv.scan(Cf::Content, &prefix, &mut |key, value| {
        // One that can't be read explains nothing.
        let manifest = codec::decode("manifest", key, value).unwrap_or_else(|_| Manifest::default());
        let digest = <[u8; 32]>::try_from(&key[prefix.len()..]);
        if manifest.created <= limit && !digest.is_ok_and(|digest| wanted.contains(&digest)) {
            batch.delete(Cf::Content, key);
        } else {
            chunks.extend(manifest.chunks.chunks_exact(NAME).map(<[u8]>::to_vec));
        }
        Ok(true)
    })?;
    if batch.is_empty() {
        return Ok(());
    }
    let prefix = chunk_key(b"");
    kv.scan(Cf::Content, &prefix, &mut |key, _| {
        if !chunks.contains(&key[prefix.len()..]) {
            batch.delete(Cf::Content, key);
        }
        Ok(true)
    })?;
    kv.write_freeing(batch)
}
