//! What is known of a model, whoever asks it.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::run::pace::PaceOptions;
use crate::run::pace::gate::Gate;
use crate::run::pace::latency::{Judgement, Latency};
use crate::state::Usage;

/// The share of the time that a request takes over which the next ones are spread.
const SPREAD: f64 = 0.9;
/// Requests that take less are not spread: nobody waits long behind their prompts, and a timer of a
/// millisecond would keep a fast upstream idle.
const SPREAD_MIN: Duration = Duration::from_millis(100);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) model: String,
    /// In metrics.
    pub(super) label: String,
    pub(super) gate: Arc<Gate>,
    pub(super) memory: Arc<Semaphore>,
    /// The sum of what its tenants' limits are.
    pub(super) tenants: AtomicUsize,
    health: Mutex<Health>,
}

#[derive(Debug)]
struct Health {
    /// Requests that the upstream has answered.
    answers: u64,
    latency: Latency,
    /// When the next request may be sent at the earliest.
    next_start: Instant,
}

impl Engine {
    pub(super) fn new(model: String, label: String, options: PaceOptions, memory: usize) -> Engine {
        Engine {
            model,
            label,
            gate: Arc::new(Gate::new(options.initial, options.most)),
            memory: Arc::new(Semaphore::new(memory)),
            tenants: AtomicUsize::new(0),
            health: Mutex::new(Health {
                answers: 0,
                latency: Latency::new(options.latency_tolerance),
                next_start: Instant::now(),
            }),
        }
    }

    /// When a request may be sent that has its turn now, if not at once. Requests that were sent
    /// together end together, and the next would be sent together again: a burst of prompts, for which
    /// whoever arrives then waits. So the starts of as many as the limit allows are spread over the
    /// time that one takes, or a little less, which pulls bursts apart and keeps the limit in use.
    pub(super) fn start(&self) -> Option<Instant> {
        let mut health = self.lock();
        let now = Instant::now();
        let start = health.next_start.max(now);
        let others = u32::try_from(self.gate.limit()).unwrap_or(u32::MAX);
        let typical = health.latency.typical();
        if typical >= SPREAD_MIN {
            health.next_start = start + typical.mul_f64(SPREAD) / others.max(1);
        }
        (start > now).then_some(start)
    }

    /// How many requests were answered, whosever they were.
    pub(super) fn answers(&self) -> u64 {
        self.lock().answers
    }

    /// An answer that took as long as it should, or longer.
    pub(super) fn succeeded(&self, began: Instant, usage: &Usage) {
        let mut health = self.lock();
        health.answers += 1;
        let limit = self.gate.limit();
        match health.latency.judge(began, Instant::now(), usage, limit) {
            Judgement::Grow => self.gate.grow(),
            Judgement::Hold => self.gate.calm(),
            Judgement::Cut => {
                self.gate.cut(began, 0.9);
            }
            Judgement::Set(limit) => self.gate.set_limit(limit),
        }
    }

    /// An answer that says nothing about load.
    pub(super) fn refused(&self) {
        self.lock().answers += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
