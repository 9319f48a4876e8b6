//! Containers in which a client starts processes itself, as opposed to steps of a build.
//!
//! The first process brings the sandbox into being and is its init; later ones join it. What they write is thrown
//! away.

use std::path::Path;
use std::sync::{Arc, Mutex as StdMutex, OnceLock, PoisonError};

use futures::FutureExt;
use kiln_cache::Ref;
use kiln_proto::pb;
use kiln_solver::op::OpError;
use kiln_solver::progress::VertexProgress;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio::sync::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::mounts::{self, Prepared};
use super::process::{Process, Streams};
use super::run::{Run, blocking, failed_run};
use super::{Emptied, Step, cache_mounts, check_grants, identity, stubs};
use crate::ops::BuildContext;
use crate::sandbox::spec;
use crate::sandbox::{ExitOutcome, ProcessRequest, SandboxError, SandboxRequest};
use crate::view::View;
use crate::worker::Worker;

/// `PATH` of a process of another system, for those who run such programs anyway.
const WINDOWS_PATH: &str = "c:\\Windows\\System32;c:\\Windows;C:\\Windows\\System32\\WindowsPowerShell\\v1.0";

/// gRPC code of what was cancelled.
const CANCELED: i32 = 1;

/// A container to make.
#[derive(Debug, Default)]
pub struct ContainerRequest {
    /// What is mounted; of `input` and `output` nothing is meant.
    pub mounts: Vec<pb::Mount>,
    /// What each mount shows.
    pub inputs: Vec<Ref>,
    /// Network of all processes.
    pub network: pb::NetMode,
    /// Host name; may be empty.
    pub hostname: String,
    /// Lines of `/etc/hosts`.
    pub extra_hosts: Vec<pb::HostIp>,
    /// Operating system that the programs are for; empty is this one.
    pub os: String,
}

/// A process to start in a container.
#[derive(Debug, Default)]
pub struct ProcessSpec {
    /// Program, environment, user, directory.
    pub meta: pb::Meta,
    /// Variables whose values are secrets.
    pub secret_env: Vec<pb::SecretEnv>,
    /// Confinement, by its number. It is that of the first process for all of a container.
    pub security: i32,
    /// All standard streams are one terminal.
    pub terminal: bool,
    /// Which of the standard streams somebody uses.
    pub fds: Vec<u32>,
}

/// A container. Dropping it ends its processes.
pub struct Container {
    worker: Arc<Worker>,
    context: BuildContext,
    id: String,
    op: pb::ExecOp,
    meta: pb::Meta,
    path: &'static str,
    inputs: Vec<Ref>,
    /// Until the container is released.
    prepared: StdMutex<Option<Arc<Prepared>>>,
    progress: VertexProgress,
    /// Whether there has been a first process; locked until it has started.
    first: Mutex<bool>,
    security: OnceLock<pb::SecurityMode>,
    cancel: CancellationToken,
    _cancelled_when_dropped: DropGuard,
    processes: TaskTracker,
    failure: Arc<StdMutex<Option<OpError>>>,
}

