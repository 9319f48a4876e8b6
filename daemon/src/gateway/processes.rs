//! `ExecProcess`: one stream on which a client starts processes in containers, feeds them, and follows them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kiln_proto::gateway::exec_message::Input;
use kiln_proto::gateway::{DoneMessage, ExecMessage, ExitMessage, FdMessage, InitMessage, StartedMessage};
use kiln_worker::ops::{Controls, Process, ProcessSpec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::{RwLock, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::Bridge;
use super::signals;
use crate::engine::op_error;
use crate::error::{BuildError, exit_detail};

/// Messages that wait for the client to take them.
const ANSWERS: usize = 64;
/// Pieces of input that wait for a process to read them.
const INPUTS: usize = 16;
/// Most that is read of a process's output at once.
const PIECE: usize = 32 << 10;
/// How long a process's output is waited for after its end: what it left running may hold the streams open.
const DRAIN: Duration = Duration::from_secs(1);
/// At most this much is in a pipe at once.
const PIPE: usize = 1 << 20;
/// The exit code of a process that has none.
const UNKNOWN: u32 = 255;

type Answer = Result<ExecMessage, Status>;

/// Serves one stream in the background; the answers.
pub(super) fn serve(bridge: Arc<Bridge>, requests: Streaming<ExecMessage>) -> mpsc::Receiver<Answer> {
    let (answers, receiver) = mpsc::channel(ANSWERS);
    tokio::spawn(async move {
        let cancel = bridge.cancel().clone();
        let outcome = tokio::select! {
            outcome = take(&bridge, requests, &answers) => outcome,
            () = cancel.cancelled() => Err(BuildError::canceled()),
            // The client has left, and its processes with it.
            () = answers.closed() => return,
        };
        if let Err(error) = outcome {
            // Nobody may be listening.
            let _ = answers.send(Err(error.into())).await;
        }
    });
    receiver
}

/// A process as messages name it.
struct Running {
    controls: Controls,
    input: Option<mpsc::Sender<FdMessage>>,
}

impl Running {
    /// Hands on a piece of input.
    async fn give(&mut self, file: FdMessage) -> Result<(), BuildError> {
        let Some(input) = self.input.as_ref().filter(|_| file.fd == 0) else {
            let text = format!("fd {} unavailable to write", file.fd);
            return Err(BuildError::new(Code::OutOfRange, text));
        };
        let last = file.eof;
        // A process that has ended reads no more.
        let _ = input.send(file).await;
        if last {
            self.input = None;
        }
        Ok(())
    }
}

/// Takes requests until there are no more and every process has ended.
async fn take(
    bridge: &Arc<Bridge>,
    mut requests: Streaming<ExecMessage>,
    answers: &mpsc::Sender<Answer>,
) -> Result<(), BuildError> {
    let mut running: HashMap<String, Running> = HashMap::new();
    let answers = &Answers { queue: answers.clone(), starting: Arc::default() };
    // Dropping it ends them.
    let mut followers = JoinSet::new();
    while let Some(message) = requests.message().await? {
        let ExecMessage { process_id: id, input } = message;
        if id.is_empty() {
            return Err(BuildError::new(Code::InvalidArgument, "ProcessID required"));
        }
        let Some(input) = input else { continue };
        match (input, running.get_mut(&id)) {
            (Input::Init(_), Some(_)) => {
                return Err(BuildError::new(Code::AlreadyExists, format!("Process {id} already exists")));
            }
            (Input::Init(init), None) => {
                let (process, follower) = start(bridge, &id, init, answers).await?;
                running.insert(id, process);
                followers.spawn(follower);
            }
            (_, None) => {
                return Err(BuildError::new(Code::NotFound, format!("IO for process {id:?} not found")));
            }
            (Input::File(file), Some(process)) => process.give(file).await?,
            (Input::Resize(size), Some(process)) => process.controls.resize(size.rows, size.cols),
            (Input::Signal(signal), Some(process)) => {
                let Some(number) = signals::number(&signal.name) else {
                    let text = format!("Unknown signal {}", signal.name);
                    return Err(BuildError::new(Code::InvalidArgument, text));
                };
                process.controls.signal(number);
            }
            // What only the daemon says.
            (Input::Started(_) | Input::Exit(_) | Input::Done(_), Some(_)) => {}
        }
    }
    while followers.join_next().await.is_some() {}
    Ok(())
}

async fn start(
    bridge: &Bridge,
    id: &str,
    init: InitMessage,
    answers: &Answers,
) -> Result<(Running, impl Future<Output = ()> + Send + 'static), BuildError> {
    let Some(container) = bridge.container(&init.container_id) else {
        let text = format!("container {:?} previously released or not created", init.container_id);
        return Err(BuildError::new(Code::NotFound, text));
    };
    let starting = answers.starting.write().await;
    let process = container
        .start(ProcessSpec {
            meta: init.meta.unwrap_or_default(),
            secret_env: init.secretenv,
            security: init.security,
            terminal: init.tty,
            fds: init.fds.clone(),
        })
        .await;
    let (input, inputs) = mpsc::channel(INPUTS);
    let wanted = init.fds.contains(&0);
    let running = Running { controls: process.controls.clone(), input: wanted.then_some(input) };
    let line = Line { id: id.to_owned(), answers: answers.clone() };
    line.send(Input::Started(StartedMessage {})).await;
    drop(starting);
    Ok((running, follow(line, process, init.fds, inputs)))
}

/// Where the answers of a stream go. A client that takes none has left, which ends all of this.
#[derive(Clone)]
struct Answers {
    queue: mpsc::Sender<Answer>,
    /// Held while a process is started. A client takes one answer after the other, and may be unable to take another of
    /// a process before the one that reads from it has started.
    starting: Arc<RwLock<()>>,
}

/// Where the answers about one process go.
struct Line {
    id: String,
    answers: Answers,
}

impl Line {
    /// Waits for what is being started.
    async fn say(&self, input: Input) {
        let _others = self.answers.starting.read().await;
        self.send(input).await;
    }

    async fn send(&self, input: Input) {
        let message = ExecMessage { process_id: self.id.clone(), input: Some(input) };
        let _ = self.answers.queue.send(Ok(message)).await;
    }
}

/// Follows a process to its end and tells the client.
async fn follow(line: Line, mut process: Process, fds: Vec<u32>, inputs: mpsc::Receiver<FdMessage>) {
    let stdin = process.stdin.take();
    let outputs = std::mem::take(&mut process.outputs);
    let outcome = {
        let over = CancellationToken::new();
        let outputs = outputs.into_iter();
        let mut pumps =
            pin!(join_all(outputs.map(|(fd, output)| { pump(&line, fd, output, fds.contains(&fd), &over) })));
        let ended = async {
            tokio::select! {
                outcome = process.wait() => {
                    over.cancel();
                    let _ = (&mut pumps).await;
                    outcome
                }
                _ = &mut pumps => process.wait().await,
            }
        };
        tokio::select! {
            outcome = ended => outcome,
            never = feed(stdin, inputs) => match never {},
        }
    };
    let exit = match outcome {
        Ok(()) => ExitMessage::default(),
        Err(err) => {
            let code = err.exit_code;
            let mut error = op_error(err);
            error.details.extend(code.map(exit_detail));
            let code = code.and_then(|code| u32::try_from(code).ok()).unwrap_or(UNKNOWN);
            ExitMessage { code, error: Some(error.to_rpc()) }
        }
    };
    line.say(Input::Exit(exit)).await;
    for fd in fds.into_iter().filter(|fd| *fd != 0) {
        line.say(Input::File(FdMessage { fd, eof: true, data: Vec::new() })).await;
    }
    line.say(Input::Done(DoneMessage {})).await;
}

/// Hands on what a process writes; an error is the end of it, as of a terminal that nobody has open any more. When the
/// process is over, so is what comes late: another one may have the other end open. A slow client does not count.
async fn pump(line: &Line, fd: u32, mut output: Receiver, wanted: bool, over: &CancellationToken) {
    let mut piece = vec![0; PIECE];
    let say = async |data: &[u8]| {
        if wanted {
            line.say(Input::File(FdMessage { fd, eof: false, data: data.to_vec() })).await;
        }
    };
    let late = async {
        over.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    let mut late = pin!(late);
    loop {
        tokio::select! {
            read = output.read(&mut piece) => match read {
                Ok(count @ 1..) => say(&piece[..count]).await,
                _ => return,
            },
            () = &mut late => break,
        }
    }
    // What it wrote itself may lie there still.
    let mut left = PIPE;
    while left > 0
        && let Ok(count @ 1..) = output.try_read(&mut piece)
    {
        say(&piece[..count]).await;
        left = left.saturating_sub(count);
    }
}

/// Hands on what a process is to read. Goes on when there is no more, so that it can be waited for beside others.
async fn feed(mut stdin: Option<Sender>, mut inputs: mpsc::Receiver<FdMessage>) -> Infallible {
    while let Some(FdMessage { data, eof, .. }) = inputs.recv().await {
        if let Some(open) = &mut stdin
            && open.write_all(&data).await.is_err()
        {
            // It reads no more.
            stdin = None;
        }
        if eof {
            stdin = None;
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_said_of_others_while_a_process_is_started() {
        let (queue, mut said) = mpsc::channel(4);
        let answers = Answers { queue, starting: Arc::default() };
        let line = |id: &str| Line { id: id.to_owned(), answers: answers.clone() };
        let starting = answers.starting.write().await;
        let (other, new) = (line("other"), line("new"));
        let ended = tokio::spawn(async move { other.say(Input::Exit(ExitMessage::default())).await });
        tokio::task::yield_now().await;
        new.send(Input::Started(StartedMessage {})).await;
        drop(starting);
        ended.await.expect("task");
        let mut next = async || said.recv().await.expect("said").expect("no error").process_id;
        assert_eq!([next().await, next().await], ["new", "other"]);
    }
}
