//! Copies single entries from one directory to another: content, links, devices and metadata.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::modestr::ModeChange;
use super::root::{Owner, chmod, chown, open_child, utimes};

/// The call that failed, and how.
pub(crate) type Failed = (&'static str, Errno);

/// Files of up to this many bytes are copied through a buffer.
const SMALL: usize = 64 << 10;

/// How copies differ from their originals.
#[derive(Clone, Default)]
pub(crate) struct Style {
    /// Who owns the copies; without, who owns the originals.
    pub(crate) owner: Option<Owner>,
    /// How the copies' permissions differ from the originals'.
    pub(crate) mode: Option<ModeChange>,
    /// Time of the copies; without, that of the originals.
    pub(crate) time: Option<Timespec>,
    /// The originals are a snapshot of a client's directory, and nothing writes into the copies: one that differs in
    /// nothing may be a further name of the original. Only one, or somebody could meet the same file under two names.
    pub(crate) link: bool,
}

/// A file of a client's directory has so many names: in the copy of the directory, and in its snapshot.
pub(super) const OWN_NAMES: u64 = 2;

/// First copy of each inode that has several names: its path below the root of the copy.
#[derive(Default)]
pub(crate) struct Links {
    first: HashMap<(u64, u64), PathBuf>,
}

/// Copies entries of one tree; files that were one inode there become one inode here.
#[derive(Default)]
pub(crate) struct Transfer {
    style: Style,
    links: Links,
    buffer: Vec<u8>,
}

impl Links {
    /// Where the first copy of this inode is. If there is none, the one that `path` names is it from now on.
    pub(crate) fn find(&mut self, stat: &Stat, path: impl FnOnce() -> PathBuf) -> Option<&Path> {
        if stat.st_nlink < 2 {
            return None;
        }
        match self.first.entry((stat.st_dev, stat.st_ino)) {
            Entry::Occupied(first) => Some(first.into_mut()),
            Entry::Vacant(place) => {
                place.insert(path());
                None
            }
        }
    }
}

impl Transfer {
    /// Copies something that is no directory to the same name in `dst`, where nothing may be. `root` is where `path`,
    /// the directories that lead from there to `dst`, starts.
    pub(crate) fn leaf(
        &mut self,
        src: BorrowedFd<'_>,
        name: &OsStr,
        stat: &Stat,
        root: BorrowedFd<'_>,
        dst: BorrowedFd<'_>,
        path: impl FnOnce() -> PathBuf,
    ) -> Result<(), Failed> {
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return self.style.special(src, name, stat, dst, name);
        }
        match self.links.find(stat, || path().join(name)) {
            Some(first) => hard_link(root, first, dst, name),
            None => self.style.file(src, name, stat, dst, name, &mut self.buffer),
        }
    }

    /// How the copies differ.
    pub(crate) fn style(&self) -> &Style {
        &self.style
    }
}

impl Style {
    /// Copies what is neither a directory nor a regular file.
    pub(crate) fn special(
        &self,
        src: BorrowedFd<'_>,
        name: &OsStr,
        stat: &Stat,
        dst: BorrowedFd<'_>,
        target: &OsStr,
    ) -> Result<(), Failed> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        match kind {
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(src, name, Vec::new()).map_err(|e| ("readlink", e))?;
                rustix::fs::symlinkat(link.as_c_str(), dst, target).map_err(|e| ("symlink", e))?;
            }
            // In a layer that would say "deleted".
            FileType::CharacterDevice if stat.st_rdev == 0 => return Err(("mknod", Errno::NODEV)),
            _ => {
                let mode = Mode::from_raw_mode(0o600);
                rustix::fs::mknodat(dst, target, kind, mode, stat.st_rdev).map_err(|e| ("mknod", e))?;
            }
        }
        chown(dst, target, self.owner_of(stat)).map_err(|e| ("chown", e))?;
        if kind != FileType::Symlink {
            chmod(dst, target, self.mode_of(stat, false)).map_err(|e| ("chmod", e))?;
        }
        utimes(dst, target, self.time_of(stat)).map_err(|e| ("utimes", e))
    }

    /// Copies a regular file with its content. `buffer` is for whatever the call needs.
    pub(crate) fn file(
        &self,
        src: BorrowedFd<'_>,
        name: &OsStr,
        stat: &Stat,
        dst: BorrowedFd<'_>,
        target: &OsStr,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Failed> {
        if self.link && self.keeps(stat) && link_once(src, name, stat, dst, target)? {
            return Ok(());
        }
        let mut from = File::from(open_child(src, name, OFlags::RDONLY).map_err(|e| ("open", e))?);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let to =
            rustix::fs::openat(dst, target, flags, Mode::from_raw_mode(0o600)).map_err(|e| ("open", e))?;
        let mut to = File::from(to);
        content(&mut from, &mut to, stat, buffer)
            .map_err(|err| ("copy", Errno::from_io_error(&err).unwrap_or(Errno::IO)))?;
        self.attributes(stat, from.as_fd(), to.as_fd()).map_err(|e| ("chmod", e))
    }

    /// Metadata of a file or directory: owner, then extended attributes, then mode and times, since each
    /// clears or changes what comes after it here.
    pub(crate) fn attributes(
        &self,
        stat: &Stat,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
    ) -> Result<(), Errno> {
        let owner = self.owner_of(stat);
        rustix::fs::fchown(to, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))?;
        for (name, value) in read_xattrs(from) {
            // What a file system refuses (labels, namespaces it lacks) is left out, as `cp -a` does.
            let _ = rustix::fs::fsetxattr(to, &name[..], &value, XattrFlags::empty());
        }
        let dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        rustix::fs::fchmod(to, Mode::from_raw_mode(self.mode_of(stat, dir)))?;
        let time = self.time_of(stat);
        rustix::fs::futimens(to, &Timestamps { last_access: time, last_modification: time })
    }

    /// Whether a file's copy differs in nothing.
    fn keeps(&self, stat: &Stat) -> bool {
        let owner = self.owner_of(stat);
        let time = self.time_of(stat);
        (owner.uid, owner.gid) == (stat.st_uid, stat.st_gid)
            && self.mode_of(stat, false) == stat.st_mode & 0o7777
            && (time.tv_sec, time.tv_nsec) == (stat.st_mtime, stat.st_mtime_nsec as _)
    }

    fn owner_of(&self, stat: &Stat) -> Owner {
        self.owner.unwrap_or(Owner { uid: stat.st_uid, gid: stat.st_gid })
    }

    fn mode_of(&self, stat: &Stat, dir: bool) -> u32 {
        match &self.mode {
            Some(change) => change.apply(stat.st_mode, dir),
            None => stat.st_mode & 0o7777,
        }
    }

    /// The time that a copy gets.
    pub(crate) fn time_of(&self, stat: &Stat) -> Timespec {
        self.time.unwrap_or(Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ })
    }
}

