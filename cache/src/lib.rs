//! What Kiln remembers: keys of finished steps, snapshots, blobs, content hashes, persistent
//! mutable directories, and the ledger of all of them.
//!
//! Everything below one root directory belongs to this crate and to one process at a time. It
//! knows nothing about operations, containers or registries. All functions here are synchronous
//! and may touch the disk: callers on an async runtime run anything that moves files in
//! `spawn_blocking`; key look-ups take microseconds and may be called in place.

mod blobs;
mod codec;
mod epoch;
mod error;
mod evictions;
mod filter;
mod fsx;
mod gc;
mod gone;
mod keys;
mod leases;
mod maintenance;
mod mutable;
mod scratch;
mod snapshots;
mod store;
mod sweep;
mod usage;
mod values;

pub mod contenthash;
pub mod kv;
pub mod layerview;
pub mod remote;

pub use blobs::{BlobInfo, BlobRef, BlobWriter, Blobs};
pub use error::{Result, StoreError};
pub use evictions::Eviction;
pub use filter::Filter;
pub use gc::{GcPolicy, PruneOptions};
pub use keys::{KeyChange, KeyRecord, KeyStorage, KeyStore, MISSING_RESULT, OpRecord};
pub use kv::Kv;
pub use mutable::{MutableDir, MutableDirs, MutableKind};
pub use scratch::ScratchDir;
pub use snapshots::{LayerBlob, LazyLayer, RecordType, SnapshotMeta, SnapshotRef, Snapshots, Staged};
pub use store::{Store, StoreOptions};
pub use usage::{STORE_RECORD, UsageRecord};
pub use values::Values;

/// The result of an operation: a snapshot, or nothing at all (`scratch`, the empty root).
pub type Ref = Option<SnapshotRef>;
