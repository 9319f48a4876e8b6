//! Builds that ended and are not yet explained: who asks for one waits, and it may be forgotten before it is there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use tokio::sync::watch;

/// All of them.
#[derive(Default)]
pub(super) struct Pending {
    /// The latest of each ref.
    builds: DashMap<String, Waiting>,
    /// The one that was added last.
    last: Mutex<Option<watch::Receiver<()>>>,
}

#[derive(Clone)]
struct Waiting {
    forgotten: Arc<AtomicBool>,
    done: watch::Receiver<()>,
}

/// A build whose explanation may come. Who asks for it waits until this is dropped.
pub(crate) struct Expected {
    pending: Arc<Pending>,
    id: String,
    forgotten: Arc<AtomicBool>,
    /// Never sends; its end tells that this has gone.
    done: watch::Sender<()>,
}

impl Pending {
    /// Another build of the same ref that is still waiting is forgotten: the history has only one.
    pub(super) fn expect(self: &Arc<Self>, id: &str) -> Expected {
        let (done, receiver) = watch::channel(());
        let forgotten = Arc::new(AtomicBool::new(false));
        let waiting = Waiting { forgotten: forgotten.clone(), done: receiver };
        if let Some(former) = self.builds.insert(id.to_owned(), waiting) {
            former.forgotten.store(true, Ordering::Relaxed);
        }
        Expected { pending: self.clone(), id: id.to_owned(), forgotten, done }
    }

    pub(super) fn forget(&self, id: &str) {
        if let Some((_, waiting)) = self.builds.remove(id) {
            waiting.forgotten.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for a build, if it is pending.
    pub(super) async fn wait(&self, id: &str) {
        let waiting = self.builds.get(id).map(|entry| entry.done.clone());
        over(waiting).await;
    }

    /// Waits for all.
    pub(super) async fn idle(&self) {
        let all: Vec<_> = self.builds.iter().map(|entry| entry.done.clone()).collect();
        // Of those that were forgotten only the line knows.
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for waiting in all.into_iter().chain(last) {
            over(Some(waiting)).await;
        }
    }
}

async fn over(waiting: Option<watch::Receiver<()>>) {
    if let Some(mut waiting) = waiting {
        // The other end never sends; it goes.
        let _ = waiting.changed().await;
    }
}

impl Expected {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Tells whether it was forgotten meanwhile.
    pub(super) fn forgotten(&self) -> Arc<AtomicBool> {
        self.forgotten.clone()
    }

    /// Takes the next place in the line of builds to be added. The answer waits for those in front.
    pub(super) fn queue(&self) -> impl Future<Output = ()> + use<> {
        let mut last = self.pending.last.lock().unwrap_or_else(PoisonError::into_inner);
        over(last.replace(self.done.subscribe()))
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.pending.builds.remove_if(&self.id, |_, other| Arc::ptr_eq(&other.forgotten, &self.forgotten));
    }
}
