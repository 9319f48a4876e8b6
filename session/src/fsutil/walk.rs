//! The sender's view of directories: their selected entries in the order of the wire. Directories are listed ahead of
//! time on several threads, entries come out on one.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};

use kiln_proto::fsutil::Stat;
use kiln_proto::gomode;
use rustix::fs::{self, FileType};

use super::filter::{Decision, Filter, Selection, Verdicts};
use super::fsops::{Found, Inode};
use super::{TransferError, fsops, path};

/// Sibling directories that are listed ahead of the one being sent.
const AHEAD: usize = 32;

/// A directory to send.
#[derive(Debug)]
pub struct Subtree {
    /// Where its entries go: a single name that becomes their parent directory, or empty for the top.
    pub prefix: String,
    /// The directory, open for reading.
    pub root: OwnedFd,
    /// What of it to send.
    pub selection: Selection,
    /// Send everything as owned by 0:0, as build clients do, instead of its real owners.
    pub reset_ids: bool,
}

impl Subtree {
    /// All of the directory at `path`.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &std::path::Path) -> Result<Self, TransferError> {
        let flags = fs::OFlags::RDONLY | fs::OFlags::DIRECTORY | fs::OFlags::CLOEXEC;
        let root = fs::open(path, flags, fs::Mode::empty());
        let root = root.map_err(|error| TransferError::io("open", path.display().to_string(), error))?;
        Ok(Self { prefix: String::new(), root, selection: Selection::default(), reset_ids: false })
    }
}

/// A subtree ready to be walked and read from several threads.
pub(super) struct Tree {
    pub(super) root: OwnedFd,
    pub(super) prefix: Vec<u8>,
    filter: Filter,
    reset_ids: bool,
}

/// Takes an entry and its path below the tree's root.
pub(super) type Emit<'a> = dyn FnMut(Stat, &[u8]) -> Result<(), TransferError> + 'a;

struct Item {
    name: Vec<u8>,
    decision: Decision,
    verdicts: Verdicts,
    stat: Stat,
    /// Device and inode of a file with several names.
    shared: Option<Inode>,
    listing: Option<mpsc::Receiver<Result<Vec<Item>, TransferError>>>,
}

struct Frame {
    /// Path below the tree's root, empty at the top.
    path: Vec<u8>,
    items: std::vec::IntoIter<Item>,
    /// The directory's own entry while nothing below it made it take part.
    withheld: Option<Stat>,
}

impl Tree {
    pub(super) fn new(subtree: Subtree) -> Result<Arc<Self>, TransferError> {
        let filter = Filter::new(&subtree.selection, subtree.root.as_fd())?;
        Ok(Arc::new(Self {
            root: subtree.root,
            prefix: subtree.prefix.into_bytes(),
            filter,
            reset_ids: subtree.reset_ids,
        }))
    }

    /// The prefix directory's own entry, if there is one.
    pub(super) fn prefix_stat(&self) -> Result<Option<Stat>, TransferError> {
        if self.prefix.is_empty() {
            return Ok(None);
        }
        let stat =
            fsops::lstat(&self.root, b".").map_err(|error| TransferError::io("stat", &self.prefix, error))?;
        Ok(stat.map(|stat| self.wire_stat(self.prefix.clone(), &stat)))
    }

    /// Calls `emit` with each selected entry, in the order of the wire.
    pub(super) fn walk(self: &Arc<Self>, emit: &mut Emit<'_>) -> Result<(), TransferError> {
        let mut links: HashMap<Inode, Vec<u8>> = HashMap::new();
        let mut stack =
            vec![Frame { path: Vec::new(), items: self.list(b"", None)?.into_iter(), withheld: None }];
        while let Some(frame) = stack.last_mut() {
            self.look_ahead(frame);
            let Some(mut item) = frame.items.next() else {
                stack.pop();
                continue;
            };
            let path = path::join(&frame.path, &item.name);
            item.stat.path = path::join(&self.prefix, &path);
            let is_dir = gomode::is_dir(item.stat.mode);
            let mut withheld = None;
            if item.decision == Decision::Take {
                for above in &mut stack {
                    if let Some(stat) = above.withheld.take() {
                        emit(stat, &above.path)?;
                    }
                }
                if let Some(inode) = item.shared {
                    match links.get(&inode) {
                        Some(first) => item.stat.linkname = first.clone(),
                        None => {
                            links.insert(inode, item.stat.path.clone());
                        }
                    }
                }
                emit(item.stat, &path)?;
            } else {
                withheld = Some(item.stat);
            }
            if is_dir {
                let listing = match item.listing {
                    Some(listing) => listing.recv().map_err(|_| TransferError::Closed)?,
                    None => self.list(&path, Some(&item.verdicts)),
                };
                stack.push(Frame { path, items: listing?.into_iter(), withheld });
            }
        }
        Ok(())
    }

