//! Short-lived files of running steps: sockets, generated `/etc/hosts`. They live in one
//! directory for each daemon process, so that what a killed one left behind can be told apart.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The directory of this process.
pub(crate) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Makes the directory of this process below `base` and removes those of processes that are gone.
    pub(crate) fn open(base: &Path) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(base)?;
        for entry in std::fs::read_dir(base)? {
            let entry = entry?;
            let name = entry.file_name();
            let owner =
                name.to_str().and_then(|name| name.strip_prefix("daemon-")).and_then(|pid| pid.parse().ok());
            let Some(owner) = owner else { continue };
            if owner == std::process::id() || !alive(owner) {
                remove(&entry.path());
            }
        }
        let path = base.join(format!("daemon-{}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            // Two workers of one process share it.
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        Ok(Self { path })
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
        // Only when empty: another worker of this process may still use it.
        let _ = std::fs::remove_dir(&self.path);
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

fn alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

fn remove(path: &Path) {
    if let Err(err) = std::fs::remove_dir_all(path)
        && err.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("removing {}: {err}", path.display());
    }
}
