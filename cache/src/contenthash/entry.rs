//! Digests of entries: one file, one directory with all below it, one layer with its marks.
//!
//! A tree is first walked into a flat list, on all cores, then the files whose digest isn't known are read, on
//! all cores too, then the list is folded. Nothing recurses. Where a snapshot is a single layer, the digests of its
//! directories are remembered and not looked into again.

use std::collections::HashMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, Stat};

use super::cache::{self, Files};
use super::manifest::Listing;
use super::{in_parallel, update};
use crate::error::{Result, StoreError};
use crate::layerview::{self, LayerView, Node};
use crate::snapshots::SnapshotRef;

const BUFFER: usize = 128 << 10;

/// Reading on several threads pays from this many bytes or files on.
const WORTHWHILE_BYTES: u64 = 1 << 20;
const WORTHWHILE_FILES: usize = 64;
/// A tree is walked in parts if one of its levels has so many directories.
const WORTHWHILE_DIRS: usize = 16;

/// A view together with what is known of its layers' files.
pub(super) struct Hasher<'a> {
    view: &'a LayerView,
    /// Top first, as in the view.
    layers: Vec<LayerFiles>,
    /// Digests of directories with all below them; of a single layer only, as another one may hide something.
    dirs: Option<Arc<Files>>,
}

struct LayerFiles {
    layer: SnapshotRef,
    known: Option<Arc<Files>>,
}

/// An entry of a directory, by name.
type Child = (Vec<u8>, Node);

/// What is known of a tree before it is listed, by path.
#[derive(Default)]
struct Ahead<'a> {
    /// Digests of directories with all below them.
    known: Option<&'a Files>,
    /// What is in a directory.
    listed: HashMap<Vec<u8>, Vec<Child>>,
    /// A directory and all below it.
    walked: HashMap<Vec<u8>, Vec<Item>>,
}

impl Ahead<'_> {
    fn whole(&self, node: &Node) -> Option<blake3::Hash> {
        let known = self.known.filter(|_| node.is_dir())?;
        known.get(node.path()).map(|digest| blake3::Hash::from_bytes(*digest))
    }
}

/// An entry of a walked tree.
pub(super) struct Item {
    pub(super) name: Vec<u8>,
    pub(super) node: Node,
    /// Digest of what describes the entry, without its content.
    header: Vec<u8>,
    /// Of a symlink: its target.
    link: Vec<u8>,
    /// Of a file: of its content.
    content: Option<[u8; 32]>,
    /// Of a directory: how many of the following items are below it.
    below: usize,
    /// Of a directory that was not looked into: its digest. There is something in it.
    pub(super) whole: Option<blake3::Hash>,
}

impl<'a> Hasher<'a> {
    /// With `reuse`, directories whose digests are remembered are not looked into.
    pub(super) fn new(view: &'a LayerView, snapshot: &SnapshotRef, reuse: bool) -> Result<Self> {
        let layers: Vec<_> =
            snapshot.layers().into_iter().rev().map(|layer| LayerFiles { layer, known: None }).collect();
        let dirs = match layers.as_slice() {
            [only] if reuse => Some(cache::files(&only.layer)?),
            _ => None,
        };
        Ok(Self { view, layers, dirs })
    }