impl Container {
    pub(crate) async fn new(
        worker: Arc<Worker>,
        context: BuildContext,
        request: ContainerRequest,
        progress: VertexProgress,
    ) -> Result<Self, OpError> {
        let ContainerRequest { mut mounts, inputs, network, hostname, extra_hosts, os } = request;
        for (index, mount) in mounts.iter_mut().enumerate() {
            mount.input = index as i64;
            mount.output = -1;
        }
        let root = mounts.iter().find(|mount| mounts::is_root(mount));
        if root.is_none_or(|mount| mount.mount_type() != pb::MountType::Bind) {
            return Err(OpError::new("a container needs a root mount"));
        }
        let op = pb::ExecOp { mounts, network: network.into(), ..pb::ExecOp::default() };
        let cgroup_parent = context.cgroup_parent.clone();
        let meta = pb::Meta { hostname, extra_hosts, cgroup_parent, ..pb::Meta::default() };
        let cancel = CancellationToken::new();
        let container = Self {
            worker,
            context,
            id: kiln_session::new_id(),
            op,
            meta,
            path: if os == "windows" { WINDOWS_PATH } else { spec::DEFAULT_PATH },
            inputs,
            prepared: StdMutex::default(),
            progress,
            first: Mutex::default(),
            security: OnceLock::new(),
            cancel: cancel.clone(),
            _cancelled_when_dropped: cancel.drop_guard(),
            processes: TaskTracker::new(),
            failure: Arc::default(),
        };
        let prepared = Arc::new(container.prepare().await?);
        *container.prepared.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared);
        Ok(container)
    }

    async fn prepare(&self) -> Result<Prepared, OpError> {
        self.worker.materialize_all(&self.inputs, &self.context.credentials, &self.progress).await?;
        let step = self.step(&ProcessSpec::default());
        let wanted = mounts::wanted_caches(&step, &self.inputs);
        let emptied: Option<&Emptied> = None;
        let caches = cache_mounts::open_all(&self.worker, &wanted, emptied, &self.cancel).await?;
        let (layers, inputs) = (self.worker.layers().clone(), self.inputs.clone());
        blocking(move || mounts::prepare(&layers, &step, &inputs, caches)).await?
    }

    /// A process of this container as a step.
    fn step(&self, process: &ProcessSpec) -> Step {
        let meta = &process.meta;
        let mut env = meta.env.clone();
        let mut default = |name: &str, value: &str| {
            if !env.iter().any(|variable| variable.strip_prefix(name).is_some_and(|v| v.starts_with('='))) {
                env.push(format!("{name}={value}"));
            }
        };
        default("PATH", self.path);
        if process.terminal {
            default("TERM", "xterm");
        }
        let meta = pb::Meta {
            env,
            cwd: if meta.cwd.is_empty() { "/".to_owned() } else { meta.cwd.clone() },
            hostname: self.meta.hostname.clone(),
            extra_hosts: self.meta.extra_hosts.clone(),
            cgroup_parent: self.meta.cgroup_parent.clone(),
            ..meta.clone()
        };
        let op = pb::ExecOp {
            secretenv: process.secret_env.clone(),
            security: process.security,
            ..self.op.clone()
        };
        Step {
            op: Arc::new(op),
            meta,
            resources: None,
            sessions: self.context.sessions.clone(),
            credentials: self.context.credentials.clone(),
        }
    }

    /// Starts a process. Whatever keeps it from running is its outcome.
    pub async fn start(&self, process: ProcessSpec) -> Process {
        let mut first = self.first.lock().await;
        let initial = !std::mem::replace(&mut *first, true);
        let cancel = self.cancel.child_token();
        let (streams, stdio, attendance) = match Streams::open(process.terminal, &process.fds) {
            Ok(opened) => opened,
            Err(err) => {
                let failed = OpError::new(format!("opening the process's streams: {err}"));
                return Process::failed(failed);
            }
        };
        let run = Run {
            worker: self.worker.clone(),
            step: Arc::new(self.step(&process)),
            progress: self.progress.clone(),
            emptied: None,
            cancel: cancel.clone(),
        };
        let Some(prepared) = self.prepared() else {
            return Process::failed(OpError::new("the container has been released"));
        };
        let (id, inputs, terminal) = (self.id.clone(), self.inputs.clone(), process.terminal);
        let asked = pb::SecurityMode::try_from(process.security)
            .map_err(|_| OpError::new(format!("invalid security mode {}", process.security)));
        let granted = asked.and_then(|asked| {
            check_grants(&self.context, &run.step.op)?;
            if run.step.meta.args.is_empty() { Err(OpError::new("no program to run")) } else { Ok(asked) }
        });
        let work = if initial {
            if let Ok(asked) = &granted {
                let _ = self.security.set(*asked);
            }
            async move {
                granted?;
                first_process(&run, id, inputs, prepared, terminal, stdio, attendance).await
            }
            .boxed()
        } else {
            let security = self.security.get().copied().unwrap_or_default();
            async move {
                granted?;
                further_process(&run, id, prepared, security, terminal, stdio, attendance).await
            }
            .boxed()
        };
        let failure = self.failure.clone();
        let work = async move {
            let outcome = work.await.and_then(|outcome| judge(&outcome));
            if let Err(err) = &outcome {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| err.clone());
            }
            outcome
        };
        // A task of its own: directories must stay until the last process is gone, whoever has left.
        let task = self.worker.steps.spawn(self.processes.track_future(work));
        Process::started(streams, task, cancel).await
    }

    fn prepared(&self) -> Option<Arc<Prepared>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends all processes and waits until nothing is left of the container.
    ///
    /// # Errors
    /// What the first process to fail failed with, being ended included.
    pub async fn release(&self) -> Result<(), OpError> {
        self.cancel.cancel();
        self.processes.close();
        self.processes.wait().await;
        let prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take();
        blocking(move || drop(prepared)).await?;
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(err) => Err(err),
            None => Ok(()),
        }
    }

    /// What a mount shows now, as a directory to read in.
    ///
    /// # Errors
    /// There is no such mount, or nothing that could be read.
    pub async fn view(&self, mount: usize) -> Result<MountView, OpError> {
        let Some(wanted) = self.op.mounts.get(mount) else {
            let count = self.op.mounts.len();
            return Err(OpError::new(format!("mount index {mount} is out of bounds ({count} available)")));
        };
        let (dest, prepared) = (mounts::dest(wanted, "/"), self.prepared());
        let layers = self.worker.layers().clone();
        blocking(move || {
            let source = prepared.as_ref().and_then(|prepared| prepared.source(Path::new(&dest)));
            let Some((source, selector)) = source else {
                return Err(OpError::new(format!("mount {dest} cannot be read from outside")));
            };
            let failed = |err: &dyn std::fmt::Display| OpError::new(format!("mount {dest}: {err}"));
            let view = View::of(&source, layers.empty_dir()).map_err(|err| failed(&err))?;
            let root = match selector {
                None => None,
                Some(path) => {
                    let flags = OFlags::PATH | OFlags::CLOEXEC;
                    let found =
                        rustix::fs::openat2(view.fd(), &path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
                    Some(found.map_err(|err| failed(&err))?)
                }
            };
            Ok(MountView { view, root, _held: prepared })
        })
        .await?
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Removing directories takes time.
        let prepared = self.prepared.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(prepared), Ok(runtime)) = (prepared, tokio::runtime::Handle::try_current()) {
            self.worker.steps.spawn_blocking_on(move || drop(prepared), &runtime);
        }
    }
}

