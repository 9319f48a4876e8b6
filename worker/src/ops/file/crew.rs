//! Files that are copied beside the walk that found them, by a few threads if there are enough of them; and the
//! directories that get their attributes when all in them is there. Knows nothing of patterns or of where paths lead.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::fs::{Stat, Timestamps};

use super::actions::FileError;
use super::root::PathError;
use super::transfer::Style;

/// Fewer files are copied sooner than a thread is there.
const WORTHWHILE: usize = 64;
/// Files that may wait; each holds two directories open.
const QUEUE: usize = 128;
const MAX_HELPERS: usize = 4;

/// What becomes of a target directory once all in it is there.
pub(super) enum Ending {
    /// It gets the attributes of what it is a copy of.
    Dress { from: Arc<OwnedFd>, stat: Stat },
    /// It was there before and keeps all but its time.
    Time(Stat),
}

/// A directory that is being filled. It ends when nobody holds it any more.
pub(super) struct Target {
    fd: OwnedFd,
    /// For messages.
    path: Vec<u8>,
    ending: Option<Ending>,
    shared: Arc<Shared>,
    /// Ends after this one.
    parent: Option<Arc<Target>>,
}

/// A regular file to copy.
pub(super) struct Job {
    pub(super) src: Arc<OwnedFd>,
    pub(super) name: OsString,
    pub(super) stat: Stat,
    pub(super) dst: Arc<Target>,
    pub(super) target: OsString,
    /// The directory that `src` is, for messages.
    pub(super) dir: Arc<str>,
}

struct Shared {
    style: Style,
    stop: AtomicBool,
    failed: Mutex<Option<FileError>>,
    /// Jobs that are queued or being done.
    pending: Mutex<usize>,
    idle: Condvar,
}

/// Those who copy.
pub(super) struct Crew {
    shared: Arc<Shared>,
    seen: usize,
    queue: Option<SyncSender<Job>>,
    helpers: Vec<JoinHandle<()>>,
    buffer: Vec<u8>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn fail(&self, error: FileError) {
        self.stop.store(true, Ordering::Relaxed);
        lock(&self.failed).get_or_insert(error);
    }

    fn work(&self, job: Job, buffer: &mut Vec<u8>) {
        if self.stop.load(Ordering::Relaxed) {
            return;
        }
        let Job { src, name, stat, dst, target, dir } = job;
        let done = self.style.file(src.as_fd(), &name, &stat, dst.fd.as_fd(), &target, buffer);
        if let Err((call, errno)) = done {
            let path = format!("{dir}/{}", name.to_string_lossy());
            self.fail(PathError { call, path, source: errno }.into());
        }
    }

    fn help(&self, jobs: &Mutex<Receiver<Job>>) {
        let mut buffer = Vec::new();
        loop {
            // Others wait for the lock where they would wait for a job.
            let Ok(job) = lock(jobs).recv() else { return };
            // Also if the work panics: somebody may wait for it.
            let _done = Done(self);
            self.work(job, &mut buffer);
        }
    }
}

/// A queued job, until it is done.
struct Done<'a>(&'a Shared);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(FileError::Text("a thread that copied files panicked".into()));
        }
        let mut pending = lock(&self.0.pending);
        *pending -= 1;
        if *pending == 0 {
            self.0.idle.notify_all();
        }
    }
}

impl Crew {
    pub(super) fn new(style: Style) -> Self {
        let shared = Shared {
            style,
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
            pending: Mutex::new(0),
            idle: Condvar::new(),
        };
        Self { shared: Arc::new(shared), seen: 0, queue: None, helpers: Vec::new(), buffer: Vec::new() }
    }

    pub(super) fn style(&self) -> &Style {
        &self.shared.style
    }

    /// A directory to fill, below `parent`.
    pub(super) fn target(
        &self,
        fd: OwnedFd,
        path: Vec<u8>,
        ending: Option<Ending>,
        parent: Option<Arc<Target>>,
    ) -> Arc<Target> {
        Arc::new(Target { fd, path, ending, shared: self.shared.clone(), parent })
    }

    /// Copies a file, now or soon. What fails shows in [`Self::check`] or at the end.
    pub(super) fn copy(&mut self, job: Job) -> Result<(), FileError> {
        self.seen += 1;
        if self.seen == WORTHWHILE {
            self.hire();
        }
        let job = match &self.queue {
            None => job,
            Some(queue) => {
                *lock(&self.shared.pending) += 1;
                match queue.try_send(job) {
                    Ok(()) => return self.check(),
                    Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => {
                        *lock(&self.shared.pending) -= 1;
                        job
                    }
                }
            }
        };
        self.shared.work(job, &mut self.buffer);
        self.check()
    }

    fn hire(&mut self) {
        let helpers = std::thread::available_parallelism().map_or(1, usize::from) - 1;
        if helpers == 0 {
            return;
        }
        let (sender, jobs) = sync_channel(QUEUE);
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..helpers.min(MAX_HELPERS) {
            let (shared, jobs) = (self.shared.clone(), jobs.clone());
            let helper = std::thread::Builder::new().name("kiln-copy".into());
            // Without a helper the walk does it all.
            self.helpers.extend(helper.spawn(move || shared.help(&jobs)).ok());
        }
        self.queue = (!self.helpers.is_empty()).then_some(sender);
    }

    /// What failed so far.
    pub(super) fn check(&self) -> Result<(), FileError> {
        match self.shared.stop.load(Ordering::Relaxed) {
            true => lock(&self.shared.failed).clone().map_or(Err(FileError::Cancelled), Err),
            false => Ok(()),
        }
    }

    /// Waits until all files that were begun are there.
    pub(super) fn wait(&self) -> Result<(), FileError> {
        let mut pending = lock(&self.shared.pending);
        while *pending > 0 {
            pending = self.shared.idle.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        drop(pending);
        self.check()
    }

    /// Ends the work; the caller holds no target any more.
    pub(super) fn finish(mut self) -> Result<(), FileError> {
        self.dismiss();
        self.check()
    }

    fn dismiss(&mut self) {
        self.queue = None;
        for helper in self.helpers.drain(..) {
            // One that panicked has said so.
            let _ = helper.join();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        // Nobody may write into the layer after this.
        self.shared.stop.store(true, Ordering::Relaxed);
        self.dismiss();
    }
}

impl Target {
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    fn end(&mut self) {
        let Some(ending) = self.ending.take() else { return };
        if self.shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let style = &self.shared.style;
        let done = match &ending {
            Ending::Dress { from, stat } => style.attributes(stat, from.as_fd(), self.fd.as_fd()),
            Ending::Time(stat) => {
                let time = style.time_of(stat);
                rustix::fs::futimens(&self.fd, &Timestamps { last_access: time, last_modification: time })
            }
        };
        if let Err(errno) = done {
            self.shared.fail(PathError::new("chmod", OsStr::from_bytes(&self.path), errno).into());
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.end();
        // A deep tree must not end one directory inside the other.
        let mut next = self.parent.take();
        while let Some(mut parent) = next.and_then(Arc::into_inner) {
            parent.end();
            next = parent.parent.take();
        }
    }
}
