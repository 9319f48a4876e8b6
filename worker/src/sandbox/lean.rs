//! The default executor: the zygote's child sets the sandbox up itself.
//!
//! Also the daemon's half of a running sandbox, which the runtime executor shares.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use oci_spec::runtime::LinuxSeccomp;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::plan::{self, Plan};
use super::wire::{self, FailureKind, Status};
use super::zygote::{self, Zygote};
use super::{Executor, ExitOutcome, SandboxError, SandboxRequest, seccomp};

/// A profile and its packed programs.
type Compiled = Mutex<Option<(LinuxSeccomp, Arc<Vec<u8>>)>>;

/// Kiln's own executor. Needs root.
#[derive(Debug)]
pub struct LeanExecutor {
    helper: Arc<Helper>,
    /// The profile compiled last; nearly always the default one.
    compiled: Arc<Compiled>,
}

impl LeanExecutor {
    /// Starts the helper process.
    pub fn new() -> Result<Self, SandboxError> {
        Ok(Self { helper: Arc::new(Helper::new()?), compiled: Arc::default() })
    }
}

impl Executor for LeanExecutor {
    fn run(
        &self,
        request: SandboxRequest,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<ExitOutcome, SandboxError>> {
        let (helper, compiled) = (Arc::clone(&self.helper), Arc::clone(&self.compiled));
        async move {
            if cancel.is_cancelled() {
                return Err(SandboxError::Cancelled);
            }
            let status = blocking(move || {
                let plan = plan::sandbox(&request)?;
                let profile = request.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
                let programs = programs(&compiled, profile)?;
                helper.start(&plan, &programs, [&request.stdin, &request.stdout, &request.stderr])
            })
            .await?;
            watch(status, cancel).await
        }
        .boxed()
    }

    fn name(&self) -> &str {
        "lean"
    }
}

fn programs(cache: &Compiled, profile: Option<&LinuxSeccomp>) -> Result<Arc<Vec<u8>>, SandboxError> {
    let Some(profile) = profile else { return Ok(Arc::default()) };
    let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, bytes)) = &*cache
        && known == profile
    {
        return Ok(Arc::clone(bytes));
    }
    let bytes = Arc::new(zygote::pack(&seccomp::compile(profile)?));
    *cache = Some((profile.clone(), Arc::clone(&bytes)));
    Ok(bytes)
}

/// Runs blocking work off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(SandboxError::Helper(format!("task failed: {error}"))),
    }
}

/// The helper process, started again should it die.
#[derive(Debug)]
pub(super) struct Helper {
    zygote: Mutex<Arc<Zygote>>,
}

impl Helper {
    pub(super) fn new() -> Result<Self, SandboxError> {
        if !rustix::process::geteuid().is_root() {
            return Err(SandboxError::Unsupported("sandboxes without root".into()));
        }
        Ok(Self { zygote: Mutex::new(Arc::new(Zygote::spawn()?)) })
    }

    fn current(&self) -> Arc<Zygote> {
        Arc::clone(&self.zygote.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a plan to the zygote. Blocks for a short time.
    pub(super) fn start(
        &self,
        plan: &Plan,
        programs: &[u8],
        stdio: [&OwnedFd; 3],
    ) -> Result<OwnedFd, SandboxError> {
        let json = serde_json::to_vec(plan)
            .map_err(|e| SandboxError::Invalid(format!("sandbox {}: {e}", plan.id)))?;
        let stdio = stdio.map(AsFd::as_fd);
        let zygote = self.current();
        match zygote.start(&json, programs, stdio) {
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
            other => return other.map_err(|e| SandboxError::io("order to the sandbox helper", e)),
        }
        let fresh = {
            let mut slot = self.zygote.lock().unwrap_or_else(PoisonError::into_inner);
            if Arc::ptr_eq(&slot, &zygote) {
                *slot = Arc::new(Zygote::spawn()?);
            }
            Arc::clone(&slot)
        };
        fresh.start(&json, programs, stdio).map_err(|e| SandboxError::io("order to the sandbox helper", e))
    }
}

/// Follows a sandbox to its end.
pub(super) async fn watch(status: OwnedFd, cancel: CancellationToken) -> Result<ExitOutcome, SandboxError> {
    // SAFETY: an OwnedFd names one open socket until it is dropped, which is after the AsyncFd lets go of it.
    let status = unsafe { AsyncFd::register_with_interest(status, Interest::READABLE) }
        .map_err(|e| SandboxError::io("watching the sandbox helper", e.into_parts().1))?;
    let mut outcome = ExitOutcome::default();
    let mut failure = None;
    let mut cancelled = false;
    loop {
        let message = tokio::select! {
            () = cancel.cancelled(), if !cancelled => {
                cancelled = true;
                // The zygote sees the end of the stream, kills, and still reports the exit.
                let _ = rustix::net::shutdown(status.get_ref(), rustix::net::Shutdown::Write);
                continue;
            }
            message = status.async_io(Interest::READABLE, |fd| wire::receive(fd)) => message,
        };
        match message.map_err(|e| SandboxError::io("answer of the sandbox helper", e))? {
            None => return Err(SandboxError::Helper("ended while a sandbox was running".into())),
            Some((bytes, _)) => {
                match wire::parse(&bytes).map_err(|e| SandboxError::io("sandbox helper", e))? {
                    Status::Stubs(paths) => outcome.stubs.extend(paths),
                    Status::Failed { kind, message } => failure = Some((kind, message)),
                    Status::Exited { code, oom_killed } => {
                        outcome.code = code;
                        outcome.oom_killed = oom_killed;
                        break;
                    }
                }
            }
        }
    }
    match failure {
        _ if cancelled => Err(SandboxError::Cancelled),
        Some((FailureKind::Setup, text)) => Err(SandboxError::Setup(text)),
        Some((FailureKind::Exec, text)) => Err(SandboxError::Exec(text)),
        Some((FailureKind::Unsupported, text)) => Err(SandboxError::Unsupported(text)),
        None => Ok(outcome),
    }
}
