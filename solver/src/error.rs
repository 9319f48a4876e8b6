//! The error at the solver's border.

use std::sync::Arc;

use crate::op::{Failure, OpError, Remains};

/// gRPC code of a cancelled call.
const CANCELED: i32 = 1;

/// Why a definition could not be loaded or solved.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct SolveError<R> {
    /// Digest of the vertex that failed; `None` when the definition as a whole was refused.
    pub vertex: Option<Arc<str>>,
    /// That vertex's display name; empty without a vertex.
    pub name: Arc<str>,
    /// What happened; its text is what the user sees.
    pub error: OpError,
    /// What is there to look into, if the vertex left anything.
    pub remains: Option<Arc<Remains<R>>>,
}

impl<R> Clone for SolveError<R> {
    fn clone(&self) -> Self {
        Self {
            vertex: self.vertex.clone(),
            name: self.name.clone(),
            error: self.error.clone(),
            remains: self.remains.clone(),
        }
    }
}

impl<R> SolveError<R> {
    pub(crate) fn new(vertex: Arc<str>, name: Arc<str>, failure: Failure<R>) -> Self {
        Self { vertex: Some(vertex), name, error: failure.error, remains: failure.remains }
    }

    pub(crate) fn load(vertex: Option<&str>, name: &str, mut error: OpError) -> Self {
        error.message = format!("failed to load LLB: {}", error.message);
        Self { vertex: vertex.map(Arc::from), name: name.into(), error, remains: None }
    }

    pub(crate) fn canceled() -> Self {
        let error = OpError { code: Some(CANCELED), ..OpError::new("context canceled") };
        Self { vertex: None, name: "".into(), error, remains: None }
    }

    /// True if the build was given up rather than having failed.
    pub fn is_canceled(&self) -> bool {
        self.error.code == Some(CANCELED)
    }
}
