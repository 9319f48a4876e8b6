//! The local source: a client's directory, through its session.
//!
//! A copy of the directory is kept by the client's shared key and brought up to date by what changed. The
//! snapshot links the copy's files; the transfer replaces files and never writes into them, and hashes what comes. Where
//! nothing changed the former snapshot is the result.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use kiln_cache::{MutableKind, Ref};
use kiln_proto::pb;
use kiln_session::fsutil::{ReceiveMode, ReceiveOptions};
use kiln_session::{FileSyncRequest, Session};
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError};
use kiln_solver::progress::StatusHandle;

use super::{flag, mirror, strings};
use crate::ops::keys::KeyBuilder;
use crate::ops::{BuildContext, SessionGroup, sessions};
use crate::worker::Worker;

/// Progress is told at most this often.
const INTERVAL: Duration = Duration::from_millis(100);

pub(super) struct LocalSource {
    worker: Arc<Worker>,
    sessions: SessionGroup,
    session: Option<String>,
    unique: String,
    hint: String,
    request: FileSyncRequest,
    every_file: bool,
}

impl LocalSource {
    pub(super) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        op: &pb::SourceOp,
        name: &str,
    ) -> Result<Self, OpError> {
        if flag(op, "local.metadatatransfer") {
            return Err(OpError::new("unsupported: local.metadatatransfer"));
        }
        let attr = |key: &str| op.attrs.get(key).cloned().unwrap_or_default();
        let every_file = match attr("local.differ").as_str() {
            "" | "metadata" => false,
            "none" => true,
            other => return Err(OpError::new(format!("invalid local.differ {other:?}"))),
        };
        let request = FileSyncRequest {
            dir_name: name.to_owned(),
            include_patterns: strings(op, "local.includepattern")?,
            exclude_patterns: strings(op, "local.excludepatterns")?,
            follow_paths: strings(op, "local.followpaths")?,
        };
        Ok(Self {
            worker,
            sessions: context.sessions.clone(),
            session: op.attrs.get("local.session").cloned().filter(|id| !id.is_empty()),
            unique: attr("local.unique"),
            hint: attr("local.sharedkeyhint"),
            request,
            every_file,
        })
    }

    /// Asks the build's sessions in turn.
    async fn receive(&self, ctx: &OpContext) -> Result<Ref, OpError> {
        let mut refused = None;
        for session in self.sessions.attached(self.session.as_deref()).await? {
            match self.receive_from(&session, ctx).await {
                Err(Refusal::NotShared(err)) => refused = Some(err),
                Err(Refusal::Failed(err)) => return Err(err),
                Ok(snapshot) => return Ok(snapshot),
            }
        }
        Err(refused.unwrap_or_else(|| OpError::new("no active sessions")))
    }

    async fn receive_from(&self, session: &Session, ctx: &OpContext) -> Result<Ref, Refusal> {
        let failed = |err: &dyn std::fmt::Display| {
            Refusal::Failed(OpError::new(format!("local directory {}: {err}", self.request.dir_name)))
        };
        // buildctl sends no shared key: all its directories of one name meet in one copy.
        let mode = match (self.every_file, session.shared_key()) {
            (true, _) => ReceiveMode::MirrorAll,
            (false, "") => ReceiveMode::MirrorWary,
            (false, _) => ReceiveMode::Mirror,
        };
        let key = format!("{}\0{}\0{}", self.request.dir_name, self.hint, session.shared_key());
        let description = format!("local source for {}", self.request.dir_name);
        let dirs = self.worker.store().mutable();
        let dir = dirs.open_alone(MutableKind::Local, &key, &description).map_err(|err| failed(&err))?;
        let former = mirror::former(self.worker.layers(), &dir).map_err(|err| failed(&err))?;

        let status = format!("transferring {}:", self.request.dir_name);
        let meter = Arc::new(Meter::new(ctx.progress.status(&status, "transferring", 0)));
        let reporting = meter.clone();
        let changing = dir.clone();
        let changes = Arc::new(Mutex::new(Vec::new()));
        let seen = changes.clone();
        let options = ReceiveOptions {
            mode,
            progress: Some(Arc::new(move |bytes| reporting.update(bytes))),
            // If this transfer breaks off, the next one must not take the former snapshot for the present state.
            on_begin: Some(Box::new(move || mirror::forget(&changing))),
            on_change: Some(Box::new(move |change| {
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(change);
            })),
            guard: Some(Box::new(dir.clone())),
            ..ReceiveOptions::default()
        };
        let received = session.file_sync(&self.request, dir.path(), options).await;
        meter.done();
        let received = received.map_err(|err| match err.is_not_found() {
            true => Refusal::NotShared(sessions::error(&err)),
            false => Refusal::Failed(sessions::error(&err)),
        })?;

        if !received.changed() && former.is_some() {
            return Ok(former);
        }
        let layers = self.worker.layers().clone();
        let changes = std::mem::take(&mut *changes.lock().unwrap_or_else(PoisonError::into_inner));
        let taken = move || mirror::snapshot(&layers, &dir, former, &changes, &description);
        Ok(Some(self.worker.on_files(taken).await.map_err(|err| failed(&err))?.map_err(|err| failed(&err))?))
    }
}

/// Why a session did not give the directory.
enum Refusal {
    /// It has no such directory; another may.
    NotShared(OpError),
    Failed(OpError),
}

/// Tells how many bytes have come, now and then.
struct Meter {
    state: Mutex<(Option<StatusHandle>, Instant, u64)>,
}

impl Meter {
    fn new(status: StatusHandle) -> Self {
        Self { state: Mutex::new((Some(status), Instant::now(), 0)) }
    }

    fn update(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.2 = bytes;
        if state.1.elapsed() >= INTERVAL {
            state.1 = Instant::now();
            if let Some(status) = &mut state.0 {
                status.update(i64::try_from(bytes).unwrap_or(i64::MAX));
            }
        }
    }

    fn done(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = state.2;
        if let Some(mut status) = state.0.take() {
            status.update(i64::try_from(bytes).unwrap_or(i64::MAX));
            status.done();
        }
    }
}

impl Op<Ref> for LocalSource {
    fn cache_map<'a>(&'a self, _ctx: &'a OpContext) -> BoxFuture<'a, Result<CacheMap, OpError>> {
        Box::pin(async {
            let mut key = KeyBuilder::new("kiln.local.v1");
            key.part("directory", &self.request.dir_name);
            key.unseen("session", &self.session.clone().unwrap_or_else(|| self.sessions.ids().join(",")));
            key.unseen("unique", &self.unique);
            key.part("shared key hint", &self.hint);
            key.part("every file", self.every_file.to_string());
            for (name, patterns) in [
                ("include", &self.request.include_patterns),
                ("exclude", &self.request.exclude_patterns),
                ("follow", &self.request.follow_paths),
            ] {
                for pattern in patterns {
                    key.part(name, pattern);
                }
            }
            Ok(key.finish(Vec::new(), false))
        })
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        _inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move { Ok(vec![self.receive(ctx).await?]) })
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}
