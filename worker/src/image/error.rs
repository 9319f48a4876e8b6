//! Failures of pulling and packing, cheap to hand to everyone who waited.

use std::sync::Arc;

use kiln_cache::StoreError;
use kiln_session::SessionError;

use crate::layer::LayerError;
use crate::registry::RegistryError;

/// Why an image or a layer could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The client whose content store it is in.
    #[error("{0}")]
    Session(Arc<SessionError>),
    /// The local store.
    #[error("{0}")]
    Store(Arc<StoreError>),
    /// A layer that can't be packed or unpacked.
    #[error("failed to {action} layer {digest}: {source}")]
    Layer {
        /// `unpack` or `pack`.
        action: &'static str,
        /// The blob, or the snapshot that was to become one.
        digest: String,
        /// The cause.
        source: Arc<LayerError>,
    },
    /// Content is not what its digest promises.
    #[error("failed to unpack layer {digest}: {what} does not match: expected {expected}, got {actual}")]
    Mismatch {
        /// The blob.
        digest: String,
        /// What was compared.
        what: &'static str,
        /// As promised.
        expected: String,
        /// As found.
        actual: String,
    },
    /// The image has nothing for the platform.
    #[error(
        "no match for platform {platform} in manifest of {reference}@{digest}: not found (it has {available})"
    )]
    NoPlatform {
        /// The image.
        reference: String,
        /// Digest of its index.
        digest: String,
        /// What was wanted.
        platform: String,
        /// What there is.
        available: String,
    },
    /// The image is malformed, or of a kind that is not understood.
    #[error("{reference}: {message}")]
    Image {
        /// The image.
        reference: String,
        /// What is wrong.
        message: String,
    },
    /// A task of this process failed.
    #[error("{0}")]
    Internal(String),
}

impl ImageError {
    pub(crate) fn image(reference: impl ToString, message: impl Into<String>) -> Self {
        Self::Image { reference: reference.to_string(), message: message.into() }
    }

    /// True if the image, or its platform, does not exist.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Registry(error) => error.is_not_found(),
            Self::Session(error) => error.is_not_found(),
            error => matches!(error, Self::NoPlatform { .. }),
        }
    }
}

impl From<SessionError> for ImageError {
    fn from(error: SessionError) -> Self {
        Self::Session(Arc::new(error))
    }
}

impl From<StoreError> for ImageError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<tokio::task::JoinError> for ImageError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::Internal(format!("a worker thread failed: {error}"))
    }
}

/// Runs what blocks beside the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await?
}
