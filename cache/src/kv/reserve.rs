//! Room that is kept for the moment when the disk is full: removing things has to be written down, too. It
//! knows one file and how much is free; who may use the room is decided by its owner.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use crate::error::{Result, StoreError};
use crate::fsx;

/// The file's name, which is none of RocksDB's.
const NAME: &str = "RESERVE";
/// Bytes that are kept: enough to open a database and to write down a few thousand removals.
const SIZE: u64 = 4 << 20;
/// Bytes that must be free besides before the room is taken.
const SPARE: u64 = 24 << 20;
/// A smaller reserve than this is given up as a whole.
const LEAST: u64 = 256 << 10;
/// Bytes that must be free for a small write to be sure not to fail.
const FLOOR: u64 = 512 << 10;

/// A file whose blocks can be had at once.
pub(super) struct Reserve {
    dir: PathBuf,
}

impl Reserve {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Takes the room if the disk has plenty; it is no error if not.
    pub(super) fn fill(&self) -> Result<()> {
        let path = self.dir.join(NAME);
        if fsx::occupied(&path) >= SIZE || fsx::free_space(&self.dir)? < SIZE + SPARE {
            return Ok(());
        }
        let file = File::create(&path).map_err(|e| StoreError::io("create", &path, e))?;
        // Some file systems can't; then there is no reserve.
        if rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, SIZE).is_err() {
            let _ = std::fs::remove_file(&path);
        }
        Ok(())
    }

    /// Gives room to whoever may write when nothing else may, if it is needed for `bytes`: half of what there is each
    /// time, since others may be writing until there is nothing left again.
    pub(super) fn open_up(&self, bytes: u64) -> Result<()> {
        let path = self.dir.join(NAME);
        while fsx::free_space(&self.dir)? < FLOOR + bytes {
            let kept = fsx::occupied(&path) / 2;
            let given = match kept {
                0 => return Ok(()),
                1..LEAST => std::fs::remove_file(&path),
                _ => File::options().write(true).open(&path).and_then(|file| file.set_len(kept)),
            };
            given.map_err(|e| StoreError::io("shrink", &path, e))?;
        }
        Ok(())
    }

    /// True if `bytes` can be written without what belongs to the reserve.
    pub(super) fn has_room(&self, bytes: u64) -> Result<bool> {
        let missing = SIZE.saturating_sub(fsx::occupied(&self.dir.join(NAME)));
        Ok(fsx::free_space(&self.dir)? >= FLOOR + bytes + missing)
    }

    /// True if `bytes` can be written by whoever may use the reserve.
    pub(super) fn has_any_room(&self, bytes: u64) -> Result<bool> {
        Ok(fsx::free_space(&self.dir)? >= FLOOR + bytes)
    }
}
