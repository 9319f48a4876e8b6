//! The mount calls a sandbox is assembled with, behind a trait so that their order can be tested without root.
//!
//! Everything is descriptor based: a mount is made detached, gets its attributes, and is attached to a directory
//! that was resolved beneath the sandbox's root. Paths from images never reach a call that could leave that root.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, StatxFlags, Timespec, Timestamps, Uid,
};
use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};

use super::plan::DevicePlan;
use crate::mount::{self, MAX_LOWERS, Namespace};

/// What a mount point must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TargetKind {
    Dir,
    File,
}

/// Mount and file calls of sandbox assembly. `Fd` is a descriptor, or a number in the test double.
pub(super) trait Sys {
    type Fd;

    /// Stops all propagation between this mount namespace and others.
    fn make_private(&self) -> io::Result<()>;
    /// A new file system, detached.
    fn new_fs(&self, fstype: &str, options: &[(String, Option<String>)], attrs: u32) -> io::Result<Self::Fd>;
    /// An overlay, detached; lowers topmost first.
    fn overlay(&self, lowers: &[PathBuf], upper: Option<(&Path, &Path)>, attrs: u32) -> io::Result<Self::Fd>;
    /// A detached copy of the mount at a host path.
    fn clone_tree(&self, path: &Path, recursive: bool) -> io::Result<Self::Fd>;
    /// A detached copy of the mount tree from this file or directory on.
    fn clone_at(&self, at: &Self::Fd, recursive: bool) -> io::Result<Self::Fd>;
    /// Sets `MOUNT_ATTR_*` bits of a mount.
    fn set_attrs(&self, mount: &Self::Fd, attrs: u32, recursive: bool) -> io::Result<()>;
    /// Opens a path of the host, without access to what it names.
    fn open_host(&self, path: &Path) -> io::Result<Self::Fd>;
    /// Opens a path with `root` as its `/`, following links inside it.
    fn lookup(&self, root: &Self::Fd, path: &Path) -> io::Result<Self::Fd>;
    /// Like `lookup`, but makes what is missing: directories, and a last component of the kind asked for. What was
    /// made is appended to `made` as symlink-free paths.
    fn make_target(
        &self,
        root: &Self::Fd,
        path: &Path,
        kind: TargetKind,
        made: &mut Vec<PathBuf>,
    ) -> io::Result<Self::Fd>;
    /// Whether an open file is a directory.
    fn is_dir(&self, fd: &Self::Fd) -> io::Result<bool>;
    /// Attaches a detached mount.
    fn attach(&self, mount: &Self::Fd, target: &Self::Fd) -> io::Result<()>;
    /// Attaches a mount on top of the old root, where no path leads to it: it belongs to this namespace then.
    fn park(&self, mount: &Self::Fd) -> io::Result<()>;
    /// Takes everything away that is parked. A root that is to stay would be hidden from whoever enters the namespace.
    fn unpark(&self) -> io::Result<()>;
    /// Makes a device node or pipe.
    fn make_node(&self, dir: &Self::Fd, name: &OsStr, device: &DevicePlan) -> io::Result<()>;
    /// Makes a symbolic link.
    fn symlink(&self, dir: &Self::Fd, name: &str, target: &str) -> io::Result<()>;
    /// Changes owner and group.
    fn chown(&self, root: &Self::Fd, path: &Path, uid: u32, gid: u32) -> io::Result<()>;
    /// Sets permission bits.
    fn chmod(&self, root: &Self::Fd, path: &Path, mode: u32) -> io::Result<()>;
    /// Writes to an existing file.
    fn write(&self, root: &Self::Fd, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Makes a mount the root of the process and drops everything else.
    fn pivot(&self, root: &Self::Fd) -> io::Result<()>;
}

/// The kernel.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Kernel;

/// Gives a directory back the times that it had.
pub(crate) fn restore_times(dir: &OwnedFd, before: &Stat) -> Result<(), Errno> {
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    let times = Timestamps {
        last_access: time(before.st_atime, before.st_atime_nsec),
        last_modification: time(before.st_mtime, before.st_mtime_nsec),
    };
    rustix::fs::futimens(dir, &times)
}

/// Symbolic links followed in one mount point, as the kernel's own limit.
const MAX_LINKS: usize = 40;

impl Sys for Kernel {
    type Fd = OwnedFd;

