//! The default executor: the zygote's child sets the sandbox up itself.
//!
//! Also the daemon's half of a running sandbox, which the runtime executor shares.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use oci_spec::runtime::{LinuxSeccomp, Spec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::plan::{self, Plan};
use super::wire::{self, Ask, FailureKind, Status};
use super::zygote::{self, Order, Zygote};
use super::{
    Attendance, Executor, ExitOutcome, ProcessRequest, SandboxError, SandboxRequest, Stdio, seccomp,
};

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
                Errand::new(plan, &request.spec, &compiled, request.stdio, request.attendance)
            })
            .await?;
            helper.run(order, cancel).await
        }
        .boxed()
    }

    fn exec(
        &self,
        request: ProcessRequest,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<ExitOutcome, SandboxError>> {
        let (helper, compiled) = (Arc::clone(&self.helper), Arc::clone(&self.compiled));
        async move {
            if cancel.is_cancelled() {
                return Err(SandboxError::Cancelled);
            }
            helper.joinable(&request.sandbox)?;
            let sandbox = request.sandbox.clone();
            let order = blocking(move || {
                let plan = plan::process(&request)?;
                Errand::new(plan, &request.spec, &compiled, request.stdio, request.attendance)
            })
            .await?;
            helper.run(order, cancel).await.map_err(|error| named(error, sandbox))
        }
        .boxed()
    }

    fn name(&self) -> &str {
        "lean"
    }
}

impl Errand {
    fn new(
        plan: Plan,
        spec: &Spec,
        compiled: &Compiled,
        stdio: Stdio,
        attendance: Option<Attendance>,
    ) -> Result<Self, SandboxError> {
        let programs = programs(compiled, spec.linux().as_ref().and_then(|l| l.seccomp().as_ref()))?;
        let stdio = match stdio {
            Stdio::Files { stdin, stdout, stderr } => [stdin, stdout, stderr],
            // It opens its terminal itself.
            Stdio::Terminal => nothing()?,
        };
        let order = Order::new(&plan, programs, stdio)?;
        let joinable = (plan.joins.is_none() && plan.attended).then_some(plan.id);
        Ok(Self { order, joinable, attendance, terminal: None })
    }
}

/// Streams that lead nowhere.
fn nothing() -> Result<[OwnedFd; 3], SandboxError> {
    let open = || -> io::Result<[OwnedFd; 3]> {
        let null: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/null")?.into();
        Ok([null.try_clone()?, null.try_clone()?, null])
    };
    open().map_err(|e| SandboxError::io("/dev/null", e))
}

