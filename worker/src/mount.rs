//! Mounts that are attached nowhere: overlays, and copies of directories and mount trees.
//!
//! A detached mount is in no mount namespace: nobody else sees it, nothing has to be unmounted, and it is gone when
//! its last descriptor closes, also after `kill -9`. This module does not know what the directories mean.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags,
};

/// Most lower layers the kernel takes for one overlay.
pub(crate) const MAX_LOWERS: usize = 500;

/// Longest string `fsconfig` takes, without its end.
const MAX_CONFIG_STRING: usize = 255;

/// Options that keep the upper directory a plain layer: no redirects, no metadata-only copies. Redirects that came
/// with a layer are not followed.
const OPTIONS: [(&str, &str); 3] = [("redirect_dir", "nofollow"), ("metacopy", "off"), ("xino", "off")];

/// The most that mount(2) takes as options, with the zero byte at their end.
const MAX_MOUNT_DATA: usize = 4096;

/// Whose mount namespace the caller is in; it matters on older kernels, where an overlay has a place for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// One that others see, too.
    Shared,
    /// One without anybody else and without propagation.
    Private,
}

/// A file system from a configured context, with what the kernel logged about a failure.
pub(crate) fn create(fs: &OwnedFd, attrs: MountAttrFlags) -> io::Result<OwnedFd> {
    rustix::mount::fsconfig_create(fs).map_err(|e| explain(fs, e))?;
    Ok(rustix::mount::fsmount(fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs)?)
}

/// Adds what the kernel logged about a failed mount; it hands out one message per read.
pub(crate) fn explain(fs: &OwnedFd, error: Errno) -> io::Error {
    let mut texts = Vec::new();
    let mut buffer = [0u8; 512];
    while let Ok(n @ 1..) = rustix::io::read(fs, &mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..n]).trim().to_owned();
        // Lines start with a severity letter.
        texts.push(text.get(2..).unwrap_or(&text).to_owned());
    }
    let error = io::Error::from(error);
    if texts.is_empty() {
        error
    } else {
        io::Error::new(error.kind(), format!("{error} ({})", texts.join("; ")))
    }
}

/// A copy of the mount at a path, beginning with what the path names.
pub(crate) fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    open_tree(CWD, path, recursive, OpenTreeFlags::empty())
}

/// A copy of the mount tree from this file or directory on.
pub(crate) fn clone_at(at: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    open_tree(at, Path::new(""), recursive, OpenTreeFlags::AT_EMPTY_PATH)
}

fn open_tree(
    at: BorrowedFd<'_>,
    path: &Path,
    recursive: bool,
    mut flags: OpenTreeFlags,
) -> io::Result<OwnedFd> {
    flags |= OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(rustix::mount::open_tree(at, path, flags)?)
}

/// Sets attributes of a mount.
pub(crate) fn set_attrs(mount: BorrowedFd<'_>, attrs: MountAttrFlags, recursive: bool) -> io::Result<()> {
    let attr =
        libc::mount_attr { attr_set: u64::from(attrs.bits()), attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a constant C string and `attr` a struct of the given size; both are only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(&attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Stops all propagation between this mount namespace and others.
pub(crate) fn make_private() -> io::Result<()> {
    Ok(rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
}

/// An overlay of at most [`MAX_LOWERS`] lower directories, topmost first; changes go to the first of `upper`, the
/// second is overlay's scratch directory beside it.
pub(crate) fn overlay(
    lowers: &[&Path],
    upper: Option<(&Path, &Path)>,
    attrs: MountAttrFlags,
    namespace: Namespace,
) -> io::Result<OwnedFd> {
    match overlay_by_config(lowers, upper, attrs) {
        // Kernels that have no option for a single layer say so with this, some of them only at the end.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            match overlay_by_mount(lowers, upper, attrs, namespace) {
                Err(older) if older.kind() != io::ErrorKind::Unsupported => Err(error),
                other => other,
            }
        }
        other => other,
    }
}

/// Layer by layer, as the kernel's documentation has it since 6.8.
fn overlay_by_config(
    lowers: &[&Path],
    upper: Option<(&Path, &Path)>,
    attrs: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let mut held = Vec::new();
    let set = |key: &str, value: &Path| {
        rustix::mount::fsconfig_set_string(&fs, key, value).map_err(|e| explain(&fs, e))
    };
    for lower in lowers {
        set("lowerdir+", &short(lower, &mut held)?)?;
    }
    for (key, value) in OPTIONS {
        set(key, Path::new(value))?;
    }
    if let Some((upper, work)) = upper {
        set("upperdir", &short(upper, &mut held)?)?;
        set("workdir", &short(work, &mut held)?)?;
        set("index", Path::new("off"))?;
        // What was written is made durable by the store, once for many; nobody must wait for the disk.
        rustix::mount::fsconfig_set_flag(&fs, "volatile").map_err(|e| explain(&fs, e))?;
    }
    create(&fs, attrs)
}

/// A name for a directory that needs no escaping and fits into the kernel's limit.
fn short(path: &Path, held: &mut Vec<OwnedFd>) -> io::Result<PathBuf> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() <= MAX_CONFIG_STRING && !bytes.iter().any(|b| matches!(b, b'\\' | b':' | b',')) {
        return Ok(path.to_owned());
    }
    by_descriptor(path, held)
}

fn by_descriptor(path: &Path, held: &mut Vec<OwnedFd>) -> io::Result<PathBuf> {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let text = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    held.push(fd);
    Ok(text)
}

/// The same through mount(2): mounted on one of its own directories in a private mount namespace, copied as a
/// detached mount, and taken away again.
fn overlay_by_mount(
    lowers: &[&Path],
    upper: Option<(&Path, &Path)>,
    attrs: MountAttrFlags,
    namespace: Namespace,
) -> io::Result<OwnedFd> {
    match namespace {
        Namespace::Private => mount_and_copy(lowers, upper, attrs),
        Namespace::Shared => std::thread::scope(|scope| {
            let private = scope.spawn(|| {
                // SAFETY: only this thread, which ends with this work, leaves the namespaces.
                if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) } < 0 {
                    return Err(io::Error::last_os_error());
                }
                make_private()?;
                mount_and_copy(lowers, upper, attrs)
            });
            private.join().unwrap_or_else(|_| Err(io::Error::other("mounting failed")))
        }),
    }
}

