//! Where archives and file trees of exporters go.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_session::{NewBlob, Session, SessionError, TarSender, fsutil};
use tokio::io::{AsyncRead, AsyncWrite};

/// The receiver did not take what was sent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct OutputError {
    /// For the user.
    pub message: String,
    /// It has the target already, which image archives count as success.
    pub already_exists: bool,
}

impl From<SessionError> for OutputError {
    fn from(error: SessionError) -> Self {
        Self { message: error.to_string(), already_exists: error.is_already_exists() }
    }
}

/// A directory to be sent.
#[derive(Debug)]
pub struct Tree {
    /// Directory at the receiver that it goes into; empty for the top.
    pub prefix: String,
    /// Its root, open for reading.
    pub root: OwnedFd,
}

/// The name under which clients offer the store that image layouts go into.
const STORE: &str = "export";

/// A blob for the client's content store.
pub struct LayoutBlob {
    /// What it is in the image, e.g. `layer`.
    pub kind: &'static str,
    /// Its digest.
    pub digest: String,
    /// Its size.
    pub size: u64,
    /// Its bytes.
    pub content: Box<dyn AsyncRead + Send + Unpin>,
}

/// An archive under way. Dropping it without [`TarOutput::finish`] aborts it.
pub trait TarOutput: AsyncWrite + Send + Unpin + 'static {
    /// Ends the archive and waits until it is stored.
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<(), OutputError>>;
}

/// The receiving side of one exporter.
pub trait Output: Send + Sync {
    /// Opens an archive; `response` is what the exporter will answer.
    fn tar(&self, response: &BTreeMap<String, String>) -> Result<Box<dyn TarOutput>, OutputError>;

    /// Sends directories. `mirror`: what is not in them is deleted. `progress` hears of bytes.
    fn directory<'a>(
        &'a self,
        trees: Vec<Tree>,
        mirror: bool,
        progress: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> BoxFuture<'a, Result<(), OutputError>>;

    /// Stores a blob; one that is there already counts as stored.
    fn blob(&self, blob: LayoutBlob) -> BoxFuture<'_, Result<(), OutputError>>;
}

/// For exporters that send nothing to the client.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoOutput;

impl NoOutput {
    fn error() -> OutputError {
        OutputError {
            message: "this exporter has no output at the client".to_string(),
            already_exists: false,
        }
    }
}

impl Output for NoOutput {
    fn tar(&self, _response: &BTreeMap<String, String>) -> Result<Box<dyn TarOutput>, OutputError> {
        Err(Self::error())
    }

    fn directory<'a>(
        &'a self,
        _trees: Vec<Tree>,
        _mirror: bool,
        _progress: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> BoxFuture<'a, Result<(), OutputError>> {
        Box::pin(async { Err(Self::error()) })
    }

    fn blob(&self, _blob: LayoutBlob) -> BoxFuture<'_, Result<(), OutputError>> {
        Box::pin(async { Err(Self::error()) })
    }
}

/// The client's exporter with this index, through its session.
#[derive(Debug, Clone)]
pub struct SessionOutput {
    /// The client.
    pub session: Arc<Session>,
    /// Index of the exporter in the request.
    pub exporter: usize,
}

impl TarOutput for TarSender {
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<(), OutputError>> {
        Box::pin(async move { TarSender::finish(*self).await.map_err(OutputError::from) })
    }
}

impl Output for SessionOutput {
    fn tar(&self, response: &BTreeMap<String, String>) -> Result<Box<dyn TarOutput>, OutputError> {
        Ok(Box::new(self.session.file_send_tar(self.exporter, response)?))
    }

    fn directory<'a>(
        &'a self,
        trees: Vec<Tree>,
        mirror: bool,
        progress: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> BoxFuture<'a, Result<(), OutputError>> {
        Box::pin(async move {
            let trees = trees
                .into_iter()
                .map(|tree| fsutil::Subtree {
                    prefix: tree.prefix,
                    root: tree.root,
                    selection: fsutil::Selection::default(),
                    reset_ids: false,
                })
                .collect();
            self.session.file_send_dir(self.exporter, mirror, trees, Some(progress)).await?;
            Ok(())
        })
    }

    fn blob(&self, blob: LayoutBlob) -> BoxFuture<'_, Result<(), OutputError>> {
        Box::pin(async move {
            let reference = format!("{}-{}", blob.kind, blob.digest);
            let new = NewBlob { reference: &reference, digest: &blob.digest, size: blob.size };
            Ok(self.session.write_blob(STORE, new, blob.content).await?)
        })
    }
}
