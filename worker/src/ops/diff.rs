//! The diff operation: what changed from one tree to another, as a layer that can be merged.
//!
//! Where the lower tree is part of the upper one's chain the layers above it are the answer. Otherwise
//! both trees are walked together: content that differs is copied, what is gone becomes a whiteout.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_cache::{Ref, SnapshotMeta, SnapshotRef};
use kiln_proto::pb;
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::BuildContext;
use super::file::FileError;
use super::file::root::{Root, lstat, open_child, read_names};
use super::file::transfer::Transfer;
use super::keys::KeyBuilder;
use crate::registry::Credentials;
use crate::worker::{Layers, Worker};

/// A diff operation of one vertex.
pub(crate) struct DiffOp {
    worker: Arc<Worker>,
    credentials: Arc<dyn Credentials>,
    lower: Option<usize>,
    upper: Option<usize>,
    name: String,
}

impl DiffOp {
    pub(crate) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        op: &pb::DiffOp,
        inputs: usize,
        name: &str,
    ) -> Result<Self, OpError> {
        let side = |input: Option<i64>| super::operand(input.unwrap_or(-1), inputs);
        let lower = side(op.lower.as_ref().map(|lower| lower.input))?;
        let upper = side(op.upper.as_ref().map(|upper| upper.input))?;
        let credentials = context.credentials.clone();
        Ok(Self { worker, credentials, lower, upper, name: name.into() })
    }
}

impl Op<Ref> for DiffOp {
    fn known_map(&self) -> Option<CacheMap> {
        let mut key = KeyBuilder::new("kiln.diff.v1");
        for (side, index) in [("lower", self.lower), ("upper", self.upper)] {
            key.part(format!("diff {side}"), index.map_or("scratch".into(), |index| index.to_string()));
        }
        Some(key.finish(Vec::new(), true))
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move {
            let side = |index: Option<usize>| index.and_then(|index| inputs.get(index).cloned().flatten());
            let (lower, upper) = (side(self.lower), side(self.upper));
            if lower == upper {
                return Ok(vec![None]);
            }
            let Some(below) = &lower else { return Ok(vec![upper]) };
            let layers = self.worker.layers().clone();
            if let Some(above) = upper.as_ref().and_then(|upper| layers_above(below, upper)) {
                let meta = SnapshotMeta::new(&self.name);
                let stack =
                    layers.snapshots().stack(&above, meta).map_err(|err| OpError::new(err.to_string()))?;
                return Ok(vec![Some(stack)]);
            }
            self.worker.materialize_all(&inputs, &self.credentials, &ctx.progress).await?;
            let cancel = CancellationToken::new();
            let _cancelled_when_dropped = cancel.clone().drop_guard();
            let name = self.name.clone();
            let run = move || compute(&layers, &lower, &upper, &name, &cancel);
            let result = self.worker.on_files(run).await;
            let result = result.map_err(|err| OpError::new(format!("diff failed: {err}")))?;
            Ok(vec![Some(result.map_err(|err| OpError::new(err.to_string()))?)])
        })
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}

/// The layers of `upper` that stand on exactly those of `lower`.
fn layers_above(lower: &SnapshotRef, upper: &SnapshotRef) -> Option<Vec<SnapshotRef>> {
    let (below, all) = (lower.layers(), upper.layers());
    let above = all.strip_prefix(&below[..])?;
    (!above.is_empty()).then(|| above.to_vec())
}

fn compute(
    layers: &Layers,
    lower: &Ref,
    upper: &Ref,
    name: &str,
    cancel: &CancellationToken,
) -> Result<SnapshotRef, FileError> {
    let text = |err: &dyn std::fmt::Display| FileError::Text(err.to_string());
    let (old, new) =
        (layers.view(lower).map_err(|err| text(&err))?, layers.view(upper).map_err(|err| text(&err))?);
    let staged = layers.snapshots().stage(None).map_err(|err| text(&err))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let out = rustix::fs::open(staged.fs(), flags, Mode::empty()).map_err(|errno| text(&errno))?;
    Walk { transfer: Transfer::default(), cancel }.run(Root(old.fd()), Root(new.fd()), out)?;
    layers.snapshots().commit(staged, SnapshotMeta::new(name)).map_err(|err| text(&err))
}

