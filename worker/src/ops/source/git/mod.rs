//! The git source: the files of a commit of a remote repository.
//!
//! The key is the commit, not where it came from. A ref is resolved by asking the remote, once in a build; fetching is
//! shallow, into a repository that builds share.

mod access;
mod checkout;
mod program;
mod refs;
mod remote;
mod repository;

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use dashmap::DashMap;
use futures::future::BoxFuture;
use kiln_cache::Ref;
use kiln_proto::pb;
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError};
use kiln_solver::progress::VertexProgress;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use super::super::keys::KeyBuilder;
use super::super::{BuildContext, SessionGroup};
use crate::worker::Worker;
use access::Access;
use checkout::Checkout;
use program::Output;
pub use refs::Resolved;
use remote::Wanted;
pub(crate) use repository::Repositories;
use repository::Repository;

/// What refs of remotes stand for in one build: once asked, the answer stays.
#[derive(Clone, Default)]
pub struct Resolutions(Arc<DashMap<String, Arc<OnceCell<Resolved>>>>);

impl Resolutions {
    fn of(&self, wanted: &Wanted) -> Arc<OnceCell<Resolved>> {
        let Wanted { remote, reference, checksum, fetch_by_commit, .. } = wanted;
        self.0
            .entry(format!("{remote}\0{reference}\0{checksum}\0{fetch_by_commit}"))
            .or_default()
            .value()
            .clone()
    }
}

/// The bytes of what a ref points to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GitObjects {
    /// The commit.
    pub commit: Vec<u8>,
    /// The commit's name.
    pub commit_name: String,
    /// The annotated tag, if there is one.
    pub tag: Option<Vec<u8>>,
}

/// A git source of one build.
#[derive(Clone)]
pub(crate) struct GitSource {
    worker: Arc<Worker>,
    sessions: SessionGroup,
    wanted: Arc<Wanted>,
    resolved: Arc<OnceCell<Resolved>>,
}

impl GitSource {
    pub(super) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        op: &pb::SourceOp,
        identifier: &str,
    ) -> Result<Self, OpError> {
        let wanted = Arc::new(Wanted::parse(op, identifier)?);
        let resolved = context.git.of(&wanted);
        Ok(Self { worker, sessions: context.sessions.clone(), wanted, resolved })
    }

    /// Does work in a task of its own: when the future is dropped, what git writes to must stay until git is gone.
    async fn detached<T, F>(&self, work: impl FnOnce(Self, CancellationToken) -> F) -> Result<T, OpError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, OpError>> + Send + 'static,
    {
        let cancel = CancellationToken::new();
        let _cancelled_when_dropped = cancel.clone().drop_guard();
        let task = self.worker.steps.spawn(work(self.clone(), cancel));
        task.await.unwrap_or_else(|err| Err(OpError::new(format!("running git failed: {err}"))))
    }

    async fn access(&self, cancel: CancellationToken) -> Result<Access, OpError> {
        Access::open(&self.wanted, &self.sessions, self.worker.run_dir(), cancel).await
    }

    /// What the reference stands for.
    async fn resolve(&self) -> Result<&Resolved, OpError> {
        let resolve = || async {
            let unasked = Resolved::unasked(&self.wanted).map_err(OpError::new)?;
            match unasked {
                Some(resolved) => Ok(resolved),
                None => self.detached(|source, cancel| async move { source.ask(cancel).await }).await,
            }
        };
        self.resolved.get_or_try_init(resolve).await
    }

    async fn ask(self, cancel: CancellationToken) -> Result<Resolved, OpError> {
        let wanted = &self.wanted;
        let access = self.access(cancel).await?;
        let peeled = format!("{}^{{}}", wanted.reference);
        let args: &[&str] = match wanted.reference.as_str() {
            "" => &["ls-remote", "--symref", "--", "origin", "HEAD"],
            reference => &["ls-remote", "--", "origin", reference, &peeled],
        };
        // Not where some repository could be found.
        let listed = access.origin().run(Path::new("/"), args).await;
        let listed = listed.map_err(|err| wanted.failed("fetch", err))?;
        Resolved::find(wanted, &listed.text()).map_err(|err| wanted.failed("fetch", err))
    }

    async fn checkout(self, cancel: CancellationToken, progress: VertexProgress) -> Result<Ref, OpError> {
        let wanted = &self.wanted;
        let resolved = self.resolve().await?;
        let access = self.access(cancel).await?;
        let said = |output: &Output| {
            if !output.stderr.is_empty() {
                progress.log(2, wanted.scrub(&output.stderr).as_bytes());
            }
        };
        let origin = access.origin();
        let repository = Repository::fetch(&self.worker, wanted, resolved, &origin, &said).await?;
        let checkout = Checkout {
            worker: &self.worker,
            wanted,
            resolved,
            repository: &repository,
            git: &access.git,
            said: &said,
        };
        checkout.run().await
    }

    /// What the reference stands for, and the commit itself if it is wanted.
    pub(crate) async fn metadata(&self, objects: bool) -> Result<(Resolved, Option<GitObjects>), OpError> {
        let resolved = self.resolve().await?.clone();
        if !objects {
            return Ok((resolved, None));
        }
        let found = resolved.clone();
        let read = self.detached(|source, cancel| async move { source.objects(&found, cancel).await });
        Ok((resolved, Some(read.await?)))
    }

    async fn objects(self, resolved: &Resolved, cancel: CancellationToken) -> Result<GitObjects, OpError> {
        let access = self.access(cancel).await?;
        let (wanted, origin) = (&self.wanted, access.origin());
        let repository = Repository::fetch(&self.worker, wanted, resolved, &origin, &|_| ()).await?;
        let failed = |err| wanted.failed("read", err);
        let object = resolved.object.as_str();
        let commit = format!("{object}^{{commit}}");
        let name = repository.run(&["rev-parse", "--verify", &commit]).await.map_err(failed)?;
        let commit_name = name.text().trim().to_owned();
        let tag = match commit_name == object {
            true => None,
            false => Some(repository.run(&["cat-file", "tag", object]).await.map_err(failed)?.stdout),
        };
        let commit = repository.run(&["cat-file", "commit", &commit_name]).await.map_err(failed)?.stdout;
        Ok(GitObjects { commit, commit_name, tag })
    }
}

impl Op<Ref> for GitSource {
    fn cache_map<'a>(&'a self, _ctx: &'a OpContext) -> BoxFuture<'a, Result<CacheMap, OpError>> {
        Box::pin(async move {
            let resolved = self.resolve().await?;
            let wanted = &self.wanted;
            let mut key = KeyBuilder::new("kiln.git.v1");
            if wanted.keep_git_dir {
                key.part("object", &resolved.object);
                key.part("ref", resolved.name.as_deref().unwrap_or_default());
                key.part("remote", wanted.shown());
            } else {
                key.part("commit", resolved.commit());
                key.note("remote", wanted.shown());
            }
            for (name, value) in [
                ("subdirectory", wanted.subdir.as_str()),
                ("submodules", if wanted.skip_submodules { "skipped" } else { "" }),
                ("times", if wanted.commit_times { "commit" } else { "" }),
            ] {
                if !value.is_empty() {
                    key.part(name, value);
                }
            }
            Ok(key.finish(Vec::new(), true))
        })
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        _inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move {
            let progress = ctx.progress.clone();
            let run = self.detached(|source, cancel| source.checkout(cancel, progress));
            Ok(vec![run.await?])
        })
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}
