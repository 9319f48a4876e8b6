//! Starts a daemon in the background. However many commands want one at the same time, a lock beside the socket lets
//! one start it while the others wait for that.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::FdFlags;

use crate::args;
use crate::error::CliError;

/// How long a daemon may take until it answers; a large store after a crash is swept first.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a daemon started on demand stays without work.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Size from which the log is set aside before the next daemon starts.
const LOG_LIMIT: u64 = 8 << 20;
/// The end of the log that is shown when a daemon does not come up.
const LOG_TAIL: u64 = 4 << 10;

/// Whether connecting failed because there is no daemon (rather than, say, for lack of permission).
pub(crate) fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Starts a daemon that listens on `socket`, unless another command just did, and connects to it.
pub(crate) fn daemon(socket: &Path, flags: &args::Connection) -> Result<UnixStream, CliError> {
    if !rustix::process::geteuid().is_root() {
        return Err(CliError::Connect(format!(
            "no daemon answers on {}, and starting one takes root (unsupported: rootless)",
            socket.display()
        )));
    }
    let _lock = lock(socket)?;
    match UnixStream::connect(socket) {
        Ok(stream) => return Ok(stream),
        Err(error) if nobody_listens(&error) => {}
        Err(error) => return Err(CliError::file("connect to", socket, error)),
    }
    let root = flags.root.clone().unwrap_or_else(kiln_daemon::default_root);
    let log = Log::open(&root)?;
    let mut child = spawn(socket, flags, &root, &log.file)?;
    let deadline = Instant::now() + READY_TIMEOUT;
    let mut pause = Duration::from_millis(1);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if nobody_listens(&error) => {}
            Err(error) => return Err(CliError::file("connect to", socket, error)),
        }
        let ended = child.try_wait().map_err(|error| CliError::file("wait for", "the daemon", error))?;
        if let Some(status) = ended {
            return Err(CliError::Connect(format!("the daemon ended at once ({status}); {}", log.tail())));
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            return Err(CliError::Connect(format!("the daemon does not answer; {}", log.tail())));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(8));
    }
}

fn lock(socket: &Path) -> Result<File, CliError> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(|error| CliError::file("make directory", dir, error))?;
    let mut path = socket.as_os_str().to_owned();
    path.push(".start");
    let path = PathBuf::from(path);
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open.map_err(|error| CliError::file("open", &path, error))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|error| CliError::file("lock", &path, error.into()))?;
    Ok(file)
}

/// The daemon's log.
struct Log {
    file: File,
    path: PathBuf,
    /// Where this daemon's part begins.
    start: u64,
}

impl Log {
    fn open(root: &Path) -> Result<Self, CliError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|error| CliError::file("make directory", root, error))?;
        let path = root.join("kilnd.log");
        if path.metadata().is_ok_and(|meta| meta.len() > LOG_LIMIT) {
            // Losing an old log is no reason not to build.
            let _ = std::fs::rename(&path, root.join("kilnd.log.old"));
        }
        let open = OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(&path);
        let file = open.map_err(|error| CliError::file("open", &path, error))?;
        let start = file.metadata().map_or(0, |meta| meta.len());
        Ok(Self { file, path, start })
    }

    /// What the daemon said since it was started.
    fn tail(&self) -> String {
        let end = self.file.metadata().map_or(0, |meta| meta.len());
        let from = self.start.max(end.saturating_sub(LOG_TAIL));
        let mut text = vec![0; usize::try_from(end.saturating_sub(from)).unwrap_or(0)];
        let read = self.file.read_exact_at(&mut text, from);
        let text = String::from_utf8_lossy(&text);
        if read.is_err() || text.trim().is_empty() {
            return format!("its log is {}", self.path.display());
        }
        format!("its log ({}) says:\n{}", self.path.display(), text.trim_end())
    }
}

fn spawn(socket: &Path, flags: &args::Connection, root: &Path, log: &File) -> Result<Child, CliError> {
    let failed = |error| CliError::file("start", "the daemon", error);
    let program = std::env::current_exe().map_err(failed)?;
    keep_descriptors_from_daemon();
    let mut command = Command::new(program);
    command
        .arg("daemon")
        .arg("--addr")
        .arg(format!("unix://{}", socket.display()))
        .arg("--root")
        .arg(absolute(root)?);
    if let Some(config) = &flags.config {
        command.arg("--config").arg(absolute(config)?);
    }
    let idle = flags.idle_timeout.unwrap_or(IDLE_TIMEOUT);
    command.arg("--idle-timeout").arg(format!("{}ms", idle.as_millis()));
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log.try_clone().map_err(failed)?);
    // SAFETY: setsid is async-signal-safe, and nothing else runs between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    command.spawn().map_err(failed)
}

fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|error| CliError::file("find", path, error))
}

/// Descriptors that this process got from its own parent (a pipe of a script, say) must not stay open for as long as
/// the daemon lives.
fn keep_descriptors_from_daemon() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    for entry in entries.flatten() {
        if let Some(number) =
            entry.file_name().to_str().and_then(|name| name.parse().ok()).filter(|n: &i32| *n > 2)
        {
            // SAFETY: the number was just listed as open, and this process has one thread.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            let _ = rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC);
        }
    }
}