/// A pair of directories that exist on both sides (`old` is missing below new directories).
struct Frame {
    old: Option<OwnedFd>,
    new: OwnedFd,
    /// Its place in the result, made when something below it differs.
    out: Option<OwnedFd>,
    name: OsString,
    stat: Stat,
    names: std::vec::IntoIter<OsString>,
}

struct Walk<'a> {
    transfer: Transfer,
    cancel: &'a CancellationToken,
}

impl Walk<'_> {
    fn run(&mut self, old: Root<'_>, new: Root<'_>, out: OwnedFd) -> Result<(), FileError> {
        let failed = |errno: Errno| FileError::Text(format!("diff: {errno}"));
        let open = |root: Root<'_>| open_child(root.0, OsStr::new("."), OFlags::RDONLY | OFlags::DIRECTORY);
        let (old, new) = (open(old).map_err(failed)?, open(new).map_err(failed)?);
        let stat = rustix::fs::fstat(&new).map_err(failed)?;
        let names = both_names(Some(old.as_fd()), new.as_fd()).map_err(failed)?;
        let top = Frame { old: Some(old), new, out: Some(out), name: OsString::new(), stat, names };
        let mut stack = vec![top];
        while let Some(frame) = stack.last_mut() {
            if self.cancel.is_cancelled() {
                return Err(FileError::Cancelled);
            }
            let Some(name) = frame.names.next() else {
                let frame = stack.pop();
                if let Some(Frame { out: Some(out), new, stat, .. }) = &frame {
                    self.transfer.style().attributes(stat, new.as_fd(), out.as_fd()).map_err(failed)?;
                }
                continue;
            };
            if let Some(below) = self.entry(&mut stack, name).map_err(failed)? {
                stack.push(below);
            }
        }
        Ok(())
    }

    /// Compares one name; a directory to be walked is answered.
    fn entry(&mut self, stack: &mut [Frame], name: OsString) -> Result<Option<Frame>, Errno> {
        let Some(frame) = stack.last() else { return Ok(None) };
        let before = match &frame.old {
            Some(old) => lstat(old.as_fd(), &name)?,
            None => None,
        };
        let Some(after) = lstat(frame.new.as_fd(), &name)? else {
            let out = make_out(stack)?;
            rustix::fs::mknodat(out, &name, FileType::CharacterDevice, Mode::empty(), 0)?;
            return Ok(None);
        };
        let kind = |stat: &Stat| FileType::from_raw_mode(stat.st_mode);
        let new_dir = kind(&after) == FileType::Directory;
        let same_kind = before.as_ref().is_some_and(|before| kind(before) == kind(&after));
        if new_dir {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let new = open_child(frame.new.as_fd(), &name, flags)?;
            let old = match (&frame.old, same_kind) {
                (Some(old), true) => Some(open_child(old.as_fd(), &name, flags)?),
                _ => None,
            };
            let changed = match (&before, &old) {
                (Some(before), Some(old)) => {
                    !same_attributes(before, &after) || !same_xattrs(old.as_fd(), new.as_fd())
                }
                _ => true,
            };
            let names = both_names(old.as_ref().map(|old| old.as_fd()), new.as_fd())?;
            let mut below = Frame { old, new, out: None, name, stat: after, names };
            if changed {
                let parent = make_out(stack)?;
                below.out = Some(make_dir(parent, &below.name)?);
            }
            return Ok(Some(below));
        }
        if same_kind
            && let (Some(before), Some(old)) = (&before, &frame.old)
            && same_entry(before, old.as_fd(), &after, frame.new.as_fd(), &name)?
        {
            return Ok(None);
        }
        let new = rustix::io::fcntl_dupfd_cloexec(&frame.new, 0)?;
        make_out(stack)?;
        let path = || stack.iter().skip(1).map(|frame| frame.name.as_os_str()).collect();
        let root =
            stack.first().and_then(|frame| frame.out.as_ref()).map(|fd| fd.as_fd()).ok_or(Errno::NOENT)?;
        let out =
            stack.last().and_then(|frame| frame.out.as_ref()).map(|fd| fd.as_fd()).ok_or(Errno::NOENT)?;
        let done = self.transfer.leaf(new.as_fd(), &name, &after, root, out, path);
        done.map(|()| None).map_err(|(_, errno)| errno)
    }
}

