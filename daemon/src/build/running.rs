//! A build from its registration to its end. However it ends, and be it that its client is gone, its job is over at
//! once, and how it ended is noted; its whole record and its explanation are stored afterwards.

use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use kiln_proto::control::{Descriptor, SolveRequest};
use kiln_solver::explain::VertexExplanation;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::JoinHandle;

use crate::daemon::Daemon;
use crate::engine::EngineBuild;
use crate::error::BuildError;
use crate::explain;
use crate::history::{Outcome, Recording};
use crate::jobs::JobGuard;
use crate::provenance::{Options, Subject};
use crate::traces::TraceParent;

/// The answer waits for what is to be remembered of a build, but no longer than this part of its duration.
const PATIENCE: u32 = 100;

/// A build. Dropping it ends it: cancelled, unless it was said how it ended.
pub(super) struct Running {
    daemon: Arc<Daemon>,
    request: Arc<SolveRequest>,
    /// Goes when the build ends.
    guard: Option<JobGuard>,
    started: Instant,
    /// Nothing for builds that clients make for themselves.
    recording: Option<Recording>,
    /// Once it has begun.
    pub(super) engine: OnceLock<Arc<EngineBuild>>,
    /// The client's directory, once its session is there.
    pub(super) directory: OnceLock<String>,
    /// Metadata of the frontend's result that is text.
    pub(super) metadata: OnceLock<Vec<(String, String)>>,
    /// What its provenance is made of, once there are results.
    pub(super) subject: OnceLock<Subject>,
    /// The images that were made of it.
    pub(super) images: OnceLock<Vec<Descriptor>>,
    /// How it ended.
    outcome: Result<(), BuildError>,
    /// Held until it is stored.
    room: Option<OwnedSemaphorePermit>,
}

/// What is to be remembered of a build that has ended.
struct Storing {
    /// Its end is kept.
    noted: oneshot::Receiver<()>,
    /// All of it is, but for its explanation.
    stored: JoinHandle<()>,
}

