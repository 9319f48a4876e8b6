//! The snapshots that show a client's directory: each is made of the one before it where nothing else uses that, else by
//! linking all files of the copy. Owns what the copy remembers of its snapshot; knows nothing of sessions. Blocking.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_cache::contenthash::{self, Files};
use kiln_cache::{MutableDir, RecordType, SnapshotMeta, SnapshotRef, Staged};
use kiln_session::fsutil::{Change, ChangeKind};
use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use crate::flat;
use crate::linktree;
use crate::ops::file::again::Notes;
use crate::ops::file::root::{descend, lstat, open_root, remove_all};
use crate::worker::Layers;

/// Name under which a directory remembers the snapshot that shows its present state.
const SNAPSHOT: &str = "snapshot";
/// With more changes than this, all files are linked anew.
const MAX_CHANGES: usize = 10_000;

/// The snapshot that showed the directory's state when it was last brought up to date.
pub(super) fn former(layers: &Layers, dir: &MutableDir) -> Result<Option<SnapshotRef>, String> {
    let id = dir.kv(SNAPSHOT).map_err(text)?.and_then(|id| String::from_utf8(id).ok());
    match id.filter(|id| !id.is_empty()) {
        Some(id) => layers.snapshots().get(&id).map_err(text),
        None => Ok(None),
    }
}

/// To be called before anything is changed in the directory.
pub(super) fn forget(dir: &MutableDir) -> std::io::Result<()> {
    dir.set_kv(SNAPSHOT, b"").map_err(std::io::Error::other)
}

/// A snapshot of the directory's present state. `former` showed it before `changes` were made.
pub(super) fn snapshot(
    layers: &Layers,
    dir: &MutableDir,
    former: Option<SnapshotRef>,
    changes: &[Change],
    description: &str,
) -> Result<SnapshotRef, String> {
    let mut digests = match &former {
        Some(former) => contenthash::known_files(former).map_err(text)?,
        None => Files::new(),
    };
    note(&mut digests, changes);
    let mut copies = former.as_ref().map(Notes::of).unwrap_or_default();
    let changed = changes.iter().filter(|change| change.kind != ChangeKind::Touched);
    copies.add(changed.map(|change| change.path.as_slice()));
    let id = former.map(|former| former.id().to_owned());
    let advanced = match id.filter(|_| changes.len() <= MAX_CHANGES) {
        Some(id) => advance(layers, dir, &id, changes).unwrap_or_else(|error| {
            tracing::warn!(error, "a client's directory is linked anew");
            None
        }),
        None => None,
    };
    let staged = match advanced {
        Some(staged) => staged,
        None => {
            let staged = layers.snapshots().stage(None).map_err(text)?;
            linktree::overlay_onto(&open(dir.path())?, &open(staged.fs())?).map_err(text)?;
            staged
        }
    };
    let meta = SnapshotMeta::of_type(RecordType::LocalSource, description);
    let snapshot = layers.snapshots().commit(staged, meta).map_err(text)?;
    contenthash::record_files(&snapshot, digests).map_err(text)?;
    copies.keep(&snapshot);
    dir.set_kv(SNAPSHOT, snapshot.id().as_bytes()).map_err(text)?;
    Ok(snapshot)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn open(path: &Path) -> Result<OwnedFd, String> {
    open_root(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Brings what is known of a directory up to date with changes.
fn note(digests: &mut Files, changes: &[Change]) {
    let changed = changes.iter().filter(|change| change.kind != ChangeKind::Touched);
    // A directory whose attributes changed loses nothing but time by this.
    contenthash::forget_changed(digests, &changed.clone().map(|change| change.path.as_slice()).collect());
    digests.extend(changed.filter_map(|change| Some((change.path.clone(), change.digest?))));
}

/// The former snapshot's directory with the changes made in it, too; `None` if it is in use.
fn advance(
    layers: &Layers,
    dir: &MutableDir,
    former: &str,
    changes: &[Change],
) -> Result<Option<Staged>, String> {
    let Some(staged) = layers.snapshots().take_over(former).map_err(text)? else { return Ok(None) };
    let pair = Pair { from: open(dir.path())?, to: open(staged.fs())? };
    let mut dirs = BTreeSet::new();
    for change in changes {
        let path = Path::new(OsStr::from_bytes(&change.path));
        pair.entry(path).map_err(|errno| format!("{}: {errno}", path.display()))?;
        dirs.extend(path.ancestors().map(Path::to_owned));
    }
    // What is below comes first: changes in a directory change its time.
    for path in dirs.iter().rev() {
        pair.attributes(path).map_err(|errno| format!("{}: {errno}", path.display()))?;
    }
    Ok(Some(staged))
}

/// The copy, and the snapshot that is to look like it.
struct Pair {
    from: OwnedFd,
    to: OwnedFd,
}

impl Pair {
    /// Makes one entry what it is in the copy. Neither tree has a link in the place of a directory that the other
    /// has, once the changes before this one are made.
    fn entry(&self, path: &Path) -> Result<(), Errno> {
        let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else { return Ok(()) };
        let Some(from) = descend(&self.from, parent)? else { return Ok(()) };
        let Some(to) = descend(&self.to, parent)? else { return Err(Errno::NOENT) };
        let is_dir = |stat: &rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        match lstat(from.as_fd(), name)? {
            None => remove_all(to.as_fd(), name),
            Some(stat) if is_dir(&stat) => match lstat(to.as_fd(), name)? {
                Some(stat) if is_dir(&stat) => Ok(()),
                _ => {
                    remove_all(to.as_fd(), name)?;
                    rustix::fs::mkdirat(&to, name, Mode::from_raw_mode(0o700))
                }
            },
            Some(_) => {
                remove_all(to.as_fd(), name)?;
                rustix::fs::linkat(&from, name, &to, name, AtFlags::empty())
            }
        }
    }

    /// Gives a directory the attributes that it has in the copy, if it is one.
    fn attributes(&self, path: &Path) -> Result<(), Errno> {
        match (descend(&self.from, path)?, descend(&self.to, path)?) {
            (Some(from), Some(to)) => flat::copy_attributes(from.as_fd(), to.as_fd()),
            _ => Ok(()),
        }
    }
}
