//! Fitting an independently unpacked layer onto the layers below it.
//!
//! An overlay shows a directory with the attributes of its topmost layer, and a directory hides a
//! symlink of the same name. So a directory that exists in a layer only because an entry lies in
//! it takes the attributes of the one below, and moves to where a lower symlink points.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, openat, unlinkat};
use rustix::io::Errno;

use super::LayerError;
use super::fsutil::{self, lstat, open_beneath, open_entry, split};
use super::unpack::Unpacked;

/// More moves than this in one layer mean that symlinks chase each other.
const MAX_MOVES: usize = 4096;
const MAX_LINKS: usize = 40;

/// Finishes a layer that [`super::unpack`] filled. `lowers` are the layer directories below it, topmost first.
pub fn settle(dir: &Path, mut unpacked: Unpacked, lowers: &[PathBuf]) -> Result<(), LayerError> {
    let upper = fsutil::open_root(dir).map_err(|e| LayerError::io("open", dir, e))?;
    let lowers = if unpacked.implicit.is_empty() && unpacked.links.is_empty() {
        Vec::new()
    } else {
        lowers
            .iter()
            .map(|lower| fsutil::open_root(lower).map_err(|e| LayerError::io("open", lower, e)))
            .collect::<Result<Vec<_>, _>>()?
    };
    let view = View { lowers };
    adopt(&upper, &view, &mut unpacked)?;
    for (target, path) in std::mem::take(&mut unpacked.links) {
        link(&upper, &view, &target, &path).map_err(|e| LayerError::io("link", &path, e))?;
    }
    // Deepest first, so that no later change in a directory touches its time.
    for (path, (seconds, nanos)) in unpacked.times.iter().rev() {
        let (parent, name) = split(path);
        open_beneath(upper.as_fd(), parent)
            .and_then(|fd| fsutil::set_mtime(&fd, name, *seconds, *nanos))
            .map_err(|e| LayerError::io("set the time of", path, e))?;
    }
    Ok(())
}

/// What the layers below show.
struct View {
    lowers: Vec<OwnedFd>,
}

struct Found<'a> {
    layer: &'a OwnedFd,
    stat: Stat,
}

