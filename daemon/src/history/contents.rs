//! The blobs that records name, logs, traces, errors and claims, as they are kept: compressed, since a log of
//! thousands of steps is megabytes of much the same. Digests and sizes are of what clients read.

use std::io::{self, Write};

use kiln_cache::Values;
use kiln_proto::control::Descriptor;
use sha2::{Digest, Sha256};
use zstd::stream::write::Encoder;

use super::storage;
use crate::error::BuildError;

/// The namespace of blobs, by digest.
pub(super) const CONTENT: &str = "build-history-content";

/// What each zstd frame begins with, and nothing that earlier versions kept: those kept blobs as they are.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A blob in the making: compressed as it is written.
pub(super) struct Content {
    encoder: Encoder<'static, Vec<u8>>,
    hash: Sha256,
    size: i64,
}

/// A blob as it is kept.
pub(super) struct Packed {
    bytes: Vec<u8>,
    digest: String,
    size: i64,
}

impl Content {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { encoder: Encoder::new(Vec::new(), 1)?, hash: Sha256::new(), size: 0 })
    }

    pub(super) fn finish(self) -> io::Result<Packed> {
        let digest = format!("sha256:{}", hex::encode(self.hash.finalize()));
        Ok(Packed { bytes: self.encoder.finish()?, digest, size: self.size })
    }
}

impl Write for Content {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.encoder.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += i64::try_from(written).unwrap_or(0);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encoder.flush()
    }
}

impl Packed {
    pub(super) fn new(bytes: &[u8]) -> io::Result<Self> {
        let mut content = Content::new()?;
        content.write_all(bytes)?;
        content.finish()
    }

    pub(super) fn descriptor(&self, media_type: &str) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest: self.digest.clone(),
            size: self.size,
            ..Descriptor::default()
        }
    }

    pub(super) fn store(&self, values: &Values) -> Result<(), BuildError> {
        values.put(CONTENT, &self.digest, &self.bytes).map_err(storage)
    }
}

/// A blob that a record names, as clients read it.
pub(super) fn load(values: &Values, digest: &str) -> Result<Option<Vec<u8>>, BuildError> {
    match values.get(CONTENT, digest).map_err(storage)? {
        Some(bytes) if bytes.starts_with(&MAGIC) => zstd::decode_all(&bytes[..]).map(Some).map_err(storage),
        kept => Ok(kept),
    }
}
