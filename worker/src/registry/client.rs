//! Repositories: one request to the endpoints that may serve it, and manifests.

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_proto::reference::{Reference, check_digest};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Response};
use sha2::{Digest, Sha256, Sha384, Sha512};
use url::Url;

use super::auth::{Authorizer, Credentials};
use super::config::{Endpoint, RegistryConfig};
use super::http::{self, Clients, RETRIES};
use super::push::Body;
use super::{MANIFEST_TYPES, RegistryError};

/// Manifests are small; a larger one is not a manifest.
const MAX_MANIFEST: usize = 4 << 20;

/// Everything that is shared between builds: configuration, connections, tokens.
pub struct Registry {
    config: RegistryConfig,
    clients: Clients,
    auth: Authorizer,
}

impl Registry {
    /// A client with this configuration. Opens no connection.
    pub fn new(config: RegistryConfig) -> Arc<Self> {
        Arc::new(Self { config, clients: Clients::default(), auth: Authorizer::default() })
    }

    /// The repository that `reference` names; its tag and digest do not matter.
    pub fn repository(
        self: &Arc<Self>,
        reference: &Reference,
        credentials: Arc<dyn Credentials>,
    ) -> Repository {
        Repository {
            registry: self.clone(),
            name: reference.clone().without_tag_and_digest(),
            credentials,
            insecure: false,
        }
    }
}

/// One repository, as one user sees it.
#[derive(Clone)]
pub struct Repository {
    registry: Arc<Registry>,
    name: Reference,
    credentials: Arc<dyn Credentials>,
    insecure: bool,
}

/// What a registry says of a manifest without sending it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestHead {
    /// As the registry states it, by whatever algorithm.
    pub digest: String,
    /// Media type of the content.
    pub media_type: String,
    /// Length in bytes, if stated.
    pub size: Option<u64>,
}

/// A manifest or an index, verified against its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Digest of `bytes`, sha256.
    pub digest: String,
    /// Media type of the content.
    pub media_type: String,
    /// The document exactly as stored.
    pub bytes: Vec<u8>,
}

/// One request; it can be sent several times.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// Path below `/v2/<repository>/`, or a whole URL that the registry gave.
    pub(super) target: Target<'a>,
    pub(super) headers: Vec<(HeaderName, String)>,
    pub(super) body: Body<'a>,
    pub(super) scopes: &'a BTreeSet<String>,
    /// What the error text is about.
    pub(super) what: &'a str,
    /// Statuses that are answers, beside success.
    pub(super) accept: &'a [u16],
    /// Whether a transient failure is tried again with the same request.
    pub(super) retry: bool,
}

