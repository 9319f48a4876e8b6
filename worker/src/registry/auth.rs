//! Answering a registry's challenges: Basic, and Bearer tokens with their cache.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use base64::Engine;
use dashmap::DashMap;
use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::sync::Mutex;
use url::Url;

use super::{RegistryError, http};

/// Name under which tokens are asked for.
const CLIENT_ID: &str = "buildkit-client";
/// What the token protocol says of a token that does not state its life.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// Servers state what they like; no token is believed for longer.
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);
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
type TokenSlot = Arc<Mutex<Option<Fetched>>>;

/// What the last request for a token brought.
struct Fetched {
    at: Instant,
    /// Authorization header and the end of its life.
    header: Result<(String, Instant), RegistryError>,
    /// Who used it last.
    owner: Weak<dyn Credentials>,
}

/// Remembers challenges and tokens.
pub(super) struct Authorizer {
    challenges: DashMap<String, Challenge>,
    tokens: DashMap<TokenKey, TokenSlot>,
    /// How long a token server may take.
    patience: Duration,
}

impl Default for Authorizer {
    fn default() -> Self {
        Self { challenges: DashMap::new(), tokens: DashMap::new(), patience: http::IDLE }
    }
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
        client: &reqwest::Client,
        endpoint: &str,
        host: &str,
        credentials: &Arc<dyn Credentials>,
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
        let asked = Instant::now();
        let slot = self.slot((credentials.identity(), realm.clone(), service.clone(), scopes.join(" ")));
        // One fetch at a time for the same token; waiting here holds nothing else.
        let mut slot = slot.lock().await;
        if let Some(fetched) = &mut *slot {
            // Came while this request waited: good or bad, asking again would bring the same.
            let fresh = fetched.at >= asked;
            let valid = !renew && fetched.is_valid();
            if fresh || valid {
                fetched.owner = Arc::downgrade(credentials);
                return fetched.header.clone().map(|(header, _)| Some(header));
            }
        }
        let request = TokenRequest { host: host.to_string(), realm, service, scopes, client_id: CLIENT_ID };
        let token = self.token(client, &request, &**credentials).await.map_err(failed);
        let at = Instant::now();
        let header = token.map(|token| {
            let life = token.expires_in.unwrap_or(DEFAULT_LIFE).min(MAX_LIFE).saturating_sub(MARGIN);
            (format!("Bearer {}", token.token), at + life)
        });
        *slot = Some(Fetched { at, header: header.clone(), owner: Arc::downgrade(credentials) });
        header.map(|(header, _)| Some(header))
    }

    /// The place of one token. A new one is the occasion to drop those that nobody will use again.
    fn slot(&self, key: TokenKey) -> TokenSlot {
        if let Some(slot) = self.tokens.get(&key) {
            return slot.clone();
        }
        self.tokens.retain(|_, slot| {
            // Who waits for a token, or fetches it, holds its slot.
            Arc::strong_count(slot) > 1
                || slot.try_lock().is_ok_and(|slot| slot.as_ref().is_some_and(Fetched::is_wanted))
        });
        self.tokens.entry(key).or_default().clone()
    }

    async fn token(
        &self,
        client: &reqwest::Client,
        request: &TokenRequest,
        credentials: &dyn Credentials,
    ) -> Result<Token, String> {
        if let Some(token) = credentials.token(request).await? {
            return Ok(token);
        }
        let basic = credentials.basic(&request.host).await?;
        let fetch = fetch_token(client, request, basic.as_ref());
        tokio::time::timeout(self.patience, fetch).await.unwrap_or_else(|_| {
            let patience = self.patience.as_secs();
            Err(format!("no token for {patience} s from {}", shown(&request.realm)))
        })
    }
}

impl Fetched {
    fn is_valid(&self) -> bool {
        matches!(&self.header, Ok((_, until)) if Instant::now() < *until)
    }

