//! The error at the solver's border.

use std::sync::Arc;

use crate::op::OpError;

/// gRPC code of a cancelled call.
const CANCELED: i32 = 1;

/// Why a definition could not be loaded or solved.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}")]
pub struct SolveError {
    /// Digest of the vertex that failed; `None` when the definition as a whole was refused.
    pub vertex: Option<Arc<str>>,
    /// That vertex's display name; empty without a vertex.
    pub name: Arc<str>,
    /// What happened; its text is what the user sees.
    pub error: OpError,
}

impl SolveError {
    pub(crate) fn load(vertex: Option<&str>, name: &str, mut error: OpError) -> Self {
        error.message = format!("failed to load LLB: {}", error.message);
        Self { vertex: vertex.map(Arc::from), name: name.into(), error }
    }

    pub(crate) fn canceled() -> Self {
        let error = OpError { code: Some(CANCELED), ..OpError::new("context canceled") };
        Self { vertex: None, name: "".into(), error }
    }

    /// True if the build was given up rather than having failed.
    pub fn is_canceled(&self) -> bool {
        self.error.code == Some(CANCELED)
    }
}
