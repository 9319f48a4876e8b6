//! What a work's task does: look once more, wait for a slot, run, record; or follow another.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures::FutureExt;
use kiln_cache::{KeyChange, KeyRecord, OpRecord};
use tokio::sync::oneshot;

use super::after::Unkeyed;
use super::board::{Board, Outcome, Watcher};
use super::{Job, JobInput, Work};
use crate::limit::Granted;
use crate::op::{Failure, OpContext, OpError};
use crate::produced::{Opened, Produced, is_partial, no_such_output, open};
use crate::progress::{Event, ProgressSink, VertexProgress};
use crate::solver::Shared;

/// gRPC code of an error that is the daemon's own fault.
const INTERNAL: i32 = 13;

/// Runs foreign code so that a panic in it is an error of its vertex and not a hang of the build.
pub(crate) async fn guarded<T, E: From<OpError>>(future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    AssertUnwindSafe(future).catch_unwind().await.unwrap_or_else(|panic| Err(panicked(&*panic).into()))
}

/// Like [`guarded`] for what is done at once.
pub(crate) fn guarded_call<T>(call: impl FnOnce() -> Result<T, OpError>) -> Result<T, OpError> {
    std::panic::catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(panicked(&*panic)))
}

fn panicked(panic: &(dyn Any + Send)) -> OpError {
    let text = panic_text(panic);
    OpError { code: Some(INTERNAL), ..OpError::new(format!("operation panicked: {text}")) }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "no message",
    }
}

/// How work ended, and what is to be remembered of it before anyone hears of that.
pub(super) struct End<R> {
    pub(super) outcome: Outcome<R>,
    pub(super) changes: Vec<KeyChange>,
    pub(super) unkeyed: Option<Unkeyed<R>>,
}

impl<R> End<R> {
    fn new(result: Result<Arc<Produced<R>>, Failure<R>>, cached: bool) -> Self {
        Self::passed_on(Outcome { result, cached, orphaned: false })
    }

    /// What somebody else has seen to.
    pub(super) fn passed_on(outcome: Outcome<R>) -> Self {
        Self { outcome, changes: Vec::new(), unkeyed: None }
    }
}

pub(super) async fn run<R: Clone + Send + Sync + 'static>(
    shared: &Shared<R>,
    board: &Arc<Board<R>>,
    job: Job<R>,
    granted: Option<Granted>,
) -> End<R> {
    // Other work may have recorded the result between this build's look-up and its claim.
    for key in &job.shared_by {
        if shared.recorder.may_have_come(key, job.looked_up)
            && let Ok(Some(record)) = shared.keys.get(key.as_bytes())
            // Somebody asks for what an imported cache did not have.
            && !is_partial(&record)
            && let Ok(Opened::Found(produced)) = guarded(open(shared, key, record, false)).await
        {
            return End::new(Ok(Arc::new(produced)), true);
        }
    }
    match execute(shared, board, job, granted).await {
        Ok(end) => end,
        Err(failure) => End::new(Err(failure), false),
    }
}

async fn execute<R: Clone + Send + Sync + 'static>(
    shared: &Shared<R>,
    board: &Arc<Board<R>>,
    job: Job<R>,
    granted: Option<Granted>,
) -> Result<End<R>, Failure<R>> {
    let permit = match granted {
        // It leaves the queues only with a permit, or when nobody is left who asks.
        Some(granted) => granted.await.ok(),
        None => None,
    };
    board.start(SystemTime::now());
    let began = Instant::now();
    let sink: Arc<dyn ProgressSink> = board.clone();
    let context = OpContext {
        progress: VertexProgress::new(board.vertex().clone(), sink),
        ignore_cache: job.ignore_cache,
    };
    let input = |input: &JobInput<R>| {
        let (produced, output) = (&input.produced, input.output);
        let missing = || no_such_output(output as usize, produced.outputs.len(), &produced.name());
        produced.output(output).cloned().ok_or_else(missing)
    };
    let inputs = job.inputs.iter().map(input).collect::<Result<Vec<R>, OpError>>()?;
    let outputs = guarded(job.op.execute(&context, inputs)).await?;
    drop(permit);
    let duration = began.elapsed();
    let record = KeyRecord {
        results: outputs.iter().map(|output| shared.results.id(output)).collect(),
        name: job.name,
        content_key: job.content_key.map(|key| *key.as_bytes()),
    };
    let produced = Arc::new(Produced::executed(outputs, record));
    let mut end = End::new(Ok(produced.clone()), false);
    if let Some(change) = produced.add_keys(job.keys, None) {
        let follows_outputs = job.inputs.iter().any(JobInput::counts_by_output);
        let record = OpRecord { duration, follows_outputs };
        end.changes = vec![change, KeyChange::Op { digest: *job.map.digest.as_bytes(), record }];
        if job.output_key_pending {
            end.unkeyed = Some(Unkeyed { build: job.build, produced, map: job.map, inputs: job.inputs });
        }
    }
    Ok(end)
}

impl<R> JobInput<R> {
    fn counts_by_output(&self) -> bool {
        self.content.is_none()
    }
}

/// Waits for other work that holds one of this work's keys, and passes on all it says.
pub(super) async fn follow<R: Send + Sync + 'static>(
    leader: Arc<Work<R>>,
    board: &Arc<Board<R>>,
    asks: (u64, Duration),
) -> Outcome<R> {
    let (reply, answer) = oneshot::channel();
    let follower = Follower { board: board.clone(), reply: Mutex::new(Some(reply)) };
    let _asker = leader.ask(Arc::new(follower), asks, false);
    answer.await.unwrap_or_else(|_| Outcome {
        result: Err(
            OpError { code: Some(INTERNAL), ..OpError::new("shared work ended without a result") }.into()
        ),
        cached: false,
        orphaned: true,
    })
}

struct Follower<R> {
    board: Arc<Board<R>>,
    reply: Mutex<Option<oneshot::Sender<Outcome<R>>>>,
}

impl<R: Send + Sync> Watcher<R> for Follower<R> {
    fn vertex(&self) -> &Arc<str> {
        self.board.vertex()
    }

    fn started(&self, at: SystemTime) {
        self.board.start(at);
    }

    fn progress(&self, event: Event) {
        self.board.event(event);
    }

    fn done(&self, outcome: Outcome<R>) {
        let reply = self.reply.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reply) = reply {
            let _ = reply.send(outcome);
        }
    }
}
