//! What an overlay of layers would show, read in user space: names, attributes and contents of the
//! merged tree without a mount. Only reads, and never leaves the layers' directories.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::{Result, StoreError};
use crate::snapshots::SnapshotRef;

/// Symlinks followed in one path before it counts as a loop.
const MAX_LINKS: usize = 255;

/// Extended attributes: names and values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// A merged tree.
pub struct LayerView {
    /// Top first.
    layers: Vec<Layer>,
    /// Keeps the layers from being removed.
    _held: Option<SnapshotRef>,
}

struct Layer {
    dir: PathBuf,
    fd: OwnedFd,
}

/// An entry of a merged tree.
#[derive(Clone)]
pub struct Node {
    /// Relative to the root, without a leading slash; empty for the root.
    path: Vec<u8>,
    stat: Stat,
    /// For a directory all layers that contribute to it, otherwise the one that has it; top first.
    layers: Vec<usize>,
}

impl LayerView {
    /// The tree of a snapshot. All its layers must be here.
    pub fn of(snapshot: &SnapshotRef) -> Result<Self> {
        let mut dirs = Vec::new();
        for layer in snapshot.layers().iter().rev() {
            if !layer.is_filled() {
                return Err(StoreError::NotMaterialized(layer.id().to_owned()));
            }
            dirs.push(layer.dir());
        }
        Self::open(dirs, Some(snapshot.clone()))
    }

    /// The tree of layer directories, given from top to bottom. There must be at least one.
    pub fn of_dirs(dirs: Vec<PathBuf>) -> Result<Self> {
        Self::open(dirs, None)
    }

    fn open(dirs: Vec<PathBuf>, held: Option<SnapshotRef>) -> Result<Self> {
        if dirs.is_empty() {
            return Err(StoreError::Invalid("a view needs at least one layer".to_owned()));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let layers = dirs
            .into_iter()
            .map(|dir| match rustix::fs::openat(CWD, &dir, flags, Mode::empty()) {
                Ok(fd) => Ok(Layer { dir, fd }),
                Err(error) => Err(StoreError::io("open layer", dir, error)),
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers, _held: held })
    }

    /// The root directory.
    pub fn root(&self) -> Result<Node> {
        let stat = rustix::fs::fstat(&self.layers[0].fd)
            .map_err(|e| StoreError::io("read", &self.layers[0].dir, e))?;
        let mut layers = Vec::new();
        for i in 0..self.layers.len() {
            layers.push(i);
            if i + 1 < self.layers.len() && self.is_opaque(i, b"")? {
                break;
            }
        }
        Ok(Node { path: Vec::new(), stat, layers })
    }

    /// One entry of a directory.
    pub fn child(&self, dir: &Node, name: &[u8]) -> Result<Option<Node>> {
        if !dir.is_dir() || name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
            return Ok(None);
        }
        let path = join(&dir.path, name);
        let mut found: Option<Node> = None;
        for &i in &dir.layers {
            let fd = self.open_at(i, &dir.path, OFlags::PATH | OFlags::DIRECTORY)?;
            let stat = match rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT | Errno::NAMETOOLONG) => continue,
                Err(error) => return Err(self.failed("read", i, &path, error)),
            };
            if !self.add(&mut found, &path, i, stat)? {
                break;
            }
        }
        Ok(found)
    }

    /// All entries of a directory with their names, in byte order.
    pub fn children(&self, dir: &Node) -> Result<Vec<(Vec<u8>, Node)>> {
        use std::collections::BTreeMap;
        let mut found: BTreeMap<Vec<u8>, Option<Node>> = BTreeMap::new();
        let mut closed: HashSet<Vec<u8>> = HashSet::new();
        for &i in if dir.is_dir() { dir.layers.as_slice() } else { &[] } {
            let fd = self.open_at(i, &dir.path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            for name in self.names(i, &dir.path, &fd)? {
                if closed.contains(name.to_bytes()) {
                    continue;
                }
                let path = join(&dir.path, name.to_bytes());
                let stat = rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| self.failed("read", i, &path, e))?;
                let entry = found.entry(name.to_bytes().to_vec()).or_default();
                if !self.add(entry, &path, i, stat)? {
                    closed.insert(name.into_bytes());
                }
            }
        }
        Ok(found.into_iter().filter_map(|(name, node)| Some((name, node?))).collect())
    }

    /// Names that the uppermost layer of a directory hides, in byte order.
    pub fn whiteouts(&self, dir: &Node) -> Result<Vec<Vec<u8>>> {
        let top = dir.layer();
        let fd = self.open_at(top, &dir.path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut out = Vec::new();
        for name in self.names(top, &dir.path, &fd)? {
            let stat = rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| self.failed("read", top, &dir.path, e))?;
            if is_whiteout(&stat) {
                out.push(name.into_bytes());
            }
        }
        out.sort();
        Ok(out)
    }

    /// Takes layer `i`'s entry into account; false if no deeper layer counts for this name.
    fn add(&self, found: &mut Option<Node>, path: &[u8], i: usize, stat: Stat) -> Result<bool> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        if is_whiteout(&stat) || (found.is_some() && kind != FileType::Directory) {
            return Ok(false);
        }
        match found {
            Some(node) => node.layers.push(i),
            None => *found = Some(Node { path: path.to_vec(), stat, layers: vec![i] }),
        }
        Ok(kind == FileType::Directory && (i + 1 == self.layers.len() || !self.is_opaque(i, path)?))
    }

    /// The entry at a path, with symlinks followed inside the root (the last component only if
    /// `follow_last`). `..` stops at the root.
    pub fn resolve(&self, path: &[u8], follow_last: bool) -> Result<Option<Node>> {
        let mut pending: Vec<Vec<u8>> = components(path).rev().collect();
        let mut trail = vec![self.root()?];
        let mut links = 0;
        while let Some(name) = pending.pop() {
            let Some(current) = trail.last().filter(|node| node.is_dir()) else { return Ok(None) };
            if name == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let Some(node) = self.child(current, &name)? else { return Ok(None) };
            if node.kind() == FileType::Symlink && (follow_last || !pending.is_empty()) {
                links += 1;
                if links > MAX_LINKS {
                    let text = String::from_utf8_lossy(path);
                    return Err(StoreError::Invalid(format!("too many symlinks in {text:?}")));
                }
                let target = self.read_link(&node)?;
                if target.first() == Some(&b'/') {
                    trail.truncate(1);
                }
                pending.extend(components(&target).rev());
                continue;
            }
            trail.push(node);
        }
        Ok(trail.pop())
    }

    /// A symlink's target.
    pub fn read_link(&self, node: &Node) -> Result<Vec<u8>> {
        let fd = self.open_at(node.layers[0], &node.path, OFlags::PATH)?;
        let target = rustix::fs::readlinkat(&fd, c"", Vec::new())
            .map_err(|e| self.failed("read link", node.layers[0], &node.path, e))?;
        Ok(target.into_bytes())
    }

    /// Opens a regular file for reading.
    pub fn open_file(&self, node: &Node) -> Result<File> {
        Ok(File::from(self.open_at(node.layers[0], &node.path, OFlags::RDONLY | OFlags::NOCTTY)?))
    }

    /// Extended attributes in byte order, without those that belong to the overlay itself.
    pub fn xattrs(&self, node: &Node) -> Result<Xattrs> {
        let layer = node.layers[0];
        xattrs(&self.full_path(layer, &node.path))
            .map_err(|e| self.failed("read attributes of", layer, &node.path, e))
    }

    /// Number of layers.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Never true; a view has at least one layer.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The file or directory itself, in its uppermost layer.
    pub fn full_path_of(&self, node: &Node) -> PathBuf {
        self.full_path(node.layers[0], &node.path)
    }

    fn full_path(&self, layer: usize, path: &[u8]) -> PathBuf {
        match path {
            [] => self.layers[layer].dir.clone(),
            path => self.layers[layer].dir.join(OsStr::from_bytes(path)),
        }
    }

    fn failed(&self, op: &'static str, layer: usize, path: &[u8], error: Errno) -> StoreError {
        StoreError::io(op, self.full_path(layer, path), error)
    }

    fn open_at(&self, layer: usize, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(
            &self.layers[layer].fd,
            path,
            flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        )
        .map_err(|e| self.failed("open", layer, path, e))
    }

    fn names(&self, layer: usize, path: &[u8], fd: &OwnedFd) -> Result<Vec<CString>> {
        let mut buffer = Vec::with_capacity(16 << 10);
        let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
        let mut out = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|e| self.failed("list", layer, path, e))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                out.push(entry.file_name().to_owned());
            }
        }
        Ok(out)
    }

    fn is_opaque(&self, layer: usize, path: &[u8]) -> Result<bool> {
        let path = self.full_path(layer, path);
        is_opaque(&path).map_err(|e| StoreError::io("read attributes of", path, e))
    }
}

