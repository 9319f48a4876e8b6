//! Caches that are kept elsewhere: in a registry, in a client's content store, or in the config of an image. Writes what
//! a build can tell of its results, and reads it again, as the solver's imported caches; layers stay where they are
//! until something reads them.
//!
//! Knows manifests and layers. What records mean is the solver's affair, their form that of `kiln_cache::remote`.

mod collect;
mod import;
pub(crate) mod inline;
mod push;

use kiln_proto::reference::Reference;

pub use collect::{Collected, Mode, collect};
pub use import::{Imported, read};
pub use push::{Form, write};

use crate::image::{ClientStore, ImageError};
use crate::registry::RegistryError;

/// Annotation of a layer: its diff id.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Annotation of a layer: when it was made.
const CREATED: &str = "buildkit/createdat";
/// Annotation of a layer: what made it.
const DESCRIPTION: &str = "buildkit/description";

/// Where a cache is.
#[derive(Clone)]
pub enum Place {
    /// In a registry.
    Registry {
        /// Under this name.
        reference: Reference,
        /// Plain HTTP or unchecked certificates are fine.
        insecure: bool,
    },
    /// In a client's content store.
    Client {
        /// Which.
        store: ClientStore,
        /// The manifest; none while nothing was written.
        digest: Option<String>,
    },
}

/// Why a cache can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The registry did not give it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A layer could not be had, or the store failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It makes no sense.
    #[error(transparent)]
    Document(#[from] kiln_cache::remote::RemoteError),
    /// Neither does this.
    #[error("{0}")]
    Malformed(String),
}
