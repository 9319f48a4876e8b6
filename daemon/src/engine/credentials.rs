//! Registry credentials of a build's client. The session may attach after the build has begun, so
//! it is looked up when somebody first asks.

use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_session::SessionManager;
use kiln_worker::registry::{BasicAuth, Credentials, SessionCredentials, Token, TokenRequest};
use tokio::sync::OnceCell;

/// What one session's client knows.
pub(super) struct ClientCredentials {
    sessions: Arc<SessionManager>,
    id: String,
    salt: [u8; 32],
    found: OnceCell<SessionCredentials>,
}

impl ClientCredentials {
    /// Of the session `id`; `salt` is the same for the life of the daemon.
    pub(super) fn new(sessions: Arc<SessionManager>, id: String, salt: [u8; 32]) -> Self {
        Self { sessions, id, salt, found: OnceCell::new() }
    }

    async fn attached(&self) -> Result<&SessionCredentials, String> {
        let attach = || async {
            let session = self.sessions.get(&self.id).await.map_err(|error| error.to_string())?;
            Ok(SessionCredentials::new(vec![session], self.salt))
        };
        self.found.get_or_try_init(attach).await
    }
}

impl Credentials for ClientCredentials {
    fn identity(&self) -> String {
        self.id.clone()
    }

    fn basic<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Option<BasicAuth>, String>> {
        Box::pin(async move { self.attached().await?.basic(host).await })
    }

    fn token<'a>(&'a self, request: &'a TokenRequest) -> BoxFuture<'a, Result<Option<Token>, String>> {
        Box::pin(async move { self.attached().await?.token(request).await })
    }
}
