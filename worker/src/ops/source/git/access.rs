//! What lets git in: secrets, ssh agents and known hosts of the build's client.

use std::ffi::OsString;
use std::fmt::Display;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::pb;
use kiln_solver::op::OpError;
use tokio_util::sync::CancellationToken;

use super::program::Git;
use super::remote::Wanted;
use crate::ops::SessionGroup;
use crate::ops::exec::forwards::Agents;
use crate::ops::run_dir::{RunDir, StepDir};

/// Sites with one token for all their repositories: submodules mostly are of the same site.
const SHARED_TOKENS: [&str; 2] = ["https://github.com/", "https://www.github.com/"];

/// Git as one source may use it. Sockets and files that it needs go with this.
pub(super) struct Access {
    /// For any remote.
    pub(super) git: Git,
    remote: String,
    _files: Option<StepDir>,
    _agents: Agents,
}

impl Access {
    pub(super) async fn open(
        wanted: &Wanted,
        sessions: &SessionGroup,
        run_dir: &RunDir,
        cancel: CancellationToken,
    ) -> Result<Self, OpError> {
        let mut agents = Agents::default();
        let mut files = None;
        let mut env: Vec<(OsString, OsString)> = Vec::new();
        let mut settings = Vec::new();
        if wanted.remote.starts_with("http") {
            if let Some(header) = authorization(wanted, sessions).await? {
                let site = SHARED_TOKENS.into_iter().find(|site| wanted.remote.starts_with(site));
                let key = format!("http.{}.extraheader", site.unwrap_or(&wanted.remote));
                settings.push((key, format!("Authorization: {header}")));
            }
        } else if !wanted.ssh_agent.is_empty() || !wanted.known_hosts.is_empty() {
            let failed = |err: &dyn Display| wanted.failed("access", err);
            let dir = run_dir.step().map_err(|err| failed(&err))?;
            if !wanted.ssh_agent.is_empty() {
                let options =
                    pb::SshOpt { id: wanted.ssh_agent.clone(), mode: 0o600, ..pb::SshOpt::default() };
                let socket = agents.open(sessions, &options, &dir, 0).await?;
                env.extend(socket.map(|path| ("SSH_AUTH_SOCK".into(), path.into_os_string())));
            }
            if !wanted.known_hosts.is_empty() {
                dir.write("known_hosts", wanted.known_hosts.as_bytes(), 0o600).map_err(|err| failed(&err))?;
            }
            env.push(("GIT_SSH_COMMAND".into(), ssh_command(wanted, Some(&dir))));
            files = Some(dir);
        }
        if files.is_none() {
            env.push(("GIT_SSH_COMMAND".into(), ssh_command(wanted, None)));
        }
        let git = Git::new(settings, env, cancel);
        Ok(Self { git, remote: wanted.remote.clone(), _files: files, _agents: agents })
    }

    /// Git that knows the source's remote as `origin`.
    pub(super) fn origin(&self) -> Git {
        self.git.with("remote.origin.url", &self.remote)
    }
}

/// Ssh without the daemon's own keys and configuration. Without known hosts any server is taken.
fn ssh_command(wanted: &Wanted, dir: Option<&StepDir>) -> OsString {
    let hosts = match dir.filter(|_| !wanted.known_hosts.is_empty()) {
        Some(dir) => {
            // A shell reads the command.
            let path = dir.path().join("known_hosts").to_string_lossy().replace('\'', r"'\''");
            format!("-o 'UserKnownHostsFile=\"{path}\"' -o StrictHostKeyChecking=yes")
        }
        None => "-o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -o LogLevel=ERROR".to_owned(),
    };
    format!("ssh -F /dev/null -o BatchMode=yes -o IdentityFile=none {hosts}").into()
}

/// The value of the `Authorization` header, of the first secret that the client has.
async fn authorization(wanted: &Wanted, sessions: &SessionGroup) -> Result<Option<String>, OpError> {
    let host = wanted.host();
    for suffix in [format!(".{host}"), String::new()] {
        for (secret, is_token) in [(&wanted.header_secret, false), (&wanted.token_secret, true)] {
            if secret.is_empty() {
                continue;
            }
            let id = format!("{secret}{suffix}");
            // A client without secrets says so by an error.
            let Ok(Some(value)) = sessions.secret(&id).await else { continue };
            let value = value.trim_ascii();
            if is_token {
                let pair = [b"x-access-token:", value].concat();
                return Ok(Some(format!("basic {}", STANDARD.encode(pair))));
            }
            let header = std::str::from_utf8(value).ok().filter(|text| !text.chars().any(char::is_control));
            let refused =
                || OpError::new(format!("{}: secret {id} can't be sent as a header", wanted.shown()));
            return Ok(Some(header.ok_or_else(refused)?.to_owned()));
        }
    }
    Ok(None)
}
