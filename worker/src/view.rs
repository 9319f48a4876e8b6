//! Merged views of layer chains, as file descriptors of detached overlay mounts.
//!
//! A detached mount is attached to no mount namespace: nobody else sees it, nothing has to be
//! unmounted, and it is gone when its last descriptor closes, also after `kill -9`. This module only
//! mounts; it does not know what the layers mean and never changes a committed one.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_cache::SnapshotRef;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

/// The kernel copies at most this much of one `fsconfig` value.
const FSCONFIG_VALUE_MAX: usize = 250;

/// Why a view could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// A system call of the mount failed.
    #[error("failed to mount overlay of {layers} layers: {call}: {source}{detail}")]
    Mount {
        /// The call that failed.
        call: &'static str,
        /// How many lower layers there were.
        layers: usize,
        /// What the kernel wrote about it.
        detail: String,
        /// The error number.
        source: Errno,
    },
    /// A directory could not be opened or made.
    #[error("failed to open {path}: {source}")]
    Open {
        /// Which one.
        path: PathBuf,
        /// The error number.
        source: Errno,
    },
    /// Flattening a chain that is too deep for one mount failed.
    #[error("failed to flatten the layers below {snapshot}: {message}")]
    Flatten {
        /// Top of the part that was to be flattened.
        snapshot: String,
        /// Why.
        message: String,
    },
}

/// A root directory that shows a chain of layers as one tree. Holds the layers while it lives.
#[derive(Debug)]
pub struct View {
    fd: OwnedFd,
    _held: Vec<SnapshotRef>,
}

impl View {
    /// The root directory, good as the first argument of `openat2`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A read-only view of `layers`, bottom first (at most what one overlay mount takes, see
    /// [`crate::flat::chain`]). `empty` is an empty directory on the same file system.
    pub fn read_only(layers: Vec<SnapshotRef>, empty: &Path) -> Result<Self, ViewError> {
        let mut lowers: Vec<PathBuf> = layers.iter().rev().map(SnapshotRef::dir).collect();
        if lowers.len() < 2 {
            // The kernel wants two lower directories where there is no upper one.
            lowers.push(empty.to_owned());
        }
        Ok(Self { fd: mount_overlay(&lowers, None)?, _held: layers })
    }

    /// A view of `layers`, bottom first, whose changes go to `upper`; `work` is overlay's scratch directory
    /// beside it. Without layers it is `upper` itself.
    pub fn writable(layers: Vec<SnapshotRef>, upper: &Path, work: &Path) -> Result<Self, ViewError> {
        if layers.is_empty() {
            return Ok(Self { fd: open_dir(upper)?, _held: layers });
        }
        let lowers: Vec<PathBuf> = layers.iter().rev().map(SnapshotRef::dir).collect();
        Ok(Self { fd: mount_overlay(&lowers, Some((upper, work)))?, _held: layers })
    }

    /// A plain directory as a view, for trees that are known to hold no whiteouts.
    pub fn directory(path: &Path, held: Vec<SnapshotRef>) -> Result<Self, ViewError> {
        Ok(Self { fd: open_dir(path)?, _held: held })
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, ViewError> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| ViewError::Open { path: path.to_owned(), source })
}

/// Mounts an overlay that is attached nowhere and returns its root. `lowers` come top first.
///
/// Options are the ones that keep the upper directory a plain layer: no redirects, no
/// metadata-only copies, no index; `volatile` because committing must not sync the file system.
pub fn mount_overlay(lowers: &[PathBuf], upper_work: Option<(&Path, &Path)>) -> Result<OwnedFd, ViewError> {
    let layers = lowers.len();
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|source| ViewError::Mount {
        call: "fsopen",
        layers,
        detail: String::new(),
        source,
    })?;
    let fail = |call: &'static str| {
        let fs = fs.as_fd();
        move |source: Errno| ViewError::Mount { call, layers, detail: kernel_log(fs), source }
    };
    fsconfig_set_string(fs.as_fd(), "source", "kiln").map_err(fail("source"))?;
    for (key, value) in [("redirect_dir", "off"), ("metacopy", "off"), ("index", "off"), ("xino", "off")] {
        fsconfig_set_string(fs.as_fd(), key, value).map_err(fail(key))?;
    }
    // Directories opened for long values stay open until the mount exists.
    let mut opened = Vec::new();
    let mut set_dir = |key: &'static str, path: &Path| -> Result<(), ViewError> {
        if path.as_os_str().len() <= FSCONFIG_VALUE_MAX {
            return fsconfig_set_string(fs.as_fd(), key, path).map_err(fail(key));
        }
        let dir = open_dir(path)?;
        let alias = format!("/proc/self/fd/{}", dir.as_raw_fd());
        opened.push(dir);
        fsconfig_set_string(fs.as_fd(), key, alias.as_str()).map_err(fail(key))
    };
    for lower in lowers {
        set_dir("lowerdir+", lower)?;
    }
    let mut attrs = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    match upper_work {
        Some((upper, work)) => {
            set_dir("upperdir", upper)?;
            set_dir("workdir", work)?;
            fsconfig_set_flag(fs.as_fd(), "volatile").map_err(fail("volatile"))?;
        }
        None => attrs |= MountAttrFlags::MOUNT_ATTR_RDONLY,
    }
    fsconfig_create(fs.as_fd()).map_err(fail("create"))?;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attrs).map_err(fail("fsmount"))
}

/// What the kernel has to say about a failed mount; it hands out one message per read.
fn kernel_log(fs: BorrowedFd<'_>) -> String {
    let mut text = String::new();
    let mut buffer = [0u8; 512];
    while let Ok(n) = rustix::io::read(fs, &mut buffer[..]) {
        if n == 0 {
            break;
        }
        text.push_str("; ");
        text.push_str(String::from_utf8_lossy(&buffer[..n]).trim());
    }
    text
}
