//! Applies a listing and file contents to a directory: what differs is replaced by rename, never changed in place,
//! so the old inodes may be linked from elsewhere. Synchronous; one thread owns a [`Receiver`].

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use kiln_proto::fsutil::Stat;
use kiln_proto::gomode;
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::fsops::Found;
use super::path::{self, quoted};
use super::{Progress, TransferError, fsops};

/// Files that a peer may keep open at once; senders interleave a handful.
const MAX_OPEN: usize = 256;

/// How long a file must have been as it is when it was received for its time to tell it from others, in nanoseconds.
const SETTLED_NS: i64 = 2_000_000_000;

/// What happens to entries of the directory that the transfer does not mention, and to those that look the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReceiveMode {
    /// The directory becomes equal to the listing: extras are deleted, entries with the same metadata are kept.
    #[default]
    Mirror,
    /// As `Mirror`, for a directory that may have been filled from another one: a file whose metadata another file
    /// could have by chance is requested too. See `settled`.
    MirrorWary,
    /// As `Mirror`, but every file's content is requested, whatever its metadata (wire: `local.differ=none`).
    MirrorAll,
    /// Entries are added or replaced, nothing is deleted, every file's content is requested.
    Merge,
}

/// Whether owners are taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ownership {
    /// Entries get the user and group that the sender names.
    #[default]
    Keep,
    /// Everything belongs to whoever receives it.
    Ignore,
}

/// What happened to an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It was added, or replaced by new content or another type.
    Written,
    /// It is gone, with all below it.
    Deleted,
    /// A directory's time was set, which alone is no change: it differed, or something in the directory changed.
    Touched,
}

/// One change to the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Path below the directory: whatever bytes the file system has as names.
    pub path: Vec<u8>,
    /// What happened to it.
    pub kind: ChangeKind,
    /// blake3 of a regular file's content that came with this transfer.
    pub digest: Option<[u8; 32]>,
}

/// How to receive.
#[derive(Default)]
pub struct ReceiveOptions {
    /// What to do with what is there.
    pub mode: ReceiveMode,
    /// Whether owners are taken over.
    pub ownership: Ownership,
    /// Told of the running count of bytes.
    pub progress: Option<Progress>,
    /// Called once, before anything is changed; nothing is if it fails.
    pub on_begin: Option<Box<dyn FnOnce() -> std::io::Result<()> + Send>>,
    /// Told of each change once it is made, on the receiving thread. Directories whose mode or owner only changed
    /// count as written.
    pub on_change: Option<Box<dyn FnMut(Change) + Send>>,
    /// Dropped when nothing writes to the directory any more, which may be after the transfer's future was dropped.
    pub guard: Option<Box<dyn Any + Send>>,
}

/// What a transfer changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// Entries in the listing.
    pub entries: u64,
    /// Entries added, replaced or deleted. Zero means the directory is what it was before.
    pub changes: u64,
    /// Bytes of file content received.
    pub bytes: u64,
}

impl Received {
    /// Whether the directory differs from what it was before.
    pub fn changed(&self) -> bool {
        self.changes > 0
    }
}

struct OpenDir {
    path: Vec<u8>,
    /// Names of the listing, kept where others may have to be deleted.
    seen: HashSet<Box<[u8]>>,
    /// It was there before the transfer, so it may hold something.
    existed: bool,
    /// Index of its metadata in `dirs`; the root has none.
    meta: Option<usize>,
}

struct DirMeta {
    stat: Stat,
    /// Its mode or owner must be set.
    fresh: bool,
    /// Its time must be set: it differs, or something directly in it changed. Alone that counts as no change.
    touched: bool,
}

struct Wanted {
    stat: Stat,
    meta: Option<usize>,
}

struct Writing {
    file: File,
    dir: OwnedFd,
    /// Of what was written so far, where somebody wants to know.
    hasher: Option<blake3::Hasher>,
}

/// The state of one receiving transfer.
pub(super) struct Receiver {
    root: OwnedFd,
    options: ReceiveOptions,
    received: Received,
    last: Option<Vec<u8>>,
    stack: Vec<OpenDir>,
    /// The open directory on top of the stack, when it was last needed.
    top: Option<(Vec<u8>, OwnedFd)>,
    /// The open parent of the file last written.
    parent: Option<(Vec<u8>, OwnedFd)>,
    dirs: Vec<DirMeta>,
    /// Hashes of the regular files' paths seen so far, for checking hard links.
    files: HashSet<u64>,
    hasher: RandomState,
    links: Vec<Wanted>,
    wanted: HashMap<u32, Wanted>,
    writing: HashMap<u32, Writing>,
    next_id: u32,
    listed: bool,
    temp_prefix: String,
}

