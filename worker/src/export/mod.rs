//! Exporters: a build's result becomes an image in a registry, an archive, or files at the client.
//!
//! Where archives and files go is behind [`Output`]; nothing here knows the wire. Layers come from
//! [`crate::image::Images`] as blobs, file trees from [`crate::view`].

mod annotations;
mod archive;
mod attestation;
mod attrs;
pub(crate) mod config;
pub(crate) mod image;
mod input;
mod manifest;
mod output;
mod tree;

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_cache::{Store, StoreError};

pub use attestation::{Attestation, IN_TOTO, PREDICATE_TYPE, Steps, Subject, package_url};
pub use attrs::{Attributes, Kind};
pub use input::{ExportInput, ExportTarget};
pub use output::{LayoutBlob, NoOutput, Output, OutputError, SessionOutput, TarOutput, Tree};

use crate::image::{Access, ImageError, Images};
use crate::layer::LayerError;
use crate::registry::RegistryError;
use crate::view::ViewError;

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// An attribute is wrong or asks for what is not there; texts of the latter begin with `unsupported: `.
    #[error("{0}")]
    Attribute(String),
    /// The result can't be exported in this form.
    #[error("{0}")]
    Input(String),
    /// A layer could not be had or packed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Files could not be archived.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The push failed.
    #[error("failed to push {name}: {source}")]
    Push {
        /// Name as given.
        name: String,
        /// The registry's error.
        source: Box<RegistryError>,
    },
    /// The local store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The result's files could not be shown as one tree.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The client did not take the output.
    #[error("{0}")]
    Output(#[from] OutputError),
    /// The result's files could not be read.
    #[error("failed to read the result: {0}")]
    Read(#[from] std::io::Error),
    /// A task of this process failed.
    #[error("{0}")]
    Internal(String),
}

impl From<tokio::task::JoinError> for ExportError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::Internal(format!("a worker thread failed: {error}"))
    }
}

/// What an export works with.
#[derive(Clone)]
pub struct ExportContext {
    /// Layers and registries.
    pub images: Arc<Images>,
    /// The store that results are in.
    pub store: Arc<Store>,
    /// The client's credentials, and the progress of the exporter's vertex.
    pub access: Access,
}

/// One requested output, with its attributes checked.
#[derive(Debug, Clone)]
pub struct Exporter {
    attributes: Attributes,
}

impl Exporter {
    /// An exporter of `kind` (`image`, `oci`, `docker`, `local`, `tar`) with the attributes of the wire.
    pub fn new<'a>(
        kind: &str,
        attributes: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<Self, ExportError> {
        Ok(Self { attributes: Attributes::parse(kind, attributes)? })
    }

    /// What progress streams call it.
    pub fn name(&self) -> &'static str {
        match self.attributes.kind {
            Kind::Image => "exporting to image",
            Kind::Oci => "exporting to oci image format",
            Kind::Docker => "exporting to docker image format",
            Kind::Local => "exporting to client directory",
            Kind::Tar => "exporting to client tarball",
        }
    }

    /// The attributes.
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// Exports, and answers the entries of the exporter response.
    pub async fn export(
        &self,
        context: &ExportContext,
        input: &ExportInput,
        output: &dyn Output,
    ) -> Result<BTreeMap<String, String>, ExportError> {
        let attributes = self.attributes.with_metadata(&input.metadata)?;
        match attributes.kind {
            Kind::Image => image::export(context, &attributes, input).await,
            Kind::Oci | Kind::Docker => archive::export(context, &attributes, input, output).await,
            Kind::Local => tree::export_local(context, &attributes, input, output).await,
            Kind::Tar => tree::export_tar(context, &attributes, input, output).await,
        }
    }
}
