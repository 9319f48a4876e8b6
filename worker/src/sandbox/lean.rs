//! The default executor: the zygote's child sets the sandbox up itself.
//!
//! Also the daemon's half of a running sandbox, which the runtime executor shares.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use oci_spec::runtime::LinuxSeccomp;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::plan;
use super::wire::{self, FailureKind, Status};
use super::zygote::{self, Order, Zygote};
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
            let order = blocking(move || {
                let plan = plan::sandbox(&request)?;
                let profile = request.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
                let programs = programs(&compiled, profile)?;
                Order::new(&plan, programs, [request.stdin, request.stdout, request.stderr])
            })
            .await?;
            helper.run(order, cancel).await
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

    /// Runs a sandbox to its end.
    pub(super) async fn run(
        self: Arc<Self>,
        order: Order,
        cancel: CancellationToken,
    ) -> Result<ExitOutcome, SandboxError> {
        let order = Arc::new(order);
        let mut zygote = self.current();
        let mut again = false;
        let status = loop {
            let (to, what) = (Arc::clone(&zygote), Arc::clone(&order));
            let mut status = match blocking(move || Ok(to.start(&what))).await? {
                Ok(socket) => Some(Follower::new(socket)?),
                Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                    None
                }
                Err(e) => return Err(SandboxError::io("order to the sandbox helper", e)),
            };
            let answer = match &mut status {
                Some(status) => status.next(&cancel).await?,
                None => None,
            };
            match (answer, status) {
                (Some(Status::Started), Some(status)) => break status,
                // It died before it took the order, which another one can still carry out.
                (None, _) if !again => {
                    again = true;
                    let (helper, dead) = (Arc::clone(&self), zygote);
                    zygote = blocking(move || helper.replace(&dead)).await?;
                }
                (None, _) => return Err(SandboxError::Helper("ended before it started a sandbox".into())),
                (Some(other), _) => return Err(SandboxError::Helper(format!("answered {other:?} first"))),
            }
        };
        // Whoever reads the program's output is to see its end, not ours.
        drop(order);
        status.finish(cancel).await
    }

    /// A new zygote in place of a dead one, unless somebody else was faster.
    fn replace(&self, dead: &Arc<Zygote>) -> Result<Arc<Zygote>, SandboxError> {
        let mut slot = self.zygote.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&slot, dead) {
            *slot = Arc::new(Zygote::spawn()?);
        }
        Ok(Arc::clone(&slot))
    }
}

/// The daemon's view of one sandbox. Dropping it kills the sandbox.
struct Follower {
    status: AsyncFd<OwnedFd>,
    cancelled: bool,
}

impl Follower {
    fn new(status: OwnedFd) -> Result<Self, SandboxError> {
        // SAFETY: an OwnedFd names one open socket until it is dropped, which is after the AsyncFd lets go of it.
        let status = unsafe { AsyncFd::register_with_interest(status, Interest::READABLE) }
            .map_err(|e| SandboxError::io("watching the sandbox helper", e.into_parts().1))?;
        Ok(Self { status, cancelled: false })
    }

    /// The next answer; none when the zygote is gone.
    async fn next(&mut self, cancel: &CancellationToken) -> Result<Option<Status>, SandboxError> {
        let message = loop {
            tokio::select! {
                () = cancel.cancelled(), if !self.cancelled => {
                    self.cancelled = true;
                    // The zygote sees the end of the stream, kills, and still reports the exit.
                    let _ = rustix::net::shutdown(self.status.get_ref(), rustix::net::Shutdown::Write);
                }
                message = self.status.async_io(Interest::READABLE, |fd| wire::receive(fd)) => break message,
            }
        };
        let message = message.map_err(|e| SandboxError::io("answer of the sandbox helper", e))?;
        message
            .map(|(bytes, _)| wire::parse(&bytes).map_err(|e| SandboxError::io("sandbox helper", e)))
            .transpose()
    }

    /// Follows a started sandbox to its end.
    async fn finish(mut self, cancel: CancellationToken) -> Result<ExitOutcome, SandboxError> {
        let mut outcome = ExitOutcome::default();
        let mut failure = None;
        loop {
            match self.next(&cancel).await? {
                None => return Err(SandboxError::Helper("ended while a sandbox was running".into())),
                Some(Status::Started) => {}
                Some(Status::Stubs(paths)) => outcome.stubs.extend(paths),
                Some(Status::Failed { kind, message }) => failure = Some((kind, message)),
                Some(Status::Exited { code, oom_killed }) => {
                    outcome.code = code;
                    outcome.oom_killed = oom_killed;
                    break;
                }
            }
        }
        match failure {
            _ if self.cancelled => Err(SandboxError::Cancelled),
            Some((FailureKind::Setup, text)) => Err(SandboxError::Setup(text)),
            Some((FailureKind::Exec, text)) => Err(SandboxError::Exec(text)),
            Some((FailureKind::Unsupported, text)) => Err(SandboxError::Unsupported(text)),
            None => Ok(outcome),
        }
    }
}