impl Receiver {
    pub(super) fn new(root: OwnedFd, options: ReceiveOptions) -> Self {
        let top = OpenDir { path: Vec::new(), seen: HashSet::new(), existed: true, meta: None };
        Self {
            root,
            options,
            received: Received::default(),
            last: None,
            stack: vec![top],
            top: None,
            parent: None,
            dirs: Vec::new(),
            files: HashSet::new(),
            hasher: RandomState::new(),
            links: Vec::new(),
            wanted: HashMap::new(),
            writing: HashMap::new(),
            next_id: 0,
            listed: false,
            temp_prefix: format!(".kiln-{}-", crate::new_id()),
        }
    }

    /// Takes the next entry of the listing; returns its id if its content is wanted.
    pub(super) fn entry(&mut self, stat: Stat) -> Result<Option<u32>, TransferError> {
        if self.listed {
            return Err(TransferError::Protocol("entry after the end of the listing".into()));
        }
        path::check(&stat.path)?;
        if self.last.as_ref().is_some_and(|last| path::compare(last, &stat.path).is_ge()) {
            return Err(TransferError::Protocol(format!("{:?} is out of order", quoted(&stat.path))));
        }
        self.last = Some(stat.path.clone());
        let id = self.next_id;
        self.next_id = id.checked_add(1).ok_or_else(|| TransferError::Protocol("too many entries".into()))?;
        self.received.entries += 1;

        let (parent, name) = path::split(&stat.path);
        while self.stack.last().is_some_and(|dir| dir.path != parent) {
            self.leave()?;
        }
        let Some(dir) = self.stack.last_mut() else {
            return Err(TransferError::Protocol(format!(
                "{:?} comes without its directory",
                quoted(&stat.path)
            )));
        };
        let (existed, meta) = (dir.existed, dir.meta);
        if existed && self.options.mode != ReceiveMode::Merge {
            dir.seen.insert(name.into());
        }
        let name = name.to_owned();
        let parent = parent.to_owned();
        let found = if existed {
            let dir = open_cached(&self.root, &mut self.top, &parent)?;
            fsops::lstat(dir, &name).map_err(|error| TransferError::io("stat", &stat.path, error))?
        } else {
            None
        };
        let Some(posix) = gomode::to_posix(stat.mode) else {
            return Err(TransferError::Protocol(format!(
                "{:?} has the unknown mode {:#x}",
                quoted(&stat.path),
                stat.mode
            )));
        };
        match FileType::from_raw_mode(posix) {
            FileType::Directory => self.directory(stat, found, meta, &parent, &name)?,
            FileType::RegularFile if !stat.linkname.is_empty() => {
                path::check(&stat.linkname)?;
                if !self.files.contains(&self.hasher.hash_one(&stat.linkname)) {
                    return Err(TransferError::Protocol(format!(
                        "{:?} links to {:?}, which did not come before it",
                        quoted(&stat.path),
                        quoted(&stat.linkname)
                    )));
                }
                self.links.push(Wanted { stat, meta });
            }
            FileType::RegularFile => {
                self.files.insert(self.hasher.hash_one(&stat.path));
                let same = found.is_some_and(|found| self.same(&found, &stat, posix));
                let settled = || found.is_some_and(|found| settled(&found));
                let keep = match self.options.mode {
                    ReceiveMode::Mirror => same,
                    ReceiveMode::MirrorWary => same && settled(),
                    ReceiveMode::MirrorAll | ReceiveMode::Merge => false,
                };
                if keep {
                    return Ok(None);
                }
                self.wanted.insert(id, Wanted { stat, meta });
                return Ok(Some(id));
            }
            kind => {
                if !(found.is_some_and(|found| self.same(&found, &stat, posix))
                    && self.same_target(&stat, kind, &parent, &name)?)
                {
                    self.special(&stat, kind, posix, &parent, &name)?;
                    self.changed(stat.path, meta);
                }
            }
        }
        Ok(None)
    }

