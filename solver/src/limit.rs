//! Who may run next. A limit on parallel work shared by all builds: free slots go to the build
//! that holds the fewest, and within it to the work with the longest path still ahead.

use std::collections::{BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// The limit. Cloning gives another handle to the same one.
#[derive(Clone)]
pub(crate) struct Limiter {
    state: Arc<Mutex<State>>,
}

struct State {
    /// `None`: no limit.
    free: Option<usize>,
    builds: HashMap<u64, Queue>,
    /// Counts grants and arrivals, to break ties by age.
    clock: u64,
}

#[derive(Default)]
struct Queue {
    held: usize,
    waiting: BinaryHeap<Waiter>,
    last_grant: u64,
}

struct Waiter {
    priority: Duration,
    arrived: u64,
    grant: oneshot::Sender<Permit>,
}

impl Ord for Waiter {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.priority.cmp(&other.priority).then(other.arrived.cmp(&self.arrived))
    }
}

impl PartialOrd for Waiter {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiter {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Waiter {}

/// A slot; dropping it hands it on.
pub(crate) struct Permit {
    limiter: Option<Limiter>,
    build: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(limiter) = self.limiter.take() {
            limiter.release(self.build);
        }
    }
}

impl Limiter {
    /// At most `max` slots at once; 0 means no limit.
    pub(crate) fn new(max: usize) -> Self {
        let state = State { free: (max > 0).then_some(max), builds: HashMap::new(), clock: 0 };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// False if everyone may always run.
    pub(crate) fn is_limited(&self) -> bool {
        self.lock().free.is_some()
    }

    /// Waits for a slot on behalf of `build`. Dropping the future leaves the queue.
    pub(crate) async fn acquire(&self, build: u64, priority: Duration) -> Permit {
        let answer = {
            let mut state = self.lock();
            state.clock += 1;
            let now = state.clock;
            match &mut state.free {
                None => return Permit { limiter: None, build },
                Some(0) => {}
                Some(free) => {
                    *free -= 1;
                    let queue = state.builds.entry(build).or_default();
                    queue.held += 1;
                    queue.last_grant = now;
                    return Permit { limiter: Some(self.clone()), build };
                }
            }
            let (grant, answer) = oneshot::channel();
            let waiter = Waiter { priority, arrived: now, grant };
            state.builds.entry(build).or_default().waiting.push(waiter);
            answer
        };
        // A waiter leaves the queue only with a permit, so the sender can't be lost.
        answer.await.unwrap_or(Permit { limiter: None, build })
    }

    fn release(&self, build: u64) {
        let mut granted = {
            let mut state = self.lock();
            if let Some(queue) = state.builds.get_mut(&build) {
                queue.held -= 1;
            }
            state.next(self)
        };
        // Handed over outside the lock: a refused permit comes back through `Drop`. It is taken
        // apart first, or each refusal would nest one call deeper.
        while let Some((waiter, mut permit)) = granted.take() {
            let refused = permit.build;
            if waiter.grant.is_closed() {
                permit.limiter = None;
                let mut state = self.lock();
                if let Some(queue) = state.builds.get_mut(&refused) {
                    queue.held -= 1;
                }
                granted = state.next(self);
            } else {
                let _ = waiter.grant.send(permit);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Gives one free slot away, to a waiter or back to the pool.
    fn next(&mut self, limiter: &Limiter) -> Option<(Waiter, Permit)> {
        let build = self
            .builds
            .iter()
            .filter(|(_, queue)| !queue.waiting.is_empty())
            .min_by_key(|(_, queue)| (queue.held, queue.last_grant))
            .map(|(build, _)| *build);
        self.builds.retain(|_, queue| queue.held > 0 || !queue.waiting.is_empty());
        let granted = build.and_then(|build| {
            self.clock += 1;
            let queue = self.builds.get_mut(&build)?;
            let waiter = queue.waiting.pop()?;
            queue.held += 1;
            queue.last_grant = self.clock;
            Some((waiter, Permit { limiter: Some(limiter.clone()), build }))
        });
        if granted.is_none()
            && let Some(free) = &mut self.free
        {
            *free += 1;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    const fn secs(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[tokio::test]
    async fn the_longest_path_goes_first_within_a_build() {
        let limiter = Limiter::new(1);
        let held = limiter.acquire(1, secs(0)).await;
        let mut short = Box::pin(limiter.acquire(1, secs(1)));
        let mut long = Box::pin(limiter.acquire(1, secs(9)));
        assert!((&mut short).now_or_never().is_none());
        assert!((&mut long).now_or_never().is_none());
        drop(held);
        assert!((&mut short).now_or_never().is_none());
        let held = (&mut long).now_or_never().expect("the long path got the slot");
        drop(held);
        assert!((&mut short).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_slot_goes_to_the_build_that_holds_least() {
        let limiter = Limiter::new(2);
        let first = limiter.acquire(1, secs(0)).await;
        let _second = limiter.acquire(1, secs(0)).await;
        let mut greedy = Box::pin(limiter.acquire(1, secs(100)));
        assert!((&mut greedy).now_or_never().is_none());
        let mut modest = Box::pin(limiter.acquire(2, secs(1)));
        assert!((&mut modest).now_or_never().is_none());
        drop(first);
        assert!((&mut greedy).now_or_never().is_none());
        assert!((&mut modest).now_or_never().is_some());
    }

    #[tokio::test]
    async fn waiters_that_left_are_passed_over_and_no_slot_is_lost() {
        let limiter = Limiter::new(1);
        let held = limiter.acquire(1, secs(0)).await;
        for _ in 0..10_000 {
            let mut gone = Box::pin(limiter.acquire(1, secs(5)));
            assert!((&mut gone).now_or_never().is_none());
        }
        let mut patient = Box::pin(limiter.acquire(1, secs(1)));
        assert!((&mut patient).now_or_never().is_none());
        drop(held);
        let held = (&mut patient).now_or_never().expect("granted");
        drop(held);
        assert!(limiter.acquire(7, secs(0)).now_or_never().is_some());
        assert!(limiter.lock().builds.len() <= 1);
    }

    #[tokio::test]
    async fn zero_is_no_limit() {
        let limiter = Limiter::new(0);
        let mut permits = Vec::new();
        for _ in 0..1000 {
            permits.push(limiter.acquire(1, secs(0)).now_or_never().expect("free"));
        }
    }
}
