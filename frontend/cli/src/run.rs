//! One solve from this side: the session that serves the daemon's questions, the status stream that is shown, the
//! call that waits for the result, and signals. All of them run at once on one thread.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::future::OptionFuture;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::control::{SolveRequest, StatusRequest, StatusResponse};
use kiln_session::client::Attachables;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::transport::Channel;

use crate::args;
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::failure::{SolveFailure, excerpt};
use crate::progress::Display;

/// How often a display that nothing arrives for is brought up to date.
const TICK: Duration = Duration::from_millis(100);
/// How long the status stream may stay silent once the result is there.
const LINGER: Duration = Duration::from_secs(5);

/// What to solve.
pub(crate) struct Job {
    pub(crate) request: SolveRequest,
    pub(crate) attachables: Attachables,
    pub(crate) shared_key: String,
}

/// What the daemon answered: the exporters' response.
pub(crate) type Response = HashMap<String, String>;

/// Solves the job that `make` makes, on a daemon that is started if needed. A daemon that leaves just as the
/// connection is made (it was idle) is replaced once.
pub(crate) fn solve(
    flags: &args::Connection,
    mut display: Display,
    mut make: impl FnMut() -> Result<Job, CliError>,
) -> Result<Response, CliError> {
    let mut retried = false;
    loop {
        let job = make()?;
        let connection = connect::connect(flags, Start::IfNeeded)?;
        let runtime = connect::runtime()?;
        let outcome = runtime.block_on(async {
            let control = connect::control(connection.channel()?);
            attempt(control, job, &mut display).await
        });
        // Reads of files that nobody waits for any more must not hold the exit up.
        runtime.shutdown_background();
        match outcome {
            Err(CliError::Solve(failure)) if failure.is_lost() && !display.started() && !retried => {
                retried = true
            }
            other => {
                display.finish();
                return report(other);
            }
        }
    }
}

fn report(outcome: Result<Response, CliError>) -> Result<Response, CliError> {
    if let Err(CliError::Solve(failure)) = &outcome {
        eprint!("{}", excerpt(failure));
    }
    outcome
}

/// The signals that stop a build.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Stop {
    fn watch() -> Result<Self, CliError> {
        let failed = |error| CliError::file("watch", "signals", error);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            hangup: signal(SignalKind::hangup()).map_err(failed)?,
        })
    }

    /// The exit code for the signal that came.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
            _ = self.hangup.recv() => 129,
        }
    }
}

async fn attempt(
    mut control: ControlClient<Channel>,
    job: Job,
    display: &mut Display,
) -> Result<Response, CliError> {
    let mut stop = Stop::watch()?;
    let Job { mut request, attachables, shared_key } = job;
    let session_id = kiln_session::new_id();
    request.session.clone_from(&session_id);
    let reference = request.r#ref.clone();

    let mut session_control = control.clone();
    let session = async move {
        match attachables.attach(&mut session_control, &session_id, &shared_key).await {
            Ok(session) => {
                session.closed().await;
                SolveFailure::local("the daemon ended the session".into())
            }
            Err(error) => SolveFailure::local(error.to_string()),
        }
    };
    let mut status_control = control.clone();
    let (messages, mut arrived) = tokio::sync::mpsc::channel::<StatusResponse>(64);
    let status = async move {
        let answer = status_control.status(StatusRequest { r#ref: reference }).await;
        // Without a status stream the build goes on unseen; what went wrong shows in its result.
        let Ok(mut stream) = answer.map(tonic::Response::into_inner) else { return };
        while let Ok(Some(message)) = stream.message().await {
            if messages.send(message).await.is_err() {
                return;
            }
        }
    };
    let solving = async move {
        let answer = control.solve(request).await;
        answer
            .map(|answer| answer.into_inner().exporter_response)
            .map_err(|status| SolveFailure::from_status(&status))
    };
    let mut session = Box::pin(session);
    let mut status = Box::pin(status);
    let mut solving = Some(Box::pin(solving));
    let mut result: Option<Result<Response, SolveFailure>> = None;
    let mut interrupted = None;
    let mut status_ended = false;
    let mut last_message = Instant::now();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if result.is_some() && status_ended && arrived.is_empty() {
            break;
        }
        tokio::select! {
            biased;
            code = stop.next() => {
                if interrupted.is_some() {
                    return Err(CliError::Interrupted(code));
                }
                interrupted = Some(code);
                if result.is_none() {
                    // Dropping the call is what tells the daemon; the status stream then shows how the steps end.
                    solving = None;
                    result = Some(Err(SolveFailure::canceled()));
                    last_message = Instant::now();
                }
            }
            Some(message) = arrived.recv() => {
                last_message = Instant::now();
                display.update(&message);
            }
            () = &mut status, if !status_ended => status_ended = true,
            Some(outcome) = OptionFuture::from(solving.as_mut()), if solving.is_some() => {
                solving = None;
                result = Some(outcome);
                last_message = Instant::now();
            }
            failure = &mut session, if result.is_none() => {
                // A lost connection ends both; the call's own answer says more, if it comes.
                let answer = match solving.take() {
                    Some(call) => tokio::time::timeout(Duration::from_secs(1), call).await.ok(),
                    None => None,
                };
                result = Some(answer.unwrap_or(Err(failure)));
                last_message = Instant::now();
            }
            _ = tick.tick() => {
                display.refresh();
                if result.is_some() && last_message.elapsed() > LINGER {
                    break;
                }
            }
        }
    }
    match (interrupted, result) {
        (Some(code), Some(Err(_)) | None) => {
            display.finish();
            eprintln!("ERROR: {}", SolveFailure::canceled());
            Err(CliError::Interrupted(code))
        }
        (_, Some(Ok(response))) => Ok(response),
        (None, Some(Err(failure))) => Err(Box::new(failure).into()),
        (None, None) => Err(Box::new(SolveFailure::canceled()).into()),
    }
}