    pub(super) fn view(&self) -> &'a LayerView {
        self.view
    }

    /// Digest of an entry; a directory's covers all below it. The root's own attributes don't count.
    pub(super) fn digest(&mut self, node: &Node, listing: &mut Listing) -> Result<blake3::Hash> {
        let mut items = self.list(node, self.ahead(node, true)?)?;
        let mut fresh = self.read_new(&mut items)?;
        let digests = fold(&items);
        if let [only] = fresh.as_mut_slice() {
            let listed =
                items.iter().zip(&digests).filter(|(item, _)| item.has_list() && item.whole.is_none());
            only.extend(listed.map(|(item, digest)| (item.node.path().to_vec(), *digest.as_bytes())));
        }
        self.remember(fresh)?;
        listing.add_tree(&items, &digests);
        Ok(first(&digests))
    }

    /// An entry and all below it, parents first, siblings in byte order of their names.
    pub(super) fn walk(&self, node: &Node) -> Result<Vec<Item>> {
        self.list(node, self.ahead(node, false)?)
    }

    /// Walks the parts of a tree that has many directories, on all cores. With `reuse` only those that are not known.
    fn ahead(&self, node: &Node, reuse: bool) -> Result<Ahead<'_>> {
        let mut ahead = Ahead { known: self.dirs.as_deref().filter(|_| reuse), ..Ahead::default() };
        let open = |node: &Node| node.is_dir() && ahead.whole(node).is_none();
        let mut listed = HashMap::new();
        let mut level: Vec<Node> = open(node).then(|| node.clone()).into_iter().collect();
        while !level.is_empty() && level.len() < WORTHWHILE_DIRS {
            let mut next = Vec::new();
            for dir in level {
                let children = self.view.children(&dir)?;
                next.extend(children.iter().map(|(_, child)| child).filter(|child| open(child)).cloned());
                listed.insert(dir.path().to_vec(), children);
            }
            level = next;
        }
        let walked = Mutex::new(HashMap::with_capacity(level.len()));
        in_parallel(&level, true, |dir| {
            let items = self.list(dir, Ahead { known: ahead.known, ..Ahead::default() })?;
            walked.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.path().to_vec(), items);
            Ok(())
        })?;
        ahead.listed = listed;
        ahead.walked = walked.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(ahead)
    }

    fn list(&self, node: &Node, mut ahead: Ahead<'_>) -> Result<Vec<Item>> {
        let name = node.path().rsplit(|&byte| byte == b'/').next().unwrap_or_default().to_vec();
        let mut items = Vec::new();
        // Directories that are being listed: index of the item, and entries still to come.
        let mut open: Vec<(usize, std::vec::IntoIter<Child>)> = Vec::new();
        let mut next = Some((name, node.clone()));
        loop {
            if let Some((name, node)) = next.take() {
                match ahead.walked.remove(node.path()) {
                    Some(walked) => items.extend(walked),
                    None => {
                        let whole = ahead.whole(&node);
                        if node.is_dir() && whole.is_none() {
                            let children = match ahead.listed.remove(node.path()) {
                                Some(children) => children,
                                None => self.view.children(&node)?,
                            };
                            open.push((items.len(), children.into_iter()));
                        }
                        items.push(Item { whole, ..self.item(name, node)? });
                    }
                }
            }
            let Some((at, children)) = open.last_mut() else { return Ok(items) };
            next = children.next();
            if next.is_none() {
                let at = *at;
                items[at].below = items.len() - at - 1;
                open.pop();
            }
        }
    }

    pub(super) fn item(&self, name: Vec<u8>, node: Node) -> Result<Item> {
        let link = match node.kind() {
            FileType::Symlink => self.view.read_link(&node)?,
            _ => Vec::new(),
        };
        let header = match node.path().is_empty() {
            true => Vec::new(),
            false => header(node.stat(), &link, &self.view.xattrs(&node)?),
        };
        Ok(Item { name, node, header, link, content: None, below: 0, whole: None })
    }

    /// Fills in the digests of files' contents, from memory or by reading them.
    pub(super) fn read_contents(&mut self, items: &mut [Item]) -> Result<()> {
        let fresh = self.read_new(items)?;
        self.remember(fresh)
    }

    /// As [`Hasher::read_contents`]; what was not known is given, by layer, and not remembered.
    fn read_new(&mut self, items: &mut [Item]) -> Result<Vec<Files>> {
        let mut unknown = Vec::new();
        let mut bytes = 0;
        for (at, item) in items.iter_mut().enumerate() {
            if item.node.kind() != FileType::RegularFile {
                continue;
            }
            let files = &mut self.layers[item.node.layer()];
            let known = match &files.known {
                Some(known) => known,
                None => files.known.insert(cache::files(&files.layer)?),
            };
            item.content = known.get(item.node.path()).copied();
            if item.content.is_none() {
                unknown.push(at);
                bytes += u64::try_from(item.node.stat().st_size).unwrap_or(0);
            }
        }
        let worthwhile = bytes >= WORTHWHILE_BYTES || unknown.len() >= WORTHWHILE_FILES;
        let found = Mutex::new(Vec::with_capacity(unknown.len()));
        in_parallel(&unknown, worthwhile, |&at| {
            let node = &items[at].node;
            let digest = read(self.view.open_file(node)?)
                .map_err(|e| StoreError::io("read", self.view.full_path_of(node), e))?;
            found.lock().unwrap_or_else(PoisonError::into_inner).push((at, digest));
            Ok(())
        })?;
        let mut fresh: Vec<Files> = self.layers.iter().map(|_| Files::new()).collect();
        for (at, digest) in found.into_inner().unwrap_or_else(PoisonError::into_inner) {
            items[at].content = Some(digest);
            fresh[items[at].node.layer()].insert(items[at].node.path().to_vec(), digest);
        }
        Ok(fresh)
    }

    fn remember(&mut self, fresh: Vec<Files>) -> Result<()> {
        for (files, fresh) in self.layers.iter_mut().zip(fresh) {
            if fresh.is_empty() {
                continue;
            }
            // Nobody else has the table then, and it need not be copied.
            files.known = None;
            let dirs = self.dirs.take().is_some();
            cache::add_files(&files.layer, fresh)?;
            if dirs {
                self.dirs = Some(cache::files(&files.layer)?);
            }
        }
        Ok(())
    }
}

