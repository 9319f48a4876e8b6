//! Keeps chains of layers within what one overlay mount takes.
//!
//! The kernel stacks at most 500 lower directories. A longer chain gets the files of its lower part
//! gathered (by hard links, so no content is copied) in one directory that stands for them. It is
//! only a shortcut for mounting: the chain itself, its hashes and its blobs never see it.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;

use kiln_cache::layerview::OPAQUE;
use kiln_cache::{RecordType, SnapshotMeta, SnapshotRef, Snapshots};
use rustix::fs::{Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::linktree::overlay_onto;
use crate::ops::file::root::open_root;
use crate::view::ViewError;

/// Layers that are mounted as they are; more are gathered. Far below what the kernel takes, because the time of
/// a mount grows with its layers.
const MAX_LAYERS: usize = 128;
/// How many layers one gathered directory stands for.
const GATHERED: usize = 96;
/// Name under which a layer remembers the directory that stands for it and all below.
const FLAT_KEY: &str = "flat";

/// The layers to mount for `top`, bottom first; short enough for one overlay. Blocking.
pub(crate) fn chain(snapshots: &Snapshots, top: &SnapshotRef) -> Result<Vec<SnapshotRef>, ViewError> {
    let layers = top.layers();
    if layers.len() <= MAX_LAYERS {
        return Ok(layers);
    }
    // A merge is no chain of parents: what stands for a layer there may not stand for it elsewhere.
    let linear = layers.windows(2).all(|pair| pair[1].parent().as_ref() == Some(&pair[0]));
    let mut bottom: Option<SnapshotRef> = None;
    let mut rest = &layers[..];
    while rest.len() + usize::from(bottom.is_some()) > MAX_LAYERS {
        let (part, above) = rest.split_at(GATHERED);
        let last = &part[GATHERED - 1];
        let known = if linear { find(snapshots, last) } else { None };
        let flat = match known {
            Some(flat) => flat,
            None => gather(snapshots, bottom.as_ref(), part, last)?,
        };
        if linear {
            // Only a shortcut: without the note it is gathered again.
            let _ = last.set_kv(FLAT_KEY, flat.id().as_bytes());
        }
        bottom = Some(flat);
        rest = above;
    }
    Ok(bottom.into_iter().chain(rest.iter().cloned()).collect())
}

fn find(snapshots: &Snapshots, layer: &SnapshotRef) -> Option<SnapshotRef> {
    let id = layer.kv(FLAT_KEY).ok()??;
    snapshots.get(std::str::from_utf8(&id).ok()?).ok()?
}

fn gather(
    snapshots: &Snapshots,
    below: Option<&SnapshotRef>,
    layers: &[SnapshotRef],
    top: &SnapshotRef,
) -> Result<SnapshotRef, ViewError> {
    let fail = |message: String| ViewError::Flatten { snapshot: top.id().to_owned(), message };
    let staged = snapshots.stage(None).map_err(|err| fail(err.to_string()))?;
    let open = |path: &std::path::Path| {
        open_root(path).map_err(|source| ViewError::Open { path: path.to_owned(), source })
    };
    let root = open(staged.fs())?;
    for layer in below.into_iter().chain(layers) {
        let dir = open(&layer.dir())?;
        overlay_onto(&dir, &root).map_err(|errno| fail(format!("layer {}: {errno}", layer.id())))?;
    }
    let meta = SnapshotMeta::of_type(RecordType::Internal, format!("flattened layers up to {}", top.id()));
    let flat = snapshots.commit(staged, meta).map_err(|err| fail(err.to_string()))?;
    for layer in below.into_iter().chain(layers) {
        layer.remeasure().map_err(|err| fail(err.to_string()))?;
    }
    Ok(flat)
}

/// Whether a directory of a layer hides what is below it.
pub(crate) fn is_opaque(dir: BorrowedFd<'_>) -> bool {
    OPAQUE.iter().any(|name| {
        let mut value = [0u8; 1];
        matches!(rustix::fs::fgetxattr(dir, *name, &mut value[..]), Ok(1)) && value == *b"y"
    })
}

/// A directory looks as its uppermost layer has it.
pub(crate) fn copy_attributes(src: BorrowedFd<'_>, dst: BorrowedFd<'_>) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(src)?;
    rustix::fs::fchown(dst, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(dst, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let mut list = vec![0u8; 64 << 10];
    if let Ok(len) = rustix::fs::flistxattr(src, &mut list[..]) {
        let mut value = vec![0u8; 64 << 10];
        for name in list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let text = String::from_utf8_lossy(name);
            if text.starts_with("trusted.overlay.") || text.starts_with("user.overlay.") {
                continue;
            }
            let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(name);
            let len = rustix::fs::fgetxattr(src, name, &mut value[..])?;
            rustix::fs::fsetxattr(dst, name, &value[..len], XattrFlags::empty())?;
        }
    }
    let time = Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ };
    rustix::fs::futimens(dst, &Timestamps { last_access: time, last_modification: time })
}
