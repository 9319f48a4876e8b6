//! Temporary directories on the store's file system, from which files can be renamed into it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::fsx;
use crate::store::Shared;

/// A temporary directory; dropping it removes it in the background.
pub struct ScratchDir {
    shared: Arc<Shared>,
    path: PathBuf,
    kept: bool,
}

impl ScratchDir {
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self> {
        shared.check_open()?;
        let path = shared.staging().join(fsx::random_id());
        fsx::make_dir(&path)?;
        Ok(Self { shared: Arc::clone(shared), path, kept: false })
    }

    /// Makes one of a directory of the store.
    pub(crate) fn of(shared: &Arc<Shared>, dir: &Path) -> Result<Self> {
        let path = shared.staging().join(fsx::random_id());
        fsx::rename(dir, &path)?;
        Ok(Self { shared: Arc::clone(shared), path, kept: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the directory to `target`, which must not exist or be an empty directory.
    pub(crate) fn move_to(mut self, target: &Path) -> Result<()> {
        fsx::rename(&self.path, target)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if !self.kept {
            self.shared.discard(&self.path);
        }
    }
}

impl std::fmt::Debug for ScratchDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ScratchDir").field(&self.path).finish()
    }
}
