//! What a load costs against what the model computes meanwhile.
//!
//! A layered load holds back everyone in its step for as long as it takes longer than the step's own
//! computation; an async load holds back only its own request, but for a few steps more. So with
//! others in the batch, a load is layered where the prompt tokens that are computed behind it take
//! at least as long.

use std::time::Duration;

/// Weight of the newest observation in a running average.
const WEIGHT: f64 = 0.2;
/// Steps without prompt tokens after which those before are taken to have been computed. Engines
/// schedule a step or two ahead of the device.
const QUIET_STEPS: u32 = 3;
/// Steps after which a stretch with prompt tokens is evaluated even if it goes on.
const STRETCH_STEPS_MAX: u32 = 32;
/// Fewer prompt tokens than this tell nothing of their rate.
const STRETCH_TOKENS_MIN: u64 = 256;

/// Predicts times from what was observed. All times are the caller's, on one clock.
#[derive(Debug, Default)]
pub struct CostModel {
    load_bytes_per_s: Option<f64>,
    /// Seconds of a step without prompt tokens.
    decode_step: Option<f64>,
    seconds_per_token: Option<f64>,
    last: Option<Duration>,
    stretch: Stretch,
}

/// Steps from the first that computes prompt tokens to the last that may still do so.
#[derive(Clone, Copy, Debug, Default)]
struct Stretch {
    tokens: u64,
    seconds: f64,
    steps: u32,
    quiet: u32,
    /// Whether a step waited for a load: its time is not that of its tokens.
    waited: bool,
}

impl CostModel {
    /// A model that knows nothing, and so predicts that no load is hidden.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A worker's loads reach `bytes_per_s`; with several workers, the slowest counts.
    pub fn set_load_rate(&mut self, bytes_per_s: f64) {
        if bytes_per_s > 0.0 {
            let known = self.load_bytes_per_s.unwrap_or(f64::INFINITY);
            self.load_bytes_per_s = Some(known.min(bytes_per_s));
        }
    }

    /// A step with `prompt_tokens` is scheduled at `now`; `loads` if it waits for a layered load.
    pub fn observe_step(&mut self, now: Duration, prompt_tokens: u64, loads: bool) {
        if let Some(last) = self.last.replace(now) {
            self.observe_interval(now.saturating_sub(last).as_secs_f64(), prompt_tokens);
        }
        self.stretch.tokens += prompt_tokens;
        self.stretch.waited |= loads;
    }

    /// The engine has nothing to do: the time until the next step is nobody's.
    pub fn idle(&mut self) {
        self.last = None;
        self.stretch = Stretch::default();
    }

    fn observe_interval(&mut self, seconds: f64, prompt_tokens: u64) {
        if self.stretch.tokens == 0 {
            self.decode_step = Some(averaged(self.decode_step, seconds));
            return;
        }
        let stretch = &mut self.stretch;
        stretch.seconds += seconds;
        stretch.steps += 1;
        stretch.quiet = if prompt_tokens == 0 {
            stretch.quiet + 1
        } else {
            0
        };
        if stretch.quiet < QUIET_STEPS && stretch.steps < STRETCH_STEPS_MAX {
            return;
        }
        let stretch = std::mem::take(&mut self.stretch);
        let decoding = self.decode_step.unwrap_or(0.0) * f64::from(stretch.steps);
        let computing = stretch.seconds - decoding;
        if stretch.tokens >= STRETCH_TOKENS_MIN && computing > 0.0 && !stretch.waited {
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52 tokens")]
            let rate = computing / stretch.tokens as f64;
            self.seconds_per_token = Some(averaged(self.seconds_per_token, rate));
        }
    }

    /// Whether computing `prompt_tokens` takes at least as long as loading `bytes` on each worker.
    /// `false` as long as either rate is unknown.
    #[must_use]
    pub fn hides(&self, bytes: u64, prompt_tokens: u64) -> bool {
        let (Some(rate), Some(seconds)) = (self.load_bytes_per_s, self.seconds_per_token) else {
            return false;
        };
        #[expect(clippy::cast_precision_loss, reason = "times, not accounts")]
        let (loading, computing) = (bytes as f64 / rate, prompt_tokens as f64 * seconds);
        loading <= computing
    }