impl Node {
    /// Relative to the root, without a leading slash; empty for the root.
    pub fn path(&self) -> &[u8] {
        &self.path
    }

    /// Its attributes.
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// What it is.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// True for a directory.
    pub fn is_dir(&self) -> bool {
        self.kind() == FileType::Directory
    }

    /// Index of the layer, counted from the top, that decides what the entry is.
    pub fn layer(&self) -> usize {
        self.layers[0]
    }
}

/// True for the mark that hides a name of deeper layers.
pub fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// The extended attributes by which overlays mark a directory that hides what deeper layers have in it.
pub const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];

/// True if a directory of a layer hides what deeper layers have in it.
pub fn is_opaque(dir: &Path) -> std::io::Result<bool> {
    for name in OPAQUE {
        let mut value = [0; 2];
        match rustix::fs::lgetxattr(dir, name, &mut value) {
            Ok(1) if value[0] == b'y' => return Ok(true),
            Ok(_) | Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE | Errno::PERM | Errno::ACCESS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Extended attributes of a file (not of a symlink's target), sorted by name, without the overlay's own.
pub fn xattrs(path: &Path) -> Result<Xattrs, Errno> {
    let mut list = vec![0; 256];
    let length = loop {
        match rustix::fs::llistxattr(path, &mut list) {
            Ok(length) => break length,
            Err(Errno::RANGE) => list.resize(list.len() * 4, 0),
            Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    };
    let mut out = Vec::new();
    for name in list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
            continue;
        }
        let mut value = vec![0; 256];
        let length = loop {
            match rustix::fs::lgetxattr(path, name, &mut value) {
                Ok(length) => break Some(length),
                Err(Errno::RANGE) => value.resize(value.len() * 4, 0),
                Err(Errno::NODATA) => break None,
                Err(error) => return Err(error),
            }
        };
        if let Some(length) = length {
            value.truncate(length);
            out.push((name.to_vec(), value));
        }
    }
    out.sort();
    Ok(out)
}

/// The meaningful components of a path.
fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> + '_ {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec)
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(dir.len() + 1 + name.len());
    path.extend_from_slice(dir);
    if !dir.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = PathBuf::from(std::ffi::OsString::from_vec(self.path.clone()));
        f.debug_struct("Node").field("path", &path).field("layers", &self.layers).finish_non_exhaustive()
    }
}
