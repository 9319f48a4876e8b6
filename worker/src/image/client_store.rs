//! Content stores that clients offer: image layouts on their side. What comes from there is checked against its digest,
//! and read while the client is there.

use std::io::Write;
use std::sync::Arc;

use kiln_cache::{BlobRef, Blobs, LayerBlob};
use kiln_proto::llb;
use kiln_proto::reference::check_digest;
use kiln_session::Session;

use super::ImageError;
use super::error::blocking;

/// A content store of a client. Cheap to clone.
#[derive(Clone)]
pub struct ClientStore {
    session: Arc<Session>,
    name: String,
}

impl std::fmt::Debug for ClientStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ClientStore").field(&self.session.id()).field(&self.name).finish()
    }
}

impl ClientStore {
    /// The store that `session` calls `name`, e.g. `local:DIR` or `oci:NAME`.
    pub fn new(session: Arc<Session>, name: impl Into<String>) -> Self {
        Self { session, name: name.into() }
    }

    /// Whose it is.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// What the client calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A blob of at most `limit` bytes.
    pub(crate) async fn read(&self, digest: &str, limit: u64) -> Result<Vec<u8>, ImageError> {
        let invalid = |why: &dyn std::fmt::Display| ImageError::image(digest, why.to_string());
        check_digest(digest).map_err(|error| invalid(&error))?;
        let mut reader = self.session.read_blob(&self.name, digest).await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = reader.chunk().await? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > limit {
                return Err(invalid(&format_args!("it has more than {limit} bytes")));
            }
        }
        let actual: String = llb::digest(&bytes);
        match actual == digest {
            true => Ok(bytes),
            false => Err(invalid(&format_args!("expected {digest}, got {actual}"))),
        }
    }

    /// A layer's blob, in the content store here.
    pub(crate) async fn receive(&self, blobs: &Blobs, blob: &LayerBlob) -> Result<BlobRef, ImageError> {
        if let Some(stored) = blobs.get(&blob.digest)? {
            return Ok(stored);
        }
        let mut writer = blobs.writer()?;
        let mut reader = self.session.read_blob(&self.name, &blob.digest).await?;
        let mut size = 0;
        while let Some(chunk) = reader.chunk().await? {
            size += chunk.len() as u64;
            if size > blob.size {
                return Err(ImageError::image(&blob.digest, format!("it has more than {} bytes", blob.size)));
            }
            let written =
                tokio::task::spawn_blocking(move || writer.write_all(&chunk).map(|()| writer)).await?;
            writer = written.map_err(|error| ImageError::Internal(format!("write blob: {error}")))?;
        }
        let blob = blob.clone();
        blocking(move || Ok(writer.commit(Some(&blob.digest), Some(blob.size))?)).await
    }
}
