//! Answering a registry's challenges: Basic, and Bearer tokens with their cache.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use dashmap::DashMap;
use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::sync::Mutex;
use url::Url;

use super::RegistryError;

/// Name under which tokens are asked for.
const CLIENT_ID: &str = "buildkit-client";
/// What the token protocol says of a token that does not state its life.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is renewed this long before it ends.
const MARGIN: Duration = Duration::from_secs(5);

/// A name and its secret. An empty name with a secret is an identity (refresh) token.
#[derive(Clone, PartialEq, Eq)]
pub struct BasicAuth {
    /// User name.
    pub username: String,
    /// Password or refresh token.
    pub secret: String,
}

impl std::fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BasicAuth").field("username", &self.username).finish_non_exhaustive()
    }
}

/// What a Bearer challenge asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRequest {
    /// Registry host (`registry-1.docker.io` for Docker Hub).
    pub host: String,
    /// URL of the token server.
    pub realm: String,
    /// Service name, may be empty.
    pub service: String,
    /// Scopes, sorted, e.g. `repository:library/alpine:pull`.
    pub scopes: Vec<String>,
    /// Name of this client.
    pub client_id: &'static str,
}

/// A token and how long it is good for.
#[derive(Clone)]
pub struct Token {
    /// The bearer token.
    pub token: String,
    /// Its life from now on; `None` if not stated.
    pub expires_in: Option<Duration>,
}

/// Where credentials come from. Errors are texts for the user.
pub trait Credentials: Send + Sync + 'static {
    /// Tokens are shared only between requests with the same identity.
    fn identity(&self) -> String;

    /// Name and secret for a registry host (`registry-1.docker.io` for Docker Hub), if there are any.
    fn basic<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Option<BasicAuth>, String>>;

    /// Lets the owner of the secret fetch a token, so that the secret need not be handed out.
    /// `None`: it can't; use [`Credentials::basic`].
    fn token<'a>(&'a self, request: &'a TokenRequest) -> BoxFuture<'a, Result<Option<Token>, String>> {
        let _ = request;
        Box::pin(async { Ok(None) })
    }
}

/// Nobody's credentials.
#[derive(Debug, Clone, Copy, Default)]
pub struct Anonymous;

impl Credentials for Anonymous {
    fn identity(&self) -> String {
        String::new()
    }

    fn basic<'a>(&'a self, _host: &'a str) -> BoxFuture<'a, Result<Option<BasicAuth>, String>> {
        Box::pin(async { Ok(None) })
    }
}

/// Credentials by registry host.
#[derive(Debug, Clone, Default)]
pub struct StaticCredentials {
    /// Distinguishes this set from others.
    pub identity: String,
    /// Host to name and secret.
    pub hosts: HashMap<String, BasicAuth>,
}

impl Credentials for StaticCredentials {
    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn basic<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Option<BasicAuth>, String>> {
        Box::pin(async move { Ok(self.hosts.get(host).cloned()) })
    }
}

/// What an endpoint wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: String, scope: String },
}

/// Identity, realm, service, scopes.
type TokenKey = (String, String, String, String);
type TokenSlot = Arc<Mutex<Option<(String, Instant)>>>;

/// Remembers challenges and tokens.
#[derive(Default)]
pub(super) struct Authorizer {
    challenges: DashMap<String, Challenge>,
    tokens: DashMap<TokenKey, TokenSlot>,
}

impl Authorizer {
    /// Notes what an endpoint asked for; false if its challenge is of no known kind.
    pub(super) fn challenged<'a>(&self, endpoint: &str, headers: impl Iterator<Item = &'a str>) -> bool {
        let mut chosen = None;
        for challenge in headers.filter_map(parse_challenge) {
            if matches!(challenge, Challenge::Bearer { .. }) {
                chosen = Some(challenge);
                break;
            }
            chosen = Some(challenge);
        }
        match chosen {
            Some(challenge) => {
                self.challenges.insert(endpoint.to_string(), challenge);
                true
            }
            None => false,
        }
    }

    /// Value of the Authorization header for an endpoint that challenged before. `renew`: the
    /// one used last was refused.
    pub(super) async fn header(
        &self,
        http: &reqwest::Client,
        endpoint: &str,
        host: &str,
        credentials: &dyn Credentials,
        scopes: &BTreeSet<String>,
        renew: bool,
    ) -> Result<Option<String>, RegistryError> {
        let Some(challenge) = self.challenges.get(endpoint).map(|c| c.clone()) else { return Ok(None) };
        let failed = |message: String| RegistryError::Auth { host: host.to_string(), message };
        let Challenge::Bearer { realm, service, scope } = challenge else {
            let basic = credentials.basic(host).await.map_err(failed)?;
            return Ok(basic.map(|basic| basic_header(&basic)));
        };
        let mut scopes = scopes.clone();
        // A challenge that was kept from another repository must not widen this one's token.
        if scopes.is_empty() {
            scopes.extend(scope.split_whitespace().map(str::to_string));
        }
        let scopes: Vec<String> = scopes.into_iter().collect();
        let key = (credentials.identity(), realm.clone(), service.clone(), scopes.join(" "));
        let slot = self.tokens.entry(key).or_default().clone();
        // One fetch at a time for the same token; waiting here holds nothing else.
        let mut slot = slot.lock().await;
        if let Some((token, until)) = &*slot
            && !renew
            && Instant::now() < *until
        {
            return Ok(Some(format!("Bearer {token}")));
        }
        let request = TokenRequest { host: host.to_string(), realm, service, scopes, client_id: CLIENT_ID };
        let token = match credentials.token(&request).await.map_err(failed)? {
            Some(token) => token,
            None => {
                let basic = credentials.basic(host).await.map_err(failed)?;
                fetch_token(http, &request, basic.as_ref()).await.map_err(failed)?
            }
        };
        let life = token.expires_in.unwrap_or(DEFAULT_LIFE).saturating_sub(MARGIN);
        let header = format!("Bearer {}", token.token);
        *slot = Some((token.token, Instant::now() + life));
        Ok(Some(header))
    }
}

