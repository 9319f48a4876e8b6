//! What a work's task does: look once more, wait for a slot, run, record; or follow another.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use futures::FutureExt;
use kiln_cache::KeyRecord;
use tokio::sync::oneshot;

use super::board::{Board, Outcome, Watcher};
use super::{Job, JobInput, Work};
use crate::keys::{OUTPUT_KEY, Part, vertex_key};
use crate::op::{Key, OpClass, OpContext, OpError};
use crate::produced::{Produced, open};
use crate::progress::{Event, ProgressSink, VertexProgress};
use crate::solver::Shared;

/// gRPC code of an error that is the daemon's own fault.
const INTERNAL: i32 = 13;

/// Runs foreign code so that a panic in it is an error of its vertex and not a hang of the build.
pub(crate) async fn guarded<T>(future: impl Future<Output = Result<T, OpError>>) -> Result<T, OpError> {
    AssertUnwindSafe(future).catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic_text(&*panic);
        Err(OpError { code: Some(INTERNAL), ..OpError::new(format!("operation panicked: {text}")) })
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "no message",
    }
}

pub(super) async fn run<R: Clone + Send + Sync + 'static>(
    shared: &Arc<Shared<R>>,
    board: &Arc<Board<R>>,
    job: Job<R>,
) -> Outcome<R> {
    // Other work may have recorded the result between this build's look-up and its claim.
    for key in &job.shared_by {
        if let Ok(Some(record)) = shared.keys.get(key.as_bytes())
            && let Ok(Some(produced)) = guarded(open(shared, key, record)).await
        {
            return Outcome { result: Ok(Arc::new(produced)), cached: true, orphaned: false };
        }
    }
    let result = execute(shared, board, job).await;
    Outcome { result, cached: false, orphaned: false }
}

async fn execute<R: Clone + Send + Sync + 'static>(
    shared: &Arc<Shared<R>>,
    board: &Arc<Board<R>>,
    job: Job<R>,
) -> Result<Arc<Produced<R>>, OpError> {
    let permit = match job.op.class() {
        OpClass::Run => Some(shared.limiter.acquire(job.build, job.priority).await),
        OpClass::Io => None,
    };
    board.start(SystemTime::now());
    let began = Instant::now();
    let sink: Arc<dyn ProgressSink> = board.clone();
    let context =
        OpContext { progress: VertexProgress::new(board.vertex(), sink), ignore_cache: job.ignore_cache };
    let inputs = job.inputs.iter().map(|input| input.produced.outputs[input.output].clone()).collect();
    let outputs = guarded(job.op.execute(&context, inputs)).await?;
    drop(permit);

    let duration = began.elapsed();
    let record = KeyRecord {
        results: outputs.iter().map(|output| shared.results.id(output)).collect(),
        vertex: job.vertex.to_string(),
        name: job.name.to_string(),
        created: SystemTime::now(),
        duration,
        output_content: vec![None; outputs.len()],
        content_key: job.content_key.map(|key| *key.as_bytes()),
    };
    let produced = Arc::new(Produced::executed(outputs, record));
    if !job.keys.is_empty() {
        produced.add_keys(&*shared.keys, &job.keys, None);
        if let Err(error) = shared.keys.set_duration(job.op_digest.as_bytes(), duration) {
            tracing::warn!(vertex = &*job.vertex, %error, "a duration was not recorded");
        }
        if job.output_key_pending {
            // Not part of the work: it goes on when all askers have their answer and left.
            let recording = record_output_key(shared.clone(), produced.clone(), job.op_digest, job.inputs);
            shared.tasks.spawn(recording);
        } else if job.inputs.iter().any(JobInput::counts_by_output) {
            mark_follower(shared, &job.op_digest);
        }
    }
    Ok(produced)
}

impl<R> JobInput<R> {
    fn counts_by_output(&self) -> bool {
        !matches!(self.part, Some(Part::Query(_)))
    }
}

/// Computes what the inputs hold and records the result under that, for builds whose inputs are
/// made in another way but come out the same.
async fn record_output_key<R: Clone + Send + Sync + 'static>(
    shared: Arc<Shared<R>>,
    produced: Arc<Produced<R>>,
    op_digest: Key,
    inputs: Vec<JobInput<R>>,
) {
    let Ok(_turn) = shared.background.acquire().await else { return };
    let mut parts = Vec::with_capacity(inputs.len());
    for input in &inputs {
        let part = match input.part {
            Some(part @ Part::Query(_)) => part,
            _ => match guarded(input.produced.output_digest(&shared, input.output)).await {
                Ok(digest) => Part::Output(digest),
                Err(error) => {
                    tracing::warn!(vertex = produced.name(), %error, "an output digest could not be computed");
                    return;
                }
            },
        };
        parts.push((part, input.selector.as_deref()));
    }
    let key = vertex_key(OUTPUT_KEY, &op_digest, parts.into_iter());
    produced.add_keys(&*shared.keys, &[key], None);
    mark_follower(&shared, &op_digest);
}

fn mark_follower<R>(shared: &Shared<R>, op_digest: &Key) {
    if let Err(error) = shared.keys.mark_follower(op_digest.as_bytes()) {
        tracing::warn!(%error, "a follower was not recorded");
    }
}

/// Waits for other work that holds one of this work's keys, and passes on all it says.
pub(super) async fn follow<R: Send + Sync + 'static>(
    leader: Arc<Work<R>>,
    board: &Arc<Board<R>>,
) -> Outcome<R> {
    let (reply, answer) = oneshot::channel();
    let follower = Follower { board: board.clone(), reply: Mutex::new(Some(reply)) };
    let _asker = leader.ask(Arc::new(follower), false);
    answer.await.unwrap_or_else(|_| Outcome {
        result: Err(OpError { code: Some(INTERNAL), ..OpError::new("shared work ended without a result") }),
        cached: false,
        orphaned: true,
    })
}

struct Follower<R> {
    board: Arc<Board<R>>,
    reply: Mutex<Option<oneshot::Sender<Outcome<R>>>>,
}

impl<R: Send + Sync> Watcher<R> for Follower<R> {
    fn vertex(&self) -> &str {
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
