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

/// HTTP/2 window of each stream, in bytes, on both connections: the outer one and the one in the tunnel.
pub const STREAM_WINDOW: u32 = 1 << 20;

/// HTTP/2 window of each whole connection, in bytes. h2 ends a connection on which small DATA frames wait whose
/// framing, counted as 256 bytes each, comes to more than half of this window. Peers send a file's metadata as a frame
/// of its own of 50 bytes or so, so one stream whose window is full of them needs about 5 MiB.
pub const CONNECTION_WINDOW: u32 = 64 << 20;
