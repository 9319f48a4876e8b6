//! Applying a layer archive to an empty layer directory.
//!
//! Layers are unpacked independently of each other, so that all layers of an image unpack at the
//! same time. What needs the layers below (attributes of directories that the archive
//! names only as parents, symlinked parents, hard links to lower files) is noted and done by
//! [`super::settle`].
//!
//! Every path is resolved component by component beneath the root's descriptor with openat2; symlinks
//! inside the layer are followed only within it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, makedev, mknodat, openat};
use rustix::io::Errno;

use super::LayerError;
use super::fsutil::{self, lstat, open_beneath};
use super::tar_read::{CopyError, Entry, Kind, TarReader};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// As many symlinks as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// What an unpacked layer still needs from the layers below it.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// Entries applied.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
    /// Directories that exist only as parents of entries.
    pub(super) implicit: BTreeSet<PathBuf>,
    /// Hard links (target, name) whose target is not in this layer.
    pub(super) links: Vec<(PathBuf, PathBuf)>,
    /// Times of directories, set when nothing is created in them any more.
    pub(super) times: BTreeMap<PathBuf, (i64, u32)>,
}

/// Applies the uncompressed archive `reader` to the empty directory `dir` and reads it to its last byte.
pub fn unpack(reader: impl Read, dir: &Path) -> Result<Unpacked, LayerError> {
    let root = fsutil::open_root(dir).map_err(|e| LayerError::io("open", dir, e))?;
    let mut state = Unpacker { root, last: None, out: Unpacked::default() };
    // Until an entry describes it, the root looks like the one below.
    state.out.implicit.insert(PathBuf::new());
    let mut archive = TarReader::new(reader);
    while let Some(entry) = archive.next_entry()? {
        state.apply(&mut archive, &entry)?;
        state.out.entries += 1;
    }
    archive.finish()?;
    Ok(state.out)
}

struct Unpacker {
    root: OwnedFd,
    /// The parent that was resolved last: path as the archive writes it, where that is, its descriptor.
    last: Option<(PathBuf, Parent)>,
    out: Unpacked,
}

type Parent = (PathBuf, Rc<OwnedFd>);

/// An archive's path as a relative one; empty for the root.
fn clean(raw: &[u8]) -> Result<PathBuf, LayerError> {
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(raw)).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir if !path.pop() => {
                return Err(LayerError::Archive(format!(
                    "{}: path leads out of the layer",
                    String::from_utf8_lossy(raw)
                )));
            }
            _ => {}
        }
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(LayerError::Archive("path holds a zero byte".into()));
    }
    Ok(path)
}

