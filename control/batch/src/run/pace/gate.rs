//! So many at once: a limit that grows with success and is cut in trouble (additive increase,
//! multiplicative decrease, as TCP does it), and that can be closed for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Gate {
    most: usize,
    permits: Arc<Semaphore>,
    state: Mutex<State>,
    opened: Notify,
}

#[derive(Debug)]
struct State {
    limit: usize,
    /// Permits to be taken out of circulation when they come back.
    owed: usize,
    /// Successes since the limit last grew.
    successes: usize,
    /// Below this, where nothing has gone wrong yet, growth is exponential.
    threshold: usize,
    /// The limit is cut once for all that was under way when the trouble began.
    cut_at: Option<Instant>,
    closed_until: Option<Instant>,
}

/// One of those who are let through.
#[derive(Debug)]
pub(super) struct Pass {
    gate: Arc<Gate>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Gate {
    pub(super) fn new(initial: usize, most: usize) -> Gate {
        let limit = initial.clamp(1, most.max(1));
        Gate {
            most,
            permits: Arc::new(Semaphore::new(limit)),
            state: Mutex::new(State {
                limit,
                owed: 0,
                successes: 0,
                threshold: usize::MAX,
                cut_at: None,
                closed_until: None,
            }),
            opened: Notify::new(),
        }
    }

    /// Waits to be let through. First come, first served. Safe to drop while waiting.
    pub(super) async fn enter(self: &Arc<Gate>) -> Pass {
        // The semaphore is never closed; without a permit the limit would just not be kept.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        let pass = Pass {
            gate: Arc::clone(self),
            permit,
        };
        loop {
            let opened = self.opened.notified();
            let Some(until) = self.closed_until() else {
                return pass;
            };
            tokio::select! {
                () = sleep_until(until) => {}
                () = opened => {}
            }
        }
    }

    pub(super) fn limit(&self) -> usize {
        self.lock().limit
    }

    /// Until when nobody is let through, if that is so.
    pub(super) fn closed_until(&self) -> Option<Instant> {
        self.lock()
            .closed_until
            .filter(|until| *until > Instant::now())
    }

    /// Lets nobody through before `until`.
    pub(super) fn close(&self, until: Instant) {
        let mut state = self.lock();
        state.closed_until = state.closed_until.max(Some(until));
    }

    /// Lets through again.
    pub(super) fn open(&self) {
        self.lock().closed_until = None;
        self.opened.notify_waiters();
    }

    /// Something went well: the limit doubles with every window of these, and where something has gone
    /// wrong before grows by one a window.
    pub(super) fn grow(&self) {
        let mut state = self.lock();
        state.successes += 1;
        let step = if state.limit < state.threshold {
            1
        } else {
            state.limit
        };
        if state.successes >= step && state.limit < self.most {
            let limit = state.limit + 1;
            self.set(&mut state, limit);
        }
    }

    /// There is not much room left: no more doubling.
    pub(super) fn calm(&self) {
        self.lock().threshold = 0;
    }

    /// Cuts the limit to `share` of it, unless it was cut since `began`, when this was let through.
    /// Whether it was cut.
    pub(super) fn cut(&self, began: Instant, share: f64) -> bool {
        let mut state = self.lock();
        if state.cut_at.is_some_and(|at| at >= began) {
            return false;
        }
        state.cut_at = Some(Instant::now());
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of a small count"
        )]
        let limit = ((state.limit as f64 * share) as usize).max(1);
        state.threshold = limit;
        self.set(&mut state, limit);
        true
    }

    /// Sets the limit, for a measurement or a search.
    pub(super) fn set_limit(&self, limit: usize) {
        self.set(&mut self.lock(), limit.clamp(1, self.most.max(1)));
    }

    fn set(&self, state: &mut State, limit: usize) {
        state.successes = 0;
        if limit < state.limit {
            let surplus = state.limit - limit;
            state.owed += surplus - self.permits.forget_permits(surplus);
        } else {
            let more = limit - state.limit;
            let paid = more.min(state.owed);
            state.owed -= paid;
            self.permits.add_permits(more - paid);
        }
        state.limit = limit;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        if state.owed > 0
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
            state.owed -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn never_more_are_let_through_than_the_limit_allows() {
        let gate = Arc::new(Gate::new(2, 6));
        for round in 0..50 {
            let mut passes = Vec::new();
            for _ in 0..gate.limit() {
                passes.push(gate.enter().await);
            }
            let began = Instant::now();
            tokio::time::advance(Duration::from_secs(1)).await;
            match round % 7 {
                6 => drop(gate.cut(began, 0.5)),
                3 => gate.set_limit(1),
                _ => passes.iter().for_each(|_| gate.grow()),
            }
            let out = passes.len();
            let available = gate.permits.available_permits();
            let owed = gate.lock().owed;
            assert_eq!(available + out, gate.limit() + owed);
            drop(passes);
            assert_eq!(gate.lock().owed, 0, "all have come back");
            assert_eq!(gate.permits.available_permits(), gate.limit());
            assert!(gate.limit() <= 6);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_doubles_a_window_then_is_cut_once_then_grows_by_one() {
        let gate = Gate::new(4, 100);
        let success = |times| (0..times).for_each(|_| gate.grow());
        success(4);
        assert_eq!(gate.limit(), 8);
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..8 {
            gate.cut(began, 0.5);
        }
        assert_eq!(gate.limit(), 4, "eight refusals of one window count once");
        success(4);
        assert_eq!(gate.limit(), 5);
        for _ in 0..100 {
            tokio::time::advance(Duration::from_secs(1)).await;
            gate.cut(Instant::now(), 0.5);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(gate.limit(), 1, "never nothing at all");
    }
}
