//! What was fetched of a remote, kept between builds: one bare repository for each remote and format of its objects,
//! shallow, with a ref for every object that was asked for.

use std::fmt::Display;
use std::path::Path;

use kiln_cache::{MutableDir, MutableKind};
use kiln_solver::op::OpError;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::program::{Git, GitError, Output};
use super::refs::Resolved;
use super::remote::Wanted;
use crate::locks::Locks;
use crate::worker::Worker;

/// Name of the mark on a repository that git is changing. One that keeps it was left by a killed git.
const CHANGING: &str = "changing";

/// Who uses which repository, by its key. One at a time.
pub(crate) type Repositories = Locks<Mutex<()>>;

/// A repository that has what is wanted. Nobody else uses it meanwhile.
pub(super) struct Repository {
    dir: MutableDir,
    /// Git on this repository.
    pub(super) git: Git,
    _alone: OwnedMutexGuard<()>,
}

impl Repository {
    /// Opens the repository of a remote and fetches what is missing. `origin` knows the remote; what it says goes to
    /// `said`.
    pub(super) async fn fetch(
        worker: &Worker,
        wanted: &Wanted,
        resolved: &Resolved,
        origin: &Git,
        said: &(dyn Fn(&Output) + Send + Sync),
    ) -> Result<Self, OpError> {
        let failed = |err: &dyn Display| wanted.failed("fetch", err);
        let format = if resolved.object.len() == 64 { "sha256" } else { "sha1" };
        // Passwords are no names.
        let key = format!("{format} {}", blake3::hash(wanted.remote.as_bytes()).to_hex());
        let alone = worker.repositories.of(&key).lock_owned().await;
        let dirs = worker.store().mutable();
        let description = format!("shared git repo for {}", wanted.shown());
        let open = || dirs.open(MutableKind::GitRepository, &key, &description).map_err(|err| failed(&err));
        let mut dir = open()?;
        let torn = dir.kv(CHANGING).map_err(|err| failed(&err))?.is_some_and(|mark| !mark.is_empty());
        if torn {
            dirs.remove(MutableKind::GitRepository, &key).map_err(|err| failed(&err))?;
            drop(dir);
            dir = open()?;
        }
        let repository = Self { git: origin.on(dir.path()), dir, _alone: alone };
        let object = &resolved.object;
        if repository.has(object).await {
            return Ok(repository);
        }
        let mark = |value: &[u8]| repository.dir.set_kv(CHANGING, value).map_err(|err| failed(&err));
        mark(b"1")?;
        let fetched = repository.fetch_missing(format, resolved, said).await;
        if !matches!(fetched, Err(GitError::Cancelled)) {
            mark(b"")?;
        }
        fetched.map_err(|err| failed(&err))?;
        match repository.has(object).await {
            true => Ok(repository),
            false => Err(failed(&format_args!(
                "fetched ref {} does not match expected commit {object} and commit can not be found in the repository",
                resolved.name.as_deref().unwrap_or(object),
            ))),
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The ref by which an object is kept.
    pub(super) fn kept(object: &str) -> String {
        format!("refs/kiln/{object}")
    }

    /// Runs git on this repository.
    pub(super) async fn run(&self, args: &[&str]) -> Result<Output, GitError> {
        self.git.run(self.path(), args).await
    }

    /// The object is here, with all that a checkout needs of it.
    async fn has(&self, object: &str) -> bool {
        let kept = format!("{}^{{commit}}", Self::kept(object));
        self.path().join("HEAD").exists()
            && self.run(&["rev-parse", "--verify", "--quiet", &kept]).await.is_ok()
    }

    /// Tries what costs least first: the object as the tip of its ref, by its own name, then with all history. Servers
    /// differ in what they allow.
    async fn fetch_missing(
        &self,
        format: &str,
        resolved: &Resolved,
        said: &(dyn Fn(&Output) + Send + Sync),
    ) -> Result<(), GitError> {
        if !self.path().join("HEAD").exists() {
            let format = format!("--object-format={format}");
            self.run(&["init", "--quiet", "--bare", "--template=", &format]).await?;
        }
        let object = &resolved.object;
        const ALL: [&str; 2] = ["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/remotes/tags/*"];
        let tip = resolved.name.as_deref().filter(|name| self.is_tip(name));
        let tip = tip.map(|name| format!("+{name}"));
        let shallow: &[&str] = &["--depth=1"];
        let unshallow: &[&str] = if self.path().join("shallow").exists() { &["--unshallow"] } else { &[] };
        let mut tries: Vec<(&[&str], Vec<&str>)> = Vec::new();
        if let Some(tip) = &tip {
            tries.push((shallow, vec![tip.as_str()]));
        }
        tries.push((shallow, vec![object.as_str()]));
        // Some transports know no depth.
        if let Some(tip) = &tip {
            tries.push((unshallow, vec![tip.as_str()]));
        }
        tries.push((unshallow, vec![object.as_str()]));
        tries.push((unshallow, ALL.to_vec()));
        let mut failure = None;
        for (depth, specs) in tries {
            let args: Vec<&str> = ["fetch", "--no-tags", "--no-write-fetch-head", "--force"]
                .into_iter()
                .chain(depth.iter().copied())
                .chain(["--", "origin"])
                .chain(specs)
                .collect();
            match self.run(&args).await {
                Ok(output) => {
                    said(&output);
                    if self.run(&["update-ref", &Self::kept(object), object]).await.is_ok() {
                        return Ok(());
                    }
                }
                Err(err @ GitError::Failed { .. }) => failure = Some(err),
                Err(err) => return Err(err),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// The name can be part of a refspec.
    fn is_tip(&self, name: &str) -> bool {
        !name.contains([':', '*', '+', '^'])
    }
}
