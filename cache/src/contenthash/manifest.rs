//! What a content digest was made of, entry by entry, so that two digests can be told apart by names.
//!
//! A manifest is kept under the digest that it explains, and what is in a directory under the digest of that directory,
//! so that neighbours in time share all directories in which nothing changed. What is long is cut into chunks where the
//! hash of an entry's path says so, and neighbours share those, too.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

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
/// Bytes in the name of a chunk or of a directory's list.
pub(super) const NAME: usize = 16;

/// The type that directories have, as entries.
const DIRECTORY: u32 = 0o040_000;

/// What a query selected, while its digest is computed.
#[derive(Default)]
pub(super) struct Listing {
    entries: Vec<Entry>,
    /// Lists of directories, and chunks, by key.
    parts: Vec<(Vec<u8>, Vec<u8>)>,
    /// Keys of the lists of directories that were not looked into.
    elsewhere: Vec<Vec<u8>>,
    /// Which of the query's paths is being listed.
    pub(super) part: u32,
}

/// One entry. Paths are relative to what the digest calls its root; in the list of a directory, to that.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Entry {
    #[prost(uint32, tag = "1")]
    pub(super) part: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) path: Vec<u8>,
    /// Type and permissions.
    #[prost(uint32, tag = "3")]
    pub(super) mode: u32,
    #[prost(uint32, tag = "4")]
    pub(super) uid: u32,
    #[prost(uint32, tag = "5")]
    pub(super) gid: u32,
    /// Of a file: digest of its content, cut. Of a symlink: its target.
    #[prost(bytes = "vec", tag = "6")]
    pub(super) content: Vec<u8>,
    /// Digest of what else describes it.
    #[prost(fixed64, tag = "7")]
    pub(super) rest: u64,
    /// Of a directory with something in it, if all of that counts: the name of its list.
    #[prost(bytes = "vec", tag = "8")]
    pub(super) tree: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Chunk {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<Entry>,
}

/// What a query selected, or what is in a directory.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Manifest {
    /// Of a query's.
    #[prost(int64, tag = "1")]
    created: i64,
    /// The whole of it, where it is short.
    #[prost(message, repeated, tag = "2")]
    pub(super) entries: Vec<Entry>,
    /// Names of chunks.
    #[prost(bytes = "vec", tag = "3")]
    chunks: Vec<u8>,
    /// Names of the lists of directories among the entries.
    #[prost(bytes = "vec", tag = "4")]
    trees: Vec<u8>,
}

impl Entry {
    fn of(path: Vec<u8>, item: &Item, tree: Option<&blake3::Hash>) -> Self {
        let tree = tree.map(|digest| digest.as_bytes()[..NAME].to_vec()).unwrap_or_default();
        // What describes the root of a whole snapshot doesn't count.
        if item.node.path().is_empty() {
            return Self { path, mode: DIRECTORY, tree, ..Self::default() };
        }
        let stat = item.node.stat();
        let (content, rest) = item.described();
        Self { part: 0, path, mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid, content, rest, tree }
    }
}

impl Listing {
    /// Takes in an entry under the path by which the digest knows it, without what is below it.
    pub(super) fn add(&mut self, path: &[u8], item: &Item) {
        let path = path.strip_prefix(b"/").unwrap_or(path).to_vec();
        self.entries.push(Entry { part: self.part, ..Entry::of(path, item, None) });
    }

    /// Takes in a walked tree with the digests of its items; its first item is the root.
    pub(super) fn add_tree(&mut self, items: &[Item], digests: &[blake3::Hash]) {
        let tree = |at: usize| items[at].has_list().then(|| &digests[at]);
        for (at, item) in items.iter().enumerate().filter(|(_, item)| item.has_list()) {
            let key = tree_key(&digests[at].as_bytes()[..NAME]);
            if item.whole.is_some() {
                self.elsewhere.push(key);
                continue;
            }
            let below = item.children(at, items);
            let entries = below.map(|child| Entry::of(items[child].name.clone(), &items[child], tree(child)));
            let manifest = Manifest::of(entries.collect(), &mut self.parts);
            self.parts.push((key, codec::encode(&manifest)));
        }
        if let Some(root) = items.first() {
            self.entries.push(Entry { part: self.part, ..Entry::of(Vec::new(), root, tree(0)) });
        }
    }

    /// True if the lists of the directories that were not looked into are kept.
    pub(super) fn is_whole(&self, kv: &dyn Kv) -> Result<bool> {
        let keys: Vec<&[u8]> = self.elsewhere.iter().map(Vec::as_slice).collect();
        Ok(kv.multi_get(Cf::Content, &keys)?.iter().all(Option::is_some))
    }

    /// Adds what is not kept yet to a batch, under the digest that it explains.
    pub(super) fn keep(self, kv: &dyn Kv, batch: &mut Batch, digest: &blake3::Hash) -> Result<()> {
        let mut parts = self.parts;
        let manifest = Manifest::of(self.entries, &mut parts);
        let keys: Vec<&[u8]> = parts.iter().map(|(key, _)| key.as_slice()).collect();
        let known = kv.multi_get(Cf::Content, &keys)?;
        for ((key, value), known) in parts.into_iter().zip(known) {
            if known.is_none() {
                batch.put(Cf::Content, key, value);
            }
        }
        let manifest = Manifest { created: codec::nanos(SystemTime::now()), ..manifest };
        batch.put(Cf::Content, manifest_key(digest.as_bytes()), codec::encode(&manifest));
        Ok(())
    }
}

