//! Layers as archives: unpacking a tar into a layer directory, packing a layer directory into a
//! tar, and the compressions between a tar and a blob.
//!
//! A layer directory has the form of an overlay upper: a deleted name is a character device 0:0, a
//! directory that hides what lies below it carries the xattr `trusted.overlay.opaque` (`user.overlay.opaque`
//! when not root). This module knows nothing of registries, snapshots or image configs, does only
//! blocking I/O, and must not be called on an async thread.

mod compress;
pub(crate) mod fsutil;
mod pack;
mod settle;
mod tar_read;
mod tar_write;
mod unpack;

use std::io;
use std::path::Path;

pub use compress::{Compression, Compressor, Decompressor, DigestWriter, media_compression};
pub(crate) use fsutil::is_overlay_xattr;
pub use pack::{PackOptions, PackStats, pack_dir, pack_layer};
pub use settle::settle;
pub(crate) use tar_read::is_archive;
pub use tar_read::{CopyError, Entry, Kind, TarReader};
pub use tar_write::{TarEntry, TarWriter};
pub use unpack::{Unpacked, unpack};

/// Why a layer could not be packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A call to the file system failed.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried, e.g. `create`.
        action: &'static str,
        /// Path as the archive or the directory names it.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The archive is not one, or asks for what no layer may do.
    #[error("invalid layer archive: {0}")]
    Archive(String),
    /// Reading the archive's bytes failed (network, disk, compression).
    #[error("read layer: {0}")]
    Read(#[source] io::Error),
    /// Writing the archive's bytes failed.
    #[error("write layer: {0}")]
    Write(#[source] io::Error),
}

impl LayerError {
    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.display().to_string(), source: source.into() }
    }
}
