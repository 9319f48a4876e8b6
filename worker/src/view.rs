//! Merged views of layer chains, as file descriptors of detached mounts.
//!
//! This module only mounts; it does not know what the layers mean and never changes a committed one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_cache::SnapshotRef;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::mount::{self, Namespace};
use crate::sandbox::RootSource;

/// Layers and directories of clients may hold device nodes; whoever works on a view must not reach a device.
const HARMLESS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV.union(MountAttrFlags::MOUNT_ATTR_NOSUID);

/// Why a view could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The layers could not be mounted.
    #[error("failed to mount {layers} layers: {source}")]
    Mount {
        /// How many there were.
        layers: usize,
        /// The cause, with what the kernel wrote about it.
        source: io::Error,
    },
    /// A directory could not be opened or made.
    #[error("failed to open {path}: {source}")]
    Open {
        /// Which one.
        path: PathBuf,
        /// The error number.
        source: Errno,
    },
    /// A directory could not be mounted.
    #[error("failed to mount {path}: {source}")]
    Directory {
        /// Which one.
        path: PathBuf,
        /// The cause.
        source: io::Error,
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
        Ok(Self { fd: overlay(&lowers, None, MountAttrFlags::MOUNT_ATTR_RDONLY)?, _held: layers })
    }

    /// A view of `layers`, bottom first, whose changes go to `upper`; `work` is overlay's scratch directory
    /// beside it. Without layers it is `upper` itself.
    pub fn writable(layers: Vec<SnapshotRef>, upper: &Path, work: &Path) -> Result<Self, ViewError> {
        if layers.is_empty() {
            return Self::directory(upper, layers);
        }
        let lowers: Vec<PathBuf> = layers.iter().rev().map(SnapshotRef::dir).collect();
        Ok(Self { fd: overlay(&lowers, Some((upper, work)), MountAttrFlags::empty())?, _held: layers })
    }

    /// A plain directory as a view, for trees that are known to hold no whiteouts.
    pub fn directory(path: &Path, held: Vec<SnapshotRef>) -> Result<Self, ViewError> {
        let failed = |source| ViewError::Directory { path: path.to_owned(), source };
        let fd = mount::clone_tree(path, false).map_err(failed)?;
        mount::set_attrs(fd.as_fd(), HARMLESS, false).map_err(failed)?;
        Ok(Self { fd, _held: held })
    }

    /// The directory at `path` itself, not a mount of its own: files can be linked from and to it.
    ///
    /// # Errors
    /// If it can't be opened.
    pub(crate) fn plain(path: &Path, held: Vec<SnapshotRef>) -> Result<Self, ViewError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|source| ViewError::Open { path: path.to_owned(), source })?;
        Ok(Self { fd, _held: held })
    }

    /// A read-only view of what a sandbox has mounted, as it is now. `empty` is as for [`Self::read_only`]. The
    /// caller holds the layers.
    pub(crate) fn of(source: &RootSource, empty: &Path) -> Result<Self, ViewError> {
        match source {
            RootSource::Dir(path) => Self::directory(path, Vec::new()),
            RootSource::Overlay { lowers, upper, .. } => {
                let mut lowers: Vec<PathBuf> = upper.iter().chain(lowers).cloned().collect();
                if lowers.len() < 2 {
                    lowers.push(empty.to_owned());
                }
                Ok(Self { fd: overlay(&lowers, None, MountAttrFlags::MOUNT_ATTR_RDONLY)?, _held: Vec::new() })
            }
        }
    }
}

fn overlay(
    lowers: &[PathBuf],
    upper: Option<(&Path, &Path)>,
    attrs: MountAttrFlags,
) -> Result<OwnedFd, ViewError> {
    let lowers: Vec<&Path> = lowers.iter().map(PathBuf::as_path).collect();
    mount::overlay(&lowers, upper, HARMLESS | attrs, Namespace::Shared)
        .map_err(|source| ViewError::Mount { layers: lowers.len(), source })
}
