//! How many requests each model is given at once: additive increase, multiplicative decrease, as TCP
//! does it, so that a batch takes what is left over and interactive traffic is not disturbed.
//!
//! The limit doubles with every window of successes until something first goes wrong, and then
//! grows by one a window. It is halved when the upstream says 429 or is not available, and cut by a
//! tenth when answers take much longer than they did. `Retry-After` stops a model altogether.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

use crate::batch::run::retry::Verdict;

/// Bounds, and what counts as slow.
#[derive(Clone, Copy, Debug)]
pub struct PaceOptions {
    /// Requests at once when a model is first used.
    pub initial: usize,
    /// Requests at once that are never exceeded.
    pub most: usize,
    /// How many times longer than at its best an answer may take, in time per output token, before
    /// the limit is cut.
    pub latency_tolerance: f64,
}

/// Failures in a row after which a model counts as down: it is asked ever less often.
const DOWN_AFTER: u32 = 8;
/// The first pause of a model that is not available; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Weight of the newest answer in the average of latencies.
const LATENCY_WEIGHT: f64 = 0.1;
/// How fast the best latency is forgotten: a hundredth with each answer that is worse, so that an
/// upstream that has become slower for good is measured against its new self.
const BASELINE_DRIFT: f64 = 0.01;
/// Models that metrics tell apart. Clients choose the names, and each label is kept for ever.
const LABELS_MAX: usize = 64;
/// The label of all others.
const OTHER: &str = "other";

/// The paces of all models.
#[derive(Debug)]
pub(super) struct Paces {
    options: PaceOptions,
    models: Mutex<Models>,
}

#[derive(Debug, Default)]
struct Models {
    paces: HashMap<String, Arc<Pace>>,
    /// Models that have a label of their own.
    labels: HashSet<String>,
}

impl Models {
    fn label(&mut self, model: &str) -> String {
        if self.labels.len() < LABELS_MAX {
            self.labels.insert(model.to_owned());
        }
        let known = self.labels.contains(model);
        (if known { model } else { OTHER }).to_owned()
    }
}

impl Paces {
    /// None used yet.
    pub(super) fn new(options: PaceOptions) -> Paces {
        Paces {
            options,
            models: Mutex::default(),
        }
    }

    /// The pace of a model. Models that no job uses are forgotten here, so that their number stays
    /// bounded by that of the jobs.
    pub(super) fn of(&self, model: &str) -> Arc<Pace> {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pace) = models.paces.get(model) {
            return Arc::clone(pace);
        }
        models.paces.retain(|_, pace| Arc::strong_count(pace) > 1);
        let pace = Arc::new(Pace::new(models.label(model), self.options));
        models.paces.insert(model.to_owned(), Arc::clone(&pace));
        pace
    }
}

/// The pace of one model.
#[derive(Debug)]
pub(super) struct Pace {
    /// In metrics.
    label: String,
    options: PaceOptions,
    permits: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limit: usize,
    /// Permits to be taken out of circulation when they come back.
    owed: usize,
    /// Successes since the limit last grew.
    successes: usize,
    /// Until the first decrease, growth is exponential.
    starting: bool,
    /// The limit is decreased once for all that was under way when the trouble began.
    decreased_at: Option<Instant>,
    paused_until: Option<Instant>,
    failures_in_a_row: u32,
    /// Requests that the upstream has answered.
    answers: u64,
    /// Pauses since the last answer. Requests that failed together make one.
    pauses: u32,
    latency: Option<f64>,
    best_latency: f64,
}

/// The right to ask once.
#[derive(Debug)]
pub(super) struct Turn {
    pace: Arc<Pace>,
    permit: Option<OwnedSemaphorePermit>,
    began: Instant,
}

impl Pace {
    fn new(label: String, options: PaceOptions) -> Pace {
        let limit = options.initial.clamp(1, options.most);
        Pace {
            label,
            options,
            permits: Arc::new(Semaphore::new(limit)),
            state: Mutex::new(State {
                limit,
                owed: 0,
                successes: 0,
                starting: true,
                decreased_at: None,
                paused_until: None,
                failures_in_a_row: 0,
                answers: 0,
                pauses: 0,
                latency: None,
                best_latency: f64::INFINITY,
            }),
        }
    }