    /// Seconds that a prompt token is taken to need, if that is known.
    #[must_use]
    pub fn seconds_per_token(&self) -> Option<f64> {
        self.seconds_per_token
    }
}

fn averaged(old: Option<f64>, new: f64) -> f64 {
    old.map_or(new, |old| old + WEIGHT * (new - old))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Decode steps of 7 ms; a prompt of so many tokens takes 25 µs each, seen `lag` steps later.
    fn serve(model: &mut CostModel, prompts: &[u64], gap: usize, lag: usize) {
        let mut times = vec![0.007; prompts.len() * (gap + 1) + lag + 8];
        let mut tokens = vec![0; times.len()];
        for (i, &prompt) in prompts.iter().enumerate() {
            let step = 4 + i * (gap + 1);
            tokens[step] = prompt;
            #[expect(clippy::cast_precision_loss, reason = "a test's small numbers")]
            let computing = prompt as f64 * 25e-6;
            times[step + lag] += computing;
        }
        let mut now = 1.0;
        for (seconds, tokens) in times.iter().zip(&tokens) {
            model.observe_step(Duration::from_secs_f64(now), *tokens, false);
            now += seconds;
        }
    }

    #[test]
    fn nothing_is_hidden_before_both_rates_are_known() {
        let mut model = CostModel::new();
        assert!(!model.hides(0, 1000));
        model.set_load_rate(50e9);
        assert!(!model.hides(1, 1000));
        serve(&mut model, &[1000], 8, 0);
        assert!(model.hides(1, 1000));
    }

    #[test]
    fn the_slowest_worker_counts() {
        let mut model = CostModel::new();
        model.set_load_rate(50e9);
        model.set_load_rate(10e9);
        model.set_load_rate(40e9);
        serve(&mut model, &[1000; 4], 8, 0);
        // 1,024 tokens take 25.6 ms: at 10 GB/s, 256 MB.
        assert!(model.hides(250_000_000, 1024) && !model.hides(262_000_000, 1024));
    }

    /// Otherwise a long load would teach that computing is slow, and so hides longer ones.
    #[test]
    fn time_spent_waiting_for_a_load_is_not_that_of_tokens() {
        let mut model = CostModel::new();
        serve(&mut model, &[1000; 4], 8, 0);
        let before = model.seconds_per_token();
        let mut now = 100.0;
        for (seconds, tokens, loads) in [(0.3, 1000, true), (0.007, 0, false), (0.007, 0, false)] {
            model.observe_step(Duration::from_secs_f64(now), tokens, loads);
            now += seconds;
        }
        serve(&mut model, &[], 8, 0);
        assert_eq!(model.seconds_per_token(), before);
    }

    #[test]
    fn time_without_requests_is_nobodys() {
        let mut model = CostModel::new();
        serve(&mut model, &[1000], 8, 0);
        let before = model.seconds_per_token();
        model.observe_step(Duration::from_secs(50), 1000, false);
        model.idle();
        serve(&mut model, &[], 8, 0);
        assert_eq!(model.seconds_per_token(), before);
    }

    proptest! {
        /// However far ahead the engine schedules, and however prompts follow one another.
        #[test]
        fn the_rate_of_prompt_tokens_is_found(
            prompts in prop::collection::vec(300u64..9000, 1..20), gap in 4usize..12, lag in 0usize..3,
        ) {
            let mut model = CostModel::new();
            serve(&mut model, &prompts, gap, lag);
            let found = model.seconds_per_token().unwrap();
            prop_assert!((found / 25e-6 - 1.0).abs() < 0.05, "{found}");
        }

        #[test]
        fn the_rate_is_found_where_every_step_has_prompt_tokens(lag in 0usize..3) {
            let mut model = CostModel::new();
            serve(&mut model, &[1024; 200], 0, lag);
            let found = model.seconds_per_token().unwrap();
            prop_assert!((found / 25e-6 - 1.0).abs() < 0.1, "{found}");
        }
    }
}
