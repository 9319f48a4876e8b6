//! Who may run next. A limit on parallel work shared by all builds: free slots go to the build
//! that holds the fewest, and within it to the work with the longest path still ahead. Work that several builds ask
//! for stands in the queue of each.

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
    /// Work that has not got its slot yet.
    turns: HashMap<u64, Waiting>,
    /// Counts grants and arrivals, to break ties by age; names turns and asks.
    clock: u64,
}

#[derive(Default)]
struct Queue {
    held: usize,
    places: BinaryHeap<Place>,
    last_grant: u64,
}

/// Where work stands in the queue of one build. It is out of date when its ask has left or the work has its slot.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    priority: Duration,
    /// The older one goes first.
    ask: std::cmp::Reverse<u64>,
    turn: u64,
}

#[derive(Default)]
struct Waiting {
    /// By the number of the ask: the build, and how urgent it is there.
    asks: Vec<(u64, u64, Duration)>,
    /// Set once the work is ready to run.
    grant: Option<oneshot::Sender<Permit>>,
}

/// A slot; dropping it hands it on.
pub(crate) struct Permit {
    /// `None` if there is nothing to hand on.
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

/// Work that will want a slot. Dropping it leaves all queues.
pub(crate) struct Turn {
    limiter: Limiter,
    id: u64,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.limiter.lock().turns.remove(&self.id);
    }
}

/// That a build wants the work done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask(u64);

impl Turn {
    /// Has the work stand in the queue of `build` as well.
    pub(crate) fn ask(&self, build: u64, priority: Duration) -> Ask {
        let mut state = self.limiter.lock();
        let ask = state.tick();
        let Some(waiting) = state.turns.get_mut(&self.id) else { return Ask(ask) };
        waiting.asks.push((ask, build, priority));
        if waiting.grant.is_some() {
            state.queue(self.id, ask, build, priority);
        }
        Ask(ask)
    }

    /// Takes that back.
    pub(crate) fn leave(&self, Ask(ask): Ask) {
        if let Some(waiting) = self.limiter.lock().turns.get_mut(&self.id) {
            waiting.asks.retain(|(id, ..)| *id != ask);
        }
    }

    /// Waits for a slot, which counts for the build through which it came. To be called once.
    pub(crate) async fn acquire(&self) -> Permit {
        let answer = {
            let mut state = self.limiter.lock();
            let asks = state.turns.get(&self.id).map(|waiting| waiting.asks.clone()).unwrap_or_default();
            match (state.free, asks.first()) {
                (Some(1..), Some(&(_, build, _))) => return state.take(&self.limiter, self.id, build),
                // Nobody is left who asks, and the work is about to be given up.
                (None, _) | (_, None) => return Permit { limiter: None, build: 0 },
                (Some(0), Some(_)) => {}
            }
            let (grant, answer) = oneshot::channel();
            if let Some(waiting) = state.turns.get_mut(&self.id) {
                waiting.grant = Some(grant);
            }
            for (ask, build, priority) in asks {
                state.queue(self.id, ask, build, priority);
            }
            answer
        };
        // It leaves the queues only with a permit, so the sender can't be lost.
        answer.await.unwrap_or(Permit { limiter: None, build: 0 })
    }
}

