//! How many requests are sent at once, so that a batch takes what is left over and interactive
//! traffic is not disturbed.
//!
//! Two limits hold at once. What says something about the engine moves that of the model: it grows
//! while answers come as fast as ever, is cut by a tenth when they take longer ([`latency`]), and is
//! halved when the upstream is not available. What says something about the caller moves that of
//! the tenant: 429, which a router or a gateway answers to whom has had his share, halves it, and
//! its `Retry-After` stops this tenant alone. An engine that is full and answers 429 to all says so
//! to each tenant, whose limits then add up to what it can do.

mod gate;
mod latency;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

use crate::batch::run::retry::Verdict;
use crate::batch::state::Usage;
use crate::batch::store::Share;

use gate::{Gate, Pass};
use latency::{Judgement, Latency};

/// Bounds, and what counts as slow.
#[derive(Clone, Copy, Debug)]
pub struct PaceOptions {
    /// Requests at once when a model is first used.
    pub initial: usize,
    /// Requests at once that are never exceeded.
    pub most: usize,
    /// How many times longer than at its best an answer may take, for each unit of its work, before
    /// the limit is cut. At half of that it no longer grows.
    pub latency_tolerance: f64,
}

/// Failures in a row after which a model counts as down: it is asked ever less often.
const DOWN_AFTER: u32 = 8;
/// The first pause of a model that is not available; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// A pause that lasts so long is one that others may use the job slot for.
const STALLED: Duration = Duration::from_secs(2);
/// The share of the time that a request takes over which the next ones are spread.
const SPREAD: f64 = 0.9;
/// Requests that take less are not spread: nobody waits long behind their prompts, and a timer of a
/// millisecond would keep a fast upstream idle.
const SPREAD_MIN: Duration = Duration::from_millis(100);
/// Models that metrics tell apart. Clients choose the names, and each label is kept for ever.
const LABELS_MAX: usize = 64;
/// The label of all others.
const OTHER: &str = "other";
/// Paces that are remembered without being used, because they are paused.
const REMEMBERED_MAX: usize = 1024;

/// The paces of all models and tenants.
#[derive(Debug)]
pub(super) struct Paces {
    options: PaceOptions,
    /// Units of memory that the requests for one model may take.
    memory: usize,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    engines: HashMap<String, Arc<Engine>>,
    paces: HashMap<(String, String), Arc<Pace>>,
    /// Models that have a label of their own.
    labels: HashSet<String>,
}

impl Known {
    fn label(&mut self, model: &str) -> String {
        if self.labels.len() < LABELS_MAX {
            self.labels.insert(model.to_owned());
        }
        let known = self.labels.contains(model);
        (if known { model } else { OTHER }).to_owned()
    }

    /// Forgets what no job uses, so that the number of paces stays bounded by that of the jobs; what is
    /// paused is remembered until the pause is over.
    fn forget_unused(&mut self) {
        let mut remembered = 0;
        self.paces.retain(|_, pace| {
            if Arc::strong_count(pace) > 1 {
                return true;
            }
            remembered += 1;
            pace.paused_for().is_some() && remembered <= REMEMBERED_MAX
        });
        self.engines
            .retain(|_, engine| Arc::strong_count(engine) > 1);
    }
}

impl Paces {
    /// None used yet. The requests for one model may take `memory` units of the memory for all.
    pub(super) fn new(options: PaceOptions, memory: usize) -> Paces {
        Paces {
            options,
            memory,
            known: Mutex::default(),
        }
    }

    /// The pace of a tenant's requests for a model.
    pub(super) fn of(&self, model: &str, tenant: &str) -> Arc<Pace> {
        let mut known = self.lock();
        let key = (model.to_owned(), tenant.to_owned());
        if let Some(pace) = known.paces.get(&key) {
            return Arc::clone(pace);
        }
        known.forget_unused();
        let engine = match known.engines.get(model) {
            Some(engine) => Arc::clone(engine),
            None => {
                let label = known.label(model);
                let engine = Engine::new(model.to_owned(), label, self.options, self.memory);
                let engine = Arc::new(engine);
                known.engines.insert(model.to_owned(), Arc::clone(&engine));
                engine
            }
        };
        let pace = Arc::new(Pace::new(engine, self.options));
        known.paces.insert(key, Arc::clone(&pace));
        pace
    }

