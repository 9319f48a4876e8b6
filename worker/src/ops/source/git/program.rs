//! The git program: run with nothing of the daemon's own configuration, and ended with its helpers when the build
//! loses interest.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::Mode;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::thread::CapabilitiesSecureBits;
use tokio_util::sync::CancellationToken;

use super::remote::PROTOCOLS;

/// Variables of the daemon that git is given.
const INHERITED: [&str; 9] = [
    "PATH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];
/// Configuration that goes before a repository's.
const SETTINGS: [(&str, &str); 9] = [
    ("core.hooksPath", "/dev/null"),
    ("core.logAllRefUpdates", "false"),
    ("credential.helper", ""),
    ("fetch.recurseSubmodules", "false"),
    // What git does now and then to its files must not go on after it has ended.
    ("gc.autoDetach", "false"),
    ("init.defaultBranch", "master"),
    ("maintenance.autoDetach", "false"),
    // All directories it is started in are the daemon's.
    ("safe.directory", "*"),
    ("advice.detachedHead", "false"),
];
/// Of what git says, this much is kept.
const MAX_OUTPUT: u64 = 64 << 20;

/// Why git did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub(super) enum GitError {
    /// There is none.
    #[error(
        "git sources need the git program, which is not in the daemon's PATH: install the package \"git\""
    )]
    Missing,
    /// It could not be started.
    #[error("starting git failed: {0}")]
    Start(io::Error),
    /// It ended with an error.
    #[error("git {command} ended with {status}; git stderr:\n{stderr}")]
    Failed { command: String, status: ExitStatus, stderr: String },
    /// The build lost interest.
    #[error("context canceled")]
    Cancelled,
    /// The thread that waited for it.
    #[error("waiting for git failed: {0}")]
    Wait(String),
}

/// How git is run on behalf of one source. Cheap to clone.
#[derive(Clone)]
pub(super) struct Git {
    env: Arc<Vec<(OsString, OsString)>>,
    settings: Vec<(String, String)>,
    protocols: String,
    repository: Option<PathBuf>,
    cancel: CancellationToken,
}

/// What a successful git said.
pub(super) struct Output {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

impl Output {
    /// The standard output where it is text.
    pub(super) fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stdout)
    }
}

