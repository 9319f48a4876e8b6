//! A client of OCI distribution registries: authentication, manifests, blobs, pushes, mirrors.
//!
//! Knows HTTP and names of images, nothing of layers or snapshots. Whoever calls it brings the
//! [`Credentials`], normally those of the build's client; nothing here reads a credentials file.

mod auth;
mod blob;
mod client;
mod config;
pub(crate) mod http;
mod push;
mod session;

pub use auth::{Anonymous, BasicAuth, Credentials, StaticCredentials, Token, TokenRequest};
pub use blob::BlobStream;
pub use client::{Manifest, ManifestHead, Registry, Repository};
pub use config::{HostConfig, KeyPair, RegistryConfig};
pub use push::{BlobSource, PushOutcome};
pub use session::SessionCredentials;

/// Media types of manifests and indexes, which a registry must be told to get the stored form.
pub const MANIFEST_TYPES: [&str; 4] = [INDEX_OCI, MANIFEST_OCI, INDEX_DOCKER, MANIFEST_DOCKER];
/// OCI image index.
pub const INDEX_OCI: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest.
pub const MANIFEST_OCI: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker manifest list.
pub const INDEX_DOCKER: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image manifest, schema 2.
pub const MANIFEST_DOCKER: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Why a registry did not do what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// No such image, manifest or blob.
    #[error("{what}: not found")]
    NotFound {
        /// Reference or digest as asked for.
        what: String,
    },
    /// The registry knows the client but refuses, or does not accept its credentials.
    #[error(
        "{what}: pull access denied, repository does not exist or may require authorization: {host} answered {status}: {message}"
    )]
    Denied {
        /// Reference or repository.
        what: String,
        /// Registry host.
        host: String,
        /// HTTP status.
        status: u16,
        /// The registry's own words.
        message: String,
    },
    /// Any other answer that is not success.
    #[error("{what}: unexpected status from {method} request to {url}: {status}")]
    Status {
        /// Reference or repository.
        what: String,
        /// HTTP method.
        method: String,
        /// Where, without query.
        url: String,
        /// Code, reason and the registry's own words, e.g. `500 Internal Server Error: disk full`.
        status: String,
        /// HTTP status code.
        code: u16,
    },
    /// The registry could not be reached or the connection broke, also on the last attempt.
    #[error("{what}: {method} {url}: {message}")]
    Network {
        /// Reference or repository.
        what: String,
        /// HTTP method.
        method: String,
        /// Where, without query.
        url: String,
        /// The chain of causes.
        message: String,
    },
    /// Content is not what its digest or size promises.
    #[error("{what}: {host} sent content that does not match: expected {expected}, got {actual}")]
    Mismatch {
        /// Reference or repository.
        what: String,
        /// Registry host.
        host: String,
        /// Digest or size that was asked for.
        expected: String,
        /// What came.
        actual: String,
    },
    /// The answer makes no sense.
    #[error("{what}: {message}")]
    Invalid {
        /// Reference or repository.
        what: String,
        /// What is wrong.
        message: String,
    },
    /// No token or credentials could be had.
    #[error("failed to authorize with {host}: {message}")]
    Auth {
        /// Registry host.
        host: String,
        /// What is wrong.
        message: String,
    },
    /// The local configuration does not work (certificates, keys).
    #[error("registry {host}: {message}")]
    Config {
        /// Registry host.
        host: String,
        /// What is wrong.
        message: String,
    },
    /// A local file to be sent could not be read.
    #[error("read {path}: {message}")]
    Local {
        /// The file.
        path: String,
        /// The cause.
        message: String,
    },
}

impl RegistryError {
    /// True if another endpoint, or the same at another time, may do better.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}
