//! System calls on entries of a layer directory, all relative to a directory descriptor.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, XattrFlags, mkdirat, mknodat,
    openat, openat2, readlinkat, statat, unlinkat, utimensat,
};
use rustix::io::Errno;

/// The xattr that marks an opaque directory for overlay mounts made by this user.
pub(crate) static OPAQUE: LazyLock<&'static str> = LazyLock::new(|| {
    if rustix::process::geteuid().is_root() { "trusted.overlay.opaque" } else { "user.overlay.opaque" }
});

/// Opens the directory that is the root of a layer.
pub(crate) fn open_root(dir: &Path) -> io::Result<OwnedFd> {
    Ok(openat(rustix::fs::CWD, dir, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens a directory below `at`; no component may be a symlink. An empty path is `at` itself.
pub(crate) fn open_beneath(at: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    open_entry(at, path, OFlags::DIRECTORY)
}

/// Opens any entry below `at` as a path descriptor; no component may be a symlink, the last one
/// is not followed.
pub(crate) fn open_entry(at: impl AsFd, path: &Path, extra: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(
        at,
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | extra,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

/// `lstat` of one name in a directory; `None` if there is none.
pub(crate) fn lstat(dir: impl AsFd, name: &OsStr) -> Result<Option<Stat>, Errno> {
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What kind of file a stat is of.
pub(crate) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Whether a stat is of an overlay whiteout.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Makes an overlay whiteout.
pub(crate) fn make_whiteout(dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
    mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0)
}

/// A path through which calls that take no descriptor reach `name` in `dir` (the last component
/// is not followed by the `l…` calls).
pub(crate) fn proc_path(dir: impl AsFd, name: &OsStr) -> PathBuf {
    let mut path = OsString::from(format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()));
    path.push(name);
    path.into()
}

/// Marks a directory opaque.
pub(crate) fn set_opaque(dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
    rustix::fs::lsetxattr(proc_path(dir, name), *OPAQUE, b"y", XattrFlags::empty())
}

/// Whether the directory `name` in `dir` is marked opaque.
pub(crate) fn is_opaque(dir: impl AsFd, name: &OsStr) -> bool {
    let path = proc_path(dir, name);
    ["trusted.overlay.opaque", "user.overlay.opaque"].iter().any(|key| {
        let mut value = [0u8; 8];
        matches!(rustix::fs::lgetxattr(&path, *key, &mut value[..]), Ok(n) if value.get(..n) == Some(b"y"))
    })
}

/// Whether an xattr is the overlay file system's own; such never enter or leave a layer.
pub(crate) fn is_overlay_xattr(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// All xattrs of an entry, sorted by name. A file system without xattrs has none.
pub(crate) fn xattrs(dir: impl AsFd, name: &OsStr) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = proc_path(dir, name);
    let mut list = vec![0u8; 1024];
    let length = loop {
        match rustix::fs::llistxattr(&path, &mut list[..]) {
            Ok(n) => break n,
            Err(Errno::RANGE) => list.resize(list.len() * 4, 0),
            Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
    };
    list.truncate(length);
    let mut found = Vec::new();
    for key in list.split(|b| *b == 0).filter(|key| !key.is_empty()) {
        let mut value = vec![0u8; 256];
        loop {
            match rustix::fs::lgetxattr(&path, OsStr::from_bytes(key), &mut value[..]) {
                Ok(n) => {
                    value.truncate(n);
                    found.push((key.to_vec(), value));
                    break;
                }
                Err(Errno::RANGE) if value.len() < (1 << 20) => value.resize(value.len() * 8, 0),
                Err(Errno::NODATA) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Sets one xattr. What the file system or the user cannot have is left out, as every unpacker does.
pub(crate) fn set_xattr(dir: impl AsFd, name: &OsStr, key: &[u8], value: &[u8]) -> io::Result<()> {
    match rustix::fs::lsetxattr(proc_path(dir, name), OsStr::from_bytes(key), value, XattrFlags::empty()) {
        Ok(()) | Err(Errno::NOTSUP) => Ok(()),
        // Only privileged users may set e.g. `user.*` on devices and symlinks or `security.*`.
        Err(Errno::PERM) if !key.starts_with(b"security.capability") => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Sets the modification time (and the access time with it) of an entry, not following symlinks.
pub(crate) fn set_mtime(dir: impl AsFd, name: &OsStr, seconds: i64, nanos: u32) -> Result<(), Errno> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    utimensat(
        dir,
        name,
        &Timestamps { last_access: time, last_modification: time },
        AtFlags::SYMLINK_NOFOLLOW,
    )
}

/// Owner, mode, xattrs and time of one entry copied to another of the same kind.
pub(crate) fn copy_attributes(
    from: impl AsFd,
    from_name: &OsStr,
    to: impl AsFd,
    to_name: &OsStr,
    stat: &Stat,
) -> io::Result<()> {
    rustix::fs::chownat(
        to.as_fd(),
        to_name,
        Some(rustix::fs::Uid::from_raw(stat.st_uid)),
        Some(rustix::fs::Gid::from_raw(stat.st_gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    if file_type(stat) != FileType::Symlink {
        chmod(to.as_fd(), to_name, stat.st_mode)?;
    }
    for (key, value) in xattrs(from.as_fd(), from_name)? {
        if !is_overlay_xattr(&key) {
            set_xattr(to.as_fd(), to_name, &key, &value)?;
        }
    }
    Ok(set_mtime(to.as_fd(), to_name, stat.st_mtime, stat.st_mtime_nsec as u32)?)
}

/// `chmod` of an entry that is known not to be a symlink.
pub(crate) fn chmod(dir: impl AsFd, name: &OsStr, mode: u32) -> Result<(), Errno> {
    rustix::fs::chmodat(dir, name, Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())
}

/// Removes an entry with everything in it, without recursion and without following symlinks.
pub(crate) fn remove_all(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(dir.as_fd(), name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let mut pending = vec![(PathBuf::from(name), false)];
    while let Some((path, emptied)) = pending.pop() {
        if emptied {
            let (parent, base) = split(&path);
            let parent = open_beneath(dir.as_fd(), parent)?;
            unlinkat(&parent, base, AtFlags::REMOVEDIR)?;
            continue;
        }
        let fd = open_beneath(dir.as_fd(), &path)?;
        pending.push((path.clone(), true));
        for child in names(&fd)? {
            match unlinkat(&fd, &child, AtFlags::empty()) {
                Ok(()) => {}
                Err(Errno::ISDIR | Errno::PERM) => pending.push((path.join(child), false)),
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Names in a directory, sorted by bytes, without `.` and `..`. `dir` may be a path descriptor.
pub(crate) fn names(dir: impl AsFd) -> io::Result<Vec<OsString>> {
    let fd = openat(dir, ".", OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::new(fd)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            found.push(OsString::from_vec(name.to_vec()));
        }
    }
    found.sort();
    Ok(found)
}

/// Target of a symlink.
pub(crate) fn read_link(dir: impl AsFd, name: &OsStr) -> Result<PathBuf, Errno> {
    Ok(OsString::from_vec(readlinkat(dir, name, Vec::new())?.into_bytes()).into())
}

/// `mkdir` with the mode that a directory nobody described gets.
pub(crate) fn make_dir(dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
    mkdirat(dir.as_fd(), name, Mode::from_raw_mode(0o755))?;
    chmod(dir, name, 0o755)
}

/// A relative path as (parent, last component).
pub(crate) fn split(path: &Path) -> (&Path, &OsStr) {
    (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or(OsStr::new(".")))
}
