//! Removes the mount points that had to be made for a step, so that they are not part of its result.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::ops::file::root::{lstat, read_names};
use crate::ops::file::transfer::read_xattrs;
use crate::sandbox::restore_times;

/// A directory of the host that shows up in the sandbox and was written there.
pub(crate) struct Written {
    /// Where, as an absolute path.
    pub(crate) dest: PathBuf,
    /// The upper directory, or the directory itself.
    pub(crate) dir: PathBuf,
    /// Layers below it, topmost first.
    pub(crate) lowers: Vec<PathBuf>,
}

/// Removes stubs that are still empty. Without `recursive` only the mount points themselves go, not the
/// directories that were made on the way to them. Blocking.
pub(crate) fn remove(stubs: &[PathBuf], written: &[Written], recursive: bool) {
    for stub in stubs.iter().rev() {
        let parent_of_another = stubs.iter().any(|other| other != stub && other.starts_with(stub));
        if parent_of_another && !recursive {
            continue;
        }
        // A mount point itself lies in what it is mounted on.
        let owner = written.iter().filter(|tree| stub.starts_with(&tree.dest) && *stub != tree.dest);
        let Some(tree) = owner.max_by_key(|tree| tree.dest.as_os_str().len()) else { continue };
        let Ok(path) = stub.strip_prefix(&tree.dest) else { continue };
        if let Err(errno) = remove_one(tree, path)
            && errno != Errno::NOENT
        {
            tracing::debug!("mount point {} stays: {errno}", stub.display());
        }
    }
}

fn remove_one(tree: &Written, path: &Path) -> Result<(), Errno> {
    let Some(name) = path.file_name() else { return Ok(()) };
    let root = open_dir(&tree.dir)?;
    let parent = path.parent().unwrap_or(Path::new(""));
    let dir = open_below(&root, parent)?;
    let Some(stat) = lstat(dir.as_fd(), name)? else { return Ok(()) };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => unlink(&dir, name, AtFlags::REMOVEDIR)?,
        FileType::RegularFile if stat.st_size == 0 => unlink(&dir, name, AtFlags::empty())?,
        _ => return Ok(()),
    }
    prune(tree, &root, parent)
}

/// Unlinks without a trace in the directory's times: they are as the step left them.
fn unlink(dir: &OwnedFd, name: &OsStr, flags: AtFlags) -> Result<(), Errno> {
    let before = rustix::fs::fstat(dir)?;
    rustix::fs::unlinkat(dir, name, flags)?;
    restore_times(dir, &before)
}

/// Removes directories that overlay copied up only because a stub was made in them: empty, and like the one below.
fn prune(tree: &Written, root: &OwnedFd, path: &Path) -> Result<(), Errno> {
    let names: Vec<OsString> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            _ => None,
        })
        .collect();
    for depth in (1..=names.len()).rev() {
        let dir: PathBuf = names[..depth].iter().collect();
        let fd = open_below(root, &dir)?;
        let unchanged = read_names(fd.as_fd())?.is_empty()
            && !crate::flat::is_opaque(fd.as_fd())
            && below(&tree.lowers, &dir).is_some_and(|lower| same(&fd, &lower));
        if !unchanged {
            return Ok(());
        }
        let parent = open_below(root, &names[..depth - 1].iter().collect::<PathBuf>())?;
        unlink(&parent, &names[depth - 1], AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// The directory that shows through at `path` from the layers.
fn below(lowers: &[PathBuf], path: &Path) -> Option<OwnedFd> {
    for lower in lowers {
        match open_below(&open_dir(lower).ok()?, path) {
            Ok(fd) => return Some(fd),
            Err(Errno::NOENT) => {}
            Err(_) => return None,
        }
    }
    None
}

fn same(a: &OwnedFd, b: &OwnedFd) -> bool {
    let key = |stat: Stat| (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_mtime, stat.st_mtime_nsec);
    let (Ok(left), Ok(right)) = (rustix::fs::fstat(a), rustix::fs::fstat(b)) else { return false };
    key(left) == key(right) && read_xattrs(a.as_fd()) == read_xattrs(b.as_fd())
}

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn open_below(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { OsStr::new(".") } else { path.as_os_str() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(root: &Path, dirs: &[&str]) {
        for dir in dirs {
            std::fs::create_dir_all(root.join(dir)).expect("mkdir");
        }
    }

    #[test]
    fn only_empty_stubs_and_untouched_directories_go() {
        let temp = tempfile::TempDir::new().expect("temp");
        let (upper, lower) = (temp.path().join("upper"), temp.path().join("lower"));
        make(&lower, &["etc", "run", "srv"]);
        make(&upper, &["etc", "run", "srv", "made/deep/mnt", "used"]);
        std::fs::write(upper.join("etc/hosts"), "").expect("write");
        std::fs::write(upper.join("run/stub"), "").expect("write");
        let touched = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_234_567_890);
        let set = |dir: PathBuf, time| std::fs::File::open(dir)?.set_modified(time);
        let unchanged = std::fs::metadata(lower.join("etc")).and_then(|meta| meta.modified()).expect("stat");
        set(upper.join("etc"), unchanged).expect("touch");
        set(upper.join("run"), touched).expect("touch");
        std::fs::write(upper.join("srv/kept"), "x").expect("write");
        std::fs::write(upper.join("srv/stub"), "").expect("write");
        std::fs::write(upper.join("used/file"), "x").expect("write");
        let stubs: Vec<PathBuf> =
            ["/etc/hosts", "/run/stub", "/srv/stub", "/made", "/made/deep", "/made/deep/mnt", "/used"]
                .map(PathBuf::from)
                .into();
        let written = [Written { dest: "/".into(), dir: upper.clone(), lowers: vec![lower] }];
        remove(&stubs, &written, true);
        assert!(!upper.join("etc").exists(), "copied up for the stub only");
        let run = std::fs::metadata(upper.join("run")).expect("the step set its time");
        assert_eq!(run.modified().expect("modified"), touched);
        assert!(!upper.join("run/stub").exists());
        assert!(upper.join("srv/kept").exists() && !upper.join("srv/stub").exists());
        assert!(!upper.join("made").exists());
        assert!(upper.join("used/file").exists(), "the step wrote there");
    }

    #[test]
    fn without_recursion_the_way_stays() {
        let temp = tempfile::TempDir::new().expect("temp");
        let upper = temp.path().join("upper");
        make(&upper, &["made/mnt"]);
        let stubs: Vec<PathBuf> = ["/made", "/made/mnt"].map(PathBuf::from).into();
        let written = [Written { dest: "/".into(), dir: upper.clone(), lowers: Vec::new() }];
        remove(&stubs, &written, false);
        assert!(upper.join("made").exists() && !upper.join("made/mnt").exists());
    }

    #[test]
    fn a_stub_in_another_mount_is_removed_there() {
        let temp = tempfile::TempDir::new().expect("temp");
        let (root, cache) = (temp.path().join("root"), temp.path().join("cache"));
        make(&root, &["data"]);
        make(&cache, &["inner"]);
        let written = [
            Written { dest: "/".into(), dir: root.clone(), lowers: Vec::new() },
            Written { dest: "/data".into(), dir: cache.clone(), lowers: Vec::new() },
        ];
        remove(&["/data/inner".into()], &written, true);
        assert!(!cache.join("inner").exists() && root.join("data").exists());
        remove(&["/data".into()], &written, true);
        assert!(!root.join("data").exists() && cache.exists());
    }
}