fn mount_and_copy(
    lowers: &[&Path],
    upper: Option<(&Path, &Path)>,
    attrs: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let Some(lowest) = lowers.first() else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mut held = Vec::new();
    let mut data = OsString::from("lowerdir=");
    for (at, lower) in lowers.iter().enumerate() {
        if at > 0 {
            data.push(":");
        }
        data.push(by_descriptor(lower, &mut held)?);
    }
    for (key, value) in OPTIONS {
        data.push(format!(",{key}={value}"));
    }
    if let Some((upper, work)) = upper {
        data.push(",upperdir=");
        data.push(by_descriptor(upper, &mut held)?);
        data.push(",workdir=");
        data.push(by_descriptor(work, &mut held)?);
        data.push(",index=off,volatile");
    }
    if data.len() >= MAX_MOUNT_DATA {
        let text = format!("unsupported: a file system of {} layers needs Linux 6.8 or later", lowers.len());
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    let data = CString::new(data.into_vec())?;
    let place = upper.map_or(*lowest, |(_, work)| work);
    rustix::mount::mount("overlay", place, "overlay", MountFlags::empty(), Some(data.as_c_str()))?;
    let copied = clone_tree(place, false);
    rustix::mount::unmount(place, UnmountFlags::DETACH)?;
    let copied = copied?;
    set_attrs(copied.as_fd(), attrs, false)?;
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;

    fn is_root() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            println!("skipped: mounts need root");
        }
        root
    }

    fn read(root: &OwnedFd, name: &str) -> io::Result<String> {
        let file = rustix::fs::openat(root, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        fs::File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn all_ways_to_an_overlay_agree() {
        if !is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let dir = |name: &str| {
            let path = base.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (a, b, c) = (dir("a"), dir("b,:\\"), dir(&"c".repeat(200)).join("d".repeat(200)));
        fs::create_dir(&c).unwrap();
        for (dir, files) in [(&a, "f"), (&b, "fg"), (&c, "fgh")] {
            for name in files.chars() {
                fs::write(dir.join(name.to_string()), dir.file_name().unwrap().as_bytes()).unwrap();
            }
        }
        let lowers = [a.as_path(), b.as_path(), c.as_path()];
        let nodev = MountAttrFlags::MOUNT_ATTR_NODEV;
        type Way<'a> = &'a (dyn Fn(Option<(&Path, &Path)>, MountAttrFlags) -> io::Result<OwnedFd> + Sync);
        let ways: [(&str, Way<'_>); 3] = [
            ("config", &|upper, attrs| overlay_by_config(&lowers, upper, attrs)),
            ("shared", &|upper, attrs| overlay_by_mount(&lowers, upper, attrs, Namespace::Shared)),
            ("private", &|upper, attrs| {
                let apart = || {
                    // SAFETY: only this thread leaves the namespaces, and it ends here.
                    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) }, 0);
                    make_private().unwrap();
                    overlay_by_mount(&lowers, upper, attrs, Namespace::Private)
                };
                std::thread::scope(|scope| scope.spawn(apart).join().unwrap())
            }),
        ];
        for (name, way) in ways {
            let (up, work) = (dir(&format!("up-{name}")), dir(&format!("work-{name}")));
            for upper in [None, Some((up.as_path(), work.as_path()))] {
                let readonly = if upper.is_none() { MountAttrFlags::MOUNT_ATTR_RDONLY } else { nodev };
                let root = way(upper, nodev | readonly).unwrap();
                for (file, text) in [("f", "a".to_owned()), ("g", "b,:\\".into()), ("h", "d".repeat(200))] {
                    assert_eq!(read(&root, file).unwrap(), text, "{name} {file}");
                }
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
                let new = rustix::fs::openat(&root, "new", flags, Mode::from_raw_mode(0o600));
                assert_eq!(new.is_ok(), upper.is_some(), "{name}");
                if upper.is_some() {
                    let null = rustix::fs::makedev(1, 3);
                    let kind = rustix::fs::FileType::CharacterDevice;
                    rustix::fs::mknodat(&root, "null", kind, Mode::from_raw_mode(0o600), null).unwrap();
                    assert_eq!(read(&root, "null").unwrap_err().raw_os_error(), Some(libc::EACCES), "{name}");
                }
            }
            assert!(up.join("new").exists(), "{name}");
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(base.path().to_str().unwrap()), "{mounts}");
    }

    #[test]
    fn an_overlay_that_cannot_be_made_says_why() {
        if !is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let missing = base.path().join("missing");
        let lowers = [missing.as_path(), base.path()];
        for namespace in [Namespace::Shared, Namespace::Private] {
            let error = overlay(&lowers, None, MountAttrFlags::empty(), namespace).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
        let many = vec![base.path(); 300];
        let error = overlay_by_mount(&many, None, MountAttrFlags::empty(), Namespace::Shared)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "unsupported: a file system of 300 layers needs Linux 6.8 or later");
    }
}
