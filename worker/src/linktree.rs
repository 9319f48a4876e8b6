//! Makes a tree show one more layer by hard links, so that no content is copied; with a few threads where there are
//! directories to share. Owns the walk of the layer and what whiteouts and opaque directories mean on the way.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::flat::{copy_attributes, is_opaque};
use crate::layer::fsutil::is_whiteout;
use crate::ops::file::root::{lstat, open_child, remove_all};

/// Directories that wait for a thread to take them; each holds two files open.
const OFFERED: usize = 16;
const MAX_THREADS: usize = 4;

/// Applies one layer directory to a tree that has no whiteouts.
pub(crate) fn overlay_onto(layer: &OwnedFd, root: &OwnedFd) -> Result<(), Errno> {
    link(layer, root, false)
}

/// Makes an empty directory a layer like another one. Fails with `NOTSUP` on a layer that hides something below it.
pub(crate) fn link_layer(layer: &OwnedFd, root: &OwnedFd) -> Result<(), Errno> {
    link(layer, root, true)
}

fn link(layer: &OwnedFd, root: &OwnedFd, only_adds: bool) -> Result<(), Errno> {
    let fresh = only_adds || entries(root.as_fd())?.is_empty();
    let src = open_child(layer.as_fd(), OsStr::new("."), OFlags::RDONLY | OFlags::DIRECTORY)?;
    let names = entries(src.as_fd())?;
    let shared = names.iter().any(|(_, kind)| matches!(kind, FileType::Directory | FileType::Unknown));
    let threads = match shared {
        true => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
        false => 1,
    };
    let first = Frame { src, dst: rustix::io::fcntl_dupfd_cloexec(root, 0)?, names, fresh };
    let work = Work {
        only_adds,
        state: Mutex::new(State { offered: vec![first], busy: 0, failed: None }),
        changed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            let helper = std::thread::Builder::new().name("kiln-link".into());
            // Without a helper the others do it all.
            let _ = helper.spawn_scoped(scope, || work.run());
        }
        work.run();
    });
    work.state.into_inner().unwrap_or_else(PoisonError::into_inner).failed.map_or(Ok(()), Err)
}

/// A directory that is being linked.
struct Frame {
    src: OwnedFd,
    dst: OwnedFd,
    /// What is still to be linked.
    names: Vec<(CString, FileType)>,
    /// The target had nothing in it.
    fresh: bool,
}

struct State {
    offered: Vec<Frame>,
    /// Threads that have taken something, and may offer more.
    busy: usize,
    failed: Option<Errno>,
}

struct Work {
    only_adds: bool,
    state: Mutex<State>,
    changed: Condvar,
}

/// A taken directory, until all below it is linked or offered.
struct Taken<'a>(&'a Work);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.busy -= 1;
        if std::thread::panicking() {
            state.failed.get_or_insert(Errno::CANCELED);
        }
        self.0.changed.notify_all();
    }
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some((frame, taken)) = self.take() {
            if let Err(errno) = self.tree(frame) {
                self.lock().failed.get_or_insert(errno);
            }
            drop(taken);
        }
    }

    fn take(&self) -> Option<(Frame, Taken<'_>)> {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() {
                return None;
            }
            if let Some(frame) = state.offered.pop() {
                state.busy += 1;
                return Some((frame, Taken(self)));
            }
            if state.busy == 0 {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Leaves a directory to others unless there is enough for them; false if somebody failed.
    fn offer(&self, frame: Frame, own: &mut Vec<Frame>) -> bool {
        let mut state = self.lock();
        if state.offered.len() < OFFERED {
            state.offered.push(frame);
            self.changed.notify_one();
        } else {
            own.push(frame);
        }
        state.failed.is_none()
    }

    fn tree(&self, frame: Frame) -> Result<(), Errno> {
        let mut own = vec![frame];
        while let Some(frame) = own.last_mut() {
            let Some((name, kind)) = frame.names.pop() else {
                // Links that are made below it later leave it as it is.
                copy_attributes(frame.src.as_fd(), frame.dst.as_fd())?;
                own.pop();
                continue;
            };
            if let Some(child) = self.entry(frame, &name, kind)?
                && !self.offer(child, &mut own)
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Links one entry; a directory is the answer.
    fn entry(&self, frame: &Frame, name: &CStr, kind: FileType) -> Result<Option<Frame>, Errno> {
        let (src, dst) = (frame.src.as_fd(), frame.dst.as_fd());
        let text = OsStr::from_bytes(name.to_bytes());
        let kind = match kind {
            FileType::Unknown | FileType::CharacterDevice => {
                let Some(stat) = lstat(src, text)? else { return Ok(None) };
                if is_whiteout(&stat) {
                    return match self.only_adds {
                        true => Err(Errno::NOTSUP),
                        false => remove_all(dst, text).map(|()| None),
                    };
                }
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        if kind != FileType::Directory {
            if !frame.fresh {
                remove_all(dst, text)?;
            }
            rustix::fs::linkat(src, name, dst, name, AtFlags::empty())?;
            return Ok(None);
        }
        let child = open_child(src, text, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let opaque = is_opaque(child.as_fd());
        if self.only_adds && opaque {
            return Err(Errno::NOTSUP);
        }
        if !frame.fresh {
            let there = lstat(dst, text)?.map(|stat| FileType::from_raw_mode(stat.st_mode));
            if there.is_some() && (there != Some(FileType::Directory) || opaque) {
                remove_all(dst, text)?;
            }
        }
        let fresh = match rustix::fs::mkdirat(dst, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(errno),
        };
        let target = open_child(dst, text, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let names = entries(child.as_fd())?;
        Ok(Some(Frame { src: child, dst: target, names, fresh }))
    }
}

/// What is in a directory, in no order.
fn entries(dir: BorrowedFd<'_>) -> Result<Vec<(CString, FileType)>, Errno> {
    let mut all = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            all.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    Ok(all)
}