    fn is_wanted(&self) -> bool {
        self.is_valid() && self.owner.strong_count() > 0
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
    client: &reqwest::Client,
    request: &TokenRequest,
    basic: Option<&BasicAuth>,
) -> Result<Token, String> {
    let realm =
        Url::parse(&request.realm).map_err(|e| format!("bad token server {:?}: {e}", request.realm))?;
    let shown = shown(&request.realm);
    if let Some(basic) = basic.filter(|b| !b.secret.is_empty()) {
        let form = grant(request, basic);
        let post =
            client.post(realm.clone()).header("content-type", "application/x-www-form-urlencoded").body(form);
        let response = post.send().await.map_err(|e| format!("{shown}: {}", http::chain(e)))?;
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
    let mut get = client.get(url);
    if let Some(basic) = basic.filter(|b| !b.username.is_empty()) {
        get = get.header("authorization", basic_header(basic));
    }
    let response = get.send().await.map_err(|e| format!("{shown}: {}", http::chain(e)))?;
    token_answer(response, &shown).await
}

/// A token server's URL without what it may carry beside the place.
fn shown(realm: &str) -> String {
    match Url::parse(realm) {
        Ok(realm) => format!("{}://{}{}", realm.scheme(), http::host(&realm), realm.path()),
        Err(_) => realm.to_string(),
    }
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
    let body = http::read_limited(response, 1 << 20).await.map_err(|e| format!("{shown}: {e}"))?;
    if !status.is_success() {
        return Err(format!("failed to fetch token from {shown}: {status}{}", http::server_message(&body)));
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

    /// A token server that counts its tokens, each good for `life` seconds.
    struct Tokens {
        identity: String,
        life: u64,
        fetched: std::sync::atomic::AtomicUsize,
    }

    impl Credentials for Tokens {
        fn identity(&self) -> String {
            self.identity.clone()
        }

        fn basic<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<BasicAuth>, String>> {
            Box::pin(async { Ok(None) })
        }

        fn token<'a>(&'a self, _: &'a TokenRequest) -> BoxFuture<'a, Result<Option<Token>, String>> {
            let count = self.fetched.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let token = Token { token: count.to_string(), expires_in: Some(Duration::from_secs(self.life)) };
            Box::pin(async { Ok(Some(token)) })
        }
    }

    fn user(identity: impl ToString, life: u64) -> Arc<dyn Credentials> {
        Arc::new(Tokens { identity: identity.to_string(), life, fetched: Default::default() })
    }

    async fn ask(
        authorizer: &Authorizer,
        credentials: &Arc<dyn Credentials>,
    ) -> Result<String, RegistryError> {
        let (client, scopes) = (reqwest::Client::builder().tls_certs_only([]).build(), BTreeSet::new());
        let client = client.expect("client");
        let header = authorizer.header(&client, "http://r", "r", credentials, &scopes, false).await?;
        Ok(header.expect("challenged before"))
    }

    #[tokio::test]
    async fn tokens_go_when_they_expire_or_their_user_does() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authorizer = Authorizer::default();
        assert!(authorizer.challenged("http://r", [r#"Bearer realm="http://t/""#].into_iter()));
        let stays = user("stays", 300);
        ask(&authorizer, &stays).await.expect("token");
        for n in 0..50 {
            ask(&authorizer, &user(n, 300)).await.expect("token");
        }
        let short = user("short", 0);
        ask(&authorizer, &short).await.expect("token");
        ask(&authorizer, &user("last", 300)).await.expect("token");
        let mut left: Vec<String> = authorizer.tokens.iter().map(|t| t.key().0.clone()).collect();
        left.sort();
        assert_eq!(left, ["last", "stays"]);
        assert_eq!(ask(&authorizer, &stays).await.expect("token"), "Bearer 0", "still the first");
        // A life that no clock can hold.
        ask(&authorizer, &user("eternal", u64::MAX)).await.expect("token");
    }

    #[tokio::test]
    async fn a_silent_token_server_is_given_up_once_for_all_who_wait() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = silent.local_addr().expect("address");
        let patience = Duration::from_millis(300);
        let authorizer = Authorizer { patience, ..Authorizer::default() };
        let challenge = format!("Bearer realm=\"http://{address}/token\"");
        assert!(authorizer.challenged("http://r", [challenge.as_str()].into_iter()));
        let nobody: Arc<dyn Credentials> = Arc::new(Anonymous);
        let started = Instant::now();
        let asks = futures::future::join_all((0..20).map(|_| ask(&authorizer, &nobody)));
        for answer in tokio::time::timeout(patience * 10, asks).await.expect("an end") {
            let error = answer.expect_err("nothing came").to_string();
            assert!(error.contains("no token") && error.contains(&address.to_string()), "{error}");
        }
        assert!(started.elapsed() >= patience);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_challenge_is_read_or_refused(
            scheme in "(?i)(basic|bearer|negotiate|)[ ]?",
            rest in "([a-z]{0,8}=?\"?[^\"]{0,8}\"?[, ]{0,2}){0,6}|\\PC{0,40}",
        ) {
            let _ = parse_challenge(&format!("{scheme}{rest}"));
        }

        #[test]
        fn quoted_values_come_through(realm in "[^\"]{0,30}", service in "[^\"]{0,30}", scope in "[^\"]{0,30}") {
            let header = format!("Bearer scope=\"{scope}\",realm=\"{realm}\", service=\"{service}\"");
            let expected = Challenge::Bearer { realm, service, scope };
            proptest::prop_assert_eq!(parse_challenge(&header), Some(expected));
        }
    }
}