    /// Waits until the model may be asked. First come, first served. Safe to drop while waiting.
    pub(super) async fn turn(self: &Arc<Pace>) -> Turn {
        // The semaphore is never closed; without a permit the limit would just not be kept.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        let mut turn = Turn {
            pace: Arc::clone(self),
            permit,
            began: Instant::now(),
        };
        loop {
            let until = self.lock().paused_until;
            match until {
                Some(until) if until > Instant::now() => sleep_until(until).await,
                _ => break,
            }
        }
        turn.began = Instant::now();
        turn
    }

    /// How many requests were answered. While it stands still, that one of them found nobody is not
    /// that request's doing.
    pub(super) fn answers(&self) -> u64 {
        self.lock().answers
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grow(&self, state: &mut State) {
        state.successes += 1;
        let step = if state.starting { 1 } else { state.limit };
        if state.successes < step || state.limit >= self.options.most {
            return;
        }
        state.successes = 0;
        state.limit += 1;
        if state.owed > 0 {
            state.owed -= 1;
        } else {
            self.permits.add_permits(1);
        }
    }

    /// Cuts the limit to `share` of it, unless it was cut since this request was sent.
    fn shrink(&self, state: &mut State, began: Instant, share: f64) {
        if state.decreased_at.is_some_and(|at| at >= began) {
            return;
        }
        state.decreased_at = Some(Instant::now());
        state.starting = false;
        state.successes = 0;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of a small count"
        )]
        let limit = ((state.limit as f64 * share) as usize).max(1);
        let surplus = state.limit - limit;
        state.owed += surplus - self.permits.forget_permits(surplus);
        state.limit = limit;
    }

    /// Judges the time an answer took, for each token of its output.
    fn observe_latency(&self, state: &mut State, began: Instant, output_tokens: u64) {
        // Prompt and queue are shared out over at least a few tokens, so that one-token answers do
        // not set a standard for long ones.
        #[expect(clippy::cast_precision_loss, reason = "counts of tokens are small")]
        let tokens = output_tokens.max(16) as f64;
        let now = began.elapsed().as_secs_f64() / tokens;
        let average = state
            .latency
            .map_or(now, |old| old + LATENCY_WEIGHT * (now - old));
        state.latency = Some(average);
        state.best_latency = if average < state.best_latency {
            average
        } else {
            state.best_latency + BASELINE_DRIFT * (average - state.best_latency)
        };
        if average > state.best_latency * self.options.latency_tolerance {
            self.shrink(state, began, 0.9);
        }
    }
}