    fn make_private(&self) -> io::Result<()> {
        mount::make_private()
    }

    fn new_fs(&self, fstype: &str, options: &[(String, Option<String>)], attrs: u32) -> io::Result<OwnedFd> {
        let fs = rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in options {
            match value {
                Some(value) => rustix::mount::fsconfig_set_string(&fs, key.as_str(), value.as_str()),
                None => rustix::mount::fsconfig_set_flag(&fs, key.as_str()),
            }
            .map_err(|e| mount::explain(&fs, e))?;
        }
        mount::create(&fs, MountAttrFlags::from_bits_retain(attrs))
    }

    fn overlay(&self, lowers: &[PathBuf], upper: Option<(&Path, &Path)>, attrs: u32) -> io::Result<OwnedFd> {
        // Of more layers than fit, the bottom ones are merged first: nothing lies beneath them that their
        // whiteouts could still hide.
        let once = |lowers: &[&Path], upper| {
            mount::overlay(lowers, upper, MountAttrFlags::from_bits_retain(attrs), Namespace::Private)
        };
        let merged;
        let mut lowers = lowers.iter().map(PathBuf::as_path).collect::<Vec<_>>();
        let bottom;
        if lowers.len() > MAX_LOWERS {
            let tail = lowers.split_off(MAX_LOWERS - 1);
            if tail.len() > MAX_LOWERS {
                return Err(io::Error::other(format!(
                    "unsupported: a file system of {} layers (at most {})",
                    lowers.len() + tail.len(),
                    2 * MAX_LOWERS - 1
                )));
            }
            bottom = once(&tail, None)?;
            self.park(&bottom)?;
            merged = PathBuf::from(format!("/proc/self/fd/{}", bottom.as_raw_fd()));
            lowers.push(&merged);
        }
        once(&lowers, upper)
    }

    fn clone_tree(&self, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
        mount::clone_tree(path, recursive)
    }

    fn clone_at(&self, at: &OwnedFd, recursive: bool) -> io::Result<OwnedFd> {
        mount::clone_at(at.as_fd(), recursive)
    }

    fn set_attrs(&self, mount: &OwnedFd, attrs: u32, recursive: bool) -> io::Result<()> {
        mount::set_attrs(mount.as_fd(), MountAttrFlags::from_bits_retain(attrs), recursive)
    }

