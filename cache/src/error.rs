//! The one error type of the crate's border.

use std::io;
use std::path::{Path, PathBuf};

/// What a function of this crate returns.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call on a file failed.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The key-value engine refused.
    #[error("key store: {0}")]
    Kv(String),
    /// A stored value can't be decoded.
    #[error("corrupt {what} record {key:?}: {reason}")]
    Corrupt {
        /// Which kind of record.
        what: &'static str,
        /// Its key, printable.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process has the root open.
    #[error("{} is in use by another daemon{}", root.display(), pid.map(|p| format!(" (process {p})")).unwrap_or_default())]
    Locked {
        /// The root directory.
        root: PathBuf,
        /// The owner, as it noted itself in the lock file.
        pid: Option<u32>,
        /// The owner noted that it is about to close the store.
        leaving: bool,
    },
    /// The root was written by a newer version.
    #[error("{}: store schema {found} is newer than {supported}, which this version understands", root.display())]
    Schema {
        /// The root directory.
        root: PathBuf,
        /// The version found.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// Data did not have the promised digest.
    #[error("digest mismatch: expected {expected}, got {actual}")]
    DigestMismatch {
        /// What was promised.
        expected: String,
        /// What the data has.
        actual: String,
    },
    /// Data did not have the promised length.
    #[error("size mismatch for {digest}: expected {expected} bytes, got {actual}")]
    SizeMismatch {
        /// Digest of the data, or what is known of it.
        digest: String,
        /// What was promised.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// A digest that is not `sha256:` and 64 hexadecimal digits.
    #[error("invalid digest {0:?}")]
    InvalidDigest(String),
    /// The named thing isn't there.
    #[error("{what} {id} not found")]
    NotFound {
        /// Which kind of thing.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// A lazy layer's files were asked for before they were unpacked.
    #[error("snapshot {0} is not materialized")]
    NotMaterialized(String),
    /// A path of a content query selects nothing. The text is part of what clients see.
    #[error("{0:?}: not found")]
    PathNotFound(String),
    /// A content query, filter or option that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Wraps an error of the standard library.
    pub fn io(op: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self::Io { op, path: path.as_ref().to_path_buf(), source: source.into() }
    }

    /// The system's error number, where the failure was a system call.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