    /// Takes a piece of a requested file; an empty one ends it.
    pub(super) fn data(&mut self, id: u32, data: &[u8]) -> Result<(), TransferError> {
        let Some(wanted) = self.wanted.get(&id) else {
            return Err(TransferError::Protocol(format!("data for file {id}, which was not requested")));
        };
        let (parent, name) = path::split(&wanted.stat.path);
        let temp = format!("{}{id}", self.temp_prefix);
        if !self.writing.contains_key(&id) {
            if self.writing.len() >= MAX_OPEN {
                return Err(TransferError::Protocol(format!("more than {MAX_OPEN} files at once")));
            }
            begin(&mut self.options)?;
            let dir = open_cached(&self.root, &mut self.parent, parent)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let hash = self.options.on_change.is_some();
            let create = || -> Result<Writing, std::io::Error> {
                let file = fs::openat(dir, temp.as_str(), flags, Mode::from_raw_mode(0o600))?;
                Ok(Writing {
                    file: file.into(),
                    dir: dir.try_clone()?,
                    hasher: hash.then(blake3::Hasher::new),
                })
            };
            let writing = create().map_err(|error| TransferError::io("create", &wanted.stat.path, error))?;
            self.writing.insert(id, writing);
        }
        let Some(writing) = self.writing.get_mut(&id) else { return Ok(()) };
        if !data.is_empty() {
            self.received.bytes += data.len() as u64;
            if let Some(hasher) = &mut writing.hasher {
                hasher.update(data);
            }
            return writing
                .file
                .write_all(data)
                .map_err(|error| TransferError::io("write", &wanted.stat.path, error));
        }
        // The temporary file stays in `writing`, which cleans up, until the rename is done.
        dress(&writing.dir, temp.as_bytes(), &wanted.stat, self.options.ownership, self.options.mode)?;
        put(&writing.dir, &temp, name)
            .map_err(|error| TransferError::io("rename", &wanted.stat.path, error))?;
        let written = self.writing.remove(&id);
        let digest = written.and_then(|writing| writing.hasher).map(|hasher| *hasher.finalize().as_bytes());
        if let Some(Wanted { stat, meta }) = self.wanted.remove(&id) {
            self.note(Change { path: stat.path, kind: ChangeKind::Written, digest }, meta);
        }
        Ok(())
    }

    /// No more entries come.
    pub(super) fn end_of_listing(&mut self) -> Result<(), TransferError> {
        if self.listed {
            return Err(TransferError::Protocol("the listing ended twice".into()));
        }
        self.listed = true;
        while !self.stack.is_empty() {
            self.leave()?;
        }
        Ok(())
    }

    /// Whether the listing and all requested content have arrived.
    pub(super) fn is_complete(&self) -> bool {
        self.listed && self.wanted.is_empty()
    }

    /// Makes hard links and gives directories their modes and times, which need everything else in place.
    pub(super) fn finish(mut self) -> Result<Received, TransferError> {
        for link in std::mem::take(&mut self.links) {
            self.hard_link(&link.stat, link.meta)?;
        }
        for meta in std::mem::take(&mut self.dirs).into_iter().rev() {
            if !(meta.fresh || meta.touched) {
                continue;
            }
            let (parent, name) = path::split(&meta.stat.path);
            let dir = open_cached(&self.root, &mut self.parent, parent)?;
            if meta.fresh {
                dress(dir, name, &meta.stat, self.options.ownership, self.options.mode)?;
            } else {
                fs::utimensat(dir, name, &fsops::times(meta.stat.mod_time), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|error| TransferError::io("set times of", &meta.stat.path, error))?;
                if let Some(on_change) = &mut self.options.on_change {
                    on_change(Change { path: meta.stat.path, kind: ChangeKind::Touched, digest: None });
                }
            }
        }
        Ok(self.received)
    }

    fn directory(
        &mut self,
        stat: Stat,
        found: Option<Found>,
        parent_meta: Option<usize>,
        parent: &[u8],
        name: &[u8],
    ) -> Result<(), TransferError> {
        let existed = found.is_some_and(|found| found.kind() == FileType::Directory);
        let (mut fresh, mut touched) = (!existed, false);
        if let Some(found) = found.filter(|_| existed) {
            fresh = found.mode & 0o7777 != gomode::permissions(stat.mode) || !self.same_owner(&found, &stat);
            touched = found.mod_time != stat.mod_time;
        } else {
            begin(&mut self.options)?;
            let dir = open_cached(&self.root, &mut self.top, parent)?;
            let make = || -> Result<(), std::io::Error> {
                if found.is_some() {
                    fs::unlinkat(dir, name, AtFlags::empty())?;
                }
                Ok(fs::mkdirat(dir, name, Mode::from_raw_mode(0o700))?)
            };
            make().map_err(|error| TransferError::io("make directory", &stat.path, error))?;
        }
        if fresh {
            begin(&mut self.options)?;
            self.changed(stat.path.clone(), parent_meta.filter(|_| !existed));
        }
        let path = stat.path.clone();
        self.dirs.push(DirMeta { stat, fresh, touched });
        let meta = Some(self.dirs.len() - 1);
        self.stack.push(OpenDir { path, seen: HashSet::new(), existed, meta });
        Ok(())
    }

