//! One `Control.Solve` from request to response: checks, the job and its record, the frontend or
//! definition, the exporters. Dropping the future cancels the build.

mod exports;
mod request;

use std::collections::HashMap;
use std::sync::Arc;

use futures::FutureExt;
use kiln_proto::control::{SolveRequest, SolveResponse};
use kiln_session::Session;
use kiln_solver::explain::VertexExplanation;
use tokio::sync::oneshot;

use crate::daemon::Daemon;
use crate::engine::{self, BuildScope, EngineBuild, PlannedExport};
use crate::error::BuildError;
use crate::explain;
use crate::gateway::{Bridge, BuildResult, FrontendRequest, Refs};
use crate::jobs::{Job, JobGuard};
use crate::policy::SourcePolicy;
use crate::progress::Step;
use crate::traces::TraceParent;

/// Metadata of a frontend's result that is text, for the history.
fn readable(result: &BuildResult) -> Vec<(String, String)> {
    result
        .metadata
        .iter()
        .filter_map(|(key, value)| Some((key.clone(), String::from_utf8(value.clone()).ok()?)))
        .collect()
}

/// Builds what a client asked for, maybe as part of its trace.
pub(crate) async fn solve(
    daemon: &Arc<Daemon>,
    request: SolveRequest,
    parent: Option<TraceParent>,
) -> Result<SolveResponse, BuildError> {
    let request = request::current(request)?;
    // A client that leaves drops this future, and what it built is garbage like any other.
    let _ended = Ended(daemon);
    let mut guard = daemon.jobs.start(&request.r#ref)?;
    let build = request.r#ref.clone();
    let progress = guard.job().progress.clone();
    let recording = (!request.internal).then(|| {
        let wanted = parent.map(|parent| daemon.traces.want(parent));
        daemon.history.begin(&request, progress.clone(), wanted)
    });
    let cancel = guard.job().cancel.clone();
    let (mut metadata, mut vertices) = (Vec::new(), Vec::new());
    let outcome = tokio::select! {
        outcome = run(daemon, &guard, &request, &mut metadata, &mut vertices) => outcome,
        () = cancel.cancelled() => Err(BuildError::canceled()),
        () = session_lost(daemon, &request.session) => {
            Err(BuildError::canceled().context(format_args!("session {} ended", request.session)))
        }
    };
    if outcome.is_ok() {
        guard.succeed();
    }
    progress.close(outcome.is_ok());
    let job = guard.job().clone();
    drop(guard);
    if let Some(recording) = recording {
        // Before the answer, with which the client's session goes.
        let ended = explain::Ended { project: project(daemon, &request), vertices };
        let ending = daemon.history.ending().await;
        // Announced before the history knows the build, and could be told to forget it.
        let expected = daemon.explanations.expect(&request.r#ref);
        let (daemon, error) = (daemon.clone(), outcome.as_ref().err().cloned());
        tokio::spawn(async move {
            recording.finish(metadata, error).await;
            if matches!(daemon.history.record(&request.r#ref), Ok(Some(_))) {
                daemon.jobs.forget(&job);
                // What the history does not keep needs no explanation.
                if !ended.vertices.is_empty() {
                    daemon.explanations.add(expected, ended).await;
                }
            }
            drop(ending);
        });
    }
    match &outcome {
        Ok(_) => tracing::debug!(build, "built"),
        Err(error) => tracing::debug!(build, %error, "build failed"),
    }
    outcome
}

/// What tells builds of one thing from those of another, apart from its content.
fn project(daemon: &Daemon, request: &SolveRequest) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    let attr = |name: &str| request.frontend_attrs.get(name).map(String::as_str).unwrap_or_default();
    let session = daemon.engine.sessions().get(&request.session);
    let session = session.now_or_never().and_then(Result::ok);
    let directory = session.as_ref().map(|session| session.shared_key()).unwrap_or_default();
    for text in [&request.frontend, attr("filename"), attr("target"), attr("platform"), directory] {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hasher.finalize().as_bytes()[..16].to_vec()
}

/// Tells the engine, once dropped, that a build is over.
struct Ended<'a>(&'a Daemon);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.engine.build_ended();
    }
}

