//! Digests of entries: one file, one directory with all below it, one layer with its marks.
//!
//! A tree is first walked into a flat list, on all cores, then the files whose digest isn't known are read, on
//! all cores too, then the list is folded. Nothing recurses.

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
}

struct LayerFiles {
    layer: SnapshotRef,
    known: Option<Arc<Files>>,
}

/// An entry of a directory, by name.
type Child = (Vec<u8>, Node);

/// What is known of a tree before it is listed, by path.
#[derive(Default)]
struct Ahead {
    /// What is in a directory.
    listed: HashMap<Vec<u8>, Vec<Child>>,
    /// A directory and all below it.
    walked: HashMap<Vec<u8>, Vec<Item>>,
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
}

impl<'a> Hasher<'a> {
    pub(super) fn new(view: &'a LayerView, snapshot: &SnapshotRef) -> Self {
        let layers =
            snapshot.layers().into_iter().rev().map(|layer| LayerFiles { layer, known: None }).collect();
        Self { view, layers }
    }

    pub(super) fn view(&self) -> &'a LayerView {
        self.view
    }

    /// Digest of an entry; a directory's covers all below it. The root's own attributes don't count.
    pub(super) fn digest(&mut self, node: &Node, listing: &mut Listing) -> Result<blake3::Hash> {
        let mut items = self.walk(node)?;
        self.read_contents(&mut items)?;
        listing.add_tree(&items);
        Ok(fold(&items))
    }

    /// An entry and all below it, parents first, siblings in byte order of their names.
    pub(super) fn walk(&self, node: &Node) -> Result<Vec<Item>> {
        let ahead = self.ahead(node)?;
        self.list(node, ahead)
    }

    /// Walks the parts of a tree that has many directories, on all cores.
    fn ahead(&self, node: &Node) -> Result<Ahead> {
        let mut ahead = Ahead::default();
        let mut level: Vec<Node> = node.is_dir().then(|| node.clone()).into_iter().collect();
        while !level.is_empty() && level.len() < WORTHWHILE_DIRS {
            let mut next = Vec::new();
            for dir in level {
                let children = self.view.children(&dir)?;
                next.extend(children.iter().map(|(_, child)| child).filter(|child| child.is_dir()).cloned());
                ahead.listed.insert(dir.path().to_vec(), children);
            }
            level = next;
        }
        let walked = Mutex::new(HashMap::with_capacity(level.len()));
        in_parallel(&level, true, |dir| {
            let items = self.list(dir, Ahead::default())?;
            walked.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.path().to_vec(), items);
            Ok(())
        })?;
        ahead.walked = walked.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(ahead)
    }

    fn list(&self, node: &Node, mut ahead: Ahead) -> Result<Vec<Item>> {
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
                        if node.is_dir() {
                            let children = match ahead.listed.remove(node.path()) {
                                Some(children) => children,
                                None => self.view.children(&node)?,
                            };
                            open.push((items.len(), children.into_iter()));
                        }
                        items.push(self.item(name, node)?);
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
        Ok(Item { name, node, header, link, content: None, below: 0 })
    }

    /// Fills in the digests of files' contents, from memory or by reading them.
    pub(super) fn read_contents(&mut self, items: &mut [Item]) -> Result<()> {
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
        for (files, fresh) in self.layers.iter_mut().zip(fresh) {
            if !fresh.is_empty() {
                cache::add_files(&files.layer, fresh)?;
                files.known = None;
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
}

/// Digest of the first item, from a walked list.
fn fold(items: &[Item]) -> blake3::Hash {
    // From the end to the front: when a directory is met, its children's digests are complete.
    let mut digests = vec![None; items.len()];
    for at in (0..items.len()).rev() {
        let item = &items[at];
        if !item.node.is_dir() {
            digests[at] = Some(item.own_digest());
            continue;
        }
        let mut hasher = blake3::Hasher::new();
        update(&mut hasher, b"dir");
        update(&mut hasher, item.own_digest().as_bytes());
        let mut child = at + 1;
        while child <= at + item.below {
            update(&mut hasher, &items[child].name);
            if let Some(digest) = &digests[child] {
                update(&mut hasher, blake3::Hash::as_bytes(digest));
            }
            child += 1 + items[child].below;
        }
        digests[at] = Some(hasher.finalize());
    }
    digests.first().copied().flatten().unwrap_or_else(|| blake3::hash(b""))
}

/// Digest of one layer's directory as it is: whiteouts are entries, opaque directories are marked.
pub(super) fn layer(layer: &SnapshotRef) -> Result<blake3::Hash> {
    if !layer.is_filled() {
        return Err(StoreError::NotMaterialized(layer.id().to_owned()));
    }
    // A single layer hides nothing, but a view leaves out its whiteouts; so they are listed beside.
    let view = LayerView::of_dirs(vec![layer.dir()])?;
    let mut hasher = Hasher { view: &view, layers: vec![LayerFiles { layer: layer.clone(), known: None }] };
    let root = view.root()?;
    let mut items = hasher.walk(&root)?;
    hasher.read_contents(&mut items)?;
    let mut out = blake3::Hasher::new();
    update(&mut out, fold(&items).as_bytes());
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