/// A mount of a container, seen from outside.
pub struct MountView {
    view: View,
    root: Option<std::os::fd::OwnedFd>,
    _held: Option<Arc<Prepared>>,
}

impl MountView {
    /// The directory that is mounted.
    pub fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.root.as_ref().map_or_else(|| self.view.fd(), AsFd::as_fd)
    }
}

async fn first_process(
    run: &Run,
    id: String,
    inputs: Vec<Ref>,
    prepared: Arc<Prepared>,
    terminal: bool,
    stdio: crate::sandbox::Stdio,
    attendance: crate::sandbox::Attendance,
) -> Result<ExitOutcome, OpError> {
    let opened = run.open().await?;
    let root = run.root(&inputs);
    let (layers, step) = (run.worker.layers().clone(), run.step.clone());
    let user = blocking(move || identity::resolve(&layers, &root, &step.meta.user)).await?;
    let user = user.map_err(OpError::new)?;
    let params = spec::SpecParams { terminal, ..run.params(&id, &prepared, &opened, &user) };
    let request = SandboxRequest {
        id,
        spec: spec::build(&params).map_err(|err| failed(run, &err))?,
        rootfs: prepared.rootfs.clone(),
        layered_mounts: prepared.layered.clone(),
        memory_files: opened.secrets.clone(),
        stdio,
        attendance: Some(attendance),
    };
    let worker = run.worker.clone();
    let executor = blocking(move || worker.executor()).await?.map_err(|err| failed(run, &err))?;
    let outcome = executor.run(request, run.cancel.clone()).await.map_err(|err| failed(run, &err));
    let step = run.step.clone();
    blocking(move || {
        if let Ok(outcome) = &outcome {
            // Directories of caches outlive the container.
            stubs::remove(&outcome.stubs, &prepared.written, step.meta.remove_mount_stubs_recursive);
        }
        drop((opened, prepared));
        outcome
    })
    .await?
}

async fn further_process(
    run: &Run,
    sandbox: String,
    prepared: Arc<Prepared>,
    security: pb::SecurityMode,
    terminal: bool,
    stdio: crate::sandbox::Stdio,
    attendance: crate::sandbox::Attendance,
) -> Result<ExitOutcome, OpError> {
    let secrets = run.secret_env().await?;
    let (layers, step) = (run.worker.layers().clone(), run.step.clone());
    let user = blocking(move || {
        // Users may have been added since the container started.
        let view = View::of(&prepared.rootfs, layers.empty_dir()).map_err(|err| err.to_string())?;
        identity::resolve_in(&view, &step.meta.user)
    });
    let user = user.await?.map_err(OpError::new)?;
    let id = kiln_session::new_id();
    let mut params = run.process(&id, &secrets, &user);
    params.terminal = terminal;
    params.security = super::run::security(security);
    let spec = spec::build(&params).map_err(|err| failed(run, &err))?;
    let worker = run.worker.clone();
    let executor = blocking(move || worker.executor()).await?.map_err(|err| failed(run, &err))?;
    let request = ProcessRequest { id, sandbox, spec, stdio, attendance: Some(attendance) };
    executor.exec(request, run.cancel.clone()).await.map_err(|err| failed(run, &err))
}

fn failed(run: &Run, err: &SandboxError) -> OpError {
    match err {
        // As it would have ended: by being killed.
        SandboxError::Cancelled => OpError {
            exit_code: Some(128 + libc::SIGKILL),
            code: Some(CANCELED),
            ..OpError::new(format!("exit code: {}: context canceled", 128 + libc::SIGKILL))
        },
        err => failed_run(&run.step, err),
    }
}

fn judge(outcome: &ExitOutcome) -> Result<(), OpError> {
    match i32::try_from(outcome.code).unwrap_or(i32::MAX) {
        0 => Ok(()),
        code => Err(OpError { exit_code: Some(code), ..OpError::new(format!("exit code: {code}")) }),
    }
}
