//! Which daemon control groups belong to, told by the names of their directories
//! (`kiln-<pid>-<start time>-<process namespace>`), and whether that daemon is gone.
//!
//! Process ids tell that only within one process namespace. A daemon elsewhere, in a container perhaps, is alive as
//! long as it holds a lock on its directories.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

const PREFIX: &str = "kiln-";

/// A daemon, and the locks on its directories.
#[derive(Debug)]
pub(super) struct Owner {
    id: Id,
    name: String,
    locks: Vec<(PathBuf, OwnedFd)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Id {
    pid: u32,
    /// In clock ticks since boot; tells a process id from its next use.
    start: u64,
    /// Number of the process namespace that the process id is of; 0 if it can't be told.
    namespace: u64,
}

impl Owner {
    /// The daemon with this process id, in terms of the mounted `/proc`.
    pub(super) fn new(pid: u32) -> Self {
        let id = Id { pid, start: start_time(pid).unwrap_or(0), namespace: namespace().unwrap_or(0) };
        let name = format!("{PREFIX}{}-{}-{}", id.pid, id.start, id.namespace);
        Self { id, name, locks: Vec::new() }
    }

    /// What its directories are called.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes a directory, and locks it if it is one that has this daemon's name.
    pub(super) fn make(&mut self, dir: &Path) -> io::Result<()> {
        loop {
            match fs::create_dir(dir) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    if self.locks.iter().any(|(locked, _)| locked == dir) {
                        return Ok(());
                    }
                }
                other => {
                    other.map_err(|e| io::Error::new(e.kind(), format!("cgroup {}: {e}", dir.display())))?
                }
            }
            if dir.file_name().is_none_or(|name| name != self.name.as_str()) {
                return Ok(());
            }
            // Where nothing can be locked, nobody else can, either.
            let Ok(lock) = lock(dir, FlockOperation::LockExclusive) else { return Ok(()) };
            // Until it was locked, another daemon could take it for abandoned.
            if dir.exists() {
                self.locks.push((dir.to_owned(), lock));
                return Ok(());
            }
        }
    }

    /// Has directories in `place` removed whose daemons are gone.
    pub(super) fn sweep(&self, place: &Path, remove: impl Fn(&Path)) {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let (name, dir) = (entry.file_name(), entry.path());
            let Some(id) = name.to_str().and_then(parse) else { continue };
            if id.namespace == self.id.namespace && id.namespace != 0 {
                if start_time(id.pid) != Some(id.start) {
                    remove(&dir);
                }
            } else if let Ok(_lock) = lock(&dir, FlockOperation::NonBlockingLockExclusive) {
                remove(&dir);
            }
        }
    }
}

fn lock(dir: &Path, how: FlockOperation) -> io::Result<OwnedFd> {
    let fd = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::flock(&fd, how)?;
    Ok(fd)
}

fn parse(name: &str) -> Option<Id> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    let id = Id {
        pid: parts.next()?.parse().ok()?,
        start: parts.next()?.parse().ok()?,
        namespace: parts.next()?.parse().ok()?,
    };
    parts.next().is_none().then_some(id)
}

/// The process namespace that the mounted `/proc` shows: that of its first process.
fn namespace() -> Option<u64> {
    let link = fs::read_link("/proc/1/ns/pid").or_else(|_| fs::read_link("/proc/self/ns/pid")).ok()?;
    link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let id = Id { pid: 12, start: 345, namespace: 6 };
        assert_eq!(parse("kiln-12-345-6"), Some(id));
        for other in ["kiln-x-1-1", "kiln-12-345", "kiln-1-2-3-4", "other"] {
            assert_eq!(parse(other), None, "{other}");
        }
        let own = Owner::new(std::process::id());
        assert_eq!(parse(own.name()), Some(own.id.clone()));
        assert!(own.id.start > 0 && own.id.namespace > 0);
    }

    #[test]
    fn only_those_of_daemons_that_are_gone_are_removed() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let mut here = Owner::new(std::process::id());
        here.make(&at(here.name())).unwrap();
        // As far as this process can tell, a process with such an id never was; elsewhere it may be.
        let there = Id { pid: u32::MAX, start: 1, namespace: here.id.namespace + 1 };
        let mut there =
            Owner { name: format!("kiln-{}-1-{}", there.pid, there.namespace), id: there, locks: Vec::new() };
        there.make(&at(there.name())).unwrap();
        let dead = at(&format!("kiln-{}-1-{}", u32::MAX, here.id.namespace));
        for dir in [&dead, &at("kiln-other"), &at("other")] {
            fs::create_dir(dir).unwrap();
        }
        let swept = || {
            here.sweep(place.path(), |dir| fs::remove_dir(dir).unwrap());
            let mut left: Vec<_> =
                fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            left.sort();
            left
        };
        let mut expected: Vec<std::ffi::OsString> =
            [here.name(), there.name(), "kiln-other", "other"].map(Into::into).into();
        expected.sort();
        assert_eq!(swept(), expected);
        expected.retain(|name| name != there.name());
        drop(there);
        assert_eq!(swept(), expected);
    }
}
