//! TLS on `tcp://` addresses. The flags are those of `buildctl` and `buildkitd`.

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_daemon::TlsFiles;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::error::CliError;

/// Certificates of this side, and what the other side's must be signed by.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct TlsArgs {
    /// Authority by which the other side of a tcp:// address must be certified
    #[arg(long = "tlscacert", global = true, value_name = "FILE", conflicts_with = "dir")]
    ca: Option<PathBuf>,
    /// Certificate to show on tcp:// addresses
    #[arg(long = "tlscert", global = true, value_name = "FILE", requires = "key", conflicts_with = "dir")]
    cert: Option<PathBuf>,
    /// Key of the certificate
    #[arg(long = "tlskey", global = true, value_name = "FILE", requires = "cert", conflicts_with = "dir")]
    key: Option<PathBuf>,
    /// Directory with ca.pem, cert.pem and key.pem, or ca.crt, tls.crt and tls.key
    #[arg(long = "tlsdir", global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Name that the daemon's certificate must have (default: the host of its address)
    #[arg(long = "tlsservername", global = true, value_name = "NAME")]
    server_name: Option<String>,
}

/// The files that flags name.
struct Files {
    ca: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
}

impl TlsArgs {
    fn files(&self) -> Result<Files, CliError> {
        let Some(dir) = &self.dir else {
            return Ok(Files { ca: self.ca.clone(), identity: self.cert.clone().zip(self.key.clone()) });
        };
        let one_of =
            |names: [&str; 2]| names.into_iter().map(|name| dir.join(name)).find(|path| path.exists());
        let (cert, key) = (one_of(["cert.pem", "tls.crt"]), one_of(["key.pem", "tls.key"]));
        if cert.is_some() != key.is_some() {
            return Err(CliError::usage(format!("{}: certificate or key is missing", dir.display())));
        }
        let files = Files { ca: one_of(["ca.pem", "ca.crt"]), identity: cert.zip(key) };
        match &files {
            Files { ca: None, identity: None } => {
                Err(CliError::usage(format!("{}: no certificates there", dir.display())))
            }
            _ => Ok(files),
        }
    }

    /// For connecting to `host:port`; `None` is plain text.
    pub(crate) fn client(&self, host: &str) -> Result<Option<ClientTlsConfig>, CliError> {
        let files = self.files()?;
        let name = match &self.server_name {
            Some(name) => name.as_str(),
            None => host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']),
        };
        let mut tls = ClientTlsConfig::new().domain_name(name);
        tls = match &files.ca {
            Some(ca) => tls.ca_certificate(Certificate::from_pem(read(ca)?)),
            None => tls.with_native_roots(),
        };
        if let Some((cert, key)) = &files.identity {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        let wanted = files.ca.is_some() || files.identity.is_some();
        Ok(wanted.then_some(tls))
    }

    /// For a daemon's addresses; `None` leaves it to its configuration.
    pub(crate) fn server(&self) -> Result<Option<TlsFiles>, CliError> {
        let Files { ca, identity } = self.files()?;
        match identity {
            Some((cert, key)) => Ok(Some(TlsFiles { cert, key, client_ca: ca })),
            None if ca.is_some() => Err(CliError::usage("--tlscacert needs --tlscert and --tlskey")),
            None => Ok(None),
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    std::fs::read(path).map_err(|error| CliError::file("read", path, error))
}