impl Running {
    /// Registers a build and begins its record.
    ///
    /// # Errors
    /// As [`crate::jobs::Jobs::start`].
    pub(super) fn start(
        daemon: &Arc<Daemon>,
        request: Arc<SolveRequest>,
        parent: Option<TraceParent>,
    ) -> Result<Self, BuildError> {
        let guard = daemon.jobs.start(&request.r#ref)?;
        let recording = (!request.internal).then(|| {
            let wanted = parent.map(|parent| daemon.traces.want(parent));
            daemon.history.begin(&request, guard.job().progress.clone(), wanted)
        });
        Ok(Self {
            daemon: daemon.clone(),
            request,
            guard: Some(guard),
            started: Instant::now(),
            recording,
            engine: OnceLock::new(),
            directory: OnceLock::new(),
            metadata: OnceLock::new(),
            subject: OnceLock::new(),
            images: OnceLock::new(),
            outcome: Err(BuildError::canceled()),
            room: None,
        })
    }

    /// Its job.
    pub(super) fn guard(&self) -> &JobGuard {
        // Only dropping takes it.
        self.guard.as_ref().expect("running")
    }

    /// Ends it. Its end is kept when this returns; what takes longer to store is waited for a little. Waits if very many
    /// builds that ended before are still to be stored.
    pub(super) async fn end(mut self, outcome: Result<(), BuildError>) {
        self.outcome = outcome;
        if self.recording.is_none() {
            return;
        }
        self.room = Some(self.daemon.history.room().await);
        let patience = self.started.elapsed() / PATIENCE;
        let Some(Storing { noted, stored }) = self.close() else { return };
        // Where the task has gone there is nothing to wait for.
        let _ = noted.await;
        let stored = async {
            let _ = stored.await;
            self.daemon.explanations.added(&self.request.r#ref).await;
        };
        let _ = tokio::time::timeout(patience, stored).await;
    }

    /// What tells builds of one thing from those of another, apart from its content.
    fn project(&self) -> Vec<u8> {
        let request = &self.request;
        let mut hasher = blake3::Hasher::new();
        let attr = |name: &str| request.frontend_attrs.get(name).map(String::as_str).unwrap_or_default();
        let directory = self.directory.get().map(String::as_str).unwrap_or_default();
        for text in [&request.frontend, attr("filename"), attr("target"), attr("platform"), directory] {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        hasher.finalize().as_bytes()[..16].to_vec()
    }

    /// What is done once, whoever ends it; gives the storing of what is to be remembered.
    fn close(&mut self) -> Option<Storing> {
        let mut guard = self.guard.take()?;
        if self.outcome.is_ok() {
            guard.succeed();
        }
        let job = guard.job().clone();
        let (daemon, engine) = (self.daemon.clone(), self.engine.take());
        let reference = self.request.r#ref.clone();
        // Before its end is known: who hears of that and asks waits. And before the history knows the build, and could
        // be told to forget it.
        let recording = self
            .recording
            .take()
            .map(|recording| (recording, daemon.history.ending(), daemon.explanations.expect(&reference)));
        drop(guard);
        let Some((mut recording, ending, expected)) = recording else {
            drop(engine);
            daemon.engine.build_ended();
            return None;
        };
        let mut outcome = Outcome {
            ended: SystemTime::now(),
            metadata: self.metadata.take().unwrap_or_default(),
            provenance: Vec::new(),
            images: self.images.take().unwrap_or_default(),
            error: std::mem::replace(&mut self.outcome, Ok(())).err(),
        };
        // A runtime that has gone takes the daemon with it.
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        let (project, room) = (self.project(), self.room.take());
        let (subject, request) = (self.subject.take(), self.request.clone());
        let (note, noted) = oneshot::channel();
        let stored = runtime.spawn(async move {
            recording.note(&outcome).await;
            // Nobody may wait for it.
            let _ = note.send(());
            let vertices = match &engine {
                Some(engine) => engine.explain().await,
                None => Vec::new(),
            };
            let succeeded = outcome.error.is_none();
            let vertices = match subject.filter(|_| succeeded) {
                Some(subject) => {
                    let (provenance, vertices) = recorded(subject, request, vertices).await;
                    outcome.provenance = provenance;
                    vertices
                }
                None => vertices,
            };
            drop(engine);
            // What it built and nobody named is garbage like any other.
            daemon.engine.build_ended();
            // What the history does not keep is forgotten with it.
            let explaining = daemon.explanations.add(expected, explain::Ended { project, vertices });
            let finishing = async {
                recording.finish(outcome).await;
                drop(ending);
                if matches!(daemon.history.record(&reference), Ok(Some(_))) {
                    daemon.jobs.forget(&job);
                }
            };
            tokio::join!(explaining, finishing);
            drop(room);
        });
        Some(Storing { noted, stored })
    }
}

/// The provenance that a build's record keeps, by platform; and what was decided about its vertices again. What the build
/// holds goes with `subject`.
async fn recorded(
    subject: Subject,
    request: Arc<SolveRequest>,
    vertices: Vec<VertexExplanation>,
) -> (Vec<(String, serde_json::Value)>, Vec<VertexExplanation>) {
    let made = tokio::task::spawn_blocking(move || {
        // Checked when the build began.
        let asked = Options::of(&request.frontend_attrs).ok().flatten();
        let builder = asked.map(|options| options.builder_id).unwrap_or_default();
        let provenance = subject.recorded(&builder, &vertices).unwrap_or_else(|error| {
            tracing::warn!(%error, build = request.r#ref, "provenance is not recorded");
            Vec::new()
        });
        (provenance, vertices)
    });
    made.await.unwrap_or_else(|error| {
        tracing::error!(%error, "recording provenance");
        Default::default()
    })
}

impl Drop for Running {
    fn drop(&mut self) {
        // Stored in the background.
        self.close();
    }
}
