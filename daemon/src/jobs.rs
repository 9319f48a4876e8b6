//! The builds that clients can ask about by their ref: running ones, and for a short time finished
//! ones. A job ends when its [`JobGuard`] is dropped, whatever the reason.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dashmap::mapref::entry::Entry;
use dashmap::{DashMap, DashSet};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::error::BuildError;
use crate::gateway::Bridge;
use crate::progress::ProgressLog;

/// How long `Status` waits for a job.
pub(crate) const STATUS_WAIT: Duration = Duration::from_secs(6);
/// How long a gateway call waits for a build to be registered.
pub(crate) const BRIDGE_WAIT: Duration = Duration::from_secs(3);
/// How long a finished job that the history does not have answers `Status` from memory.
const LINGER: Duration = Duration::from_secs(10);

/// One build.
pub(crate) struct Job {
    /// The client's name for it.
    pub(crate) id: String,
    /// Its events.
    pub(crate) progress: Arc<ProgressLog>,
    /// Stops it.
    pub(crate) cancel: CancellationToken,
    bridge: Mutex<Option<Arc<Bridge>>>,
}

impl Job {
    fn bridge(&self) -> Option<Arc<Bridge>> {
        self.bridge.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// All jobs.
pub(crate) struct Jobs {
    jobs: DashMap<String, Arc<Job>>,
    /// The refs of builds that ended a short time ago: nobody need wait for those.
    ended: DashSet<String>,
    /// Bumped on every change.
    changed: watch::Sender<u64>,
    shutdown: CancellationToken,
}

impl Jobs {
    /// `shutdown` stops every job.
    pub(crate) fn new(shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            jobs: DashMap::new(),
            ended: DashSet::new(),
            changed: watch::Sender::new(0),
            shutdown,
        })
    }

    /// Registers a build.
    ///
    /// # Errors
    /// A live job has the same ref, or the daemon is stopping.
    pub(crate) fn start(self: &Arc<Self>, id: &str) -> Result<JobGuard, BuildError> {
        if self.shutdown.is_cancelled() {
            return Err(BuildError::new(Code::Unavailable, "the daemon is shutting down"));
        }
        let job = Arc::new(Job {
            id: id.to_owned(),
            progress: ProgressLog::new(),
            cancel: self.shutdown.child_token(),
            bridge: Mutex::new(None),
        });
        match self.jobs.entry(id.to_owned()) {
            // One that ended only waits for its record.
            Entry::Occupied(mut former) if former.get().progress.is_closed() => former.insert(job.clone()),
            Entry::Occupied(_) => return Err(BuildError::build(format!("job ID {id} exists"))),
            Entry::Vacant(entry) => entry.insert(job.clone()).clone(),
        };
        self.ended.remove(id);
        self.bump();
        Ok(JobGuard { jobs: self.clone(), job, succeeded: false })
    }

    fn bump(&self) {
        self.changed.send_modify(|generation| *generation = generation.wrapping_add(1));
    }

    /// A job by its ref, if it is there.
    pub(crate) fn get(&self, id: &str) -> Option<Arc<Job>> {
        self.jobs.get(id).map(|job| job.value().clone())
    }

    /// Forgets a job that ended: the history answers for it.
    pub(crate) fn forget(&self, job: &Arc<Job>) {
        self.jobs.remove_if(&job.id, |_, current| Arc::ptr_eq(current, job));
    }

    /// A job by its ref; waits for it to appear.
    pub(crate) async fn wait(&self, id: &str, limit: Duration) -> Result<Arc<Job>, BuildError> {
        self.wait_for(id, limit, |job| job.cloned().map(Ok)).await
    }

    /// The gateway of a build; waits for it to be registered.
    pub(crate) async fn wait_bridge(&self, id: &str, limit: Duration) -> Result<Arc<Bridge>, BuildError> {
        let bridge = |job: Option<&Arc<Job>>| match job.and_then(|job| job.bridge()) {
            None if self.ended.contains(id) => Some(Err(no_such(id))),
            found => found.map(Ok),
        };
        self.wait_for(id, limit, bridge).await
    }

