//! File system helpers: trees of foreign origin are walked and removed without recursion, and
//! never through a symlink.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::rc::Rc;

use rand::Rng;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::error::{Result, StoreError};

const ID_LENGTH: usize = 25;

/// A random name: 25 characters of 0-9 and a-z, about 129 bits.
pub(crate) fn random_id() -> String {
    let mut rng = rand::rng();
    (0..ID_LENGTH)
        .map(|_| char::from(b"0123456789abcdefghijklmnopqrstuvwxyz"[rng.random_range(0..36)]))
        .collect()
}

/// Bytes that are free on the disk of `path` for those without privileges.
pub(crate) fn free_space(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| StoreError::io("measure disk of", path, e))?;
    Ok(stat.f_bavail * stat.f_frsize)
}

pub(crate) fn make_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| StoreError::io("create directory", path, e))
}

/// A directory that only its owner may enter: layers hold setuid programs and devices. One that is there keeps its
/// mode.
pub(crate) fn make_private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| StoreError::io("create directory", path, e))
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|e| StoreError::io("move to", to, e))
}

pub(crate) fn open_dir(dir: impl AsFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(
        dir,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Names in a directory, without `.` and `..`, in the order the file system gives them.
pub(crate) fn names(dir: &OwnedFd) -> Result<Vec<(CString, FileType)>, Errno> {
    let mut buffer = Vec::with_capacity(16 << 10);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut out = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if !is_dot(name) {
            out.push((name.to_owned(), entry.file_type()));
        }
    }
    Ok(out)
}

fn is_dot(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// Removes a directory with all that is in it; nothing happens if it isn't there.
///
/// Sub-directories are first moved up to the top, so that neither depth nor path length matters.
/// The caller must own the tree alone.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let top = match open_dir(CWD, path) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return std::fs::remove_file(path),
        Err(error) => return Err(error.into()),
    };
    let mut pending = Vec::new();
    for (name, kind) in names(&top)? {
        if unlink_or_dir(&top, &name, kind)? {
            pending.push(name);
        }
    }
    let mut counter = 0u64;
    while let Some(name) = pending.pop() {
        if rustix::fs::unlinkat(&top, &name, AtFlags::REMOVEDIR).is_ok() {
            continue;
        }
        let dir = writable_dir(&top, &name)?;
        for (child, kind) in names(&dir)? {
            if !unlink_or_dir(&dir, &child, kind)? {
                continue;
            }
            let moved = loop {
                counter += 1;
                let candidate = CString::new(format!(".{counter}.removed"))?;
                if !exists(&top, &candidate)? {
                    break candidate;
                }
            };
            move_dir(&dir, &child, &top, &moved)?;
            pending.push(moved);
        }
        rustix::fs::unlinkat(&top, &name, AtFlags::REMOVEDIR)?;
    }
    drop(top);
    std::fs::remove_dir(path)
}

fn exists(dir: &OwnedFd, name: &CStr) -> Result<bool, Errno> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn move_dir(from: &OwnedFd, name: &CStr, to: &OwnedFd, new_name: &CStr) -> Result<(), Errno> {
    match rustix::fs::renameat(from, name, to, new_name) {
        // Moving a directory changes its `..`, which its own mode may forbid.
        Err(Errno::ACCESS) => {
            rustix::fs::chmodat(from, name, Mode::RWXU, AtFlags::empty())?;
            rustix::fs::renameat(from, name, to, new_name)
        }
        other => other,
    }
}

fn writable_dir(parent: &OwnedFd, name: &CStr) -> io::Result<OwnedFd> {
    match open_dir(parent, name) {
        Err(Errno::ACCESS) => {
            rustix::fs::chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
            Ok(open_dir(parent, name)?)
        }
        other => Ok(other?),
    }
}

/// Unlinks what is no directory; true if it is one.
fn unlink_or_dir(dir: &OwnedFd, name: &CStr, kind: FileType) -> io::Result<bool> {
    if kind == FileType::Directory {
        return Ok(true);
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(false),
        Err(Errno::ISDIR) => Ok(true),
        Err(Errno::ACCESS) => {
            rustix::fs::fchmod(dir, Mode::RWXU)?;
            rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// What a tree occupies on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DiskUsage {
    /// Bytes of what has no name outside the tree.
    pub(crate) own: u64,
    /// Files that have names outside it, too: inode and bytes.
    pub(crate) linked: Vec<(u64, u64)>,
}

/// Measures a tree; a file with several names in it counts once. Entries that vanish meanwhile don't count.
pub(crate) fn disk_usage(path: &Path) -> io::Result<DiskUsage> {
    let root = match open_dir(CWD, path) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(DiskUsage::default()),
        Err(error) => return Err(error.into()),
    };
    let mut usage = DiskUsage { own: allocated(&rustix::fs::fstat(&root)?), linked: Vec::new() };
    // Bytes, and how many names were not met yet.
    let mut several = HashMap::new();
    // Directories are opened from the one above: paths may be longer than the system takes.
    let mut pending = vec![(Rc::new(root), None::<CString>)];
    while let Some((above, name)) = pending.pop() {
        let dir = match name {
            None => above,
            Some(name) => match open_dir(&*above, name.as_c_str()) {
                Ok(dir) => Rc::new(dir),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(error.into()),
            },
        };
        let names = match names(&dir) {
            Err(Errno::NOENT) => continue,
            names => names?,
        };
        for (name, _) in names {
            let Ok(stat) = rustix::fs::statat(&*dir, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !is_dir && stat.st_nlink > 1 {
                let left = &mut several.entry(stat.st_ino).or_insert((allocated(&stat), stat.st_nlink)).1;
                *left = left.saturating_sub(1);
                continue;
            }
            usage.own += allocated(&stat);
            if is_dir {
                pending.push((Rc::clone(&dir), Some(name)));
            }
        }
    }
    for (inode, (bytes, left)) in several {
        match left {
            0 => usage.own += bytes,
            _ => usage.linked.push((inode, bytes)),
        }
    }
    Ok(usage)
}

/// Bytes that one file or directory occupies, without what is below it; none if it isn't there.
pub(crate) fn occupied(path: &Path) -> u64 {
    rustix::fs::lstat(path).map_or(0, |stat| allocated(&stat))
}

fn allocated(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

/// Writes back all that the file system with `dir` holds in memory.
pub(crate) fn sync_filesystem(dir: &Path) -> Result<()> {
    let fd = open_dir(CWD, dir).map_err(|e| StoreError::io("open", dir, e))?;
    rustix::fs::syncfs(&fd).map_err(|e| StoreError::io("sync file system of", dir, e))
}

/// Names of the entries of a directory of our own (always UTF-8); anything else is left out.
pub(crate) fn list(dir: &Path) -> Result<Vec<String>> {
    let fail = |e: Errno| StoreError::io("list", dir, e);
    let fd = open_dir(CWD, dir).map_err(fail)?;
    let entries = Dir::read_from(&fd).map_err(fail)?;
    let mut out = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        if let Ok(name) = entry.file_name().to_str()
            && !is_dot(entry.file_name())
        {
            out.push(name.to_owned());
        }
    }
    Ok(out)
}
