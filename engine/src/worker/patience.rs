//! How long the thread that runs the model waits for a thread that copies.

use std::time::Duration;

use crate::sync::{Condvar, MutexGuard};

/// A copy thread has not moved although it was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stuck;

/// What is left to be waited, in ticks rather than by the clock: a process that was stopped meanwhile,
/// with all its threads, has lost one tick by it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    ticks: u32,
    tick: Duration,
}

impl Patience {
    /// A copy takes milliseconds, and seconds on a host that swaps. vLLM gives a step this long, too,
    /// where workers have processes of their own (`VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`).
    pub(crate) const COPY: Self = Self::of(300, Duration::from_secs(1));

    pub(crate) const fn of(ticks: u32, tick: Duration) -> Self {
        Self { ticks, tick }
    }

    /// Waits for `changed`, at most for a tick.
    #[cfg(not(loom))]
    pub(crate) fn wait<'a, T>(
        &mut self,
        changed: &Condvar,
        guard: MutexGuard<'a, T>,
    ) -> Result<MutexGuard<'a, T>, Stuck> {
        let left = self.ticks.checked_sub(1).ok_or(Stuck)?;
        let (guard, waited) = changed
            .wait_timeout(guard, self.tick)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if waited.timed_out() {
            self.ticks = left;
        }
        Ok(guard)
    }

    /// In models there is no time: who is not woken is found to wait for ever.
    #[cfg(loom)]
    pub(crate) fn wait<'a, T>(
        &mut self,
        changed: &Condvar,
        guard: MutexGuard<'a, T>,
    ) -> Result<MutexGuard<'a, T>, Stuck> {
        let guard = changed.wait(guard);
        Ok(guard.unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}
