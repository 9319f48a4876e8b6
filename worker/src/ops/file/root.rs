//! Paths beneath a root directory that is known only as a descriptor.
//!
//! Every path here came from a client or an image. Resolution is the kernel's (`openat2` with
//! `RESOLVE_IN_ROOT`); where a missing tail has to be followed or made, it goes one
//! component at a time over descriptors, so a symlink can never lead out.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use kiln_proto::pattern;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

/// As many symlinks as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// A failed call on a path beneath the root, worded as Go programs word it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{call} {path}: {}", errno_text(*.source))]
pub struct PathError {
    /// The call, e.g. `lstat`.
    pub call: &'static str,
    /// The path as seen from the root.
    pub path: String,
    /// The error number.
    pub source: Errno,
}

impl PathError {
    pub(crate) fn new(call: &'static str, path: impl AsRef<OsStr>, source: Errno) -> Self {
        Self { call, path: path.as_ref().to_string_lossy().into_owned(), source }
    }
}

/// The text of an error number in lower case and without the number.
pub(crate) fn errno_text(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// `/a/../b//c/` becomes `/b/c`: purely lexical, as clients mean it.
pub(crate) fn clean(path: &str) -> String {
    pattern::clean(&format!("/{path}"))
}

/// [`clean`] for a path whose names may be any bytes.
pub(crate) fn clean_path(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => drop(out.pop()),
            _ => {}
        }
    }
    out
}

/// Directory part and last component of a path that [`clean`] or [`clean_path`] made; `("/", ".")` for the root.
pub(crate) fn split(clean: &Path) -> (&Path, &OsStr) {
    match (clean.parent(), clean.file_name()) {
        (Some(dir), Some(name)) => (dir, name),
        _ => (Path::new("/"), OsStr::new(".")),
    }
}

/// Where something is, or would be: a directory and a name in it.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) dir: OwnedFd,
    /// One component; `.` when the place is a directory that has no name here (the root).
    pub(crate) name: OsString,
    /// What is there now, without following a symlink.
    pub(crate) stat: Option<Stat>,
}

impl Place {
    pub(crate) fn file_type(&self) -> Option<FileType> {
        self.stat.as_ref().map(|stat| FileType::from_raw_mode(stat.st_mode))
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.file_type() == Some(FileType::Directory)
    }

    /// Opens what is there; a symlink in the last component is never followed.
    pub(crate) fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        open_child(self.dir.as_fd(), &self.name, flags)
    }
}

