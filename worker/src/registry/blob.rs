//! Downloads that go on where they broke off.

use bytes::Bytes;
use reqwest::{Method, Response};

use super::client::{Call, Target, better};
use super::config::Endpoint;
use super::http::{self, RETRIES};
use super::{RegistryError, Repository};

/// The bytes of one blob, in order. Size is checked here; the reader checks the digest.
pub struct BlobStream {
    repository: Repository,
    digest: String,
    size: u64,
    position: u64,
    endpoints: std::vec::IntoIter<Endpoint>,
    endpoint: Option<Endpoint>,
    response: Option<Response>,
    /// Bytes to drop because the registry ignored the range.
    skip: u64,
    failures: u32,
    last_error: Option<RegistryError>,
}

impl Repository {
    /// Prepares the download of a blob; the first request goes out with the first read.
    pub fn blob(&self, digest: &str, size: u64) -> BlobStream {
        let mut endpoints = self.endpoints(false).into_iter();
        let endpoint = endpoints.next();
        BlobStream {
            repository: self.clone(),
            digest: digest.to_string(),
            size,
            position: 0,
            endpoints,
            endpoint,
            response: None,
            skip: 0,
            failures: 0,
            last_error: None,
        }
    }
}

impl BlobStream {
    /// Bytes handed out so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next piece; `None` at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            if self.position == self.size && (self.size > 0 || self.response.is_some()) {
                self.response = None;
                return Ok(None);
            }
            if self.response.is_none() && !self.open().await? {
                continue;
            }
            let Some(response) = &mut self.response else { continue };
            match http::next_chunk(response).await {
                Ok(Some(mut chunk)) => {
                    let drop = self.skip.min(chunk.len() as u64);
                    self.skip -= drop;
                    bytes::Buf::advance(&mut chunk, drop as usize);
                    if chunk.is_empty() {
                        continue;
                    }
                    self.position += chunk.len() as u64;
                    self.failures = 0;
                    if self.position > self.size {
                        let host = http::host(response.url());
                        return Err(RegistryError::Mismatch {
                            what: self.what(),
                            host,
                            expected: format!("{} bytes", self.size),
                            actual: "more".to_string(),
                        });
                    }
                    return Ok(Some(chunk));
                }
                // Only an empty blob gets here with all it needs.
                Ok(None) if self.position == self.size => {}
                Ok(None) => self.broken("connection closed before the end".to_string()).await?,
                Err(message) => self.broken(message).await?,
            }
        }
    }

    fn what(&self) -> String {
        format!("{}@{}", self.repository.name().name(), self.digest)
    }

    /// Sends the request for what is missing; false if the next endpoint is to be tried.
    async fn open(&mut self) -> Result<bool, RegistryError> {
        let what = self.what();
        let Some(endpoint) = self.endpoint.clone() else {
            return Err(self.last_error.take().unwrap_or(RegistryError::NotFound { what }));
        };
        let path = format!("blobs/{}", self.digest);
        let scopes = self.repository.scopes("pull");
        let mut headers = Vec::new();
        if self.position > 0 {
            headers.push((reqwest::header::RANGE, format!("bytes={}-", self.position)));
        }
        let call = Call { headers, ..Call::bare(Method::GET, Target::Path(&path), &scopes, &what) };
        match self.repository.send(&endpoint, call).await {
            Ok(response) => {
                self.skip = if response.status().as_u16() == 206 { 0 } else { self.position };
                if response.content_length() == Some(0) && self.size > 0 {
                    self.failures += 1;
                    self.endpoint = self.endpoints.next();
                    return Ok(false);
                }
                self.response = Some(response);
                Ok(true)
            }
            Err(error) => {
                tracing::debug!(host = %endpoint.host, %error, "endpoint failed");
                self.last_error = Some(better(self.last_error.take(), error));
                self.endpoint = self.endpoints.next();
                self.failures = 0;
                Ok(false)
            }
        }
    }

    /// The connection broke: pause and go on, or move to the next endpoint after too many failures in a row.
    async fn broken(&mut self, message: String) -> Result<(), RegistryError> {
        self.response = None;
        self.failures += 1;
        if self.failures <= RETRIES {
            tokio::time::sleep(http::pause(self.failures, None)).await;
            return Ok(());
        }
        let host = self.endpoint.as_ref().map(|e| e.host.clone()).unwrap_or_default();
        self.last_error = Some(RegistryError::Network {
            what: self.what(),
            method: "GET".to_string(),
            url: host,
            message: format!("{message} (after {} of {} bytes)", self.position, self.size),
        });
        self.endpoint = self.endpoints.next();
        self.failures = 0;
        Ok(())
    }
}
