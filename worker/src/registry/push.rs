//! Uploads: existence check, cross-repository mount, chunks with recovery, manifests.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use reqwest::{Method, RequestBuilder, Response};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use url::Url;

use super::client::{Call, Target, header};
use super::config::Endpoint;
use super::http::{self, RETRIES};
use super::{RegistryError, Repository};

/// Larger blobs go up in pieces of this size, each of which can be repeated.
const CHUNK: u64 = 64 << 20;

/// Content to push.
#[derive(Debug, Clone, Copy)]
pub enum BlobSource<'a> {
    /// In memory.
    Bytes(&'a [u8]),
    /// A file that holds exactly the blob.
    File(&'a Path),
}

/// How a blob came to be in the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushOutcome {
    /// It was there.
    Existed,
    /// Taken over from another repository of the same registry.
    Mounted,
    /// Sent.
    Uploaded,
    /// Neither there nor to be mounted, and no content was given.
    Missing,
}

/// Body of a request, made anew for each attempt.
pub(super) enum Body<'a> {
    Empty,
    Bytes(&'a [u8]),
    /// Part of a file: offset and length.
    File(&'a Path, u64, u64),
}

impl Body<'_> {
    /// Whether an answer can be expected at once.
    pub(super) fn is_small(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Bytes(bytes) => bytes.len() < 64 << 10,
            Self::File(..) => false,
        }
    }

    pub(super) async fn attach(&self, request: RequestBuilder) -> Result<RequestBuilder, RegistryError> {
        Ok(match self {
            Self::Empty => request,
            Self::Bytes(bytes) => request.body(Bytes::copy_from_slice(bytes)),
            Self::File(path, offset, length) => {
                let failed = |e: std::io::Error| RegistryError::Local {
                    path: path.display().to_string(),
                    message: e.to_string(),
                };
                let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
                file.seek(std::io::SeekFrom::Start(*offset)).await.map_err(failed)?;
                let stream = tokio_util::io::ReaderStream::with_capacity(file.take(*length), 256 << 10);
                request
                    .header(reqwest::header::CONTENT_LENGTH, *length)
                    .body(reqwest::Body::wrap_stream(stream))
            }
        })
    }
}

impl<'a> BlobSource<'a> {
    fn part(self, offset: u64, length: u64) -> Body<'a> {
        match self {
            Self::Bytes(bytes) => Body::Bytes(&bytes[offset as usize..(offset + length) as usize]),
            Self::File(path) => Body::File(path, offset, length),
        }
    }
}

impl Repository {
    /// Whether the repository has a blob.
    pub async fn has_blob(&self, digest: &str) -> Result<bool, RegistryError> {
        let scopes = self.scopes("pull,push");
        let mut last = None;
        for endpoint in self.endpoints(true) {
            match self.has_blob_at(&endpoint, &scopes, digest).await {
                Ok(found) => return Ok(found),
                Err(error) => last = Some(error),
            }
        }
        last.map_or(Ok(false), Err)
    }