/// Looks at a name in a directory without following it; `None` when there is nothing.
pub(crate) fn lstat(dir: BorrowedFd<'_>, name: &OsStr) -> Result<Option<Stat>, Errno> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Opens one name of a directory, never through a symlink.
pub(crate) fn open_child(dir: BorrowedFd<'_>, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a directory of Kiln's own by its path, to look up what is below it.
pub(crate) fn open_root(dir: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A directory below `root`, through no link; `None` if there is none. `path` has no `..`.
pub(crate) fn descend(root: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>, Errno> {
    let mut dir = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
    for name in path {
        dir = match open_child(dir.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(errno),
        };
    }
    Ok(Some(dir))
}

/// Opens anew what `found` (opened with `O_PATH`) stands for, if it is a regular file. Nothing else is opened at all: a
/// pipe would wait, and a device might act.
pub(crate) fn reopen_file(found: BorrowedFd<'_>, flags: OFlags) -> Result<Option<OwnedFd>, Errno> {
    let stat = rustix::fs::fstat(found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(Some)
}

/// Opens a subdirectory for use as a base, never through a symlink.
pub(crate) fn open_subdir(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    open_child(dir, name, OFlags::PATH | OFlags::DIRECTORY)
}

/// Names in a directory, sorted by bytes.
pub(crate) fn read_names(dir: BorrowedFd<'_>) -> Result<Vec<OsString>, Errno> {
    let readable = open_child(dir, OsStr::new("."), OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(readable)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Removes a name and everything below it, without following symlinks and without recursion.
pub(crate) fn remove_all(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    // (directory, its name in the one before, names still to remove)
    let first = open_subdir(dir, name)?;
    let names = read_names(first.as_fd())?;
    let mut stack = vec![(first, name.to_owned(), names)];
    while let Some((current, _, names)) = stack.last_mut() {
        if let Some(child) = names.pop() {
            match rustix::fs::unlinkat(current.as_fd(), &child, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR | Errno::PERM) => {
                    let fd = open_subdir(current.as_fd(), &child)?;
                    let names = read_names(fd.as_fd())?;
                    stack.push((fd, child, names));
                }
                Err(errno) => return Err(errno),
            }
            continue;
        }
        let Some((_, done, _)) = stack.pop() else { break };
        let parent = stack.last().map_or(dir, |(fd, _, _)| fd.as_fd());
        rustix::fs::unlinkat(parent, &done, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// Who owns what is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Sets owner, without following a symlink. Must come before the mode: it clears set-id bits.
pub(crate) fn chown(dir: BorrowedFd<'_>, name: &OsStr, owner: Owner) -> Result<(), Errno> {
    use rustix::fs::{Gid, Uid};
    rustix::fs::chownat(
        dir,
        name,
        Some(Uid::from_raw(owner.uid)),
        Some(Gid::from_raw(owner.gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )
}

/// Sets permission bits of something that is not a symlink.
pub(crate) fn chmod(dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<(), Errno> {
    rustix::fs::chmodat(dir, name, Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())
}

/// Sets access and modification time, without following a symlink.
pub(crate) fn utimes(dir: BorrowedFd<'_>, name: &OsStr, time: Timespec) -> Result<(), Errno> {
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}

/// What directories that have to be made look like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewDir {
    pub(crate) mode: u32,
    pub(crate) owner: Option<Owner>,
    pub(crate) time: Option<Timespec>,
}

impl NewDir {
    pub(crate) fn make(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
        rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700))?;
        if let Some(owner) = self.owner {
            chown(dir, name, owner)?;
        }
        chmod(dir, name, self.mode)?;
        match self.time {
            Some(time) => utimes(dir, name, time),
            None => Ok(()),
        }
    }
}

/// Directories that were made on the way, outermost first.
#[derive(Debug, Default)]
pub(crate) struct Made(Vec<(OwnedFd, OsString)>);

impl Made {
    /// Sets the times again, innermost first: making their content changed them.
    pub(crate) fn restore_times(&self, time: Option<Timespec>) -> Result<(), Errno> {
        let Some(time) = time else { return Ok(()) };
        self.0.iter().rev().try_for_each(|(dir, name)| utimes(dir.as_fd(), name, time))
    }
}

/// A root directory; all paths given to it are as seen from inside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Root<'a>(pub(crate) BorrowedFd<'a>);

impl<'a> Root<'a> {
    /// Opens a path inside the root, following symlinks inside it.
    pub(crate) fn open(&self, path: impl AsRef<Path>, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
        let path = path.as_ref();
        loop {
            let answer = rustix::fs::openat2(
                self.0,
                path,
                flags | OFlags::CLOEXEC,
                Mode::from_raw_mode(mode),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            );
            match answer {
                // A rename somewhere on the machine raced with a `..` in a link.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// Opens a directory inside the root as a base for further calls.
    pub(crate) fn open_dir(&self, path: impl AsRef<Path>) -> Result<OwnedFd, Errno> {
        self.open(path, OFlags::PATH | OFlags::DIRECTORY, 0)
    }

    /// Finds the directory and name that `path` stands for. Its parent must exist; it need not.
    /// With `follow`, symlinks in the last component are resolved too, also when they dangle.
    pub(crate) fn place(&self, path: impl AsRef<Path>, follow: bool) -> Result<Place, Errno> {
        let path = clean_path(path.as_ref());
        let (parent, name) = split(&path);
        match self.open_dir(parent) {
            Ok(dir) => {
                let name = OsString::from(name);
                let stat = lstat(dir.as_fd(), &name)?;
                let place = Place { dir, name, stat };
                if !follow || place.file_type() != Some(FileType::Symlink) {
                    return Ok(place);
                }
            }
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        self.walk(&path, follow, None, &mut Made::default())
    }

    /// The directory at `path`, made with all its missing parents. A symlink on the way
    /// that points to nothing has its target made.
    pub(crate) fn ensure_dir(&self, path: impl AsRef<Path>, new: &NewDir) -> Result<(OwnedFd, Made), Errno> {
        let path = clean_path(path.as_ref());
        let mut made = Made::default();
        match self.open_dir(&path) {
            Ok(dir) => return Ok((dir, made)),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        let place = self.walk(&path, true, Some(new), &mut made)?;
        if place.stat.is_none() {
            new.make(place.dir.as_fd(), &place.name)?;
            let dir = open_subdir(place.dir.as_fd(), &place.name)?;
            made.0.push((place.dir, place.name));
            return Ok((dir, made));
        }
        Ok((open_subdir(place.dir.as_fd(), &place.name)?, made))
    }

    /// Resolution one component at a time, which can go on past what does not exist.
    fn walk(
        &self,
        path: &Path,
        follow: bool,
        make: Option<&NewDir>,
        made: &mut Made,
    ) -> Result<Place, Errno> {
        let mut todo: VecDeque<OsString> = components(path.as_os_str()).collect();
        let mut stack: Vec<(OwnedFd, OsString)> = Vec::new();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == ".." {
                stack.pop();
                continue;
            }
            let dir = stack.last().map_or(self.0, |(fd, _)| fd.as_fd());
            let last = todo.is_empty();
            let stat = lstat(dir, &name)?;
            let kind = stat.as_ref().map(|stat| FileType::from_raw_mode(stat.st_mode));
            if kind == Some(FileType::Symlink) && (!last || follow) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                let target = rustix::fs::readlinkat(dir, &name, Vec::new())?;
                let target = OsStr::from_bytes(target.as_bytes());
                if target.as_bytes().starts_with(b"/") {
                    stack.clear();
                }
                for part in components(target).collect::<Vec<_>>().into_iter().rev() {
                    todo.push_front(part);
                }
                continue;
            }
            if last {
                return Ok(Place { dir: rustix::io::fcntl_dupfd_cloexec(dir, 0)?, name, stat });
            }
            if kind.is_none() {
                let Some(new) = make else { return Err(Errno::NOENT) };
                new.make(dir, &name)?;
                made.0.push((rustix::io::fcntl_dupfd_cloexec(dir, 0)?, name.clone()));
            }
            stack.push((open_subdir(dir, &name)?, name));
        }
        // The path ended in the root or in `..`: the place is the directory reached.
        let dir = match stack.pop() {
            Some((fd, _)) => fd,
            None => rustix::io::fcntl_dupfd_cloexec(self.0, 0)?,
        };
        let name = OsString::from(".");
        let stat = lstat(dir.as_fd(), &name)?;
        Ok(Place { dir, name, stat })
    }
}

fn components(path: &OsStr) -> impl Iterator<Item = OsString> + '_ {
    path.as_bytes()
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(|part| OsStr::from_bytes(part).to_owned())
}