    /// Starts listing the next few directories of a frame; a lone one is left for the walk itself.
    fn look_ahead(self: &Arc<Self>, frame: &mut Frame) {
        let items = frame.items.as_mut_slice();
        if items.first().is_none_or(|item| !gomode::is_dir(item.stat.mode) || item.listing.is_some()) {
            return;
        }
        let dirs = items.iter_mut().filter(|item| gomode::is_dir(item.stat.mode)).take(AHEAD);
        for item in dirs.skip(1) {
            let (sender, receiver) = mpsc::channel();
            item.listing = Some(receiver);
            let (tree, path, verdicts) =
                (self.clone(), path::join(&frame.path, &item.name), item.verdicts.clone());
            rayon::spawn(move || {
                // The walk may have failed meanwhile; then nobody listens.
                let _ = sender.send(tree.list(&path, Some(&verdicts)));
            });
        }
    }

    /// The entries of the directory `dir_path` that may take part, sorted by name.
    fn list(&self, dir_path: &[u8], verdicts: Option<&Verdicts>) -> Result<Vec<Item>, TransferError> {
        let shown = || path::join(&self.prefix, dir_path);
        let dir = match fsops::open_dir(self.root.as_fd(), dir_path) {
            Ok(dir) => dir,
            // It went away or changed since its parent was listed.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
                return Ok(Vec::new());
            }
            Err(error) => return Err(TransferError::io("open", shown(), error)),
        };
        let mut names = fsops::entries(&dir).map_err(|error| TransferError::io("read", shown(), error))?;
        names.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let mut items = Vec::with_capacity(names.len());
        for (name, kind) in names {
            if let Some(item) = self.item(&dir, dir_path, name, kind, verdicts)? {
                items.push(item);
            }
        }
        Ok(items)
    }

    fn item(
        &self,
        dir: &OwnedFd,
        dir_path: &[u8],
        name: CString,
        kind: FileType,
        parent: Option<&Verdicts>,
    ) -> Result<Option<Item>, TransferError> {
        let path = path::join(dir_path, name.to_bytes());
        let failed = |action, error| TransferError::io(action, path::join(&self.prefix, &path), error);
        let stat = || fsops::lstat(dir, name.to_bytes()).map_err(|error| failed("stat", error));
        // Some file systems don't tell a directory's reader what its entries are.
        let mut known = if kind == FileType::Unknown { stat()? } else { None };
        let is_dir = known.map_or(kind, |stat| stat.kind()) == FileType::Directory;
        let (decision, verdicts) = self.filter.decide(&path, is_dir, parent);
        if decision == Decision::Skip {
            return Ok(None);
        }
        if known.is_none() {
            known = stat()?;
        }
        let Some(stat) = known else { return Ok(None) };
        let mut wire = self.wire_stat(Vec::new(), &stat);
        let mut shared = None;
        match stat.kind() {
            FileType::Symlink => {
                let target =
                    fs::readlinkat(dir, &name, Vec::new()).map_err(|error| failed("readlink", error))?;
                wire.linkname = target.into_bytes();
                wire.size = i64::try_from(wire.linkname.len()).unwrap_or(i64::MAX);
            }
            FileType::RegularFile if stat.names > 1 => shared = Some(stat.inode),
            _ => {}
        }
        wire.xattrs = fsops::xattrs(dir, name.to_bytes())
            .map_err(|error| failed("read attributes of", error))?
            .into_iter()
            .collect();
        Ok(Some(Item { name: name.into_bytes(), decision, verdicts, stat: wire, shared, listing: None }))
    }

    fn wire_stat(&self, path: Vec<u8>, stat: &Found) -> Stat {
        let kind = stat.kind();
        let (devmajor, devminor) = match kind {
            FileType::CharacterDevice | FileType::BlockDevice => stat.device,
            _ => (0, 0),
        };
        Stat {
            path,
            // Sockets mean nothing elsewhere; they travel as the empty files that their size says they are.
            mode: gomode::from_posix(stat.mode) & !gomode::SOCKET,
            uid: if self.reset_ids { 0 } else { stat.uid },
            gid: if self.reset_ids { 0 } else { stat.gid },
            size: if kind == FileType::RegularFile { stat.size } else { 0 },
            mod_time: stat.mod_time,
            linkname: Vec::new(),
            devmajor,
            devminor,
            xattrs: Default::default(),
        }
    }
}