impl Limiter {
    /// At most `max` slots at once; 0 means no limit.
    pub(crate) fn new(max: usize) -> Self {
        let state =
            State { free: (max > 0).then_some(max), builds: HashMap::new(), turns: HashMap::new(), clock: 0 };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// False if everyone may always run.
    pub(crate) fn is_limited(&self) -> bool {
        self.lock().free.is_some()
    }

    /// Announces work that will want a slot, and who asks for it first; nothing if everyone may always run.
    pub(crate) fn turn(&self, build: u64, priority: Duration) -> Option<(Turn, Ask)> {
        let mut state = self.lock();
        state.free?;
        let (id, ask) = (state.tick(), state.tick());
        state.turns.insert(id, Waiting { asks: vec![(ask, build, priority)], grant: None });
        Some((Turn { limiter: self.clone(), id }, Ask(ask)))
    }

    fn release(&self, build: u64) {
        let mut granted = {
            let mut state = self.lock();
            state.give_back(build);
            state.next(self)
        };
        // Handed over outside the lock: a refused permit comes back through `Drop`. It is taken
        // apart first, or each refusal would nest one call deeper.
        while let Some((grant, permit)) = granted.take() {
            if let Err(mut refused) = grant.send(permit) {
                refused.limiter = None;
                let mut state = self.lock();
                state.give_back(refused.build);
                granted = state.next(self);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn queue(&mut self, turn: u64, ask: u64, build: u64, priority: Duration) {
        let place = Place { priority, ask: std::cmp::Reverse(ask), turn };
        self.builds.entry(build).or_default().places.push(place);
    }

    /// A free slot, at once.
    fn take(&mut self, limiter: &Limiter, turn: u64, build: u64) -> Permit {
        self.turns.remove(&turn);
        if let Some(free) = &mut self.free {
            *free -= 1;
        }
        self.count(limiter, build)
    }

    fn count(&mut self, limiter: &Limiter, build: u64) -> Permit {
        let now = self.tick();
        let queue = self.builds.entry(build).or_default();
        queue.held += 1;
        queue.last_grant = now;
        Permit { limiter: Some(limiter.clone()), build }
    }

    fn give_back(&mut self, build: u64) {
        if let Some(queue) = self.builds.get_mut(&build) {
            queue.held -= 1;
        }
    }

    /// Gives one free slot away, to work that waits or back to the pool.
    fn next(&mut self, limiter: &Limiter) -> Option<(oneshot::Sender<Permit>, Permit)> {
        while let Some(build) = self
            .builds
            .iter()
            .filter(|(_, queue)| !queue.places.is_empty())
            .min_by_key(|(_, queue)| (queue.held, queue.last_grant))
            .map(|(build, _)| *build)
        {
            let granted = self.first_of(build);
            if let Some(grant) = granted {
                return Some((grant, self.count(limiter, build)));
            }
        }
        self.builds.retain(|_, queue| queue.held > 0);
        if let Some(free) = &mut self.free {
            *free += 1;
        }
        None
    }

    /// The most urgent work in the queue of a build.
    fn first_of(&mut self, build: u64) -> Option<oneshot::Sender<Permit>> {
        let queue = self.builds.get_mut(&build)?;
        while let Some(Place { ask, turn, .. }) = queue.places.pop() {
            let stands = |waiting: &&mut Waiting| waiting.asks.iter().any(|(id, ..)| *id == ask.0);
            if let Some(grant) = self.turns.get_mut(&turn).filter(stands).and_then(|w| w.grant.take()) {
                self.turns.remove(&turn);
                return Some(grant);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    struct Held {
        _turn: Option<(Turn, Ask)>,
        _permit: Option<Permit>,
    }

    impl Limiter {
        /// Waits for a slot for work that only one build wants.
        async fn acquire(&self, build: u64, priority: Duration) -> Held {
            let turn = self.turn(build, priority);
            let permit = match &turn {
                Some((turn, _)) => Some(turn.acquire().await),
                None => None,
            };
            Held { _turn: turn, _permit: permit }
        }
    }

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
    async fn work_that_another_build_wants_too_comes_when_it_is_due_for_either() {
        let limiter = Limiter::new(1);
        let held = limiter.acquire(1, secs(0)).await;
        let mut own = Box::pin(limiter.acquire(1, secs(9)));
        assert!((&mut own).now_or_never().is_none());
        let (shared, first) = limiter.turn(1, secs(1)).expect("limited");
        let mut turn = Box::pin(shared.acquire());
        assert!((&mut turn).now_or_never().is_none());
        let second = shared.ask(2, secs(0));
        drop(held);
        let permit = (&mut turn).now_or_never().expect("build 2 held nothing");
        assert!((&mut own).now_or_never().is_none());
        drop(permit);
        let held = (&mut own).now_or_never().expect("the slot is free");
        drop(held);
        shared.leave(first);
        shared.leave(second);
        assert!(limiter.acquire(3, secs(0)).now_or_never().is_some(), "no slot is lost");
    }

    #[tokio::test]
    async fn who_asks_no_longer_lends_no_place() {
        let limiter = Limiter::new(1);
        let held = limiter.acquire(1, secs(0)).await;
        let mut own = Box::pin(limiter.acquire(1, secs(9)));
        assert!((&mut own).now_or_never().is_none());
        let (shared, _) = limiter.turn(1, secs(1)).expect("limited");
        let mut turn = Box::pin(shared.acquire());
        assert!((&mut turn).now_or_never().is_none());
        shared.leave(shared.ask(2, secs(0)));
        drop(held);
        assert!((&mut turn).now_or_never().is_none());
        let held = (&mut own).now_or_never().expect("its build's most urgent");
        drop(held);
        assert!((&mut turn).now_or_never().is_some());
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
