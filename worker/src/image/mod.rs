//! Images as sources: a reference becomes a digest and a config, an image a chain of lazy
//! snapshots, and a lazy snapshot gets its files when somebody reads them. Images are in registries and in
//! clients' content stores. Also the layers of snapshots as blobs, which exporters send.
//!
//! Decides nothing about builds; downloads only what is asked for.

mod blob;
mod client_store;
mod error;
mod fetch;
mod manifest;
mod resolve;

use std::sync::Arc;

use dashmap::DashMap;
use kiln_cache::{Blobs, Snapshots, Store, Values};
use kiln_solver::progress::VertexProgress;
use tokio::sync::Semaphore;

pub(crate) use blob::EMPTY_DIFF_ID;
pub use blob::{BlobOptions, LayerContent};
pub use client_store::ClientStore;
pub use error::ImageError;
pub use manifest::{chain_ids, diff_ids, platform_of};
pub use resolve::{ResolveMode, ResolvedImage};

use crate::registry::{Anonymous, Credentials, Registry};

/// Downloads and unpackings that run at once, over all builds.
const TRANSFERS: usize = 6;

/// Work that only one at a time may do, by key.
type Turns = DashMap<String, Arc<tokio::sync::Mutex<()>>>;

/// Pulls images into the store. One for the daemon.
pub struct Images {
    registry: Arc<Registry>,
    snapshots: Snapshots,
    blobs: Blobs,
    values: Values,
    flights: fetch::Flights,
    turns: Turns,
    transfers: Arc<Semaphore>,
}

/// On whose behalf something is fetched, and who hears of it.
#[derive(Clone)]
pub struct Access {
    /// Credentials for registries.
    pub credentials: Arc<dyn Credentials>,
    /// Hears of transfers.
    pub progress: Option<VertexProgress>,
}

impl Access {
    /// Nobody's credentials, nobody who listens.
    pub fn anonymous() -> Self {
        Self { credentials: Arc::new(Anonymous), progress: None }
    }
}

impl Images {
    /// Pulls through `registry` into `store`.
    pub fn new(registry: Arc<Registry>, store: &Store) -> Arc<Self> {
        Arc::new(Self {
            registry,
            snapshots: store.snapshots(),
            blobs: store.blobs(),
            values: store.values(),
            flights: fetch::Flights::default(),
            turns: Turns::new(),
            transfers: Arc::new(Semaphore::new(TRANSFERS)),
        })
    }

    /// The registries that images come from and go to.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// The content store that blobs are kept in.
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    /// The snapshots that layers become.
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }
}