fn basic_header(basic: &BasicAuth) -> String {
    let pair = format!("{}:{}", basic.username, basic.secret);
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
    expires_in: Option<u64>,
}

async fn fetch_token(
    http: &reqwest::Client,
    request: &TokenRequest,
    basic: Option<&BasicAuth>,
) -> Result<Token, String> {
    let realm =
        Url::parse(&request.realm).map_err(|e| format!("bad token server {:?}: {e}", request.realm))?;
    let shown = format!("{}://{}{}", realm.scheme(), realm.host_str().unwrap_or_default(), realm.path());
    if let Some(basic) = basic.filter(|b| !b.secret.is_empty()) {
        let form = grant(request, basic);
        let post =
            http.post(realm.clone()).header("content-type", "application/x-www-form-urlencoded").body(form);
        let response = post.send().await.map_err(|e| format!("{shown}: {}", super::http::chain(e)))?;
        let status = response.status().as_u16();
        // Servers of the older protocol know only GET.
        if basic.username.is_empty() || !matches!(status, 401 | 404 | 405) {
            return token_answer(response, &shown).await;
        }
    }
    let mut url = realm;
    {
        let mut query = url.query_pairs_mut();
        if !request.service.is_empty() {
            query.append_pair("service", &request.service);
        }
        for scope in &request.scopes {
            query.append_pair("scope", scope);
        }
        query.append_pair("client_id", request.client_id);
    }
    let mut get = http.get(url);
    if let Some(basic) = basic.filter(|b| !b.username.is_empty()) {
        get = get.header("authorization", basic_header(basic));
    }
    let response = get.send().await.map_err(|e| format!("{shown}: {}", super::http::chain(e)))?;
    token_answer(response, &shown).await
}

/// Body of a token request by POST.
fn grant(request: &TokenRequest, basic: &BasicAuth) -> String {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("service", &request.service)
        .append_pair("client_id", request.client_id)
        .append_pair("scope", &request.scopes.join(" "));
    if basic.username.is_empty() {
        form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", &basic.secret);
    } else {
        form.append_pair("grant_type", "password")
            .append_pair("username", &basic.username)
            .append_pair("password", &basic.secret);
    }
    form.finish()
}

async fn token_answer(response: reqwest::Response, shown: &str) -> Result<Token, String> {
    let status = response.status();
    let body = super::http::read_limited(response, 1 << 20).await.map_err(|e| format!("{shown}: {e}"))?;
    if !status.is_success() {
        return Err(format!(
            "failed to fetch token from {shown}: {status}{}",
            super::http::server_message(&body)
        ));
    }
    let answer: TokenAnswer =
        serde_json::from_slice(&body).map_err(|e| format!("{shown} sent no valid token: {e}"))?;
    let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
    if token.is_empty() {
        return Err(format!("{shown} sent no token"));
    }
    Ok(Token { token, expires_in: answer.expires_in.map(Duration::from_secs) })
}

/// One `WWW-Authenticate` value.
fn parse_challenge(header: &str) -> Option<Challenge> {
    let (scheme, mut rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut fields: HashMap<String, String> = HashMap::new();
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_ascii_lowercase();
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').unwrap_or((after, "")),
        };
        fields.insert(key, value.to_string());
        rest = next;
    }
    Some(Challenge::Bearer {
        realm: fields.remove("realm")?,
        service: fields.remove("service").unwrap_or_default(),
        scope: fields.remove("scope").unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_with_and_without_quotes() {
        assert_eq!(
            parse_challenge(
                r#"Bearer realm="https://a/token",service="s, t",scope="repository:x:pull,push""#
            ),
            Some(Challenge::Bearer {
                realm: "https://a/token".into(),
                service: "s, t".into(),
                scope: "repository:x:pull,push".into(),
            })
        );
        assert_eq!(
            parse_challenge("bearer realm=https://a/token, service=s"),
            Some(Challenge::Bearer {
                realm: "https://a/token".into(),
                service: "s".into(),
                scope: String::new()
            })
        );
        assert_eq!(parse_challenge("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(parse_challenge("Negotiate"), None);
        assert_eq!(parse_challenge("Bearer service=\"no realm\""), None);
    }
}