    /// Makes the repository have a blob: checks, mounts from one of the repositories `mount_from` (paths
    /// within the same registry), or uploads, if there is a `source`. `sent` hears of each part that went up, in
    /// bytes from the start.
    pub async fn push_blob(
        &self,
        digest: &str,
        size: u64,
        source: Option<BlobSource<'_>>,
        mount_from: &[String],
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<PushOutcome, RegistryError> {
        let mut last = None;
        for endpoint in self.endpoints(true) {
            match self.push_blob_at(&endpoint, digest, size, source, mount_from, sent).await {
                Ok(outcome) => return Ok(outcome),
                Err(error @ RegistryError::Network { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| self.invalid("no endpoint to push to")))
    }

    /// Stores a manifest under a tag or its digest.
    pub async fn push_manifest(
        &self,
        name: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), RegistryError> {
        let scopes = self.scopes("pull,push");
        let path = format!("manifests/{name}");
        let what = self.name().name();
        let mut last = None;
        for endpoint in self.endpoints(true) {
            let call = Call {
                headers: vec![(reqwest::header::CONTENT_TYPE, media_type.to_string())],
                body: Body::Bytes(bytes),
                ..Call::bare(Method::PUT, Target::Path(&path), &scopes, &what)
            };
            match self.send(&endpoint, call).await {
                Ok(_) => return Ok(()),
                Err(error @ RegistryError::Network { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| self.invalid("no endpoint to push to")))
    }

    fn invalid(&self, message: impl Into<String>) -> RegistryError {
        RegistryError::Invalid { what: self.name().name(), message: message.into() }
    }

    async fn has_blob_at(
        &self,
        endpoint: &Endpoint,
        scopes: &BTreeSet<String>,
        digest: &str,
    ) -> Result<bool, RegistryError> {
        let what = format!("{}@{digest}", self.name().name());
        let path = format!("blobs/{digest}");
        let call = Call { accept: &[404], ..Call::bare(Method::HEAD, Target::Path(&path), scopes, &what) };
        Ok(self.send(endpoint, call).await?.status().is_success())
    }

    async fn push_blob_at(
        &self,
        endpoint: &Endpoint,
        digest: &str,
        size: u64,
        source: Option<BlobSource<'_>>,
        mount_from: &[String],
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<PushOutcome, RegistryError> {
        let mut scopes = self.scopes("pull,push");
        if self.has_blob_at(endpoint, &scopes, digest).await? {
            sent(size);
            return Ok(PushOutcome::Existed);
        }
        let mut session = None;
        for from in mount_from.iter().filter(|from| *from != self.name().path()) {
            scopes.insert(format!("repository:{from}:pull"));
            let target = mount_target(digest, from);
            // A registry that may not read the other repository refuses; a plain upload is still possible.
            match self.start(endpoint, &scopes, &target).await {
                Ok(response) if response.status().as_u16() == 201 => {
                    sent(size);
                    return Ok(PushOutcome::Mounted);
                }
                // Not mounted, but an upload was opened: it is the one to go on with.
                Ok(response) => {
                    session = Some(self.location(&response, None)?);
                    break;
                }
                Err(error) => tracing::debug!(%error, from, "mount refused"),
            }
        }
        let scopes = self.scopes("pull,push");
        let Some(source) = source else {
            if let Some(location) = session {
                self.abandon(endpoint, &scopes, &location).await;
            }
            return Ok(PushOutcome::Missing);
        };
        let mut restarts = 0;
        loop {
            let location = match session.take() {
                Some(location) => location,
                None => {
                    let response = self.start(endpoint, &scopes, "blobs/uploads/").await?;
                    self.location(&response, None)?
                }
            };
            match self.upload(endpoint, &scopes, location, digest, size, source, sent).await {
                Ok(()) => return Ok(PushOutcome::Uploaded),
                Err(error) if restarts < 2 && restartable(&error) => {
                    restarts += 1;
                    tracing::debug!(%error, "upload starts again");
                    tokio::time::sleep(http::pause(restarts, None)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn start(
        &self,
        endpoint: &Endpoint,
        scopes: &BTreeSet<String>,
        target: &str,
    ) -> Result<Response, RegistryError> {
        let what = self.name().name();
        let call = Call {
            headers: vec![(reqwest::header::CONTENT_LENGTH, "0".to_string())],
            ..Call::bare(Method::POST, Target::Path(target), scopes, &what)
        };
        self.send(endpoint, call).await
    }

    /// Closes an upload that is not needed; registries forget those that stay open by themselves.
    async fn abandon(&self, endpoint: &Endpoint, scopes: &BTreeSet<String>, location: &Url) {
        let what = self.name().name();
        let call = Call { retry: false, ..Call::bare(Method::DELETE, Target::Url(location), scopes, &what) };
        if let Err(error) = self.send(endpoint, call).await {
            tracing::debug!(%error, "upload left open");
        }
    }

    /// Where an upload goes on, relative to the request that was answered.
    fn location(&self, response: &Response, previous: Option<&Url>) -> Result<Url, RegistryError> {
        match (header(response, "location"), previous) {
            (Some(location), _) => response
                .url()
                .join(&location)
                .map_err(|e| self.invalid(format!("bad upload location {location:?}: {e}"))),
            (None, Some(previous)) => Ok(previous.clone()),
            (None, None) => Err(self.invalid("the registry opened an upload without saying where")),
        }
    }

    #[allow(clippy::too_many_arguments)]
    async fn upload(
        &self,
        endpoint: &Endpoint,
        scopes: &BTreeSet<String>,
        mut location: Url,
        digest: &str,
        size: u64,
        source: BlobSource<'_>,
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<(), RegistryError> {
        let what = self.name().name();
        let mut position = 0;
        let mut failures = 0;
        let octets = (reqwest::header::CONTENT_TYPE, "application/octet-stream".to_string());
        while size - position > CHUNK || position > 0 && position < size {
            let length = CHUNK.min(size - position);
            let call = Call {
                headers: vec![
                    octets.clone(),
                    (reqwest::header::CONTENT_RANGE, format!("{position}-{}", position + length - 1)),
                ],
                body: source.part(position, length),
                retry: false,
                ..Call::bare(Method::PATCH, Target::Url(&location), scopes, &what)
            };
            match self.send(endpoint, call).await {
                Ok(response) => {
                    location = self.location(&response, Some(&location))?;
                    position += length;
                    failures = 0;
                    sent(position);
                }
                Err(error) if failures < RETRIES && recoverable(&error) => {
                    failures += 1;
                    tokio::time::sleep(http::pause(failures, None)).await;
                    (location, position) =
                        self.upload_state(endpoint, scopes, &location).await.map_err(|_| error)?;
                    if position > size {
                        let message =
                            format!("{} has {position} bytes of {size} that were sent", endpoint.host);
                        return Err(self.invalid(message));
                    }
                    sent(position);
                }
                Err(error) => return Err(error),
            }
        }
        let mut last = location.clone();
        last.query_pairs_mut().append_pair("digest", digest);
        let rest = size - position;
        let call = Call {
            headers: if rest > 0 {
                vec![octets]
            } else {
                vec![(reqwest::header::CONTENT_LENGTH, "0".to_string())]
            },
            body: if rest > 0 { source.part(position, rest) } else { Body::Empty },
            retry: rest == 0,
            ..Call::bare(Method::PUT, Target::Url(&last), scopes, &what)
        };
        self.send(endpoint, call).await?;
        sent(size);
        Ok(())
    }

    /// Asks an open upload how far it is.
    async fn upload_state(
        &self,
        endpoint: &Endpoint,
        scopes: &BTreeSet<String>,
        location: &Url,
    ) -> Result<(Url, u64), RegistryError> {
        let what = self.name().name();
        let call = Call::bare(Method::GET, Target::Url(location), scopes, &what);
        let response = self.send(endpoint, call).await?;
        let location = self.location(&response, Some(location))?;
        // `0-0` is both nothing and one byte; taking it for nothing is always right with a fresh upload.
        let end = header(&response, "range")
            .and_then(|range| {
                range.trim_start_matches("bytes=").split_once('-')?.1.trim().parse::<u64>().ok()
            })
            .filter(|end| *end > 0);
        Ok((location, end.map_or(0, |end| end.saturating_add(1))))
    }
}

fn mount_target(digest: &str, from: &str) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.append_pair("mount", digest).append_pair("from", from);
    format!("blobs/uploads/?{}", query.finish())
}

fn recoverable(error: &RegistryError) -> bool {
    match error {
        RegistryError::Network { .. } => true,
        RegistryError::Status { code, .. } => *code == 416 || http::is_transient(*code),
        _ => false,
    }
}

/// An upload that was lost (the session expired, the registry restarted) can begin anew.
fn restartable(error: &RegistryError) -> bool {
    error.is_not_found() || recoverable(error)
}
