//! Where a daemon listens.

use std::path::PathBuf;

use crate::error::CliError;

/// A daemon's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A socket on this machine; a daemon can be started there.
    Unix(PathBuf),
    /// A host and port, in plain text.
    Tcp(String),
}

impl Address {
    /// Reads an address as given by flag or environment; `None` is the default socket.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self, CliError> {
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            return Ok(Self::Unix(kiln_daemon::default_socket()));
        };
        match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("tcp", host)) if host.contains(':') => Ok(Self::Tcp(host.to_owned())),
            Some(("unix" | "tcp", _)) | None => Err(CliError::usage(format!(
                "invalid address {text:?}: expected unix:///PATH or tcp://HOST:PORT"
            ))),
            Some((scheme, _)) => {
                Err(CliError::usage(format!("unsupported: address scheme {scheme} of {text:?}")))
            }
        }
    }

    /// As it is given to a daemon.
    pub(crate) fn url(&self) -> String {
        match self {
            Self::Unix(path) => format!("unix://{}", path.display()),
            Self::Tcp(host) => format!("tcp://{host}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(Address::parse(Some("unix:///run/x.sock")).unwrap(), Address::Unix("/run/x.sock".into()));
        assert_eq!(Address::parse(Some("tcp://h:1")).unwrap().url(), "tcp://h:1");
        assert!(matches!(Address::parse(None).unwrap(), Address::Unix(_)));
        for text in ["/run/x.sock", "unix://relative", "tcp://host", "ssh://host"] {
            assert!(Address::parse(Some(text)).is_err(), "{text}");
        }
    }
}