impl Turn {
    /// The request is sent now: what it waited for since it got its turn is not the model's doing.
    pub(super) fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// Says how it went. `retry_after` is how long the upstream wants to be left alone.
    pub(super) fn end(self, verdict: Verdict, retry_after: Option<Duration>, output_tokens: u64) {
        let pace = Arc::clone(&self.pace);
        let mut state = pace.lock();
        match verdict {
            Verdict::Success => {
                state.failures_in_a_row = 0;
                state.answers += 1;
                state.pauses = 0;
                pace.grow(&mut state);
                pace.observe_latency(&mut state, self.began, output_tokens);
            }
            // The upstream has answered; that it did not like the request is no sign of load.
            Verdict::Permanent => {
                state.failures_in_a_row = 0;
                state.answers += 1;
            }
            Verdict::Overloaded => pace.shrink(&mut state, self.began, 0.5),
            Verdict::Unavailable | Verdict::Transient => {
                state.failures_in_a_row = state.failures_in_a_row.saturating_add(1);
                pace.shrink(&mut state, self.began, 0.5);
            }
        }
        let pause = match (retry_after, verdict) {
            (Some(asked), Verdict::Overloaded | Verdict::Unavailable) => Some(asked),
            (None, Verdict::Unavailable)
                if state.failures_in_a_row >= DOWN_AFTER
                    && state.paused_until.is_none_or(|until| until <= self.began) =>
            {
                let doublings = state.pauses.min(16);
                state.pauses += 1;
                Some(PAUSE_FIRST.saturating_mul(1 << doublings).min(PAUSE_MAX))
            }
            _ => None,
        };
        if let Some(pause) = pause {
            let until = Instant::now() + pause;
            state.paused_until = state.paused_until.max(Some(until));
        }
        #[expect(clippy::cast_precision_loss, reason = "a gauge of a small count")]
        metrics::gauge!("kvtide_batch_concurrency_limit", "model" => pace.label.clone())
            .set(state.limit as f64);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.pace.lock();
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
    use super::*;

    fn pace(initial: usize, most: usize) -> Arc<Pace> {
        Paces::new(PaceOptions {
            initial,
            most,
            latency_tolerance: 3.0,
        })
        .of("m")
    }

    fn limit(pace: &Pace) -> usize {
        pace.lock().limit
    }

    async fn window(pace: &Arc<Pace>, count: usize, verdict: Verdict, took: Duration) {
        let mut turns = Vec::new();
        for _ in 0..count {
            turns.push(pace.turn().await);
        }
        tokio::time::advance(took).await;
        for turn in turns {
            turn.end(verdict, None, 100);
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn the_limit_doubles_a_window_then_halves_once_then_grows_by_one() {
        let pace = pace(4, 100);
        window(&pace, 4, Verdict::Success, SECOND).await;
        assert_eq!(limit(&pace), 8);
        window(&pace, 8, Verdict::Overloaded, SECOND).await;
        assert_eq!(limit(&pace), 4, "eight refusals of one window count once");
        window(&pace, 4, Verdict::Success, SECOND).await;
        assert_eq!(limit(&pace), 5);
        for _ in 0..100 {
            window(&pace, 1, Verdict::Overloaded, SECOND).await;
        }
        assert_eq!(limit(&pace), 1, "never nothing at all");
    }

    #[tokio::test(start_paused = true)]
    async fn never_more_turns_are_out_than_the_limit_allows() {
        let pace = pace(2, 6);
        for round in 0..50 {
            let verdict = if round % 7 == 6 {
                Verdict::Overloaded
            } else {
                Verdict::Success
            };
            let count = limit(&pace);
            window(&pace, count, verdict, SECOND).await;
            let available = pace.permits.available_permits();
            let owed = pace.lock().owed;
            assert_eq!(available, limit(&pace) + owed);
            assert_eq!(owed, 0, "all turns have come back");
            assert!(limit(&pace) <= 6);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_take_much_longer_lower_the_limit() {
        let pace = pace(8, 8);
        for _ in 0..5 {
            window(&pace, 4, Verdict::Success, SECOND).await;
        }
        assert_eq!(limit(&pace), 8);
        for _ in 0..5 {
            window(&pace, 1, Verdict::Success, 20 * SECOND).await;
        }
        assert!(limit(&pace) < 8);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_asked_before_retry_after_has_passed() {
        let pace = pace(2, 2);
        let turn = pace.turn().await;
        turn.end(Verdict::Overloaded, Some(7 * SECOND), 0);
        let began = Instant::now();
        drop(pace.turn().await);
        assert!(began.elapsed() >= 7 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_never_answers_is_asked_ever_less_often() {
        let pace = pace(1, 1);
        for _ in 0..DOWN_AFTER {
            window(&pace, 1, Verdict::Unavailable, SECOND).await;
        }
        let began = Instant::now();
        for _ in 0..13 {
            window(&pace, 1, Verdict::Unavailable, Duration::ZERO).await;
        }
        assert!(began.elapsed() > 3 * PAUSE_MAX);
        assert_eq!(pace.answers(), 0);
        window(&pace, 1, Verdict::Success, SECOND).await;
        assert_eq!(pace.answers(), 1);
        assert_eq!(pace.lock().failures_in_a_row, 0);
    }

    #[test]
    fn so_many_models_have_labels_of_their_own() {
        let mut models = Models::default();
        assert_eq!(models.label("first"), "first");
        for n in 1..LABELS_MAX {
            assert_eq!(models.label(&n.to_string()), n.to_string());
        }
        assert_eq!(models.label("late"), OTHER);
        assert_eq!(models.label("first"), "first");
    }

    #[test]
    fn models_that_nobody_uses_are_forgotten() {
        let paces = Paces::new(PaceOptions {
            initial: 1,
            most: 1,
            latency_tolerance: 2.0,
        });
        let kept = paces.of("kept");
        for n in 0..100 {
            drop(paces.of(&n.to_string()));
        }
        assert!(paces.models.lock().unwrap().paces.len() <= 2);
        assert!(Arc::ptr_eq(&kept, &paces.of("kept")));
    }
}