impl Git {
    /// `settings` and `env` are added to what every git gets. They are not seen by other users, as arguments are.
    pub(super) fn new(
        settings: Vec<(String, String)>,
        env: impl IntoIterator<Item = (OsString, OsString)>,
        cancel: CancellationToken,
    ) -> Self {
        let fixed = [
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("HOME", "/dev/null"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("LC_ALL", "C"),
        ];
        let inherited = INHERITED.into_iter().filter_map(|name| Some((name.into(), std::env::var_os(name)?)));
        let fixed = fixed.into_iter().map(|(name, value)| (name.into(), value.into()));
        let env = inherited.chain(fixed).chain(env).collect();
        Self { env: Arc::new(env), settings, protocols: PROTOCOLS.join(":"), repository: None, cancel }
    }

    /// The same on a repository without files.
    pub(super) fn on(&self, repository: &Path) -> Self {
        Self { repository: Some(repository.to_owned()), ..self.clone() }
    }

    /// The same with another setting.
    pub(super) fn with(&self, key: impl Into<String>, value: impl Into<String>) -> Self {
        let mut changed = self.clone();
        changed.settings.push((key.into(), value.into()));
        changed
    }

    /// The same for reading from a repository of this machine, whose path must be the daemon's own choice.
    pub(super) fn local(&self) -> Self {
        Self { protocols: "file".to_owned(), ..self.clone() }
    }

    /// Runs a command in a directory.
    pub(super) async fn run(&self, dir: &Path, args: &[&str]) -> Result<Output, GitError> {
        self.run_with(dir, args, &[]).await
    }

    /// Runs a command with more variables.
    pub(super) async fn run_with(
        &self,
        dir: &Path,
        args: &[&str],
        env: &[(&str, &OsStr)],
    ) -> Result<Output, GitError> {
        if self.cancel.is_cancelled() {
            return Err(GitError::Cancelled);
        }
        let mut command = self.command(dir, args);
        command.envs(env.iter().copied());
        let name = args.first().copied().unwrap_or_default().to_owned();
        let group = Arc::new(Group::default());
        let running = group.clone();
        // A thread of its own, because the kernel ends the process with the thread that started it.
        let mut run = tokio::task::spawn_blocking(move || running.run(command));
        let ended = tokio::select! {
            ended = &mut run => ended,
            () = self.cancel.cancelled() => {
                group.kill();
                run.await
            }
        };
        let (status, stdout, stderr) = match ended.map_err(|err| GitError::Wait(err.to_string()))? {
            _ if self.cancel.is_cancelled() => return Err(GitError::Cancelled),
            Err(err) if err.kind() == io::ErrorKind::NotFound && dir.is_dir() => {
                return Err(GitError::Missing);
            }
            Err(err) => return Err(GitError::Start(err)),
            Ok(ended) => ended,
        };
        match status.success() {
            true => Ok(Output { stdout, stderr }),
            false => Err(GitError::Failed { command: name, status, stderr }),
        }
    }

    fn command(&self, dir: &Path, args: &[&str]) -> Command {
        let mut command = Command::new("git");
        command
            .args(args)
            .current_dir(dir)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("GIT_ALLOW_PROTOCOL", &self.protocols)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(repository) = &self.repository {
            command.env("GIT_DIR", repository);
        }
        let own = self.settings.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let mut count = 0;
        for (number, (key, value)) in SETTINGS.into_iter().chain(own).enumerate() {
            command.env(format!("GIT_CONFIG_KEY_{number}"), key);
            command.env(format!("GIT_CONFIG_VALUE_{number}"), value);
            count = number + 1;
        }
        command.env("GIT_CONFIG_COUNT", count.to_string());
        // SAFETY: `confine` only makes system calls.
        unsafe { command.pre_exec(confine) };
        command
    }
}

/// Takes from the process what a fetch does not need: a root without capabilities is left, that gains none by
/// executing and ends with the daemon.
fn confine() -> io::Result<()> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::thread::set_no_new_privs(true)?;
    // Refused where the daemon itself has few capabilities.
    let bits = CapabilitiesSecureBits::NO_ROOT | CapabilitiesSecureBits::NO_ROOT_LOCKED;
    let _ = rustix::thread::set_capabilities_secure_bits(bits);
    Ok(())
}

/// A process and those that it starts.
#[derive(Default)]
struct Group(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    Waiting,
    Running(Pid),
    Over,
}

impl Group {
    /// Blocking.
    fn run(&self, mut command: Command) -> io::Result<(ExitStatus, Vec<u8>, String)> {
        let mut child = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*state, State::Over) {
                return Ok((ExitStatus::from_raw(Signal::KILL.as_raw()), Vec::new(), String::new()));
            }
            let child = command.spawn()?;
            *state =
                i32::try_from(child.id()).ok().and_then(Pid::from_raw).map_or(State::Over, State::Running);
            child
        };
        let output = drain(&mut child);
        // Its number is nobody else's until it has been waited for.
        if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while matches!(rustix::process::waitid(WaitId::Pid(pid), ended), Err(rustix::io::Errno::INTR)) {}
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::Over;
        let status = child.wait()?;
        let (stdout, stderr) = output?;
        Ok((status, stdout, stderr))
    }

    fn kill(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Running(pid) => {
                // It may have ended by itself.
                let _ = rustix::process::kill_process_group(pid, Signal::KILL);
            }
            State::Waiting => *state = State::Over,
            State::Over => {}
        }
    }
}

/// Both outputs to their ends.
fn drain(child: &mut Child) -> io::Result<(Vec<u8>, String)> {
    fn read(from: Option<impl Read>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            from.by_ref().take(MAX_OUTPUT).read_to_end(&mut bytes)?;
            io::copy(&mut from, &mut io::sink())?;
        }
        Ok(bytes)
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let errors = scope.spawn(|| read(stderr));
        let stdout = read(stdout)?;
        let stderr =
            errors.join().unwrap_or_else(|_| Err(io::Error::other("the reader of stderr panicked")))?;
        Ok((stdout, String::from_utf8_lossy(&stderr).into_owned()))
    })
}