/// The zygote knows sandboxes by its own means; callers by their ids.
pub(super) fn named(error: SandboxError, sandbox: String) -> SandboxError {
    match error {
        SandboxError::Gone(_) => SandboxError::Gone(sandbox),
        error => error,
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

/// What the helper is to do, and who attends.
pub(super) struct Errand {
    pub(super) order: Order,
    /// The id of the sandbox, if processes may join it once it is set up.
    pub(super) joinable: Option<String>,
    pub(super) attendance: Option<Attendance>,
    /// The controlling end of the terminal, if it is known beforehand.
    pub(super) terminal: Option<OwnedFd>,
}

/// The helper process, started again should it die.
#[derive(Debug)]
pub(super) struct Helper {
    zygote: Mutex<Arc<Zygote>>,
    /// Sandboxes that are set up. What joined one before would be outside of it.
    joinable: Mutex<HashSet<String>>,
}

impl Helper {
    pub(super) fn new() -> Result<Self, SandboxError> {
        if !rustix::process::geteuid().is_root() {
            return Err(SandboxError::Unsupported("sandboxes without root".into()));
        }
        Ok(Self { zygote: Mutex::new(Arc::new(Zygote::spawn()?)), joinable: Mutex::default() })
    }

    fn current(&self) -> Arc<Zygote> {
        Arc::clone(&self.zygote.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a sandbox is there for others to join.
    pub(super) fn joinable(&self, sandbox: &str) -> Result<(), SandboxError> {
        let joinable = self.joinable.lock().unwrap_or_else(PoisonError::into_inner);
        if joinable.contains(sandbox) { Ok(()) } else { Err(SandboxError::Gone(sandbox.to_owned())) }
    }

    /// Runs a sandbox, or a process in one, to its end.
    pub(super) async fn run(
        self: Arc<Self>,
        errand: Errand,
        cancel: CancellationToken,
    ) -> Result<ExitOutcome, SandboxError> {
        let Errand { order, joinable, attendance, terminal } = errand;
        let order = Arc::new(order);
        let mut zygote = self.current();
        let mut again = false;
        let mut status = loop {
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
                (Some((Status::Started, _)), Some(status)) => break status,
                // It died before it took the order, which another one can still carry out.
                (None, _) if !again => {
                    again = true;
                    let (helper, dead) = (Arc::clone(&self), zygote);
                    zygote = blocking(move || helper.replace(&dead)).await?;
                }
                (None, _) => return Err(SandboxError::Helper("ended before it started a sandbox".into())),
                (Some((other, _)), _) => {
                    return Err(SandboxError::Helper(format!("answered {other:?} first")));
                }
            }
        };
        // Whoever reads the program's output is to see its end, not ours.
        drop(order);
        let (started, signals) = attendance.map(|a| (a.started, a.signals)).unzip();
        status.signals = signals;
        let set_up = SetUp { helper: Arc::clone(&self), id: joinable, started, terminal };
        status.finish(set_up, cancel).await
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

/// What is to be done when a sandbox is set up; dropping it says that it is no more.
struct SetUp {
    helper: Arc<Helper>,
    id: Option<String>,
    started: Option<oneshot::Sender<Option<OwnedFd>>>,
    terminal: Option<OwnedFd>,
}

impl SetUp {
    fn done(&mut self) {
        if let Some(id) = &self.id {
            self.helper.joinable.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        }
        if let Some(started) = self.started.take() {
            // Who does not listen does not want it.
            let _ = started.send(self.terminal.take());
        }
    }
}

impl Drop for SetUp {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.helper.joinable.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        }
    }
}

/// The daemon's view of one process that the zygote started. Dropping it kills the process.
struct Follower {
    status: AsyncFd<OwnedFd>,
    signals: Option<mpsc::UnboundedReceiver<i32>>,
    cancelled: bool,
}

impl Follower {
    fn new(status: OwnedFd) -> Result<Self, SandboxError> {
        // SAFETY: an OwnedFd names one open socket until it is dropped, which is after the AsyncFd lets go of it.
        let status = unsafe { AsyncFd::register_with_interest(status, Interest::READABLE) }
            .map_err(|e| SandboxError::io("watching the sandbox helper", e.into_parts().1))?;
        Ok(Self { status, signals: None, cancelled: false })
    }

    /// The next answer and what came with it; none when the zygote is gone.
    async fn next(
        &mut self,
        cancel: &CancellationToken,
    ) -> Result<Option<(Status, Vec<OwnedFd>)>, SandboxError> {
        let message = loop {
            tokio::select! {
                () = cancel.cancelled(), if !self.cancelled => {
                    self.cancelled = true;
                    // The zygote sees the end of the stream, kills, and still reports the exit.
                    let _ = rustix::net::shutdown(self.status.get_ref(), rustix::net::Shutdown::Write);
                }
                signal = next_signal(&mut self.signals), if !self.cancelled => {
                    // The zygote may be gone, which the next answer shows.
                    let _ = wire::send_json(self.status.get_ref(), &Ask::Signal(signal));
                }
                message = self.status.async_io(Interest::READABLE, |fd| wire::receive(fd)) => break message,
            }
        };
        let message = message.map_err(|e| SandboxError::io("answer of the sandbox helper", e))?;
        message
            .map(|(bytes, fds)| {
                let status = wire::parse(&bytes).map_err(|e| SandboxError::io("sandbox helper", e))?;
                Ok((status, fds))
            })
            .transpose()
    }

    /// Follows a started process to its end.
    async fn finish(
        mut self,
        mut set_up: SetUp,
        cancel: CancellationToken,
    ) -> Result<ExitOutcome, SandboxError> {
        let mut outcome = ExitOutcome::default();
        let mut failure = None;
        loop {
            let Some((status, fds)) = self.next(&cancel).await? else {
                return Err(SandboxError::Helper("ended while a sandbox was running".into()));
            };
            match status {
                Status::Started => {}
                Status::Terminal => set_up.terminal = fds.into_iter().next(),
                Status::Ready => set_up.done(),
                Status::Stubs(paths) => outcome.stubs.extend(paths),
                Status::Failed { kind, message } => failure = Some((kind, message)),
                Status::Exited { code, oom_killed } => {
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
            Some((FailureKind::Gone, _)) => Err(SandboxError::Gone(String::new())),
            None => Ok(outcome),
        }
    }
}

/// The next signal that somebody wants to send; never, when nobody can any more.
async fn next_signal(signals: &mut Option<mpsc::UnboundedReceiver<i32>>) -> i32 {
    match signals {
        Some(receiver) => match receiver.recv().await {
            Some(signal) => signal,
            None => {
                *signals = None;
                std::future::pending().await
            }
        },
        None => std::future::pending().await,
    }
}
