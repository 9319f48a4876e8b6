//! What a build may ask this machine for: secrets and ssh agents, from flags and the environment.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kiln_session::client::{Agent, Secret};

use crate::csv;
use crate::error::CliError;

/// Largest secret that the session sends, in bytes.
const MAX_SECRET: u64 = 500 << 10;

/// Reads `--secret` flags. Missing files are found here, before anything is built.
pub(crate) fn secrets(flags: &[String]) -> Result<Vec<Secret>, CliError> {
    flags.iter().map(|flag| secret(flag)).collect()
}

fn secret(flag: &str) -> Result<Secret, CliError> {
    let (mut id, mut file, mut env, mut kind) = (None, None, None, None);
    for (key, value) in csv::pairs(flag)? {
        match key.as_str() {
            "id" => id = Some(value),
            "src" | "source" => file = Some(PathBuf::from(value)),
            "env" => env = Some(value),
            "type" if matches!(value.as_str(), "file" | "env") => kind = Some(value),
            "type" => return Err(CliError::usage(format!("unsupported: secret type {value}"))),
            _ => return Err(CliError::usage(format!("invalid secret {flag:?}: unknown key {key:?}"))),
        }
    }
    let id = id
        .filter(|id| !id.is_empty())
        .ok_or_else(|| CliError::usage(format!("invalid secret {flag:?}: no id")))?;
    if kind.as_deref() == Some("env") && env.is_none() {
        env = file.take().and_then(|name| name.to_str().map(str::to_owned)).or_else(|| Some(id.clone()));
    }
    // With nothing but an id, the environment is asked first, then a file of that name.
    if env.is_none() && file.is_none() && kind.is_none() && std::env::var_os(&id).is_some() {
        env = Some(id.clone());
    }
    if let Some(name) = env {
        let value = std::env::var_os(&name)
            .ok_or_else(|| CliError::usage(format!("secret {id}: environment variable {name} is not set")))?;
        return Ok(Secret::Value { id, value: std::os::unix::ffi::OsStringExt::into_vec(value) });
    }
    let path = file.unwrap_or_else(|| PathBuf::from(&id));
    let meta = path.metadata().map_err(|error| CliError::file("read secret", &path, error))?;
    if meta.is_dir() {
        return Err(CliError::usage(format!("secret {id}: {} is a directory", path.display())));
    }
    if meta.len() > MAX_SECRET {
        return Err(CliError::usage(format!(
            "secret {id}: {} is larger than {MAX_SECRET} bytes",
            path.display()
        )));
    }
    Ok(Secret::File { id, path })
}

/// Reads `--ssh` flags.
pub(crate) fn agents(flags: &[String]) -> Result<Vec<Agent>, CliError> {
    flags.iter().map(|flag| agent(flag)).collect()
}

fn agent(flag: &str) -> Result<Agent, CliError> {
    let (id, path) = flag.split_once('=').map_or((flag, None), |(id, path)| (id, Some(PathBuf::from(path))));
    let id = if id.is_empty() { "default" } else { id }.to_owned();
    let socket = match path {
        Some(path) => path,
        None => std::env::var_os("SSH_AUTH_SOCK").map(PathBuf::from).ok_or_else(|| {
            CliError::usage(format!(
                "ssh {id}: SSH_AUTH_SOCK is not set; start an ssh agent or name its socket"
            ))
        })?,
    };
    check_socket(&id, &socket)?;
    Ok(Agent { id, socket })
}

fn check_socket(id: &str, socket: &Path) -> Result<(), CliError> {
    let meta = socket.metadata().map_err(|error| CliError::file("use ssh agent", socket, error))?;
    if meta.file_type().is_socket() {
        return Ok(());
    }
    Err(CliError::usage(format!(
        "unsupported: ssh {id}: {} is not an agent's socket (add keys to an agent)",
        socket.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_files_or_variables() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "x").unwrap();
        let flag = format!("id=a,src={}", file.display());
        assert!(matches!(secret(&flag).unwrap(), Secret::File { id, path } if id == "a" && path == file));
        assert!(matches!(secret("id=PATH").unwrap(), Secret::Value { id, .. } if id == "PATH"));
        assert!(
            matches!(secret("id=b,env=PATH").unwrap(), Secret::Value { id, value } if id == "b" && !value.is_empty())
        );
        assert!(matches!(secret("id=PATH,type=env").unwrap(), Secret::Value { .. }));
        for (flag, expected) in [
            ("src=/x", "no id"),
            ("id=a,src=/no/such/file", "/no/such/file"),
            ("id=a,env=KILN_NO_SUCH_VARIABLE", "KILN_NO_SUCH_VARIABLE is not set"),
            ("id=a,colour=red", "unknown key \"colour\""),
            ("id=a,type=vault", "unsupported: secret type vault"),
            ("id=a,src=/", "is a directory"),
        ] {
            match secret(flag) {
                Err(error) => assert!(error.to_string().contains(expected), "{flag}: {error}"),
                Ok(_) => panic!("{flag} was accepted"),
            }
        }
    }

    #[test]
    fn agents_are_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let found = agent(&format!("key={}", path.display())).unwrap();
        assert_eq!((found.id.as_str(), &found.socket), ("key", &path));
        std::fs::write(dir.path().join("id_rsa"), "x").unwrap();
        let error = agent(&format!("key={}", dir.path().join("id_rsa").display())).unwrap_err();
        assert!(error.to_string().starts_with("unsupported: ssh key"), "{error}");
    }
}
