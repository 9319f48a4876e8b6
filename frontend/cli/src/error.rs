//! What a command can end with.

use crate::failure::SolveFailure;

/// A failed command. Every one makes the process exit with 1, except where a signal ended it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// A flag's value or the environment is unusable.
    #[error("{0}")]
    Usage(String),
    /// The daemon cannot be reached or started.
    #[error("{0}")]
    Connect(String),
    /// The daemon answered with an error, or went away.
    #[error(transparent)]
    Solve(#[from] Box<SolveFailure>),
    /// A call other than a build failed.
    #[error("{}", called(.0))]
    Call(Box<tonic::Status>),
    /// A file of the user's cannot be read or written.
    #[error("{action} {path}: {source}")]
    File {
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// On what.
        path: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The daemon of `kiln daemon` failed.
    #[error(transparent)]
    Daemon(#[from] kiln_daemon::DaemonError),
    /// The daemon's configuration is unusable.
    #[error(transparent)]
    Config(#[from] kiln_daemon::ConfigError),
    /// A signal ended the command, which said so already; the exit code to use.
    #[error("interrupted")]
    Interrupted(u8),
}

impl CliError {
    pub(crate) fn file(
        action: &'static str,
        path: impl AsRef<std::path::Path>,
        source: std::io::Error,
    ) -> Self {
        Self::File { action, path: path.as_ref().display().to_string(), source }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }
}

/// What the daemon said or, where the call did not get to it, why.
fn called(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        Self::Call(Box::new(status))
    }
}
