//! Short-lived files of running steps: sockets, generated `/etc/hosts`. They live in one
//! directory for each daemon process, so that what a killed one left behind can be told apart.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

/// A directory of this process, locked for as long as it is used. Process ids would not do: daemons of different
/// process namespaces may share the directory above.
pub(crate) struct RunDir {
    path: PathBuf,
    _lock: OwnedFd,
}

impl RunDir {
    /// Makes a new directory below `base` and removes those of processes that are gone.
    pub(crate) fn open(base: &Path) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(base)?;
        for entry in std::fs::read_dir(base)? {
            let path = entry?.path();
            let ours = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"daemon-"));
            if ours && let Ok(_lock) = lock(&path, FlockOperation::NonBlockingLockExclusive) {
                remove(&path);
            }
        }
        loop {
            let path = base.join(format!("daemon-{}", kiln_session::new_id()));
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            // Until it was locked, another daemon that started could take it for abandoned.
            match lock(&path, FlockOperation::LockExclusive) {
                Ok(lock) if path.exists() => return Ok(Self { path, _lock: lock }),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }

    /// A new directory for one step.
    pub(crate) fn step(&self) -> io::Result<StepDir> {
        let path = self.path.join(kiln_session::new_id());
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        Ok(StepDir { path })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Files of one step, removed with it.
pub(crate) struct StepDir {
    path: PathBuf,
}

impl StepDir {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a new file with these permission bits.
    pub(crate) fn write(&self, name: &str, content: &[u8], mode: u32) -> io::Result<PathBuf> {
        use std::io::Write;
        use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
        let path = self.path.join(name);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(content)?;
        if mode != 0o600 {
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        }
        Ok(path)
    }
}

impl Drop for StepDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn lock(path: &Path, how: FlockOperation) -> io::Result<OwnedFd> {
    let directory = rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::flock(&directory, how)?;
    Ok(directory)
}

fn remove(path: &Path) {
    if let Err(err) = std::fs::remove_dir_all(path)
        && err.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("removing {}: {err}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_what_was_left_goes() {
        let base = tempfile::TempDir::new().expect("temp");
        let left = base.path().join("daemon-left");
        std::fs::create_dir(&left).expect("mkdir");
        std::fs::write(left.join("hosts"), "").expect("write");
        let first = RunDir::open(base.path()).expect("open");
        assert!(!left.exists());
        let step = first.step().expect("a step");
        // Of the same process id, as a daemon in another namespace may be.
        let second = RunDir::open(base.path()).expect("open");
        step.write("hosts", b"", 0o644).expect("still there");
        drop((step, first, second));
        assert_eq!(std::fs::read_dir(base.path()).expect("list").count(), 0);
    }
}
