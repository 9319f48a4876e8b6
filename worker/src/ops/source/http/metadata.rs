//! What clients ask about a file of the web before it is used.

use std::fs::File;
use std::io::{self, Read};

use kiln_cache::Ref;
use kiln_proto::gateway::checksum_request::ChecksumAlgo;
use kiln_proto::gateway::{ChecksumRequest, ChecksumResponse, ResolveSourceHttpResponse};
use kiln_solver::op::OpError;
use kiln_solver::progress::VertexProgress;
use rustix::fs::{Mode, OFlags, openat};
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::HttpSource;

/// Suffixes are what signatures add to a file; none is longer.
const MAX_SUFFIX: usize = 4 << 10;

impl HttpSource {
    /// Digest, name and date of the file, and the checksum that is asked for. What a definition promises is not asked
    /// of the server unless a checksum is.
    pub(crate) async fn metadata(
        &self,
        request: Option<ChecksumRequest>,
        progress: &VertexProgress,
    ) -> Result<ResolveSourceHttpResponse, OpError> {
        let request = match request {
            Some(request) => Some((algorithm(&request).map_err(OpError::new)?, request.suffix)),
            None => None,
        };
        let promised = self.resolve(progress).await?;
        let fetched = match (&request, &promised.file) {
            (Some(_), None) => Some(self.fetch(progress).await?),
            _ => None,
        };
        let resolved = fetched.as_ref().unwrap_or(promised);
        let checksum_response = match (request, &resolved.file) {
            (Some((algorithm, suffix)), Some(file)) => {
                let digest = self.checksum_of(file, &resolved.name, algorithm, suffix.clone()).await?;
                Some(ChecksumResponse { digest, suffix })
            }
            _ => None,
        };
        let seconds = resolved.modified.and_then(|modified| i64::try_from(modified).ok());
        Ok(ResolveSourceHttpResponse {
            checksum: resolved.digest.clone(),
            filename: resolved.name.clone(),
            last_modified: seconds.map(|seconds| prost_types::Timestamp { seconds, nanos: 0 }),
            checksum_response,
        })
    }

    async fn checksum_of(
        &self,
        snapshot: &Ref,
        name: &str,
        algorithm: ChecksumAlgo,
        suffix: Vec<u8>,
    ) -> Result<String, OpError> {
        let view = self.worker.view(snapshot).await?;
        let path = name.to_owned();
        let hashed = self.worker.on_files(move || {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(openat(view.fd(), path, flags, Mode::empty())?);
            match algorithm {
                ChecksumAlgo::Sha256 => hash::<Sha256>("sha256", file, &suffix),
                ChecksumAlgo::Sha384 => hash::<Sha384>("sha384", file, &suffix),
                ChecksumAlgo::Sha512 => hash::<Sha512>("sha512", file, &suffix),
            }
        });
        hashed.await.map_err(|err| self.failed(err))?.map_err(|err| self.failed(err))
    }
}

/// `<name>:…` of the file and what is to follow it.
fn hash<D: Digest>(name: &str, mut file: File, suffix: &[u8]) -> io::Result<String> {
    let mut hash = D::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    hash.update(suffix);
    Ok(format!("{name}:{}", hex::encode(hash.finalize())))
}

/// Refuses what is not answered before anything is fetched.
fn algorithm(request: &ChecksumRequest) -> Result<ChecksumAlgo, String> {
    if request.suffix.len() > MAX_SUFFIX {
        return Err(format!("http checksum request suffix exceeds max size {MAX_SUFFIX}"));
    }
    ChecksumAlgo::try_from(request.algo)
        .map_err(|_| format!("unsupported checksum algorithm {}", request.algo))
}
