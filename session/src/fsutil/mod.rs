//! The file transfer protocol of sessions (fsutil packets; wire/filesync-auth-secrets-ssh.md §1): a sender walks
//! directories and streams their entries, a receiver asks for the contents it does not have.
//!
//! Knows packets and directories, not who is at the other end. All file system work happens on blocking threads and
//! beneath an open root directory: no path from a peer is ever resolved outside it or through a symbolic link.

mod filter;
mod follow;
mod fsops;
mod path;
mod receive;
mod receiver;
mod send;
mod walk;

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use kiln_proto::fsutil::Packet;
use kiln_proto::pattern::PatternError;
use tonic::Status;

pub use filter::{Filter, Selection};
pub use receive::receive;
pub use receiver::{Change, ChangeKind, Ownership, ReceiveMode, ReceiveOptions, Received};
pub use send::{SEND_QUEUE, SendSummary, send};
pub use walk::Subtree;

/// Packets as they arrive.
pub type PacketStream = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

/// Called with the running count of bytes transferred, for every packet: must be cheap.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// Largest piece of a file in one packet.
const CHUNK: usize = 32 << 10;

/// A transfer that failed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A file operation failed on this side.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried, e.g. `open`.
        action: &'static str,
        /// On what, as the caller or the peer named it.
        path: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The peer broke the protocol.
    #[error("file transfer: {0}")]
    Protocol(String),
    /// The peer gave up, with this text.
    #[error("{0}")]
    Remote(String),
    /// A pattern is malformed.
    #[error("invalid pattern: {0}")]
    Pattern(#[from] PatternError),
    /// The connection failed or the call was refused.
    #[error("{}", .0.message())]
    Status(Box<Status>),
    /// The connection ended before the transfer did.
    #[error("connection closed before the transfer ended")]
    Closed,
}

impl TransferError {
    pub(crate) fn io(
        action: &'static str,
        path: impl AsRef<[u8]>,
        source: impl Into<std::io::Error>,
    ) -> Self {
        let path = String::from_utf8_lossy(path.as_ref()).into_owned();
        Self::Io { action, path, source: source.into() }
    }

    /// What the peer says in an error packet.
    fn remote(packet: &Packet) -> Self {
        Self::Remote(String::from_utf8_lossy(&packet.data).into_owned())
    }
}

impl From<Status> for TransferError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}