impl View {
    /// The entry at a path without symlinks, as an overlay of the layers shows it.
    fn entry(&self, path: &Path) -> Result<Option<Found<'_>>, Errno> {
        for layer in &self.lowers {
            match open_entry(layer.as_fd(), path, OFlags::empty()) {
                Ok(fd) => {
                    let stat = rustix::fs::fstat(&fd)?;
                    return Ok((!fsutil::is_whiteout(&stat)).then_some(Found { layer, stat }));
                }
                Err(Errno::NOENT) if !hides(layer, path)? => {}
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// `path` with the symlinks among its parents followed; the last component stays as it is.
    fn resolve(&self, path: &Path) -> Result<PathBuf, Errno> {
        let mut todo: VecDeque<OsString> = path.iter().map(OsStr::to_os_string).collect();
        let mut at = PathBuf::new();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            match name.as_bytes() {
                b"/" => at = PathBuf::new(),
                b"." => {}
                b".." => {
                    at.pop();
                }
                _ if todo.is_empty() => at.push(&name),
                _ => {
                    let next = at.join(&name);
                    match self.entry(&next)? {
                        Some(found) if fsutil::file_type(&found.stat) == FileType::Symlink => {
                            links += 1;
                            if links > MAX_LINKS {
                                return Err(Errno::LOOP);
                            }
                            let target = read_link_at(found.layer, &next)?;
                            for component in target.iter().rev() {
                                todo.push_front(component.to_os_string());
                            }
                        }
                        _ => at = next,
                    }
                }
            }
        }
        Ok(at)
    }
}

fn read_link_at(layer: &OwnedFd, path: &Path) -> Result<PathBuf, Errno> {
    let (parent, name) = split(path);
    fsutil::read_link(open_beneath(layer.as_fd(), parent)?, name)
}

/// Whether a layer that lacks `path` also hides it from those below.
fn hides(layer: &OwnedFd, path: &Path) -> Result<bool, Errno> {
    for ancestor in path.ancestors().skip(1) {
        let (parent, name) = split(ancestor);
        let Ok(parent) = open_beneath(layer.as_fd(), parent) else { continue };
        if let Some(stat) = lstat(&parent, name)?
            && (fsutil::file_type(&stat) != FileType::Directory || fsutil::is_opaque(&parent, name))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Gives implicit directories the attributes, or the place, that the layers below say.
fn adopt(upper: &OwnedFd, view: &View, unpacked: &mut Unpacked) -> Result<(), LayerError> {
    let mut moves = 0;
    while let Some(path) = unpacked.implicit.pop_first() {
        let failed = |e: Errno| LayerError::io("adopt", &path, e);
        let (parent, name) = split(&path);
        let Ok(dir) = open_beneath(upper.as_fd(), parent) else { continue };
        if hides(upper, &path).map_err(failed)? {
            continue;
        }
        let Some(found) = view.entry(&path).map_err(failed)? else { continue };
        match fsutil::file_type(&found.stat) {
            FileType::Directory => {
                let from = open_beneath(found.layer.as_fd(), parent).map_err(failed)?;
                fsutil::copy_attributes(&from, name, &dir, name, &found.stat)
                    .map_err(|e| LayerError::io("adopt", &path, e))?;
                unpacked.times.insert(path, (found.stat.st_mtime, found.stat.st_mtime_nsec as u32));
            }
            FileType::Symlink => {
                moves += 1;
                if moves > MAX_MOVES {
                    return Err(LayerError::io("adopt", &path, Errno::LOOP));
                }
                let link = read_link_at(found.layer, &path).map_err(failed)?;
                let target = beneath(parent, &link);
                if target.starts_with(&path) {
                    return Err(LayerError::io("adopt", &path, Errno::LOOP));
                }
                relocate(upper, &path, &target, unpacked).map_err(|e| LayerError::io("move", &path, e))?;
            }
            // The directory replaces a file, as it would in an overlay.
            _ => {}
        }
    }
    Ok(())
}

/// A symlink's target as a path beneath the root, by its text; its own symlinks are met later.
fn beneath(parent: &Path, link: &Path) -> PathBuf {
    let mut at = if link.is_absolute() { PathBuf::new() } else { parent.to_path_buf() };
    for component in link.iter() {
        match component.as_bytes() {
            b"/" | b"." => {}
            b".." => {
                at.pop();
            }
            _ => at.push(component),
        }
    }
    at
}

/// Moves the content of the directory `from` into `to`, merging directories that both have.
fn relocate(upper: &OwnedFd, from: &Path, to: &Path, unpacked: &mut Unpacked) -> io::Result<()> {
    let mut at = PathBuf::new();
    for component in to.iter() {
        let dir = open_beneath(upper.as_fd(), &at)?;
        at.push(component);
        match lstat(&dir, component)? {
            None => {
                fsutil::make_dir(&dir, component)?;
                unpacked.implicit.insert(at.clone());
            }
            Some(stat) if fsutil::file_type(&stat) == FileType::Directory => {}
            Some(_) => return Err(Errno::NOTDIR.into()),
        }
    }
    let mut pending = vec![(from.to_path_buf(), to.to_path_buf(), false)];
    while let Some((source, target, emptied)) = pending.pop() {
        let (parent, name) = split(&source);
        if emptied {
            unlinkat(open_beneath(upper.as_fd(), parent)?, name, AtFlags::REMOVEDIR)?;
            continue;
        }
        pending.push((source.clone(), target.clone(), true));
        let source_dir = open_beneath(upper.as_fd(), &source)?;
        let target_dir = open_beneath(upper.as_fd(), &target)?;
        for child in fsutil::names(&source_dir)? {
            let is_dir =
                |stat: Option<Stat>| stat.is_some_and(|s| fsutil::file_type(&s) == FileType::Directory);
            if is_dir(lstat(&source_dir, &child)?) && is_dir(lstat(&target_dir, &child)?) {
                pending.push((source.join(&child), target.join(&child), false));
                continue;
            }
            fsutil::remove_all(&target_dir, &child)?;
            rustix::fs::renameat(&source_dir, &child, &target_dir, &child)?;
        }
    }
    let moved = |path: &Path| path.strip_prefix(from).ok().map(|rest| to.join(rest));
    let implicit: Vec<PathBuf> = unpacked.implicit.iter().filter(|p| p.starts_with(from)).cloned().collect();
    for path in implicit {
        unpacked.implicit.remove(&path);
        unpacked.implicit.extend(moved(&path).filter(|p| p != to));
    }
    let times: Vec<PathBuf> = unpacked.times.keys().filter(|p| p.starts_with(from)).cloned().collect();
    for path in times {
        if let (Some(time), Some(place)) = (unpacked.times.remove(&path), moved(&path)) {
            unpacked.times.insert(place, time);
        }
    }
    for (target, path) in &mut unpacked.links {
        if let Some(place) = moved(path) {
            *path = place;
        }
        if let Some(place) = moved(target) {
            *target = place;
        }
    }
    Ok(())
}

/// Makes a hard link to a file of a lower layer: the file is copied up first, as an overlay does.
fn link(upper: &OwnedFd, view: &View, target: &Path, path: &Path) -> io::Result<()> {
    let target = view.resolve(target)?;
    let (target_parent, target_name) = split(&target);
    let in_upper = open_beneath(upper.as_fd(), target_parent).and_then(|dir| lstat(&dir, target_name));
    if !matches!(in_upper, Ok(Some(_))) {
        let found = view.entry(&target)?.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("hard link target {} not found", target.display()),
            )
        })?;
        copy_up(upper, view, &target, &found)?;
    }
    let from = open_beneath(upper.as_fd(), target_parent)?;
    let (parent, name) = split(path);
    let to = open_beneath(upper.as_fd(), parent)?;
    Ok(rustix::fs::linkat(&from, target_name, &to, name, AtFlags::empty())?)
}

fn copy_up(upper: &OwnedFd, view: &View, path: &Path, found: &Found<'_>) -> io::Result<()> {
    let (parent, name) = split(path);
    let mut at = PathBuf::new();
    for component in parent.iter() {
        let dir = open_beneath(upper.as_fd(), &at)?;
        let above = at.clone();
        at.push(component);
        if lstat(&dir, component)?.is_none() {
            fsutil::make_dir(&dir, component)?;
            if let Some(lower) = view.entry(&at)? {
                let from = open_beneath(lower.layer.as_fd(), &above)?;
                fsutil::copy_attributes(&from, component, &dir, component, &lower.stat)?;
            }
        }
    }
    let from = open_beneath(found.layer.as_fd(), parent)?;
    let to = open_beneath(upper.as_fd(), parent)?;
    match fsutil::file_type(&found.stat) {
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut source = File::from(openat(&from, name, flags, Mode::empty())?);
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut copy = File::from(openat(&to, name, flags, Mode::from_raw_mode(0o600))?);
            io::copy(&mut source, &mut copy)?;
        }
        FileType::Symlink => rustix::fs::symlinkat(fsutil::read_link(&from, name)?, &to, name)?,
        FileType::Directory => return Err(Errno::PERM.into()),
        kind => rustix::fs::mknodat(&to, name, kind, Mode::from_raw_mode(0o600), found.stat.st_rdev)?,
    }
    fsutil::copy_attributes(&from, name, &to, name, &found.stat)
}
