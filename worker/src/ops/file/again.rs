//! Copies of a client's directory that were made before, of a former state of it: the layer that such a copy made is
//! linked, and only what changed since is copied again. Owns the notes about copies that go from one snapshot of the
//! directory to the next.
//!
//! Two layers that share a file this way have it at the same path, and both come from the same action on the same base.
//! So wherever both are seen at once one hides the other, and nobody meets one file under two names.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use kiln_cache::{RecordType, Ref, SnapshotRef, Snapshots, Staged, StoreError};
use kiln_proto::pattern::has_wildcard;
use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;
use prost::Message;
use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::plan::{Operand, Step};
use super::root::{clean, descend, lstat, open_root, remove_all};
use super::transfer::OWN_NAMES;
use crate::linktree;

/// Name under which a snapshot of a client's directory has its notes.
const NOTES: &str = "copies";
/// With more changes than this a copy is made anew.
const MAX_CHANGED: usize = 2_000;
/// Copies that are remembered, the last ones.
const MAX_NOTES: usize = 8;

/// Held while a snapshot's notes are added to.
static NOTING: Mutex<()> = Mutex::new(());

/// A copy that was made.
#[derive(Clone, PartialEq, prost::Message)]
struct Note {
    /// Of the action and all that it depends on beside the directory.
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    /// The snapshot that it made.
    #[prost(string, tag = "2")]
    result: String,
    /// What has changed in the directory since.
    #[prost(bytes = "vec", repeated, tag = "3")]
    changed: Vec<Vec<u8>>,
}

/// The copies that were made of a client's directory.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Notes {
    #[prost(message, repeated, tag = "1")]
    notes: Vec<Note>,
}

impl Notes {
    /// Those of a snapshot.
    pub(crate) fn of(snapshot: &SnapshotRef) -> Self {
        let found = snapshot.kv(NOTES).ok().flatten();
        found.and_then(|bytes| Self::decode(bytes.as_slice()).ok()).unwrap_or_default()
    }

    /// Paths that changed until the next snapshot.
    pub(crate) fn add<'a>(&mut self, changed: impl Iterator<Item = &'a [u8]> + Clone) {
        for note in &mut self.notes {
            let all: BTreeSet<_> =
                note.changed.drain(..).chain(changed.clone().map(<[u8]>::to_vec)).collect();
            note.changed = all.into_iter().collect();
        }
        self.notes.retain(|note| note.changed.len() <= MAX_CHANGED);
    }

    /// Keeps them with the next snapshot. Without them its copies are made anew.
    pub(crate) fn keep(&self, snapshot: &SnapshotRef) {
        if let Err(error) = snapshot.set_kv(NOTES, &self.encode_to_vec()) {
            tracing::debug!(%error, "copies of a directory are not remembered");
        }
    }
}

/// The paths below a copy's source that are copied; no others are.
#[derive(Debug, Default)]
pub(crate) struct Only(BTreeSet<Vec<u8>>);

impl Only {
    pub(super) fn has(&self, path: &[u8]) -> bool {
        self.0.contains(path)
    }

    /// Whether one of them is this directory or below it.
    pub(super) fn leads_on(&self, dir: &[u8]) -> bool {
        let below = [dir, b"/"].concat();
        self.has(dir) || self.0.range(below.clone()..).next().is_some_and(|path| path.starts_with(&below))
    }
}

/// A copy that can be noted, and perhaps was.
pub(super) struct Repeat<'a> {
    action: &'a pb::FileActionCopy,
    key: Vec<u8>,
    source: SnapshotRef,
    former: Option<Note>,
}

impl<'a> Repeat<'a> {
    /// The operation's only action, if it copies a client's directory as it is.
    pub(super) fn of(
        action: &'a pb::FileAction,
        step: &Step,
        resolve: impl Fn(Operand) -> Ref,
    ) -> Option<Self> {
        let Some(Action::Copy(copy)) = &action.action else { return None };
        let plain = copy.dir_copy_contents
            && !copy.attempt_unpack_docker_compatibility
            && !(copy.allow_wildcard && has_wildcard(&copy.src))
            && [&copy.include_patterns, &copy.exclude_patterns, &copy.required_paths]
                .iter()
                .all(|patterns| patterns.is_empty());
        let source = resolve(step.source?)?;
        if !plain || source.meta().record_type != RecordType::LocalSource || source.layers().len() != 1 {
            return None;
        }
        let mut hasher = blake3::Hasher::new();
        for operand in [Some(step.base), step.user, step.group] {
            let id = operand.and_then(&resolve).map_or(String::new(), |input| input.id().to_owned());
            hasher.update(&(id.len() as u64).to_le_bytes()).update(id.as_bytes());
        }
        let key = hasher.update(&action.encode_to_vec()).finalize().as_bytes().to_vec();
        let former = Notes::of(&source).notes.into_iter().find(|note| note.key == key);
        Some(Self { action: copy, key, source, former })
    }

