//! What can go wrong between the daemon and a client's session.

use tonic::{Code, Status};

use crate::fsutil::TransferError;

/// A failed use of a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No session with this id attached in time.
    #[error("no active session for {id}")]
    NotFound {
        /// The id that was asked for.
        id: String,
    },
    /// The metadata of a `Control.Session` call is unusable.
    #[error("invalid session: {0}")]
    Invalid(String),
    /// The client announced no such method, or answered that it has none.
    #[error("method {method} not supported by the client")]
    Unsupported {
        /// The gRPC path.
        method: String,
    },
    /// A call into the session failed.
    #[error("{call}: {}", .status.message())]
    Call {
        /// What was asked for, e.g. `secret npmrc`.
        call: String,
        /// The client's answer.
        status: Box<Status>,
    },
    /// A file transfer failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

impl SessionError {
    pub(crate) fn call(call: impl Into<String>, status: Status) -> Self {
        Self::Call { call: call.into(), status: Box::new(status) }
    }

    /// The gRPC code of the failure, if it came from a call.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::NotFound { .. } => Some(Code::NotFound),
            Self::Unsupported { .. } => Some(Code::Unimplemented),
            Self::Call { status, .. } => Some(status.code()),
            Self::Transfer(TransferError::Status(status)) => Some(status.code()),
            Self::Invalid(_) | Self::Transfer(_) => None,
        }
    }

    /// The client does not serve what was asked for; another session of the same build may.
    pub fn is_not_found(&self) -> bool {
        matches!(self.code(), Some(Code::NotFound | Code::Unimplemented))
    }

    /// The client already had the target (only answered to exports).
    pub fn is_already_exists(&self) -> bool {
        self.code() == Some(Code::AlreadyExists)
    }
}
