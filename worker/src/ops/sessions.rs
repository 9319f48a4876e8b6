//! The client sessions that a build may ask for files, secrets and agents.

use std::sync::Arc;

use kiln_session::{Session, SessionError, SessionManager};
use kiln_solver::op::OpError;

/// The sessions of one build, asked in order.
#[derive(Clone)]
pub struct SessionGroup {
    manager: Arc<SessionManager>,
    ids: Vec<String>,
}

impl SessionGroup {
    /// Sessions with these ids; they need not be attached yet.
    pub fn new(manager: Arc<SessionManager>, ids: Vec<String>) -> Self {
        Self { manager, ids: ids.into_iter().filter(|id| !id.is_empty()).collect() }
    }

    /// Their ids.
    pub fn ids(&self) -> &[String] {
        &self.ids
    }

    /// The session that an operation names, then the others. Waits for each to attach; one that does
    /// not is left out unless none does.
    pub(crate) async fn attached(&self, preferred: Option<&str>) -> Result<Vec<Arc<Session>>, OpError> {
        // A name may carry a prefix that has no meaning here.
        let preferred =
            preferred.filter(|id| !id.is_empty()).map(|id| id.rsplit_once(':').map_or(id, |(_, id)| id));
        let others = self.ids.iter().map(String::as_str).filter(|id| Some(*id) != preferred);
        let mut found = Vec::new();
        let mut missing = None;
        for id in preferred.into_iter().chain(others) {
            match self.manager.get(id).await {
                Ok(session) => found.push(session),
                Err(err) => missing = Some(err),
            }
        }
        match (found.is_empty(), missing) {
            (false, _) => Ok(found),
            (true, Some(err)) => Err(error(&err)),
            (true, None) => Err(OpError::new("no active sessions")),
        }
    }

    /// A secret of the client; `None` if no session has it.
    pub(crate) async fn secret(&self, id: &str) -> Result<Option<Vec<u8>>, OpError> {
        if self.ids.is_empty() {
            return Ok(None);
        }
        for session in self.attached(None).await? {
            if let Some(secret) = session.get_secret(id).await.map_err(|err| error(&err))? {
                return Ok(Some(secret));
            }
        }
        Ok(None)
    }

    /// The session that forwards the ssh agent `id`; `None` if none does.
    pub(crate) async fn ssh(&self, id: &str) -> Result<Option<Arc<Session>>, OpError> {
        if self.ids.is_empty() {
            return Ok(None);
        }
        for session in self.attached(None).await? {
            if session.ssh_check(id).await.map_err(|err| error(&err))? {
                return Ok(Some(session));
            }
        }
        Ok(None)
    }
}

/// A session's failure with its gRPC code.
pub(crate) fn error(err: &SessionError) -> OpError {
    let mut failed = OpError::new(err.to_string());
    failed.code = err.code().map(|code| code as i32);
    failed
}
