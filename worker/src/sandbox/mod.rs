//! Sandboxes: one process tree with its own namespaces, root file system and limits.
//!
//! Owns everything between "an OCI runtime spec plus layer directories" and "an exit code". It knows
//! nothing of LLB, snapshots, caches or sessions: callers resolve users, mounts and secrets first, and
//! commit or throw away what a sandbox wrote afterwards.
//!
//! Two executors share one helper process, the [`zygote`]: [`LeanExecutor`] sets the sandbox up itself,
//! [`OciRuntimeExecutor`] prepares the same root in a private mount namespace and hands it to `runc` or
//! `crun`. Neither attaches a mount where the host could see it, so nothing can be left mounted, and the
//! helper is the first process of a pid namespace, so the death of the daemon ends every sandbox.

mod cgroup;
mod devices;
mod init;
mod lean;
mod limits;
mod mounts;
mod nofile;
mod oci;
mod owner;
mod plan;
mod runner;
pub mod seccomp;
pub mod spec;
mod sys;
mod syscalls;
mod terminal;
mod wire;
pub mod zygote;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub(crate) use sys::restore_times;

pub use lean::LeanExecutor;
pub use nofile::raise_open_files;
pub use oci::OciRuntimeExecutor;

/// Runs sandboxes. Implementations behave alike; one test suite runs on all of them.
pub trait Executor: Send + Sync {
    /// Runs one sandbox to its end.
    ///
    /// Returns once every process of the sandbox is gone and its mounts and cgroups are released, also
    /// when `cancel` fires (then [`SandboxError::Cancelled`]). Dropping the future kills the sandbox too,
    /// but cannot wait for its end.
    fn run(
        &self,
        request: SandboxRequest,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<ExitOutcome, SandboxError>>;

    /// Runs one more process in a sandbox that [`Attendance::started`] told of, to its end.
    ///
    /// The sandbox's end is the end of all its processes. The end of this one leaves those that it started, unless
    /// their own end comes with it.
    fn exec(
        &self,
        request: ProcessRequest,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<ExitOutcome, SandboxError>>;

    /// Short name for logs and `debug` output: `lean`, `runc`, `crun`.
    fn name(&self) -> &str;
}

/// Everything one sandbox needs. Paths are host paths unless said otherwise.
#[derive(Debug)]
pub struct SandboxRequest {
    /// Unique among running sandboxes; used in cgroup and runtime state names. `[A-Za-z0-9_.-]+`.
    pub id: String,
    /// Process, namespaces, capabilities, seccomp, plain mounts. `root.path` is ignored, `root.readonly` is not.
    /// [`spec::build`] makes one with the defaults of a container.
    pub spec: Spec,
    /// The root file system.
    pub rootfs: RootSource,
    /// Mounts whose source is itself a stack of layers. Applied with the spec's mounts, parents first.
    pub layered_mounts: Vec<LayeredMount>,
    /// Files that must not touch a disk.
    pub memory_files: Vec<MemoryFile>,
    /// Standard streams of the process.
    pub stdio: Stdio,
    /// Given by callers that take part while it runs.
    pub attendance: Option<Attendance>,
}

/// A further process of a running sandbox.
#[derive(Debug)]
pub struct ProcessRequest {
    /// Unique among running sandboxes and processes, as [`SandboxRequest::id`].
    pub id: String,
    /// Id of the sandbox.
    pub sandbox: String,
    /// Process and seccomp profile; everything else is as the sandbox has it.
    pub spec: Spec,
    /// Standard streams of the process.
    pub stdio: Stdio,
    /// Given by callers that take part while it runs.
    pub attendance: Option<Attendance>,
}

/// Standard streams of a process.
#[derive(Debug)]
pub enum Stdio {
    /// Three descriptors. The daemon's copies are closed when the sandbox has them.
    Files {
        /// Input (usually `/dev/null`).
        stdin: OwnedFd,
        /// Output.
        stdout: OwnedFd,
        /// Errors.
        stderr: OwnedFd,
    },
    /// A new terminal is all three. The spec's process has to say `terminal` as well.
    Terminal,
}

/// How a caller takes part in a process while it runs.
#[derive(Debug)]
pub struct Attendance {
    /// Told when the sandbox is set up and other processes may join it, with the other end of the terminal if there is
    /// one. Dropped if it does not come to that. Whether the program can be executed shows only afterwards.
    pub started: oneshot::Sender<Option<OwnedFd>>,
    /// Numbers of signals for the process.
    pub signals: mpsc::UnboundedReceiver<i32>,
}

/// Where a directory tree of a sandbox comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootSource {
    /// Layers in overlayfs form. Without `upper` the tree is read-only; with no `lowers` the upper
    /// directory is used as it is. `upper` and `work` go together, on one file system.
    Overlay {
        /// Lower directories, topmost first.
        lowers: Vec<PathBuf>,
        /// Takes the changes.
        upper: Option<PathBuf>,
        /// Empty scratch directory for overlayfs.
        work: Option<PathBuf>,
    },
    /// One directory, changed in place.
    Dir(PathBuf),
}

/// A mount made from layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayeredMount {
    /// Absolute path in the sandbox; made when missing.
    pub dest: PathBuf,
    /// What is mounted.
    pub source: RootSource,
    /// A path inside the source to mount instead of all of it, resolved beneath the source. May name a file.
    pub selector: Option<PathBuf>,
    /// Mount read-only.
    pub readonly: bool,
}