/// Makes `target` a name of the original if that has none yet beside its own; says whether it did.
fn link_once(
    src: BorrowedFd<'_>,
    name: &OsStr,
    stat: &Stat,
    dst: BorrowedFd<'_>,
    target: &OsStr,
) -> Result<bool, Failed> {
    if stat.st_nlink > OWN_NAMES || rustix::fs::linkat(src, name, dst, target, AtFlags::empty()).is_err() {
        return Ok(false);
    }
    // Another copy may have done the same meanwhile: then neither keeps it.
    let now = rustix::fs::statat(dst, target, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| ("stat", e))?;
    if now.st_nlink <= OWN_NAMES + 1 {
        return Ok(true);
    }
    rustix::fs::unlinkat(dst, target, AtFlags::empty()).map_err(|e| ("remove", e))?;
    Ok(false)
}

/// Copies all that is in a file.
fn content(from: &mut File, to: &mut File, stat: &Stat, buffer: &mut Vec<u8>) -> std::io::Result<()> {
    match usize::try_from(stat.st_size) {
        Ok(0) => Ok(()),
        // Less work for the kernel than sharing so little between the files.
        Ok(size) if size <= SMALL => {
            buffer.resize(SMALL, 0);
            let mut left = size;
            while left > 0 {
                match from.read(&mut buffer[..left])? {
                    0 => break,
                    count => {
                        to.write_all(&buffer[..count])?;
                        left -= count;
                    }
                }
            }
            Ok(())
        }
        _ => std::io::copy(from, to).map(drop),
    }
}

/// Links to an earlier copy. All its directories were made or checked by the copy, so none may be a symlink.
pub(crate) fn hard_link(
    root: BorrowedFd<'_>,
    first: &Path,
    dst: BorrowedFd<'_>,
    target: &OsStr,
) -> Result<(), Failed> {
    let link = || -> Result<(), Errno> {
        let name = first.file_name().ok_or(Errno::NOENT)?;
        let dir = Path::new(".").join(first.parent().unwrap_or(Path::new("")));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let dir = rustix::fs::openat2(root, &dir, flags, Mode::empty(), resolve)?;
        rustix::fs::linkat(&dir, name, dst, target, AtFlags::empty())
    };
    link().map_err(|errno| ("link", errno))
}

/// Extended attributes of an open file or directory, without overlay's own, which are no content. A file
/// system that has none gives none.
pub(crate) fn read_xattrs(fd: BorrowedFd<'_>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0u8; 1024];
    let len = loop {
        match rustix::fs::flistxattr(fd, &mut list[..]) {
            Ok(len) => break len,
            Err(Errno::RANGE) if list.len() < 1 << 20 => list = vec![0; list.len() * 8],
            Err(_) => return Vec::new(),
        }
    };
    let mut found = Vec::new();
    for name in list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
            continue;
        }
        let mut value = vec![0u8; 64 << 10];
        if let Ok(len) = rustix::fs::fgetxattr(fd, name, &mut value[..]) {
            value.truncate(len);
            found.push((name.to_vec(), value));
        }
    }
    found.sort_unstable();
    found
}