/// The output directory of the topmost frame, made with its parents where they are missing.
fn make_out(stack: &mut [Frame]) -> Result<BorrowedFd<'_>, Errno> {
    for depth in 1..stack.len() {
        if stack[depth].out.is_none() {
            let parent = stack[depth - 1].out.as_ref().ok_or(Errno::NOENT)?;
            stack[depth].out = Some(make_dir(parent.as_fd(), &stack[depth].name)?);
        }
    }
    stack.last().and_then(|frame| frame.out.as_ref()).map(|fd| fd.as_fd()).ok_or(Errno::NOENT)
}

fn make_dir(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
    open_child(parent, name, OFlags::RDONLY | OFlags::DIRECTORY)
}

fn both_names(
    old: Option<BorrowedFd<'_>>,
    new: BorrowedFd<'_>,
) -> Result<std::vec::IntoIter<OsString>, Errno> {
    let mut names = read_names(new)?;
    if let Some(old) = old {
        names.extend(read_names(old)?);
        names.sort_unstable();
        names.dedup();
    }
    Ok(names.into_iter())
}

fn same_attributes(a: &Stat, b: &Stat) -> bool {
    (a.st_mode, a.st_uid, a.st_gid) == (b.st_mode, b.st_uid, b.st_gid)
}

fn same_xattrs(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    super::file::transfer::read_xattrs(a) == super::file::transfer::read_xattrs(b)
}

/// Whether two things of one kind that are no directories are the same.
fn same_entry(
    before: &Stat,
    old: BorrowedFd<'_>,
    after: &Stat,
    new: BorrowedFd<'_>,
    name: &OsStr,
) -> Result<bool, Errno> {
    if !same_attributes(before, after) || before.st_size != after.st_size || before.st_rdev != after.st_rdev {
        return Ok(false);
    }
    let times = |stat: &Stat| (stat.st_mtime, stat.st_mtime_nsec as i64);
    match FileType::from_raw_mode(after.st_mode) {
        FileType::Symlink => {
            let read = |dir| rustix::fs::readlinkat(dir, name, Vec::new());
            Ok(read(old)? == read(new)?)
        }
        FileType::RegularFile if times(before) != times(after) => Ok(false),
        // All layers are on one file system, whose inode numbers both views show.
        FileType::RegularFile if before.st_ino == after.st_ino => Ok(true),
        FileType::RegularFile => {
            let open = |dir| open_child(dir, name, OFlags::RDONLY);
            let (old, new) = (open(old)?, open(new)?);
            Ok(same_xattrs(old.as_fd(), new.as_fd()) && same_content(File::from(old), File::from(new)))
        }
        _ => Ok(true),
    }
}

/// Unreadable content counts as different: it is then copied, and fails there with its reason.
fn same_content(mut a: File, mut b: File) -> bool {
    let (mut left, mut right) = (vec![0u8; 64 << 10], vec![0u8; 64 << 10]);
    loop {
        let Ok(count) = a.read(&mut left) else { return false };
        if count == 0 {
            return matches!(b.read(&mut right[..1]), Ok(0));
        }
        if b.read_exact(&mut right[..count]).is_err() || left[..count] != right[..count] {
            return false;
        }
    }
}
