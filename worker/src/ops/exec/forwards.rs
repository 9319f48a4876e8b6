//! What a step gets from the client while it runs: secrets, ssh agents as sockets.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_proto::pb;
use kiln_session::Session;
use kiln_solver::op::OpError;
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use crate::ops::SessionGroup;
use crate::ops::run_dir::StepDir;

/// The agent that a mount without an id means (BuildKit's `sshforward.DefaultID`).
const DEFAULT_AGENT: &str = "default";

/// The value of a secret; `None` if the client has none and the step can do without.
pub(crate) async fn secret(
    sessions: &SessionGroup,
    id: &str,
    optional: bool,
) -> Result<Option<Vec<u8>>, OpError> {
    match sessions.secret(id).await {
        Ok(Some(value)) => Ok(Some(value)),
        Ok(None) if optional => Ok(None),
        Ok(None) => Err(OpError::new(format!("secret {id}: not found"))),
        Err(err) => Err(err),
    }
}

/// Agent sockets of one step; dropping it ends them.
#[derive(Default)]
pub(crate) struct Agents {
    tasks: JoinSet<()>,
}

impl Agents {
    /// Opens a socket that leads to the client's agent. `None` if it is optional and missing.
    pub(crate) async fn open(
        &mut self,
        sessions: &SessionGroup,
        options: &pb::SshOpt,
        dir: &StepDir,
        number: usize,
    ) -> Result<Option<PathBuf>, OpError> {
        let id = if options.id.is_empty() { DEFAULT_AGENT } else { options.id.as_str() };
        let session = match sessions.ssh(id).await {
            Ok(Some(session)) => session,
            Ok(None) | Err(_) if options.optional => return Ok(None),
            Ok(None) => return Err(OpError::new(format!("no SSH key {id:?} forwarded from the client"))),
            Err(err) => return Err(err),
        };
        let failed = |err: std::io::Error| OpError::new(format!("ssh agent {id}: {err}"));
        let path = dir.path().join(format!("ssh-{number}.sock"));
        let listener = UnixListener::bind(&path).map_err(failed)?;
        give(&path, options.uid, options.gid, options.mode).map_err(failed)?;
        self.tasks.spawn(serve(listener, session, id.to_owned()));
        Ok(Some(path))
    }
}

async fn serve(listener: UnixListener, session: Arc<Session>, id: String) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (session, id) = (session.clone(), id.clone());
        connections.spawn(async move {
            if let Err(err) = session.ssh_forward(&id, stream).await {
                tracing::debug!("ssh agent connection: {err}");
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

fn give(path: &Path, uid: u32, gid: u32, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o777))
}