/// A read-only file that is in memory alone, on a file system of its own.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFile {
    /// Absolute path in the sandbox; made when missing.
    pub dest: PathBuf,
    /// What is in it.
    pub content: Vec<u8>,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits. It can be executed only if one of them says so.
    pub mode: u32,
}

impl std::fmt::Debug for MemoryFile {
    // The content may be a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryFile({}, {} bytes)", self.dest.display(), self.content.len())
    }
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExitOutcome {
    /// The exit status; 128 + n when signal n ended the process, as a shell reports it.
    pub code: u32,
    /// The kernel killed a process of the sandbox for its memory limit. Only known when a limit was set.
    pub oom_killed: bool,
    /// Mount points that were missing and have been made: absolute, symlink-free paths in the sandbox,
    /// parents before children. The caller removes those that are still empty.
    pub stubs: Vec<PathBuf>,
}

/// Why a sandbox did not run to an exit status.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The request asks for something this executor does not do.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The request contradicts itself.
    #[error("invalid sandbox: {0}")]
    Invalid(String),
    /// The sandbox could not be set up; nothing of the process ran.
    #[error("cannot set up the sandbox: {0}")]
    Setup(String),
    /// The program could not be started.
    #[error("{0}")]
    Exec(String),
    /// The sandbox that a process was to join is not there any more.
    #[error("container {0} not found")]
    Gone(String),
    /// The run was cancelled; all processes are gone.
    #[error("sandbox cancelled")]
    Cancelled,
    /// The helper process is gone or does not answer.
    #[error("sandbox helper: {0}")]
    Helper(String),
    /// A system call of the daemon's side failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl SandboxError {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }
}

/// Which executor a worker uses (`[worker.oci] binary` in buildkitd.toml).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ExecutorChoice {
    /// Kiln's own.
    #[default]
    Lean,
    /// An OCI runtime binary, by path or by name in `PATH`.
    Runtime(PathBuf),
}

/// Makes the chosen executor. `state` is a directory of the caller's for runtime state; it is created, and
/// what an earlier daemon left there is removed.
///
/// Starts the helper process: the binary must call [`zygote::run_if_requested`] first thing in `main`.
pub fn open(choice: &ExecutorChoice, state: &std::path::Path) -> Result<Arc<dyn Executor>, SandboxError> {
    Ok(match choice {
        ExecutorChoice::Lean => Arc::new(LeanExecutor::new()?),
        ExecutorChoice::Runtime(binary) => Arc::new(OciRuntimeExecutor::new(binary, state)?),
    })
}