    /// Those who would only wait if they had a job slot.
    pub(super) fn stalled(&self) -> Vec<Share> {
        self.lock()
            .paces
            .iter()
            .filter(|(_, pace)| pace.paused_for().is_some_and(|pause| pause >= STALLED))
            .map(|((model, tenant), _)| Share {
                tenant: tenant.clone(),
                model: Some(model.clone()),
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of a model, whoever asks it.
#[derive(Debug)]
struct Engine {
    model: String,
    /// In metrics.
    label: String,
    gate: Arc<Gate>,
    memory: Arc<Semaphore>,
    health: Mutex<Health>,
    /// The sum of what its tenants' limits are.
    tenants: AtomicUsize,
}

#[derive(Debug)]
struct Health {
    failures_in_a_row: u32,
    /// Requests that the upstream has answered.
    answers: u64,
    /// Pauses since the last answer. Requests that failed together make one.
    pauses: u32,
    latency: Latency,
    /// When the next request may be sent at the earliest.
    next_start: Instant,
}

impl Engine {
    fn new(model: String, label: String, options: PaceOptions, memory: usize) -> Engine {
        Engine {
            model,
            label,
            gate: Arc::new(Gate::new(options.initial, options.most)),
            memory: Arc::new(Semaphore::new(memory)),
            health: Mutex::new(Health {
                failures_in_a_row: 0,
                answers: 0,
                pauses: 0,
                latency: Latency::new(options.latency_tolerance),
                next_start: Instant::now(),
            }),
            tenants: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a request may be sent that has its turn now, if not at once. Requests that were sent together end
    /// together, and the next would be sent together again: a burst of prompts, for which whoever
    /// arrives then waits. So the starts of as many as the limit allows are spread over the time that
    /// one takes, or a little less, which pulls bursts apart and keeps the limit in use.
    fn start(&self) -> Option<Instant> {
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

    fn succeeded(&self, began: Instant, usage: &Usage) {
        let mut health = self.lock();
        health.failures_in_a_row = 0;
        health.answers += 1;
        health.pauses = 0;
        let limit = self.gate.limit();
        match health.latency.judge(began, Instant::now(), usage, limit) {
            Judgement::Grow => self.gate.grow(),
            Judgement::Hold => self.gate.calm(),
            Judgement::Cut => self.gate.cut(began, 0.9),
            Judgement::Set(limit) => self.gate.set_limit(limit),
        }
    }

    /// Gives back the pause that begins with this failure, if one does. Requests that failed together
    /// make one pause.
    fn failed(
        &self,
        began: Instant,
        verdict: Verdict,
        retry_after: Option<Duration>,
    ) -> Option<Duration> {
        let mut health = self.lock();
        health.failures_in_a_row = health.failures_in_a_row.saturating_add(1);
        self.gate.cut(began, 0.5);
        let open = self.gate.closed_until().is_none();
        let pause = match (retry_after, verdict) {
            (_, Verdict::Transient) => None,
            (Some(asked), _) => Some(asked),
            (None, _) => (health.failures_in_a_row >= DOWN_AFTER && open).then(|| {
                let doublings = health.pauses.min(16);
                health.pauses += 1;
                PAUSE_FIRST.saturating_mul(1 << doublings).min(PAUSE_MAX)
            }),
        };
        if let Some(pause) = pause {
            self.gate.close(Instant::now() + pause);
        }
        pause.filter(|_| open)
    }
}

/// The pace of one tenant's requests for one model.
#[derive(Debug)]
pub(super) struct Pace {
    engine: Arc<Engine>,
    gate: Arc<Gate>,
    /// What of the sum of limits is this one's.
    counted: AtomicUsize,
}

/// The right to ask once.
#[derive(Debug)]
pub(super) struct Turn {
    pace: Arc<Pace>,
    began: Instant,
    _passes: [Pass; 2],
}

impl Pace {
    fn new(engine: Arc<Engine>, options: PaceOptions) -> Pace {
        let pace = Pace {
            engine,
            gate: Arc::new(Gate::new(options.initial, options.most)),
            counted: AtomicUsize::new(0),
        };
        pace.count(pace.gate.limit());
        pace
    }

    /// Waits until the model may be asked. First come, first served. Safe to drop while waiting.
    pub(super) async fn turn(self: &Arc<Pace>) -> Turn {
        loop {
            // The tenant's own first: who may not ask takes nobody's place.
            let mine = self.gate.enter().await;
            let shared = self.engine.gate.enter().await;
            if self.gate.closed_until().is_none() {
                // A timer takes a millisecond also for what is due now.
                if let Some(start) = self.engine.start() {
                    sleep_until(start).await;
                }
                return Turn {
                    pace: Arc::clone(self),
                    began: Instant::now(),
                    _passes: [mine, shared],
                };
            }
        }
    }

    /// The memory that all requests for this model share.
    pub(super) fn memory(&self) -> &Arc<Semaphore> {
        &self.engine.memory
    }

    /// The model that is asked.
    pub(super) fn model(&self) -> &str {
        &self.engine.model
    }

    /// How many requests were answered. While it stands still, that one of them found nobody is not
    /// that request's doing.
    pub(super) fn answers(&self) -> u64 {
        self.engine.lock().answers
    }

    /// For how long nothing will be asked, if that is so.
    fn paused_for(&self) -> Option<Duration> {
        let until = self
            .gate
            .closed_until()
            .max(self.engine.gate.closed_until())?;
        Some(until.duration_since(Instant::now()))
    }

    fn count(&self, limit: usize) {
        let before = self.counted.swap(limit, Ordering::Relaxed);
        self.engine.tenants.fetch_add(limit, Ordering::Relaxed);
        self.engine.tenants.fetch_sub(before, Ordering::Relaxed);
    }

    fn show(&self) {
        self.count(self.gate.limit());
        let tenants = self.engine.tenants.load(Ordering::Relaxed);
        let limit = self.engine.gate.limit().min(tenants);
        #[expect(clippy::cast_precision_loss, reason = "a gauge of a small count")]
        metrics::gauge!("kvtide_batch_concurrency_limit", "model" => self.engine.label.clone())
            .set(limit as f64);
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.count(0);
    }
}

impl Turn {
    /// The request is sent now: what it waited for since it got its turn is not the model's doing.
    pub(super) fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// This server had nothing left for a connection: the limit is more than it has room for. Of the
    /// model nothing is learnt, and it is not paused.
    pub(super) fn could_not_begin(&self) {
        self.pace.engine.gate.cut(self.began, 0.5);
        self.pace.show();
    }

    /// Says how it went. `retry_after` is how long the upstream wants to be left alone. Gives back for
    /// how long nobody is asked for the model, if that begins now.
    pub(super) fn end(
        self,
        verdict: Verdict,
        retry_after: Option<Duration>,
        usage: &Usage,
    ) -> Option<Duration> {
        let (pace, engine) = (&self.pace, &self.pace.engine);
        let mut begins = None;
        match verdict {
            Verdict::Success => {
                engine.succeeded(self.began, usage);
                pace.gate.grow();
            }
            // The upstream has answered; that it did not like the request is no sign of load.
            Verdict::Permanent => {
                let mut health = engine.lock();
                health.failures_in_a_row = 0;
                health.answers += 1;
            }
            Verdict::Overloaded => {
                pace.gate.cut(self.began, 0.5);
                if let Some(asked) = retry_after {
                    pace.gate.close(Instant::now() + asked);
                }
            }
            Verdict::Unavailable | Verdict::Transient => {
                begins = engine.failed(self.began, verdict, retry_after);
            }
        }
        pace.show();
        begins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn paces(initial: usize, most: usize) -> Paces {
        let options = PaceOptions {
            initial,
            most,
            latency_tolerance: 1.3,
        };
        Paces::new(options, 1024)
    }

    fn limits(pace: &Pace) -> (usize, usize) {
        (pace.gate.limit(), pace.engine.gate.limit())
    }

    async fn window(pace: &Arc<Pace>, count: usize, verdict: Verdict, took: Duration) {
        let mut turns = Vec::new();
        for _ in 0..count {
            turns.push(pace.turn().await);
        }
        tokio::time::advance(took).await;
        for turn in turns {
            turn.end(verdict, None, &Usage::default());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_told_once_when_it_begins() {
        let pace = paces(16, 16).of("m", "a");
        let mut turns = Vec::new();
        for _ in 0..16 {
            turns.push(pace.turn().await);
        }
        let end = |turn: Turn, asked| turn.end(Verdict::Unavailable, asked, &Usage::default());
        let told: Vec<_> = turns.drain(..).map(|turn| end(turn, None)).collect();
        let down = DOWN_AFTER as usize - 1;
        assert_eq!(told[down], Some(PAUSE_FIRST));
        assert!((0..16).all(|n| n == down || told[n].is_none()), "{told:?}");
        assert_eq!(end(pace.turn().await, None), Some(2 * PAUSE_FIRST));
        let turn = pace.turn().await;
        assert_eq!(end(turn, Some(7 * SECOND)), Some(7 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_take_longer_lower_the_limit_of_the_model_for_all() {
        let paces = paces(8, 8);
        let (one, other) = (paces.of("m", "a"), paces.of("m", "b"));
        for _ in 0..5 {
            window(&one, 4, Verdict::Success, SECOND).await;
        }
        assert_eq!(limits(&other), (8, 8));
        for _ in 0..20 {
            window(&one, 1, Verdict::Success, 2 * SECOND).await;
        }
        assert!(limits(&other).1 < 8);
        assert_eq!(limits(&other).0, 8);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_end_together_do_not_start_together_again() {
        let pace = paces(8, 8).of("m", "a");
        for _ in 0..2 {
            window(&pace, 8, Verdict::Success, 8 * SECOND).await;
        }
        let began = Instant::now();
        let mut starts = Vec::new();
        for _ in 0..8 {
            starts.push((pace.turn().await, began.elapsed()));
        }
        let apart = |n: usize| starts[n + 1].1 - starts[n].1;
        assert!((0..7).all(|n| apart(n) > SECOND / 2), "{starts:?}");
        assert!(began.elapsed() < 8 * SECOND, "the limit stays in use");
    }

    #[tokio::test(start_paused = true)]
    async fn what_this_server_has_no_room_for_lowers_the_limit_and_pauses_nobody() {
        let paces = paces(8, 8);
        let pace = paces.of("m", "a");
        let mut turns = Vec::new();
        for _ in 0..8 {
            turns.push(pace.turn().await);
        }
        tokio::time::advance(SECOND).await;
        for turn in &turns {
            turn.could_not_begin();
        }
        assert_eq!(
            limits(&pace),
            (8, 4),
            "those that failed together count once"
        );
        assert!(pace.paused_for().is_none());
        tokio::time::advance(SECOND).await;
        turns[0].begin();
        turns[0].could_not_begin();
        assert_eq!(limits(&pace), (8, 2));
        drop(turns);
        window(&pace, 2, Verdict::Success, SECOND).await;
        assert_eq!(limits(&pace), (8, 3), "it grows again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_slows_and_stops_only_the_tenant_whose_it_is() {
        let paces = paces(4, 4);
        let (one, other) = (paces.of("m", "a"), paces.of("m", "b"));
        let began = Instant::now();
        let turn = one.turn().await;
        turn.end(Verdict::Overloaded, Some(7 * SECOND), &Usage::default());
        assert_eq!((limits(&one), limits(&other)), ((2, 4), (4, 4)));
        drop(other.turn().await);
        assert!(began.elapsed() < SECOND, "another tenant is not stopped");
        let stalled = paces.stalled();
        assert_eq!(stalled.len(), 1);
        assert_eq!(stalled[0].tenant, "a");
        drop(one.turn().await);
        assert!(began.elapsed() >= 7 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_out_a_pause_takes_no_place_of_others() {
        let paces = paces(1, 1);
        let (one, other) = (paces.of("m", "a"), paces.of("m", "b"));
        let turn = one.turn().await;
        turn.end(Verdict::Overloaded, Some(7 * SECOND), &Usage::default());
        let waiting = tokio::spawn({
            let one = Arc::clone(&one);
            async move { drop(one.turn().await) }
        });
        tokio::time::sleep(SECOND).await;
        let began = Instant::now();
        drop(other.turn().await);
        assert_eq!(began.elapsed(), Duration::ZERO);
        waiting.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_asks_to_be_left_alone_is_left_alone_by_all() {
        let paces = paces(2, 2);
        let (one, other) = (paces.of("m", "a"), paces.of("m", "b"));
        let turn = one.turn().await;
        turn.end(Verdict::Unavailable, Some(7 * SECOND), &Usage::default());
        let began = Instant::now();
        drop(other.turn().await);
        assert!(began.elapsed() >= 7 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_never_answers_is_asked_ever_less_often() {
        let paces = paces(1, 1);
        let pace = paces.of("m", "a");
        for _ in 0..DOWN_AFTER {
            window(&pace, 1, Verdict::Unavailable, SECOND).await;
        }
        let began = Instant::now();
        for _ in 0..13 {
            window(&pace, 1, Verdict::Unavailable, Duration::ZERO).await;
        }
        assert!(began.elapsed() > 3 * PAUSE_MAX);
        assert_eq!(pace.answers(), 0);
        assert_eq!(paces.stalled().len(), 1);
        window(&pace, 1, Verdict::Success, SECOND).await;
        assert_eq!(pace.answers(), 1);
        assert_eq!(pace.engine.lock().failures_in_a_row, 0);
    }

    #[test]
    fn so_many_models_have_labels_of_their_own() {
        let mut known = Known::default();
        assert_eq!(known.label("first"), "first");
        for n in 1..LABELS_MAX {
            assert_eq!(known.label(&n.to_string()), n.to_string());
        }
        assert_eq!(known.label("late"), OTHER);
        assert_eq!(known.label("first"), "first");
    }

    #[test]
    fn models_that_nobody_uses_are_forgotten() {
        let paces = paces(1, 1);
        let kept = paces.of("kept", "a");
        for n in 0..100 {
            drop(paces.of(&n.to_string(), "a"));
        }
        assert!(paces.lock().paces.len() <= 2);
        assert!(paces.lock().engines.len() <= 2);
        assert!(Arc::ptr_eq(&kept, &paces.of("kept", "a")));
        assert_eq!(kept.engine.tenants.load(Ordering::Relaxed), 1);
    }
}