impl Manifest {
    /// One with these entries; its chunks are added to `parts`.
    fn of(entries: Vec<Entry>, parts: &mut Vec<(Vec<u8>, Vec<u8>)>) -> Self {
        let trees = entries.iter().flat_map(|entry| entry.tree.iter().copied()).collect();
        let mut manifest = Self { trees, ..Self::default() };
        if entries.len() <= INLINE {
            manifest.entries = entries;
        } else {
            for (name, value) in chunks(entries) {
                manifest.chunks.extend_from_slice(&name);
                parts.push((chunk_key(&name), value));
            }
        }
        manifest
    }

    /// Names of its chunks.
    pub(super) fn chunks(&self) -> Vec<[u8; NAME]> {
        names(&self.chunks)
    }
}

fn names(all: &[u8]) -> Vec<[u8; NAME]> {
    all.chunks_exact(NAME).filter_map(|name| name.try_into().ok()).collect()
}

/// Names and values of chunks.
fn chunks(entries: Vec<Entry>) -> Vec<([u8; NAME], Vec<u8>)> {
    let mut out = Vec::new();
    let mut chunk = Chunk::default();
    let mut close = |chunk: &mut Chunk| {
        let value = codec::encode(chunk);
        let mut name = [0; NAME];
        blake3::Hasher::new().update(&value).finalize_xof().fill(&mut name);
        out.push((name, value));
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

fn key(kind: &str, name: &[u8]) -> Vec<u8> {
    let mut key = values::key(b'm', kind, "");
    key.extend_from_slice(name);
    key
}

fn manifest_key(digest: &[u8]) -> Vec<u8> {
    key("manifest", digest)
}

fn chunk_key(name: &[u8]) -> Vec<u8> {
    key("chunk", name)
}

fn tree_key(name: &[u8]) -> Vec<u8> {
    key("tree", name)
}

fn read<T: prost::Message + Default>(kv: &dyn Kv, key: &[u8]) -> Result<Option<T>> {
    kv.get(Cf::Content, key)?.map(|bytes| codec::decode("manifest", key, &bytes)).transpose()
}

/// What a digest of a query was made of, if that is kept.
pub(super) fn load(kv: &dyn Kv, digest: &[u8; 32]) -> Result<Option<Manifest>> {
    read(kv, &manifest_key(digest))
}

/// The list of a directory by its name.
pub(super) fn load_tree(kv: &dyn Kv, name: &[u8]) -> Result<Option<Manifest>> {
    read(kv, &tree_key(name))
}

/// The entries in a chunk.
pub(super) fn load_chunk(kv: &dyn Kv, name: &[u8]) -> Result<Option<Vec<Entry>>> {
    Ok(read::<Chunk>(kv, &chunk_key(name))?.map(|chunk| chunk.entries))
}

/// True if there is a manifest for a digest.
pub(super) fn is_kept(kv: &dyn Kv, digest: &blake3::Hash) -> Result<bool> {
    Ok(kv.get(Cf::Content, &manifest_key(digest.as_bytes()))?.is_some())
}

/// Forgets manifests that explain none of `wanted`, and all that is then in none.
pub(crate) fn sweep(shared: &Shared, wanted: &HashSet<[u8; 32]>) -> Result<()> {
    let _exclusive = shared.manifests.write();
    let kv = shared.kv.as_ref();
    let prefix = manifest_key(b"");
    let limit = SystemTime::now().checked_sub(GRACE).map_or(0, codec::nanos);
    let (mut batch, mut chunks, mut trees) = (Batch::new(), HashSet::new(), Vec::new());
    kv.scan(Cf::Content, &prefix, &mut |key, value| {
        // One that can't be read explains nothing.
        let manifest = codec::decode("manifest", key, value).unwrap_or_else(|_| Manifest::default());
        let digest = <[u8; 32]>::try_from(&key[prefix.len()..]);
        if manifest.created <= limit && !digest.is_ok_and(|digest| wanted.contains(&digest)) {
            batch.delete(Cf::Content, key);
        } else {
            chunks.extend(manifest.chunks());
            trees.extend(names(&manifest.trees));
        }
        Ok(true)
    })?;
    if batch.is_empty() {
        return Ok(());
    }
    let mut seen = HashSet::new();
    while let Some(name) = trees.pop() {
        if seen.insert(name)
            && let Some(list) = load_tree(kv, &name).ok().flatten()
        {
            chunks.extend(list.chunks());
            trees.extend(names(&list.trees));
        }
    }
    for (prefix, wanted) in [(chunk_key(b""), chunks), (tree_key(b""), seen)] {
        kv.scan(Cf::Content, &prefix, &mut |key, _| {
            if !wanted.contains(&key[prefix.len()..]) {
                batch.delete(Cf::Content, key);
            }
            Ok(true)
        })?;
    }
    kv.write_freeing(batch)
}
