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
    /// How many builds are just adding work: nobody gets a slot until it is known who is the most urgent.
    gathering: usize,
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

struct Waiting {
    /// The asks that have not left.
    asks: Vec<u64>,
    grant: oneshot::Sender<Permit>,
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

/// Work that wants a slot. Dropping it leaves all queues.
pub(crate) struct Turn {
    limiter: Limiter,
    id: u64,
}

/// Where a slot will arrive. It counts for the build through which it came.
pub(crate) type Granted = oneshot::Receiver<Permit>;

/// Work is being added. Dropping it has free slots given away.
pub(crate) struct Gathering(Limiter);

impl Drop for Gathering {
    fn drop(&mut self) {
        let granted = {
            let mut state = self.0.lock();
            state.gathering -= 1;
            state.fill(&self.0)
        };
        self.0.hand_over(granted);
    }
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
        if let Some(waiting) = state.turns.get_mut(&self.id) {
            waiting.asks.push(ask);
            state.queue(self.id, ask, build, priority);
        }
        Ask(ask)
    }

    /// Takes that back.
    pub(crate) fn leave(&self, Ask(ask): Ask) {
        if let Some(waiting) = self.limiter.lock().turns.get_mut(&self.id) {
            waiting.asks.retain(|id| *id != ask);
        }
    }
}

impl Limiter {
    /// At most `max` slots at once; 0 means no limit.
    pub(crate) fn new(max: usize) -> Self {
        let state = State {
            free: (max > 0).then_some(max),
            builds: HashMap::new(),
            turns: HashMap::new(),
            clock: 0,
            gathering: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// False if everyone may always run.
    pub(crate) fn is_limited(&self) -> bool {
        self.lock().free.is_some()
    }

    /// To be held while work is added that becomes ready together, and not for long.
    pub(crate) fn gather(&self) -> Option<Gathering> {
        let mut state = self.lock();
        state.free?;
        state.gathering += 1;
        Some(Gathering(self.clone()))
    }

    /// Has work of `build` wait for a slot; nothing if everyone may always run.
    pub(crate) fn turn(&self, build: u64, priority: Duration) -> Option<(Turn, Ask, Granted)> {
        let (grant, answer) = oneshot::channel();
        let (turn, ask, granted) = {
            let mut state = self.lock();
            state.free?;
            let (id, ask) = (state.tick(), state.tick());
            state.turns.insert(id, Waiting { asks: vec![ask], grant });
            state.queue(id, ask, build, priority);
            (Turn { limiter: self.clone(), id }, Ask(ask), state.fill(self))
        };
        self.hand_over(granted);
        Some((turn, ask, answer))
    }

    fn release(&self, build: u64) {
        let granted = {
            let mut state = self.lock();
            state.give_back(build);
            state.fill(self)
        };
        self.hand_over(granted);
    }

    /// Outside the lock: a refused permit would come back through `Drop`. It is taken apart first, or each refusal
    /// would nest one call deeper.
    fn hand_over(&self, mut granted: Vec<(oneshot::Sender<Permit>, Permit)>) {
        while let Some((grant, permit)) = granted.pop() {
            if let Err(mut refused) = grant.send(permit) {
                refused.limiter = None;
                let mut state = self.lock();
                state.give_back(refused.build);
                granted.append(&mut state.fill(self));
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

    fn give_back(&mut self, build: u64) {
        if let Some(queue) = self.builds.get_mut(&build) {
            queue.held -= 1;
        }
        if let Some(free) = &mut self.free {
            *free += 1;
        }
    }

    /// Gives free slots away as long as somebody waits.
    fn fill(&mut self, limiter: &Limiter) -> Vec<(oneshot::Sender<Permit>, Permit)> {
        let mut granted = Vec::new();
        while self.gathering == 0
            && self.free.is_some_and(|free| free > 0)
            && let Some((build, grant)) = self.next()
        {
            let now = self.tick();
            let queue = self.builds.entry(build).or_default();
            queue.held += 1;
            queue.last_grant = now;
            self.free = self.free.map(|free| free - 1);
            granted.push((grant, Permit { limiter: Some(limiter.clone()), build }));
        }
        granted
    }

    /// Takes the work whose turn it is, with the build for which that is so, out of the queues.
    fn next(&mut self) -> Option<(u64, oneshot::Sender<Permit>)> {
        while let Some(build) = self
            .builds
            .iter()
            .filter(|(_, queue)| !queue.places.is_empty())
            .min_by_key(|(_, queue)| (queue.held, queue.last_grant))
            .map(|(build, _)| *build)
        {
            if let Some(grant) = self.first_of(build) {
                return Some((build, grant));
            }
        }
        self.builds.retain(|_, queue| queue.held > 0);
        None
    }

    /// The most urgent work in the queue of a build.
    fn first_of(&mut self, build: u64) -> Option<oneshot::Sender<Permit>> {
        let queue = self.builds.get_mut(&build)?;
        while let Some(Place { ask, turn, .. }) = queue.places.pop() {
            if self.turns.get(&turn).is_some_and(|waiting| waiting.asks.contains(&ask.0)) {
                return self.turns.remove(&turn).map(|waiting| waiting.grant);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    impl Limiter {
        /// Waits for a slot for work that only one build wants.
        async fn acquire(&self, build: u64, priority: Duration) -> Option<Permit> {
            let (_turn, _, granted) = self.turn(build, priority)?;
            granted.await.ok()
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
    async fn work_that_is_ready_together_is_compared_before_a_free_slot_is_given_away() {
        let limiter = Limiter::new(1);
        let gathering = limiter.gather();
        let mut short = Box::pin(limiter.acquire(1, secs(1)));
        let mut long = Box::pin(limiter.acquire(1, secs(9)));
        assert!((&mut short).now_or_never().is_none());
        assert!((&mut long).now_or_never().is_none());
        drop(gathering);
        assert!((&mut short).now_or_never().is_none());
        assert!((&mut long).now_or_never().is_some());
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
        let (shared, first, mut turn) = limiter.turn(1, secs(1)).expect("limited");
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
        let (shared, _, mut turn) = limiter.turn(1, secs(1)).expect("limited");
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