impl Unpacker {
    fn apply<R: Read>(&mut self, archive: &mut TarReader<R>, entry: &Entry) -> Result<(), LayerError> {
        let path = clean(&entry.path)?;
        let (parent_path, name) = fsutil::split(&path);
        if path.as_os_str().is_empty() {
            return self.apply_root(entry);
        }
        let parent = self.parent(parent_path)?;
        let base = name.as_bytes();
        if base == OPAQUE {
            return self.opaque(&parent, &path);
        }
        if base.starts_with(WHITEOUT_META) {
            // Bookkeeping of the AUFS driver; no file of the image.
            return Ok(());
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(LayerError::Archive(format!("{}: whiteout of no name", path.display())));
            }
            return self.whiteout(&parent, OsStr::from_bytes(hidden), &path);
        }
        self.create(archive, entry, &parent, name, &path)
    }

    /// The archive's own root entry describes the layer directory.
    fn apply_root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        if entry.kind != Kind::Dir {
            return Err(LayerError::Archive("the root is not a directory".into()));
        }
        let root = self.root.try_clone().map_err(|e| LayerError::io("open", Path::new("/"), e))?;
        attributes(&root, OsStr::new("."), entry)
            .map_err(|e| LayerError::io("set attributes of", Path::new("/"), e))?;
        self.out.implicit.remove(Path::new(""));
        self.out.times.insert(PathBuf::new(), (entry.mtime, entry.mtime_nanos));
        Ok(())
    }

    fn opaque(&mut self, parent: &Parent, path: &Path) -> Result<(), LayerError> {
        fsutil::set_opaque(&*parent.1, OsStr::new(".")).map_err(|e| LayerError::io("mark opaque", path, e))
    }

    fn whiteout(&mut self, parent: &Parent, name: &OsStr, path: &Path) -> Result<(), LayerError> {
        let failed = |e: Errno| LayerError::io("remove", path, e);
        match lstat(&*parent.1, name).map_err(failed)? {
            // A whiteout hides what lies below this layer, never this layer's own entry.
            Some(stat) if fsutil::file_type(&stat) == FileType::Directory => {
                fsutil::set_opaque(&*parent.1, name).map_err(failed)
            }
            Some(_) => Ok(()),
            None => fsutil::make_whiteout(&*parent.1, name).map_err(failed),
        }
    }

    fn create<R: Read>(
        &mut self,
        archive: &mut TarReader<R>,
        entry: &Entry,
        parent: &Parent,
        name: &OsStr,
        path: &Path,
    ) -> Result<(), LayerError> {
        let failed = |action| move |e: Errno| LayerError::io(action, path, e);
        let dir = &*parent.1;
        let real = parent.0.join(name);
        let existing = lstat(dir, name).map_err(failed("stat"))?;
        let mut opaque = false;
        if let Some(stat) = existing {
            let is_dir = fsutil::file_type(&stat) == FileType::Directory;
            if entry.kind == Kind::Dir && is_dir {
                self.out.implicit.remove(&real);
            } else {
                // A directory takes the place of a deleted name: what was below it stays hidden.
                opaque = entry.kind == Kind::Dir && (fsutil::is_whiteout(&stat) || !is_dir);
                self.forget(&real);
                fsutil::remove_all(dir, name).map_err(|e| LayerError::io("replace", path, e))?;
            }
        }
        let mode = Mode::from_raw_mode(0o600);
        match entry.kind {
            Kind::Dir => {
                if existing.is_none_or(|stat| fsutil::file_type(&stat) != FileType::Directory) {
                    rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)).map_err(failed("create"))?;
                }
                if opaque {
                    fsutil::set_opaque(dir, name).map_err(failed("mark opaque"))?;
                }
            }
            Kind::Regular => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = File::from(openat(dir, name, flags, mode).map_err(failed("create"))?);
                archive.copy_to(&file).map_err(|e| match e {
                    CopyError::Read(error) => error,
                    CopyError::Write(error) => LayerError::io("write", path, error),
                })?;
                self.out.bytes += entry.size;
            }
            Kind::Symlink => {
                rustix::fs::symlinkat(OsStr::from_bytes(&entry.link), dir, name).map_err(failed("create"))?;
            }
            Kind::HardLink => return self.hard_link(entry, dir, name, &real, path),
            Kind::Char | Kind::Block | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::Char => FileType::CharacterDevice,
                    Kind::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = makedev(entry.device.0, entry.device.1);
                mknodat(dir, name, kind, mode, device).map_err(failed("create"))?;
            }
        }
        attributes(dir, name, entry).map_err(|e| LayerError::io("set attributes of", path, e))?;
        if entry.kind == Kind::Dir {
            self.out.times.insert(real, (entry.mtime, entry.mtime_nanos));
        } else {
            fsutil::set_mtime(dir, name, entry.mtime, entry.mtime_nanos)
                .map_err(failed("set the time of"))?;
        }
        Ok(())
    }

    fn hard_link(
        &mut self,
        entry: &Entry,
        dir: &OwnedFd,
        name: &OsStr,
        real: &Path,
        path: &Path,
    ) -> Result<(), LayerError> {
        let target = clean(&entry.link)?;
        let (target_parent, target_name) = fsutil::split(&target);
        if target.as_os_str().is_empty() {
            return Err(LayerError::Archive(format!("{}: hard link to the root", path.display())));
        }
        let found = self.lookup(target_parent).map_err(|e| LayerError::io("link", path, e))?;
        if let Some((_, fd)) = found {
            match lstat(&*fd, target_name).map_err(|e| LayerError::io("link", path, e))? {
                Some(stat) if fsutil::is_whiteout(&stat) => {
                    return Err(LayerError::Archive(format!(
                        "{}: hard link to the deleted file {}",
                        path.display(),
                        target.display()
                    )));
                }
                Some(_) => {
                    return rustix::fs::linkat(&*fd, target_name, dir, name, AtFlags::empty())
                        .map_err(|e| LayerError::io("link", path, e));
                }
                None => {}
            }
        }
        self.out.links.push((target, real.to_path_buf()));
        Ok(())
    }

    /// Drops what is known of a path (and of all beneath it) that is about to be replaced.
    fn forget(&mut self, path: &Path) {
        self.last = None;
        let out = &mut self.out;
        out.implicit.retain(|p| !p.starts_with(path));
        out.times.retain(|p, _| !p.starts_with(path));
        out.links.retain(|(_, p)| !p.starts_with(path));
    }

    /// The directory that an entry goes into; missing components are created.
    fn parent(&mut self, path: &Path) -> Result<Parent, LayerError> {
        if let Some((last, parent)) = &self.last
            && last == path
        {
            return Ok(parent.clone());
        }
        let parent = self
            .walk(path, true)
            .and_then(|found| found.ok_or(Errno::NOENT))
            .map_err(|e| LayerError::io("resolve", path, e))?;
        self.last = Some((path.to_path_buf(), parent.clone()));
        Ok(parent)
    }

    /// The directory at `path`, if this layer has it.
    fn lookup(&mut self, path: &Path) -> Result<Option<Parent>, Errno> {
        self.walk(path, false)
    }

    fn walk(&mut self, path: &Path, create: bool) -> Result<Option<Parent>, Errno> {
        let mut todo: VecDeque<OsString> = path.iter().map(OsStr::to_os_string).collect();
        let mut at = PathBuf::new();
        let mut fd = open_beneath(self.root.as_fd(), &at)?;
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            match name.as_bytes() {
                b"/" => {
                    at = PathBuf::new();
                    fd = open_beneath(self.root.as_fd(), &at)?;
                    continue;
                }
                b"." => continue,
                b".." => {
                    at.pop();
                    fd = open_beneath(self.root.as_fd(), &at)?;
                    continue;
                }
                _ => {}
            }
            match open_beneath(fd.as_fd(), Path::new(&name)) {
                Ok(next) => {
                    fd = next;
                    at.push(&name);
                    continue;
                }
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error),
            }
            match lstat(fd.as_fd(), &name)? {
                None if !create => return Ok(None),
                None => {
                    fsutil::make_dir(fd.as_fd(), &name)?;
                    self.out.implicit.insert(at.join(&name));
                }
                Some(stat) if fsutil::file_type(&stat) == FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    let target = fsutil::read_link(fd.as_fd(), &name)?;
                    for component in target.iter().rev() {
                        todo.push_front(component.to_os_string());
                    }
                    continue;
                }
                Some(stat) if fsutil::is_whiteout(&stat) && create => {
                    rustix::fs::unlinkat(fd.as_fd(), &name, AtFlags::empty())?;
                    fsutil::make_dir(fd.as_fd(), &name)?;
                    fsutil::set_opaque(fd.as_fd(), &name)?;
                }
                Some(stat) if fsutil::is_whiteout(&stat) => return Ok(None),
                Some(_) => return Err(Errno::NOTDIR),
            }
            fd = open_beneath(fd.as_fd(), Path::new(&name))?;
            at.push(&name);
        }
        Ok(Some((at, Rc::new(fd))))
    }
}

/// Owner, mode and xattrs; in this order, because a change of owner clears setuid bits and capabilities.
fn attributes(dir: &OwnedFd, name: &OsStr, entry: &Entry) -> std::io::Result<()> {
    rustix::fs::chownat(
        dir,
        name,
        Some(Uid::from_raw(entry.uid)),
        Some(Gid::from_raw(entry.gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    if entry.kind != Kind::Symlink {
        fsutil::chmod(dir, name, entry.mode)?;
    }
    for (key, value) in &entry.xattrs {
        if !fsutil::is_overlay_xattr(key) {
            fsutil::set_xattr(dir, name, key, value)?;
        }
    }
    Ok(())
}