/// Completes when a session that was there has gone: nobody is left to build for.
async fn session_lost(daemon: &Daemon, id: &str) {
    if !id.is_empty() {
        let session: Result<Arc<Session>, _> = daemon.engine.sessions().get(id).await;
        if let Ok(session) = session {
            return session.closed().await;
        }
    }
    // Builds that need no session may do without; those that need it say so themselves.
    std::future::pending().await
}

async fn run(
    daemon: &Arc<Daemon>,
    guard: &JobGuard,
    request: &SolveRequest,
    metadata: &mut Vec<(String, String)>,
    vertices: &mut Vec<VertexExplanation>,
) -> Result<SolveResponse, BuildError> {
    let job = guard.job();
    // Within the job: a client that asks for its status hears at once that it has ended.
    request::check(request, &daemon.config)?;
    report_cache_imports(job, request);
    let planned = engine::plan(&request.exporters)?;
    let policy = SourcePolicy::new(request, daemon.engine.sessions())?;
    let build = daemon.engine.begin(BuildScope {
        session: request.session.clone(),
        entitlements: request.entitlements.clone(),
        progress: job.progress.clone(),
    });
    let outcome = run_in(&build, guard, request, &planned, policy, metadata).await;
    *vertices = build.explain().await;
    outcome
}

async fn run_in(
    build: &Arc<EngineBuild>,
    guard: &JobGuard,
    request: &SolveRequest,
    planned: &[PlannedExport],
    policy: SourcePolicy,
    metadata: &mut Vec<(String, String)>,
) -> Result<SolveResponse, BuildError> {
    let job = guard.job();
    let (bridge, returned) = Bridge::new(
        build.clone(),
        job.progress.clone(),
        job.cancel.clone(),
        &request.session,
        request.frontend_inputs.clone(),
        policy,
    );
    let published = guard.publish(bridge.clone());
    // Boxed: the compiler has a limit for futures within futures.
    let outcome = produce(build, job, request, planned, (&bridge, returned), metadata).boxed().await;
    drop(published);
    bridge.release_containers().await;
    outcome
}

/// Runs the frontend, builds what it returns, and exports it.
async fn produce(
    build: &Arc<EngineBuild>,
    job: &Job,
    request: &SolveRequest,
    planned: &[PlannedExport],
    (bridge, returned): (&Arc<Bridge>, oneshot::Receiver<Result<BuildResult, BuildError>>),
    metadata: &mut Vec<(String, String)>,
) -> Result<SolveResponse, BuildError> {
    let definition = request.definition.clone().filter(|definition| !definition.def.is_empty());
    let result = if !request.frontend.is_empty() {
        let frontend = FrontendRequest {
            name: request.frontend.clone(),
            opts: request.frontend_attrs.clone(),
            inputs: request.frontend_inputs.clone(),
        };
        bridge.run_frontend(frontend).await?
    } else if let Some(definition) = definition {
        BuildResult { refs: Refs::Single(bridge.solve(definition).await?), ..BuildResult::default() }
    } else {
        // The client is the frontend; it ends by returning a result.
        returned.await.map_err(|_| BuildError::canceled())??
    };
    *metadata = readable(&result);
    result.refs.evaluate().await?;
    let mut response: HashMap<String, String> = result
        .metadata
        .iter()
        .filter(|(key, _)| key.starts_with("frontend."))
        .filter_map(|(key, value)| Some((key.clone(), String::from_utf8(value.clone()).ok()?)))
        .collect();
    exports::run(build, job, planned, &request.session, &result, &mut response).await?;
    Ok(SolveResponse { exporter_response: response })
}

/// A cache that cannot be imported never fails a build; it is shown.
fn report_cache_imports(job: &Job, request: &SolveRequest) {
    for import in request.cache.iter().flat_map(|cache| &cache.imports) {
        let name = match import.attrs.get("ref") {
            Some(reference) => reference.clone(),
            None => import.r#type.clone(),
        };
        let name = format!("importing cache manifest from {name}");
        let step = Step::start(job.progress.clone(), &crate::gateway::text_digest(&name), &name);
        step.end(Some(&format!("unsupported: cache import of type {}", import.r#type)));
    }
}
