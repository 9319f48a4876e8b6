//! HTTP clients by endpoint, one request with its retries, and texts of failures.

use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use dashmap::DashMap;
use reqwest::{Certificate, Client, Identity, Response, Url};

use super::RegistryError;
use super::config::{Endpoint, HostConfig};

/// How often a request is repeated after an answer or a failure that may pass.
pub(super) const RETRIES: u32 = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// No byte for this long means that the connection is dead.
pub(crate) const IDLE: Duration = Duration::from_secs(60);
/// Longest time that one piece of an upload may take.
pub(super) const UPLOAD: Duration = Duration::from_secs(3600);
/// Longest pause that a registry may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// Clients, which hold the connections; one for each set of TLS settings.
#[derive(Default)]
pub(crate) struct Clients {
    by_settings: DashMap<(String, bool, bool), Client>,
}

impl Clients {
    pub(super) fn get(
        &self,
        endpoint: &Endpoint,
        config: Option<&HostConfig>,
    ) -> Result<Client, RegistryError> {
        let tls = endpoint.scheme == "https";
        let named =
            config.is_some_and(|c| !c.ca.is_empty() || !c.keypair.is_empty() || !c.tlsconfigdir.is_empty());
        let name = if tls && named { endpoint.config.clone() } else { String::new() };
        let loopback = super::config::is_loopback(&endpoint.host);
        let key = (if tls { name } else { "http".to_string() }, endpoint.skip_verify, loopback);
        self.shared(key, || build(endpoint.skip_verify, config, tls, loopback))
            .map_err(|message| RegistryError::Config { host: endpoint.host.clone(), message })
    }

    /// A client for a URL that is no registry's: with the system's certificates and nobody's settings.
    pub(crate) fn for_url(&self, url: &Url) -> Result<Client, String> {
        let (tls, loopback) = (url.scheme() == "https", super::config::is_loopback(&host(url)));
        let name = if tls { String::new() } else { "http".to_string() };
        self.shared((name, false, loopback), || build(false, None, tls, loopback))
    }

    fn shared(
        &self,
        key: (String, bool, bool),
        build: impl FnOnce() -> Result<Client, String>,
    ) -> Result<Client, String> {
        if let Some(client) = self.by_settings.get(&key) {
            return Ok(client.clone());
        }
        let client = build()?;
        self.by_settings.insert(key, client.clone());
        Ok(client)
    }
}

fn build(
    skip_verify: bool,
    config: Option<&HostConfig>,
    tls: bool,
    loopback: bool,
) -> Result<Client, String> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Another part of the process may have installed it already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let mut builder = Client::builder()
        .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_user_timeout(IDLE)
        .pool_idle_timeout(Duration::from_secs(30));
    if loopback {
        builder = builder.no_proxy();
    }
    if !tls {
        // Redirects to https are still followed, with the system's certificates where there are any.
        if let Ok(client) = builder.build() {
            return Ok(client);
        }
        let bare =
            Client::builder().connect_timeout(CONNECT_TIMEOUT).tcp_user_timeout(IDLE).tls_certs_only([]);
        return if loopback { bare.no_proxy() } else { bare }.build().map_err(chain);
    }
    if skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    let mut certificates = Vec::new();
    let mut identity = None;
    if let Some(config) = config {
        for file in &config.ca {
            certificates.extend(read_certificates(file)?);
        }
        for pair in &config.keypair {
            identity = Some(read_identity(&pair.cert, &pair.key)?);
        }
        for dir in &config.tlsconfigdir {
            let entries = std::fs::read_dir(dir).map_err(|e| format!("read {}: {e}", dir.display()))?;
            for entry in entries {
                let path = entry.map_err(|e| format!("read {}: {e}", dir.display()))?.path();
                match path.extension().and_then(|e| e.to_str()) {
                    Some("crt") => certificates.extend(read_certificates(&path)?),
                    Some("cert") => identity = Some(read_identity(&path, &path.with_extension("key"))?),
                    _ => {}
                }
            }
        }
    }
    if !certificates.is_empty() {
        builder = builder.tls_certs_merge(certificates);
    }
    if let Some(identity) = identity {
        builder = builder.identity(identity);
    }
    builder.build().map_err(|e| format!("TLS can't be set up (are CA certificates installed?): {}", chain(e)))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|e| format!("read {}: {e}", path.display()))
}

fn read_certificates(path: &Path) -> Result<Vec<Certificate>, String> {
    Certificate::from_pem_bundle(&read(path)?).map_err(|e| format!("{}: {}", path.display(), chain(e)))
}

fn read_identity(cert: &Path, key: &Path) -> Result<Identity, String> {
    let mut pem = read(cert)?;
    pem.push(b'\n');
    pem.extend(read(key)?);
    Identity::from_pem(&pem).map_err(|e| format!("{}: {}", cert.display(), chain(e)))
}

/// An HTTP failure with its causes, without the URL (which may carry signatures).
pub(crate) fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Host and port of a URL, without the user that a redirect may have put there.
pub(super) fn host(url: &Url) -> String {
    let name = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| name.to_string(), |port| format!("{name}:{port}"))
}

/// What an error answer says, as `: code: message`, or nothing.
pub(super) fn server_message(body: &[u8]) -> String {
    if let Ok(json) = serde_json::from_slice::<serde_json::Value>(body) {
        let mut parts = Vec::new();
        for error in json["errors"].as_array().into_iter().flatten() {
            let text = [error["code"].as_str(), error["message"].as_str()];
            parts.push(text.into_iter().flatten().collect::<Vec<_>>().join(": "));
        }
        for key in ["details", "message", "error_description", "error"] {
            if parts.is_empty()
                && let Some(text) = json[key].as_str()
            {
                parts.push(text.to_string());
            }
        }
        parts.retain(|part| !part.is_empty());
        if parts.is_empty() {
            return String::new();
        }
        return format!(": {}", parts.join(", "));
    }
    let text = String::from_utf8_lossy(body);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    if line.is_empty() || line.starts_with('<') {
        return String::new();
    }
    format!(": {}", line.chars().take(200).collect::<String>())
}

/// The next piece of a body; one that does not come in time is an error.
///
/// The client's own read timeout is not used: it also runs while a request's body is being sent.
pub(crate) async fn next_chunk(response: &mut Response) -> Result<Option<bytes::Bytes>, String> {
    match tokio::time::timeout(IDLE, response.chunk()).await {
        Ok(result) => result.map_err(chain),
        Err(_) => Err(format!("no data for {} s", IDLE.as_secs())),
    }
}

/// A body of at most `limit` bytes.
pub(super) async fn read_limited(mut response: Response, limit: usize) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(chunk) = next_chunk(&mut response).await? {
        if body.len() + chunk.len() > limit {
            return Err(format!("answer is longer than {limit} bytes"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Whether a status may pass by itself.
pub(super) fn is_transient(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// Pause before attempt `attempt` (counted from 1), or what the registry asked for.
pub(super) fn pause(attempt: u32, response: Option<&Response>) -> Duration {
    let asked = response
        .and_then(|r| r.headers().get("retry-after"))
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(Duration::from_secs);
    let base = Duration::from_millis(100 << attempt.min(6));
    let jitter = base.mul_f64(rand::random::<f64>() * 0.5);
    asked.map_or(base + jitter, |asked| asked.min(MAX_PAUSE).max(base))
}