    fn special(
        &mut self,
        stat: &Stat,
        kind: FileType,
        posix: u32,
        parent: &[u8],
        name: &[u8],
    ) -> Result<(), TransferError> {
        begin(&mut self.options)?;
        let temp = format!("{}s", self.temp_prefix);
        let dir = open_cached(&self.root, &mut self.top, parent)?;
        let made = if kind == FileType::Symlink {
            fs::symlinkat(&stat.linkname, dir, temp.as_str())
        } else {
            let number = |n: i64| {
                u32::try_from(n).map_err(|_| {
                    TransferError::Protocol(format!("{:?} has an invalid device number", quoted(&stat.path)))
                })
            };
            let device = fs::makedev(number(stat.devmajor)?, number(stat.devminor)?);
            fs::mknodat(dir, temp.as_str(), kind, Mode::from_raw_mode(posix & 0o7777), device)
        };
        made.map_err(|error| TransferError::io("create", &stat.path, error))?;
        let placed =
            dress(dir, temp.as_bytes(), stat, self.options.ownership, self.options.mode).and_then(|()| {
                put(dir, &temp, name).map_err(|error| TransferError::io("rename", &stat.path, error))
            });
        if placed.is_err() {
            let _ = fs::unlinkat(dir, temp.as_str(), AtFlags::empty());
        }
        placed
    }

    fn hard_link(&mut self, stat: &Stat, meta: Option<usize>) -> Result<(), TransferError> {
        let failed = |error: std::io::Error| TransferError::io("link", &stat.path, error);
        let (from_parent, from_name) = path::split(&stat.linkname);
        let (parent, name) = path::split(&stat.path);
        let from = fsops::open_dir(self.root.as_fd(), from_parent).map_err(|error| failed(error.into()))?;
        begin(&mut self.options)?;
        let dir = open_cached(&self.root, &mut self.parent, parent)?;
        let source = fsops::lstat(&from, from_name).map_err(|error| failed(error.into()))?;
        let source = source.ok_or_else(|| failed(Errno::NOENT.into()))?;
        let found = fsops::lstat(dir, name).map_err(|error| failed(error.into()))?;
        if found.is_some_and(|found| found.inode == source.inode) {
            return Ok(());
        }
        let temp = format!("{}l", self.temp_prefix);
        fs::linkat(&from, from_name, dir, temp.as_str(), AtFlags::empty())
            .map_err(|error| failed(error.into()))?;
        put(dir, &temp, name).map_err(failed)?;
        self.changed(stat.path.clone(), meta);
        Ok(())
    }

    /// Leaves the directory on top of the stack: what the listing did not name is deleted.
    fn leave(&mut self) -> Result<(), TransferError> {
        let Some(dir) = self.stack.pop() else { return Ok(()) };
        if !dir.existed || self.options.mode == ReceiveMode::Merge {
            return Ok(());
        }
        let fd = fsops::open_dir(self.root.as_fd(), &dir.path)
            .map_err(|error| TransferError::io("open", &dir.path, error))?;
        let names = fsops::entries(&fd).map_err(|error| TransferError::io("read", &dir.path, error))?;
        for (name, _) in names {
            let bytes = name.to_bytes();
            if dir.seen.contains(bytes) || bytes.starts_with(self.temp_prefix.as_bytes()) {
                continue;
            }
            let path = path::join(&dir.path, bytes);
            begin(&mut self.options)?;
            fsops::remove_all(&fd, &name).map_err(|error| TransferError::io("remove", &path, error))?;
            self.note(Change { path, kind: ChangeKind::Deleted, digest: None }, dir.meta);
        }
        Ok(())
    }

    fn same(&self, found: &Found, stat: &Stat, posix: u32) -> bool {
        let kind = FileType::from_raw_mode(posix);
        let device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
        found.mode == posix
            && self.same_owner(found, stat)
            && (kind != FileType::RegularFile || found.size == stat.size)
            && found.mod_time == stat.mod_time
            && (!device || found.device == (stat.devmajor, stat.devminor))
    }

