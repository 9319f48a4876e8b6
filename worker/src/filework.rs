//! Work on files beside the async tasks: only so much at once, since more takes memory and is no faster, and each
//! thread that is at it goes on with what waits, since one that ends and another that begins take both. It knows
//! nothing of what is done.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

type Work = Box<dyn FnOnce() + Send>;

/// The work panicked.
#[derive(Debug, thiserror::Error)]
#[error("the work panicked")]
pub(crate) struct Panicked;

/// What waits for its turn. Cheap to clone.
#[derive(Clone)]
pub(crate) struct FileWork {
    queue: Arc<Mutex<Queue>>,
}

struct Queue {
    waiting: VecDeque<Work>,
    /// How many more threads may be at it.
    free: usize,
}

impl FileWork {
    /// At most `limit` at once.
    pub(crate) fn new(limit: usize) -> Self {
        Self { queue: Arc::new(Mutex::new(Queue { waiting: VecDeque::new(), free: limit })) }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` in its turn. What was begun ends and keeps its place until then, even if the future is dropped; what
    /// was not is left out.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Panicked> {
        let (done, result) = oneshot::channel();
        let work = move || {
            if !done.is_closed() {
                // The hook has told of a panic; who asked sees that nothing comes.
                let _ = std::panic::catch_unwind(AssertUnwindSafe(move || done.send(work())));
            }
        };
        let another = {
            let mut queue = self.lock();
            queue.waiting.push_back(Box::new(work));
            let another = queue.free > 0;
            queue.free -= usize::from(another);
            another
        };
        if another {
            let own = self.clone();
            tokio::task::spawn_blocking(move || own.work_off());
        }
        result.await.map_err(|_| Panicked)
    }

    fn work_off(&self) {
        loop {
            let mut queue = self.lock();
            let Some(work) = queue.waiting.pop_front() else {
                queue.free += 1;
                return;
            };
            drop(queue);
            work();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;

    use super::*;

    #[tokio::test]
    async fn all_is_done_and_no_more_at_once_than_allowed() {
        let (work, now, most) =
            (FileWork::new(3), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let jobs = (0..200).map(|i| {
            let (now, most) = (now.clone(), most.clone());
            work.run(move || {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::yield_now();
                now.fetch_sub(1, Ordering::SeqCst);
                i
            })
        });
        let done: Vec<i32> = join_all(jobs).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(done, (0..200).collect::<Vec<_>>());
        assert!(most.load(Ordering::SeqCst) <= 3);
    }

    #[tokio::test]
    async fn a_panic_is_told_and_costs_no_place() {
        let work = FileWork::new(1);
        assert!(work.run(|| panic!("on purpose")).await.is_err());
        assert_eq!(work.run(|| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_begun() {
        let work = FileWork::new(1);
        let (go, gate) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let work = work.clone();
            async move { work.run(move || gate.recv().is_ok()).await }
        });
        while work.lock().free > 0 || !work.lock().waiting.is_empty() {
            tokio::task::yield_now().await;
        }
        let begun = Arc::new(AtomicUsize::new(0));
        let mut left = Box::pin(work.run({
            let begun = begun.clone();
            move || begun.fetch_add(1, Ordering::SeqCst)
        }));
        assert!(futures::poll!(&mut left).is_pending());
        drop(left);
        go.send(()).unwrap();
        assert!(first.await.unwrap().unwrap());
        work.run(|| ()).await.unwrap();
        assert_eq!(begun.load(Ordering::SeqCst), 0);
    }
}