    async fn wait_for<T>(
        &self,
        id: &str,
        limit: Duration,
        found: impl Fn(Option<&Arc<Job>>) -> Option<Result<T, BuildError>>,
    ) -> Result<T, BuildError> {
        let mut changed = self.changed.subscribe();
        let search = async {
            loop {
                if let Some(value) = found(self.get(id).as_ref()) {
                    return value;
                }
                if changed.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(limit, search).await.unwrap_or_else(|_| Err(no_such(id)))
    }
}

fn no_such(id: &str) -> BuildError {
    BuildError::new(Code::NotFound, format!("no such job {id}"))
}

/// A running job. Dropping it ends the job.
pub(crate) struct JobGuard {
    jobs: Arc<Jobs>,
    job: Arc<Job>,
    succeeded: bool,
}

impl JobGuard {
    /// The job.
    pub(crate) fn job(&self) -> &Arc<Job> {
        &self.job
    }

    /// Lets clients reach the build's gateway until the answer is dropped.
    pub(crate) fn publish(&self, bridge: Arc<Bridge>) -> Published<'_> {
        *self.job.bridge.lock().unwrap_or_else(PoisonError::into_inner) = Some(bridge);
        self.jobs.bump();
        Published(&self.job)
    }

    /// The gateways of all builds that clients can reach.
    pub(crate) fn running(&self) -> Vec<Arc<Bridge>> {
        self.jobs.jobs.iter().filter_map(|job| job.bridge()).collect()
    }

    /// Says that the build succeeded.
    pub(crate) fn succeed(&mut self) {
        self.succeeded = true;
    }
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        // Before the ref is free: the next build takes it back.
        self.jobs.ended.insert(self.job.id.clone());
        self.job.progress.close(self.succeeded);
        self.job.cancel.cancel();
        self.jobs.bump();
        // What is forgotten before holds no memory until then.
        let (jobs, id, job) = (self.jobs.clone(), self.job.id.clone(), Arc::downgrade(&self.job));
        let forget = move || {
            jobs.jobs.remove_if(&id, |_, current| std::ptr::eq(Arc::as_ptr(current), job.as_ptr()));
            jobs.ended.remove(&id);
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    tokio::time::sleep(LINGER).await;
                    forget();
                });
            }
            Err(_) => forget(),
        }
    }
}

/// Keeps a gateway reachable.
pub(crate) struct Published<'a>(&'a Job);

impl Drop for Published<'_> {
    fn drop(&mut self) {
        *self.0.bridge.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_a_job_that_comes_later() {
        let jobs = Jobs::new(CancellationToken::new());
        let waiting = {
            let jobs = jobs.clone();
            tokio::spawn(async move { jobs.wait("a", STATUS_WAIT).await.map(|job| job.id.clone()) })
        };
        tokio::task::yield_now().await;
        let guard = jobs.start("a").expect("no such job yet");
        assert_eq!(waiting.await.expect("task"), Ok("a".to_owned()));
        let again = jobs.start("a").err().expect("the ref is taken");
        assert_eq!(again.message, "job ID a exists");
        drop(guard);
        let job = jobs.get("a").expect("a finished job can still be asked about");
        let next = jobs.start("a").expect("the ref is free");
        jobs.forget(&job);
        assert!(jobs.get("a").is_some(), "the other job of that ref stays");
        drop(next);
        let job = jobs.get("a").expect("it is still there");
        jobs.forget(&job);
        assert!(jobs.get("a").is_none());
        let _guard = jobs.start("a").expect("the ref is free");
        jobs.forget(&job);
        assert!(jobs.get("a").is_some(), "the other job of that ref stays");
    }

    #[tokio::test]
    async fn unknown_job() {
        let jobs = Jobs::new(CancellationToken::new());
        let limit = Duration::from_millis(5);
        let error = jobs.wait("x", limit).await.err().expect("nobody registers it");
        assert_eq!((error.code, error.message.as_str()), (Code::NotFound, "no such job x"));
        let guard = jobs.start("x").expect("start");
        let error = jobs.wait_bridge("x", limit).await.err().expect("a build without a gateway");
        assert_eq!(error.message, "no such job x");
        drop(guard);
        let ended = jobs.get("x").expect("it can still be asked about");
        jobs.forget(&ended);
        let long = Duration::from_secs(3600);
        let answer = tokio::time::timeout(STATUS_WAIT, jobs.wait_bridge("x", long)).await;
        assert!(answer.expect("an ended build is not waited for").is_err());
    }

    #[tokio::test]
    async fn shutdown_stops_jobs_and_refuses_new_ones() {
        let shutdown = CancellationToken::new();
        let jobs = Jobs::new(shutdown.clone());
        let guard = jobs.start("a").expect("start");
        shutdown.cancel();
        assert!(guard.job().cancel.is_cancelled());
        assert!(jobs.start("b").is_err());
    }
}