    fn same_owner(&self, found: &Found, stat: &Stat) -> bool {
        self.options.ownership == Ownership::Ignore || (found.uid, found.gid) == (stat.uid, stat.gid)
    }

    fn same_target(
        &mut self,
        stat: &Stat,
        kind: FileType,
        parent: &[u8],
        name: &[u8],
    ) -> Result<bool, TransferError> {
        if kind != FileType::Symlink {
            return Ok(true);
        }
        let dir = open_cached(&self.root, &mut self.top, parent)?;
        let target = fs::readlinkat(dir, name, Vec::new());
        let target: CString = target.map_err(|error| TransferError::io("readlink", &stat.path, error))?;
        Ok(target.as_bytes() == stat.linkname)
    }

    fn changed(&mut self, path: Vec<u8>, meta: Option<usize>) {
        self.note(Change { path, kind: ChangeKind::Written, digest: None }, meta);
    }

    fn note(&mut self, change: Change, parent: Option<usize>) {
        self.received.changes += 1;
        if let Some(meta) = parent.and_then(|index| self.dirs.get_mut(index)) {
            meta.touched = true;
        }
        if let Some(on_change) = &mut self.options.on_change {
            on_change(change);
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        for (id, writing) in self.writing.drain() {
            let _ = fs::unlinkat(&writing.dir, format!("{}{id}", self.temp_prefix), AtFlags::empty());
        }
    }
}

/// Whether only the file that was received can have this metadata. Archives and reproducible builds give many files
/// one whole second; and files written in one go, each to its own directory, may share a tick of the clock, but by
/// the time at which one that has lain there for a while was received, the other one was there too.
fn settled(found: &Found) -> bool {
    let lay_for = found.born.map_or(0, |born| born.saturating_sub(found.mod_time));
    found.mod_time % 1_000_000_000 != 0 && lay_for >= SETTLED_NS
}

/// To be called before every change.
fn begin(options: &mut ReceiveOptions) -> Result<(), TransferError> {
    match options.on_begin.take() {
        Some(on_begin) => on_begin().map_err(|error| TransferError::io("begin to change", "", error)),
        None => Ok(()),
    }
}

/// The directory `path`, opened unless it is the one opened last.
fn open_cached<'a>(
    root: &OwnedFd,
    cache: &'a mut Option<(Vec<u8>, OwnedFd)>,
    path: &[u8],
) -> Result<&'a OwnedFd, TransferError> {
    if cache.as_ref().is_none_or(|(cached, _)| cached != path) {
        let dir =
            fsops::open_dir(root.as_fd(), path).map_err(|error| TransferError::io("open", path, error))?;
        *cache = None;
        return Ok(&cache.insert((path.to_owned(), dir)).1);
    }
    cache.as_ref().map(|(_, dir)| dir).ok_or(TransferError::Closed)
}

/// Puts `temp` in the place of `name`, whatever that is.
fn put(dir: &OwnedFd, temp: &str, name: &[u8]) -> Result<(), std::io::Error> {
    match fs::renameat(dir, temp, dir, name) {
        Err(Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY) => {
            fsops::remove_all(dir, &CString::new(name)?)?;
            Ok(fs::renameat(dir, temp, dir, name)?)
        }
        other => Ok(other?),
    }
}

/// Gives `name` in `dir` the owner, mode, attributes and time of `stat`; the time last, because it is what says
/// that an entry is whole.
fn dress(
    dir: &OwnedFd,
    name: &[u8],
    stat: &Stat,
    ownership: Ownership,
    mode: ReceiveMode,
) -> Result<(), TransferError> {
    let failed = |action, error: Errno| TransferError::io(action, &stat.path, error);
    if ownership == Ownership::Keep {
        let (uid, gid) = (Uid::from_raw(stat.uid), Gid::from_raw(stat.gid));
        fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed("chown", error))?;
    }
    if !gomode::is_symlink(stat.mode) {
        let bits = Mode::from_raw_mode(gomode::permissions(stat.mode));
        fs::chmodat(dir, name, bits, AtFlags::empty()).map_err(|error| failed("chmod", error))?;
    }
    for (key, value) in &stat.xattrs {
        match fsops::set_xattr(dir, name, key, value) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            // A person's own directory takes only what that person may set.
            Err(Errno::PERM | Errno::ACCESS) if mode == ReceiveMode::Merge => {}
            Err(error) => return Err(failed("set attribute of", error)),
        }
    }
    fs::utimensat(dir, name, &fsops::times(stat.mod_time), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| failed("set times of", error))
}