    /// The client's directory.
    pub(super) fn source(&self) -> &SnapshotRef {
        &self.source
    }

    /// Whether such a copy was made before.
    pub(super) fn is_known(&self) -> bool {
        self.former.is_some()
    }

    /// Fills a staged layer with what the former copy made and is still right; what is left to copy is the answer.
    /// `None`, and the layer is not to be used, if there was none, or if more depends on the changes than their own
    /// paths.
    pub(super) fn prepare(&self, snapshots: &Snapshots, staged: &Staged) -> Option<(SnapshotRef, Only)> {
        let former = self.former.as_ref()?;
        let layer = snapshots.get(&former.result).ok().flatten().filter(SnapshotRef::is_filled)?;
        match self.fill(former, &layer, staged) {
            Ok(only) => only.map(|only| (layer, only)),
            Err(error) => {
                tracing::debug!(%error, "a copy is made anew");
                None
            }
        }
    }

    fn fill(&self, former: &Note, layer: &SnapshotRef, staged: &Staged) -> Result<Option<Only>, Errno> {
        let source = clean(&self.action.src);
        let within = source.trim_matches('/');
        let mut only = BTreeSet::new();
        for path in former.changed.iter().map(|path| Path::new(OsStr::from_bytes(path))) {
            // The source itself, or what leads to it.
            if Path::new(within).starts_with(path) {
                return Ok(None);
            }
            if let Ok(below) = path.strip_prefix(within) {
                only.insert(below.as_os_str().as_bytes().to_vec());
            }
        }
        let Some(from) = descend(&open_root(&self.source.dir())?, Path::new(within))? else {
            return Ok(None);
        };
        let to = open_root(staged.fs())?;
        linktree::link_layer(&open_root(&layer.dir())?, &to)?;
        let dest = clean(&self.action.dest);
        let Some(to) = descend(&to, Path::new(dest.trim_matches('/')))? else { return Ok(None) };
        for path in &only {
            let path = Path::new(OsStr::from_bytes(path));
            let Some(now) = find(&from, path)? else {
                remove(&to, path)?;
                continue;
            };
            // More names may be in the tree, and of those others may not have changed.
            if is(&now, FileType::RegularFile) && now.st_nlink > OWN_NAMES {
                return Ok(None);
            }
            let keeps = is(&now, FileType::Directory)
                && find(&to, path)?.is_some_and(|there| is(&there, FileType::Directory));
            if !keeps {
                remove(&to, path)?;
            }
        }
        Ok(Some(Only(only)))
    }

    /// Remembers what the copy made.
    pub(super) fn note(self, result: &SnapshotRef) -> Result<(), StoreError> {
        self.source.remeasure()?;
        let _noting = NOTING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut notes = Notes::of(&self.source);
        notes.notes.retain(|note| note.key != self.key);
        notes.notes.push(Note { key: self.key, result: result.id().to_owned(), changed: Vec::new() });
        let surplus = notes.notes.len().saturating_sub(MAX_NOTES);
        notes.notes.drain(..surplus);
        notes.keep(&self.source);
        Ok(())
    }
}

fn is(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
}

/// What is at a path, through no link.
fn find(root: &OwnedFd, path: &Path) -> Result<Option<Stat>, Errno> {
    match (descend(root, path.parent().unwrap_or(Path::new("")))?, path.file_name()) {
        (Some(dir), Some(name)) => lstat(dir.as_fd(), name),
        _ => Ok(None),
    }
}

fn remove(root: &OwnedFd, path: &Path) -> Result<(), Errno> {
    match (descend(root, path.parent().unwrap_or(Path::new("")))?, path.file_name()) {
        (Some(dir), Some(name)) => remove_all(dir.as_fd(), name),
        _ => Ok(()),
    }
}
