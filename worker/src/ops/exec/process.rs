//! A process that a client attends: its streams, what may be done to it, and its outcome.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kiln_solver::op::OpError;
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use rustix::termios::Winsize;
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::sandbox::{Attendance, Stdio};

const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;

/// A process. Dropping it ends it.
pub struct Process {
    /// What it reads, if that was asked for. Dropping it is the end of the input, unless it is a terminal.
    pub stdin: Option<Sender>,
    /// What it writes, with the stream's number. A terminal's end shows as an error.
    pub outputs: Vec<(u32, Receiver)>,
    /// What may be done to it.
    pub controls: Controls,
    task: Option<JoinHandle<Result<(), OpError>>>,
    failed: Option<OpError>,
    _ended_when_dropped: Option<DropGuard>,
}

/// What may be done to a process. Cheap to clone; works for as long as the process does, and is ignored afterwards.
#[derive(Clone, Default)]
pub struct Controls {
    signals: Option<mpsc::UnboundedSender<i32>>,
    terminal: Option<Arc<OwnedFd>>,
}

impl Controls {
    /// Sends a signal by its number.
    pub fn signal(&self, signal: i32) {
        if let Some(signals) = &self.signals {
            let _ = signals.send(signal);
        }
    }

    /// Changes the size of the terminal, if there is one.
    pub fn resize(&self, rows: u32, columns: u32) {
        let Some(terminal) = &self.terminal else { return };
        let narrow = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        let size = Winsize { ws_row: narrow(rows), ws_col: narrow(columns), ws_xpixel: 0, ws_ypixel: 0 };
        if let Err(err) = rustix::termios::tcsetwinsize(terminal, size) {
            tracing::debug!("size of a terminal: {err}");
        }
    }
}

/// The daemon's ends of a process's streams, before it has started.
pub(super) struct Streams {
    stdin: Option<Sender>,
    outputs: Vec<(u32, Receiver)>,
    terminal: bool,
    started: oneshot::Receiver<Option<OwnedFd>>,
    signals: mpsc::UnboundedSender<i32>,
}

impl Streams {
    /// Opens the streams `fds` of a process; the others lead nowhere.
    pub(super) fn open(terminal: bool, fds: &[u32]) -> io::Result<(Self, Stdio, Attendance)> {
        let (started, start) = oneshot::channel();
        let (signals, signalled) = mpsc::unbounded_channel();
        let attendance = Attendance { started, signals: signalled };
        let mut streams = Self { stdin: None, outputs: Vec::new(), terminal, started: start, signals };
        if terminal {
            return Ok((streams, Stdio::Terminal, attendance));
        }
        let null = || std::fs::File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let stdin = if fds.contains(&STDIN) {
            let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            streams.stdin = Some(Sender::from_owned_fd(writer)?);
            reader
        } else {
            null()?
        };
        let mut output = |fd: u32| {
            if !fds.contains(&fd) {
                return null();
            }
            let (reader, writer) = super::output::pipe()?;
            streams.outputs.push((fd, reader));
            Ok(writer)
        };
        let stdout = output(STDOUT)?;
        let stderr = output(STDERR)?;
        Ok((streams, Stdio::Files { stdin, stdout, stderr }, attendance))
    }
}

impl Process {
    /// One that never ran.
    pub(super) fn failed(err: OpError) -> Self {
        Self {
            stdin: None,
            outputs: Vec::new(),
            controls: Controls::default(),
            task: None,
            failed: Some(err),
            _ended_when_dropped: None,
        }
    }

    /// Waits until the process that `task` runs has started, or has not.
    pub(super) async fn started(
        streams: Streams,
        task: JoinHandle<Result<(), OpError>>,
        cancel: CancellationToken,
    ) -> Self {
        let Streams { stdin, outputs, terminal, started, signals } = streams;
        // What is not sent is dropped with the task.
        let controller = started.await.ok().flatten();
        let mut process = Self {
            stdin,
            outputs,
            controls: Controls { signals: Some(signals), terminal: None },
            task: Some(task),
            failed: None,
            _ended_when_dropped: Some(cancel.drop_guard()),
        };
        if let Some(controller) = controller.filter(|_| terminal)
            && let Err(err) = process.attach(controller)
        {
            return Self::failed(OpError::new(format!("opening the terminal: {err}")));
        }
        process
    }

    fn attach(&mut self, controller: OwnedFd) -> io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(&controller)?;
        rustix::fs::fcntl_setfl(&controller, flags | OFlags::NONBLOCK)?;
        self.stdin = Some(Sender::from_owned_fd_unchecked(controller.try_clone()?)?);
        self.outputs.push((STDOUT, Receiver::from_owned_fd_unchecked(controller.try_clone()?)?));
        self.controls.terminal = Some(Arc::new(controller));
        Ok(())
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// It could not be started, was ended, or its exit status, which is then part of the error, is not zero.
    pub async fn wait(&mut self) -> Result<(), OpError> {
        if let Some(err) = self.failed.take() {
            return Err(err);
        }
        match &mut self.task {
            Some(task) => {
                let outcome = task.await;
                self.task = None;
                outcome.unwrap_or_else(|err| Err(OpError::new(format!("running the process failed: {err}"))))
            }
            None => Ok(()),
        }
    }
}
