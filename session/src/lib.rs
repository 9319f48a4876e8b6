//! The session between a build client and the daemon: a gRPC connection that runs *backwards* inside a byte
//! stream which the client opened, so that the daemon can ask the client for files, credentials and secrets,
//! and hand results back.
//!
//! Owns both ends of that tunnel ([`SessionManager`] and [`Session`] for the daemon, [`client`] for the command
//! line), the metadata keys that ride on its calls, and the file transfer protocol ([`fsutil`]).
//! Reads no environment, home directory or terminal, and knows nothing of builds or caches.

pub mod client;
mod content;
mod error;
pub mod fsutil;
mod headers;
mod id;
mod manager;
mod pipe;
mod session;
mod transfer;

pub use content::{BlobReader, NewBlob};
pub use error::SessionError;
pub use id::new_id;
pub use manager::SessionManager;
pub use session::{Credentials, Session};
pub use transfer::{FileSyncRequest, TarSender};

/// Largest gRPC message either end of the outer connection, and the daemon inside the tunnel, takes.
pub const MAX_MESSAGE_SIZE: usize = 16 << 20;
