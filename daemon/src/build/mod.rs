//! One `Control.Solve` from request to response: checks, the job and its record, the frontend or
//! definition, the exporters. Dropping the future cancels the build.

mod exports;
mod platforms;
mod request;
mod running;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use futures::FutureExt;
use kiln_proto::control::{SolveRequest, SolveResponse};
use kiln_session::Session;

use crate::daemon::Daemon;
use crate::engine::{self, BuildScope, CachePlan, EngineBuild, PlannedExport};
use crate::error::BuildError;
use crate::gateway::{Bridge, BuildResult, CacheEntry, FrontendRequest, Refs, Returned};
use crate::policy::SourcePolicy;
use crate::provenance::{self, Solved, Subject};
use crate::traces::TraceParent;
use running::Running;

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
    let request = Arc::new(request::current(request)?);
    let running = Running::start(daemon, request.clone(), parent)?;
    let cancel = running.guard().job().cancel.clone();
    let outcome = tokio::select! {
        outcome = run(daemon, &running, &request) => outcome,
        () = cancel.cancelled() => Err(BuildError::canceled()),
        () = session_lost(daemon, &running, &request.session) => {
            Err(BuildError::canceled().context(format_args!("session {} ended", request.session)))
        }
    };
    let build = &request.r#ref;
    match &outcome {
        Ok(_) => tracing::debug!(build, "built"),
        Err(error) => tracing::debug!(build, %error, "build failed"),
    }
    // Before the answer, with which the client's session goes.
    running.end(outcome.as_ref().map(drop).map_err(Clone::clone)).await;
    outcome
}

/// Completes when a session that was there has gone: nobody is left to build for.
async fn session_lost(daemon: &Daemon, running: &Running, id: &str) {
    if !id.is_empty() {
        let session: Result<Arc<Session>, _> = daemon.engine.sessions().get(id).await;
        if let Ok(session) = session {
            running.directory.get_or_init(|| session.shared_key().to_owned());
            return session.closed().await;
        }
    }
    // Builds that need no session may do without; those that need it say so themselves.
    std::future::pending().await
}

async fn run(
    daemon: &Arc<Daemon>,
    running: &Running,
    request: &SolveRequest,
) -> Result<SolveResponse, BuildError> {
    let started = SystemTime::now();
    let (guard, job) = (running.guard(), running.guard().job());
    // Within the job: a client that asks for its status hears at once that it has ended.
    request::check(request, &daemon.config)?;
    let planned = engine::plan(&request.exporters)?;
    let caches = CachePlan::new(request.cache.as_ref().map_or(&[][..], |cache| &cache.exports))?;
    let provenance = provenance::Options::of(&request.frontend_attrs)?;
    let policy = SourcePolicy::new(request, daemon.engine.sessions())?;
    let build = running.engine.get_or_init(|| {
        daemon.engine.begin(BuildScope {
            session: request.session.clone(),
            entitlements: request.entitlements.clone(),
            progress: job.progress.clone(),
        })
    });
    let (bridge, returned) = Bridge::new(daemon, build.clone(), job, request, policy);
    let published = guard.publish(bridge.clone());
    // Boxed: the compiler has a limit for futures within futures.
    let wanted = Wanted {
        exporters: &planned,
        caches: &caches,
        provenance: provenance.as_ref(),
        started,
        environment: daemon.config.provenance_env_dir.as_deref(),
    };
    let outcome = produce(running, build, request, wanted, (&bridge, returned)).boxed().await;
    drop(published);
    bridge.release_containers().await;
    outcome
}

/// What a build is to make, beside its results.
struct Wanted<'a> {
    exporters: &'a [PlannedExport],
    caches: &'a CachePlan,
    provenance: Option<&'a provenance::Options>,
    started: SystemTime,
    /// What the administrator adds to provenance.
    environment: Option<&'a Path>,
}

/// Runs the frontend, builds what it returns, and exports it.
async fn produce(
    running: &Running,
    build: &Arc<EngineBuild>,
    request: &SolveRequest,
    wanted: Wanted<'_>,
    (bridge, returned): (&Arc<Bridge>, Returned),
) -> Result<SolveResponse, BuildError> {
    let (guard, job) = (running.guard(), running.guard().job());
    // An empty one is scratch; without any, the client is the frontend.
    let definition = request.definition.clone();
    let result = if !request.frontend.is_empty() {
        let frontend = FrontendRequest {
            name: request.frontend.clone(),
            opts: request.frontend_attrs.clone(),
            inputs: request.frontend_inputs.clone(),
        };
        bridge.run_frontend(frontend).await?
    } else if let Some(definition) = definition {
        bridge.import(request.cache.iter().flat_map(|cache| &cache.imports).map(CacheEntry::from)).await;
        BuildResult { refs: Refs::Single(bridge.solve(definition).await?), ..BuildResult::default() }
    } else {
        // The client is the frontend; it ends by returning a result.
        returned.await.map_err(|_| BuildError::canceled())??
    };
    running.metadata.get_or_init(|| readable(&result));
    platforms::verify(bridge, &result);
    result.refs.evaluate().await?;
    let mut response: HashMap<String, String> = result
        .metadata
        .iter()
        .filter(|(key, _)| key.starts_with("frontend."))
        .filter_map(|(key, value)| Some((key.clone(), String::from_utf8(value.clone()).ok()?)))
        .collect();
    let mut claims = provenance::offered(&result).await?;
    let subject =
        Subject::new(bridge, &result, request, wanted.started, &guard.running(), wanted.environment);
    if let Some(options) = wanted.provenance {
        let solved = Solved { explained: build.explain().await, made: build.results().await };
        claims.extend(subject.claims(options, &solved)?);
    }
    let planned = (wanted.exporters, wanted.caches);
    let images = exports::run(build, job, planned, request, &result, &claims, &mut response).await?;
    running.images.get_or_init(|| images);
    running.subject.get_or_init(|| subject);
    Ok(SolveResponse { exporter_response: response })
}
