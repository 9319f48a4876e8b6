//! What an opaque directory of a new layer hides, said name by name.
//!
//! An overlay marks a directory opaque that took the place of another one. In the layer's own place that is the same
//! as a whiteout for each name below. In a merge the layer stands on other layers too, whose files it never knew and
//! must not hide.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, Timespec, Timestamps};
use rustix::io::Errno;

use super::SnapshotRef;
use crate::error::{Result, StoreError};
use crate::fsx;
use crate::layerview::{self, LayerView, Node};

/// A directory of the layer that is still to be looked at.
struct Pending {
    /// Relative to the layer's root.
    path: PathBuf,
    /// What is below it and hidden, if it lies in an opaque directory.
    hidden: Option<Node>,
}

/// Replaces all opaque marks in the layer at `dir`, which is to stand on `parent`. Nobody may be using it.
pub(super) fn spell_out(dir: &Path, parent: &SnapshotRef) -> Result<()> {
    let failed = |path: &Path, errno: Errno| StoreError::io("unmark", dir.join(path), errno);
    let mut view = None;
    let mut pending = vec![Pending { path: PathBuf::new(), hidden: None }];
    while let Some(Pending { path, mut hidden }) = pending.pop() {
        let full = dir.join(&path);
        let fd = fsx::open_dir(rustix::fs::CWD, &full).map_err(|errno| failed(&path, errno))?;
        let names = fsx::names(&fd).map_err(|errno| failed(&path, errno))?;
        let marked =
            layerview::is_opaque(&full).map_err(|e| StoreError::io("read attributes of", &full, e))?;
        if marked {
            let view = match &view {
                Some(view) => view,
                None => view.insert(LayerView::of(parent)?),
            };
            hidden = below(view, &path)?;
        }
        let mut shown = Vec::new();
        if let (Some(hidden), Some(view)) = (&hidden, &view) {
            shown = view.children(hidden)?;
            let here: HashSet<&[u8]> = names.iter().map(|(name, _)| name.to_bytes()).collect();
            let gone = shown.iter().map(|(name, _)| &name[..]).filter(|name| !here.contains(name));
            hide(&fd, gone).map_err(|errno| failed(&path, errno))?;
        }
        if marked {
            unmark(&fd).map_err(|errno| failed(&path, errno))?;
        }
        for (name, kind) in names {
            if kind == FileType::Directory {
                let found = shown.binary_search_by(|(other, _)| other[..].cmp(name.to_bytes()));
                let hidden = found.ok().map(|at| shown[at].1.clone()).filter(Node::is_dir);
                pending.push(Pending { path: path.join(OsStr::from_bytes(name.to_bytes())), hidden });
            }
        }
    }
    Ok(())
}

/// The directory at a path without symlinks, if the tree has one there.
fn below(view: &LayerView, path: &Path) -> Result<Option<Node>> {
    let mut node = view.root()?;
    for name in path {
        match view.child(&node, name.as_bytes())? {
            Some(child) if child.is_dir() => node = child,
            _ => return Ok(None),
        }
    }
    Ok(Some(node))
}

/// Whites names out; the directory keeps its time.
fn hide<'a>(dir: &OwnedFd, names: impl Iterator<Item = &'a [u8]>) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(dir)?;
    for name in names {
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        rustix::fs::mknodat(dir, &name, FileType::CharacterDevice, Mode::empty(), 0)?;
    }
    let time = |seconds: i64, nanos: u64| Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
    let times = Timestamps {
        last_access: time(stat.st_atime as _, stat.st_atime_nsec as _),
        last_modification: time(stat.st_mtime as _, stat.st_mtime_nsec as _),
    };
    rustix::fs::futimens(dir, &times)
}

fn unmark(dir: impl AsFd) -> Result<(), Errno> {
    for name in layerview::OPAQUE {
        match rustix::fs::fremovexattr(&dir, name) {
            Ok(()) | Err(Errno::NODATA | Errno::NOTSUP | Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