impl Item {
    /// Digest of the entry alone; for a directory only of what describes it.
    pub(super) fn own_digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        update(&mut hasher, b"entry");
        update(&mut hasher, &self.header);
        if let Some(content) = &self.content {
            update(&mut hasher, content);
        }
        hasher.finalize()
    }

    /// Of a file, a digest of its content, cut; of a symlink, its target. And a digest of what describes the entry
    /// beside its attributes.
    pub(super) fn described(&self) -> (Vec<u8>, u64) {
        let content = match &self.content {
            Some(digest) => digest[..16].to_vec(),
            None => self.link.clone(),
        };
        let rest = blake3::hash(self.header.get(BESIDE_ATTRIBUTES..).unwrap_or_default());
        (content, rest.as_bytes()[..8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    pub(super) fn below(&self) -> usize {
        self.below
    }

    /// True if it is a directory with something in it.
    pub(super) fn has_list(&self) -> bool {
        self.below > 0 || self.whole.is_some()
    }

    /// Where in the walked list the items directly below this one are, which is at `at`.
    pub(super) fn children(&self, at: usize, items: &[Item]) -> impl Iterator<Item = usize> {
        let (mut next, end) = (at + 1, at + self.below);
        std::iter::from_fn(move || {
            let child = next;
            (child <= end).then(|| {
                next += 1 + items[child].below;
                child
            })
        })
    }
}

/// Digests of the items of a walked list, each with all below it.
fn fold(items: &[Item]) -> Vec<blake3::Hash> {
    let mut digests = vec![blake3::Hash::from_bytes([0; 32]); items.len()];
    // From the end to the front: when a directory is met, its children's digests are complete.
    for (at, item) in items.iter().enumerate().rev() {
        digests[at] = match (item.node.is_dir(), item.whole) {
            (_, Some(whole)) => whole,
            (false, None) => item.own_digest(),
            (true, None) => {
                let mut hasher = blake3::Hasher::new();
                update(&mut hasher, b"dir");
                update(&mut hasher, item.own_digest().as_bytes());
                for child in item.children(at, items) {
                    update(&mut hasher, &items[child].name);
                    update(&mut hasher, digests[child].as_bytes());
                }
                hasher.finalize()
            }
        };
    }
    digests
}

/// Digest of a whole walked list.
fn first(digests: &[blake3::Hash]) -> blake3::Hash {
    digests.first().copied().unwrap_or_else(|| blake3::hash(b""))
}

/// Digest of one layer's directory as it is: whiteouts are entries, opaque directories are marked.
pub(super) fn layer(layer: &SnapshotRef) -> Result<blake3::Hash> {
    if !layer.is_filled() {
        return Err(StoreError::NotMaterialized(layer.id().to_owned()));
    }
    // A single layer hides nothing, but a view leaves out its whiteouts; so they are listed beside.
    let view = LayerView::of_dirs(vec![layer.dir()])?;
    let layers = vec![LayerFiles { layer: layer.clone(), known: None }];
    let mut hasher = Hasher { view: &view, layers, dirs: None };
    let root = view.root()?;
    let mut items = hasher.walk(&root)?;
    hasher.read_contents(&mut items)?;
    let mut out = blake3::Hasher::new();
    update(&mut out, first(&fold(&items)).as_bytes());
    // Here, unlike in a query, the root's attributes are part of what a step may have changed.
    update(&mut out, &header(root.stat(), b"", &view.xattrs(&root)?));
    for item in items.iter().filter(|item| item.node.is_dir()) {
        let path = view.full_path_of(&item.node);
        if layerview::is_opaque(&path).map_err(|e| StoreError::io("read attributes of", &path, e))? {
            update(&mut out, b"opaque");
            update(&mut out, item.node.path());
        }
        for name in view.whiteouts(&item.node)? {
            update(&mut out, b"whiteout");
            update(&mut out, item.node.path());
            update(&mut out, &name);
        }
    }
    Ok(out.finalize())
}

/// Where a header goes on behind type, mode, owner and size.
const BESIDE_ATTRIBUTES: usize = 21;

/// What describes an entry, beside its name and content.
fn header(stat: &Stat, link: &[u8], xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let (letter, is_device) = match kind {
        FileType::RegularFile => (b'0', false),
        FileType::Symlink => (b'2', false),
        FileType::CharacterDevice => (b'3', true),
        FileType::BlockDevice => (b'4', true),
        FileType::Directory => (b'5', false),
        FileType::Fifo => (b'6', false),
        FileType::Socket => (b's', false),
        FileType::Unknown => (b'?', false),
    };
    let mode = if kind == FileType::Symlink { 0o777 } else { stat.st_mode & 0o7777 };
    let size = if kind == FileType::RegularFile { stat.st_size } else { 0 };
    let device = if is_device { stat.st_rdev } else { 0 };
    let mut out = Vec::with_capacity(64 + link.len());
    out.push(letter);
    out.extend_from_slice(&mode.to_le_bytes());
    out.extend_from_slice(&stat.st_uid.to_le_bytes());
    out.extend_from_slice(&stat.st_gid.to_le_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&rustix::fs::major(device).to_le_bytes());
    out.extend_from_slice(&rustix::fs::minor(device).to_le_bytes());
    let mut part = |bytes: &[u8]| {
        out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(bytes);
    };
    part(link);
    for (name, value) in xattrs.iter().filter(|(name, _)| counts(name)) {
        part(name);
        part(value);
    }
    out
}

/// Labels of security modules and ACLs depend on the machine, not on what was built.
fn counts(xattr: &[u8]) -> bool {
    xattr == b"security.capability" || !(xattr.starts_with(b"security.") || xattr.starts_with(b"system."))
}

fn read(mut file: std::fs::File) -> std::io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(*hasher.finalize().as_bytes()),
            n => hasher.update(&buffer[..n]),
        };
    }
}