    fn open_host(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn lookup(&self, root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
        open_in(root.as_fd(), path, OFlags::PATH)
    }

    fn make_target(
        &self,
        root: &OwnedFd,
        path: &Path,
        kind: TargetKind,
        made: &mut Vec<PathBuf>,
    ) -> io::Result<OwnedFd> {
        match self.lookup(root, path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            done => return done,
        }
        let mut rest: VecDeque<OsString> = names(path).collect();
        let mut done = PathBuf::new();
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            if name == ".." {
                done.pop();
                continue;
            }
            let next = done.join(&name);
            match open_in(root.as_fd(), &next, OFlags::PATH | OFlags::NOFOLLOW) {
                Ok(fd) if file_type(&fd)? == FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = rustix::fs::readlinkat(&fd, "", Vec::new())?;
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    if target.is_absolute() {
                        done = PathBuf::new();
                    }
                    for name in names(&target).collect::<Vec<_>>().into_iter().rev() {
                        rest.push_front(name);
                    }
                }
                Ok(_) => done = next,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let parent = open_in(root.as_fd(), &done, OFlags::RDONLY | OFlags::DIRECTORY)?;
                    let before = rustix::fs::fstat(&parent)?;
                    if rest.is_empty() && kind == TargetKind::File {
                        let flags = OFlags::CREATE
                            | OFlags::EXCL
                            | OFlags::NOFOLLOW
                            | OFlags::CLOEXEC
                            | OFlags::WRONLY;
                        drop(rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o755))?);
                    } else {
                        rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755))?;
                    }
                    // Only what the step does is to be seen in the result. A file system may refuse.
                    let _ = restore_times(&parent, &before);
                    made.push(Path::new("/").join(&next));
                    done = next;
                }
                Err(e) => return Err(e),
            }
        }
        self.lookup(root, &done)
    }

    fn is_dir(&self, fd: &OwnedFd) -> io::Result<bool> {
        Ok(file_type(fd)? == FileType::Directory)
    }

    fn attach(&self, mount: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
    }

    fn park(&self, mount: &OwnedFd) -> io::Result<()> {
        Ok(rustix::mount::move_mount(mount, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    }

    fn unpark(&self) -> io::Result<()> {
        let mount = |path| {
            rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).map(|found| found.stx_mnt_id)
        };
        // The way up from the root leads to the topmost mount there.
        while mount("/..")? != mount("/")? {
            rustix::mount::unmount("/..", UnmountFlags::DETACH)?;
        }
        Ok(())
    }

    fn make_node(&self, dir: &OwnedFd, name: &OsStr, device: &DevicePlan) -> io::Result<()> {
        let kind = match device.kind {
            'b' => FileType::BlockDevice,
            'p' => FileType::Fifo,
            _ => FileType::CharacterDevice,
        };
        let number = rustix::fs::makedev(device.major, device.minor);
        rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(device.mode & 0o7777), number)?;
        if device.uid != 0 || device.gid != 0 {
            let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
            rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    fn symlink(&self, dir: &OwnedFd, name: &str, target: &str) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, dir, name)?)
    }

    fn chown(&self, root: &OwnedFd, path: &Path, uid: u32, gid: u32) -> io::Result<()> {
        let fd = self.lookup(root, path)?;
        Ok(rustix::fs::chownat(
            &fd,
            "",
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::EMPTY_PATH,
        )?)
    }

    fn chmod(&self, root: &OwnedFd, path: &Path, mode: u32) -> io::Result<()> {
        let file = open_in(root.as_fd(), path, OFlags::RDONLY)?;
        Ok(rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o7777))?)
    }

    fn write(&self, root: &OwnedFd, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = open_in(root.as_fd(), path, OFlags::WRONLY)?;
        io::Write::write_all(&mut std::fs::File::from(file), bytes)
    }

    fn pivot(&self, root: &OwnedFd) -> io::Result<()> {
        let old = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::process::fchdir(root)?;
        rustix::process::pivot_root(".", ".")?;
        rustix::process::fchdir(&old)?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        // That took the topmost of what is parked there, if there is any; the old root itself comes last. Were it left,
        // whoever enters this namespace would find it on top of everything.
        loop {
            match rustix::mount::unmount(".", UnmountFlags::DETACH) {
                Ok(()) => {}
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        rustix::process::chdir("/")?;
        Ok(())
    }
}

/// Path components that mean something, without the leading slash.
fn names(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

/// Opens a path with `root` as its `/`; never leaves it.
pub(super) fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    // The kernel asks for a retry when a rename elsewhere raced with `..`.
    let mut tries = 0;
    loop {
        let opened =
            rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT);
        match opened {
            Err(Errno::AGAIN) if tries < 100 => tries += 1,
            other => return Ok(other?),
        }
    }
}

fn file_type(fd: &OwnedFd) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

/// Reads a small file completely, or as much as `limit`.
pub(super) fn read_limited(fd: OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::from(fd).take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn targets_stay_beneath_their_root() {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("root");
        fs::create_dir_all(root.join("real")).unwrap();
        for (name, target) in
            [("up", "../../.."), ("abs", "/"), ("loop", "loop"), ("next", "real/../fresh/x")]
        {
            std::os::unix::fs::symlink(target, root.join(name)).unwrap();
        }
        let fd = Kernel.open_host(&root).unwrap();
        let mut made = Vec::new();
        let mut make = |path: &str, kind| Kernel.make_target(&fd, Path::new(path), kind, &mut made).map(drop);
        make("/up/a/b", TargetKind::Dir).unwrap();
        make("abs/real/f", TargetKind::File).unwrap();
        make("/next/../../../y", TargetKind::File).unwrap();
        assert_eq!(make("/loop/x", TargetKind::Dir).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert!(make("/real/f/x", TargetKind::Dir).is_err());
        assert_eq!(made, ["/a", "/a/b", "/real/f", "/fresh", "/fresh/x", "/y"].map(PathBuf::from));
        assert!(root.join("a/b").is_dir() && root.join("real/f").is_file() && root.join("y").is_file());
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
    }
}