pub(super) enum Target<'a> {
    Path(&'a str),
    Url(&'a Url),
}

impl<'a> Call<'a> {
    /// A request with nothing but its target: no body, tried again after what may pass.
    pub(super) fn bare(
        method: Method,
        target: Target<'a>,
        scopes: &'a BTreeSet<String>,
        what: &'a str,
    ) -> Self {
        Self {
            method,
            target,
            headers: Vec::new(),
            body: Body::Empty,
            scopes,
            what,
            accept: &[],
            retry: true,
        }
    }
}

impl Repository {
    /// The same repository, reached without checking certificates or by plain HTTP if need be.
    #[must_use]
    pub fn insecure(mut self, insecure: bool) -> Self {
        self.insecure = insecure;
        self
    }

    /// Registry and repository, without tag and digest.
    pub fn name(&self) -> &Reference {
        &self.name
    }

    pub(super) fn endpoints(&self, push: bool) -> Vec<Endpoint> {
        self.registry.config.endpoints(self.name.domain(), push, self.insecure)
    }

    pub(super) fn scopes(&self, actions: &str) -> BTreeSet<String> {
        BTreeSet::from([format!("repository:{}:{actions}", self.name.path())])
    }

    /// Text that error messages begin with.
    fn label(&self, name: &str) -> String {
        let separator = if name.contains(':') { '@' } else { ':' };
        format!("{}{separator}{name}", self.name.name())
    }

    /// Asks what a tag or digest names. Answers `None` if the registry does not answer such
    /// questions properly; [`Repository::manifest`] then tells.
    pub async fn head_manifest(&self, name: &str) -> Result<Option<ManifestHead>, RegistryError> {
        let what = self.label(name);
        let response = self.manifest_request(Method::HEAD, name, &what).await?;
        let digest = header(&response, "docker-content-digest");
        let media_type = header(&response, "content-type");
        let size = header(&response, "content-length").and_then(|s| s.parse().ok());
        match (digest, media_type) {
            (Some(digest), Some(media_type)) if check_digest(&digest).is_ok() => {
                if name.contains(':') && name != digest {
                    return Err(RegistryError::Mismatch {
                        what,
                        host: http::host(response.url()),
                        expected: name.to_string(),
                        actual: digest,
                    });
                }
                Ok(Some(ManifestHead { digest, media_type, size }))
            }
            _ => Ok(None),
        }
    }

    /// Fetches a manifest by tag or digest and checks it.
    pub async fn manifest(&self, name: &str) -> Result<Manifest, RegistryError> {
        let what = self.label(name);
        let response = self.manifest_request(Method::GET, name, &what).await?;
        let host = http::host(response.url());
        let stated = header(&response, "docker-content-digest");
        let content_type = header(&response, "content-type").unwrap_or_default();
        let bytes = http::read_limited(response, MAX_MANIFEST).await.map_err(|message| {
            RegistryError::Invalid { what: what.clone(), message: format!("{host}: {message}") }
        })?;
        let expected = match name.contains(':') {
            true => Some(name.to_string()),
            false => stated.filter(|digest| check_digest(digest).is_ok()),
        };
        if let Some(expected) = expected {
            let actual = digest_as(&expected, &bytes).ok_or_else(|| RegistryError::Invalid {
                what: what.clone(),
                message: unsupported(&expected),
            })?;
            if actual != expected {
                return Err(RegistryError::Mismatch { what, host, expected, actual });
            }
        }
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        // The document's own word counts; some registries answer with `text/plain`.
        let stated: Option<String> = serde_json::from_slice::<serde_json::Value>(&bytes).map_err(|e| {
            RegistryError::Invalid { what: what.clone(), message: format!("{host} sent no manifest: {e}") }
        })?["mediaType"]
            .as_str()
            .map(str::to_string);
        Ok(Manifest { digest, media_type: stated.unwrap_or(content_type), bytes })
    }

    async fn manifest_request(
        &self,
        method: Method,
        name: &str,
        what: &str,
    ) -> Result<Response, RegistryError> {
        let path = format!("manifests/{name}");
        let scopes = self.scopes("pull");
        let accept = [MANIFEST_TYPES.join(", "), "*/*".to_string()].join(", ");
        let mut last = None;
        for endpoint in self.endpoints(false) {
            let call = Call {
                headers: vec![(reqwest::header::ACCEPT, accept.clone())],
                ..Call::bare(method.clone(), Target::Path(&path), &scopes, what)
            };
            match self.send(&endpoint, call).await {
                Ok(response) => return Ok(response),
                Err(error) => {
                    tracing::debug!(host = %endpoint.host, %error, "endpoint failed");
                    last = Some(better(last, error));
                }
            }
        }
        Err(last.unwrap_or_else(|| RegistryError::NotFound { what: what.to_string() }))
    }

    /// Sends a request to one endpoint: authorises, retries what may pass, and turns refusals into errors.
    pub(super) async fn send(&self, endpoint: &Endpoint, call: Call<'_>) -> Result<Response, RegistryError> {
        let base = format!("{}://{}{}", endpoint.scheme, endpoint.host, endpoint.prefix);
        let parse = |text: &str| {
            Url::parse(text).map_err(|e| RegistryError::Invalid {
                what: call.what.to_string(),
                message: format!("{text}: {e}"),
            })
        };
        // Uploads and redirects may lead elsewhere: credentials are the endpoint's alone.
        let home = parse(&base)?.origin();
        let client = self.registry.clients.get(endpoint, self.registry.config.host(&endpoint.config))?;
        let url = match &call.target {
            Target::Url(url) => (*url).clone(),
            Target::Path(path) => {
                let text = format!(
                    "{}://{}/v2{}/{}/{path}",
                    endpoint.scheme,
                    endpoint.host,
                    endpoint.prefix,
                    self.name.path()
                );
                let mut url = parse(&text)?;
                if let Some(namespace) = &endpoint.namespace {
                    url.query_pairs_mut().append_pair("ns", namespace);
                }
                url
            }
        };
        let mut attempt = 0;
        let mut refused = 0;
        loop {
            let header = match url.origin() == home {
                true => {
                    let (auth, credentials) = (&self.registry.auth, &self.credentials);
                    auth.header(&client, &base, &endpoint.host, credentials, call.scopes, refused > 1).await?
                }
                false => None,
            };
            let mut request = client.request(call.method.clone(), url.clone());
            let mut headers = HeaderMap::new();
            for (name, value) in &call.headers {
                headers.insert(name.clone(), header_value(value, &endpoint.host)?);
            }
            if let Some(value) = &header {
                let mut value = header_value(value, &endpoint.host)?;
                value.set_sensitive(true);
                headers.insert(reqwest::header::AUTHORIZATION, value);
            }
            request = request.headers(headers);
            let request = call.body.attach(request).await?;
            // While a body goes up, silence is no sign; the connection itself notices a dead peer.
            let limit = if call.body.is_small() { http::IDLE } else { http::UPLOAD };
            let sent = tokio::time::timeout(limit, request.send()).await;
            let failure = match &sent {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(!error.is_builder() && may_pass(error)),
                Err(_) => Some(true),
            };
            if let Some(passes) = failure
                && passes
                && call.retry
                && attempt < RETRIES
            {
                attempt += 1;
                tokio::time::sleep(http::pause(attempt, None)).await;
                continue;
            }
            let lost = |message| RegistryError::Network {
                what: call.what.to_string(),
                method: call.method.to_string(),
                url: shown(&url),
                message,
            };
            let response = match sent {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => return Err(lost(http::chain(error))),
                Err(_) => return Err(lost(format!("no answer for {} s", limit.as_secs()))),
            };
            let status = response.status();
            let code = status.as_u16();
            if status.is_success() || call.accept.contains(&code) {
                return Ok(response);
            }
            if code == 401 && refused < 2 && response.url().origin() == home {
                let values: Vec<String> = response
                    .headers()
                    .get_all("www-authenticate")
                    .iter()
                    .filter_map(|v| v.to_str().ok().map(str::to_string))
                    .collect();
                refused += if header.is_some() { 2 } else { 1 };
                if refused <= 2 && self.registry.auth.challenged(&base, values.iter().map(String::as_str)) {
                    continue;
                }
            }
            if http::is_transient(code) && call.retry && attempt < RETRIES {
                attempt += 1;
                tokio::time::sleep(http::pause(attempt, Some(&response))).await;
                continue;
            }
            return Err(refusal(&call, &url, response).await);
        }
    }
}

async fn refusal(call: &Call<'_>, url: &Url, response: Response) -> RegistryError {
    let status = response.status();
    let host = http::host(response.url());
    let what = call.what.to_string();
    let body = http::read_limited(response, 64 << 10).await.unwrap_or_default();
    let message = http::server_message(&body);
    match status.as_u16() {
        404 => RegistryError::NotFound { what },
        401 | 403 if matches!(call.method, Method::GET | Method::HEAD) => RegistryError::Denied {
            what,
            host,
            status: status.as_u16(),
            message: match message.strip_prefix(": ") {
                Some(message) => message.to_string(),
                None => status.canonical_reason().unwrap_or("no reason given").to_string(),
            },
        },
        code => RegistryError::Status {
            what,
            method: call.method.to_string(),
            url: shown(url),
            status: format!("{status}{message}"),
            code,
        },
    }
}

/// Digest of `bytes` by the algorithm that another digest names; `None` for one that images do not use.
fn digest_as(other: &str, bytes: &[u8]) -> Option<String> {
    let (algorithm, _) = other.split_once(':')?;
    let value = match algorithm {
        "sha256" => hex::encode(Sha256::digest(bytes)),
        "sha384" => hex::encode(Sha384::digest(bytes)),
        "sha512" => hex::encode(Sha512::digest(bytes)),
        _ => return None,
    };
    Some(format!("{algorithm}:{value}"))
}

fn unsupported(digest: &str) -> String {
    format!("unsupported: digest {digest}, which is neither sha256, sha384 nor sha512")
}

/// Which of two endpoints' errors tells the user more: the last, unless it only says "not found".
pub(super) fn better(previous: Option<RegistryError>, next: RegistryError) -> RegistryError {
    match previous {
        Some(previous) if next.is_not_found() && !previous.is_not_found() => previous,
        _ => next,
    }
}

/// Connections that were refused or names that don't resolve won't be there a second later; ones
/// that broke may.
fn may_pass(error: &reqwest::Error) -> bool {
    if error.is_timeout() {
        return true;
    }
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return !matches!(
                io.kind(),
                std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::InvalidData
            );
        }
        source = cause.source();
    }
    !error.is_connect()
}

pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.to_string()
}

pub(super) fn header(response: &Response, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_string)
}

fn header_value(value: &str, host: &str) -> Result<HeaderValue, RegistryError> {
    HeaderValue::from_str(value).map_err(|_| RegistryError::Auth {
        host: host.to_string(),
        message: "credentials hold characters that no header can carry".to_string(),
    })
}
