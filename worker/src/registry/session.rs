//! Credentials of the clients that are attached to a build.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use kiln_proto::filesync::FetchTokenRequest;
use kiln_session::Session;

use super::auth::{BasicAuth, Credentials, Token, TokenRequest};

/// Asks the sessions of a build in order; the first that knows something answers.
#[derive(Debug, Clone, Default)]
pub struct SessionCredentials {
    sessions: Vec<Arc<Session>>,
    salt: [u8; 32],
}

impl SessionCredentials {
    /// Credentials of these sessions. `salt` is the daemon's: 32 random bytes of its start.
    pub fn new(sessions: Vec<Arc<Session>>, salt: [u8; 32]) -> Self {
        Self { sessions, salt }
    }
}

impl Credentials for SessionCredentials {
    // Tokens are kept for one set of sessions, so none is ever used on behalf of another client.
    fn identity(&self) -> String {
        self.sessions.iter().map(|session| session.id()).collect::<Vec<_>>().join(",")
    }

    fn basic<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Option<BasicAuth>, String>> {
        Box::pin(async move {
            for session in &self.sessions {
                if let Some(found) = session.credentials(host).await.map_err(|e| e.to_string())? {
                    return Ok(Some(BasicAuth { username: found.username, secret: found.secret }));
                }
            }
            Ok(None)
        })
    }

    fn token<'a>(&'a self, request: &'a TokenRequest) -> BoxFuture<'a, Result<Option<Token>, String>> {
        Box::pin(async move {
            for session in &self.sessions {
                let authority = session.token_authority(&request.host, &self.salt);
                // Without an authority the client wants the daemon to fetch tokens.
                if !matches!(authority.await, Ok(Some(_))) {
                    continue;
                }
                let answer = session
                    .fetch_token(FetchTokenRequest {
                        client_id: request.client_id.to_string(),
                        host: request.host.clone(),
                        realm: request.realm.clone(),
                        service: request.service.clone(),
                        scopes: request.scopes.clone(),
                    })
                    .await
                    .map_err(|e| e.to_string())?;
                let life = u64::try_from(answer.expires_in).ok().filter(|s| *s > 0).map(Duration::from_secs);
                return Ok(Some(Token { token: answer.token, expires_in: life }));
            }
            Ok(None)
        })
    }
}
