//! What a load costs against what the model computes meanwhile.
//!
//! A layered load holds back everyone in its step for as long as it takes longer than the step's own
//! computation; an async load holds back only its own request, but for a few steps more. So with
//! others in the batch, a load is layered where the step takes longer without it.
//!
//! A step takes the time of a decode step, and so much for every prompt token. Both are learned from
//! the times between steps. Too low an estimate mends itself: its loads are async, and leave the
//! computation to be seen. Too high a one hides loads behind nothing, and steps that wait for loads
//! do not show what they compute; but they show what it takes at most, which is believed.

use std::time::Duration;

/// Steps without prompt tokens after which those before are taken to have been computed. Engines
/// schedule a step or two ahead of the device.
const QUIET_STEPS: u32 = 3;
/// Steps after which a stretch with prompt tokens is evaluated even if it goes on.
const STRETCH_STEPS_MAX: u32 = 32;
/// Fewer prompt tokens than this tell nothing of their rate.
const STRETCH_TOKENS_MIN: u64 = 256;
/// What a stretch takes beyond its decode steps tells nothing if it is less than this share of one.
const STRETCH_NOISE: f64 = 0.5;
/// Share of a step that a load may take. A step computes nothing before the first layer is loaded,
/// and loads nothing while it samples. And where a step takes as long as its load, the share keeps
/// that time from being taken for one that hides the next load.
const HIDDEN_SHARE: f64 = 0.8;
/// Observations that count.
const RECENT: usize = 5;

/// Predicts times from what was observed. All times are the caller's, on one clock.
#[derive(Debug, Default)]
pub struct CostModel {
    load_bytes_per_s: Option<f64>,
    /// Seconds of a step without prompt tokens.
    decode_step: Recent,
    seconds_per_token: Recent,
    last: Option<Duration>,
    stretch: Stretch,
}

/// Steps from the first that computes prompt tokens, or waits for a load, to the last that may still
/// do so.
#[derive(Clone, Copy, Debug, Default)]
struct Stretch {
    tokens: u64,
    seconds: f64,
    steps: u32,
    quiet: u32,
    /// Whether a step waited for a load: its time is not that of its tokens, but at least that.
    waited: bool,
}

/// The last few observations of what should always be the same.
#[derive(Debug, Default)]
struct Recent {
    values: [f64; RECENT],
    seen: usize,
}

impl Recent {
    fn observe(&mut self, value: f64) {
        self.values[self.seen % RECENT] = value;
        self.seen += 1;
    }

    /// Their median, the lower one of two. A single observation is not believed: the first step of
    /// its kind may have compiled a kernel.
    fn typical(&self) -> Option<f64> {
        let mut values = self.values;
        let known = &mut values[..self.seen.min(RECENT)];
        known.sort_unstable_by(f64::total_cmp);
        (known.len() > 1).then(|| known[(known.len() - 1) / 2])
    }
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
        let stretch = &mut self.stretch;
        if stretch.tokens == 0 && !stretch.waited {
            self.decode_step.observe(seconds);
            return;
        }
        stretch.seconds += seconds;
        stretch.steps += 1;
        stretch.quiet = if prompt_tokens == 0 {
            stretch.quiet + 1
        } else {
            0
        };
        if stretch.quiet >= QUIET_STEPS || stretch.steps >= STRETCH_STEPS_MAX {
            let stretch = std::mem::take(stretch);
            self.observe_stretch(stretch);
        }
    }

    fn observe_stretch(&mut self, stretch: Stretch) {
        let Some(decode_step) = self.decode_step.typical() else {
            return; // The stretch ends with steps that may be no more than that.
        };
        let computing = stretch.seconds - decode_step * f64::from(stretch.steps);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 tokens")]
        let rate = computing / stretch.tokens as f64;
        let tells = if stretch.waited {
            // However few the tokens are: it is a bound, and must not be hidden behind again.
            computing >= decode_step * STRETCH_NOISE
                && self.seconds_per_token().is_some_and(|known| rate < known)
        } else {
            computing > 0.0 && stretch.tokens >= STRETCH_TOKENS_MIN
        };
        if tells {
            self.seconds_per_token.observe(rate);
        }
    }

    /// Whether a step that computes `prompt_tokens`, and the next token of others if they are
    /// `decoding`, takes longer than loading `bytes` on each worker: the load has the whole step,
    /// since each layer is awaited only before it computes. What is unknown hides nothing.
    #[must_use]
    pub fn hides(&self, bytes: u64, prompt_tokens: u64, decoding: bool) -> bool {
        let Some(rate) = self.load_bytes_per_s else {
            return false;
        };
        let decode_step = self.decode_step.typical().filter(|_| decoding);
        let per_token = self.seconds_per_token().unwrap_or(0.0);
        #[expect(clippy::cast_precision_loss, reason = "times, not accounts")]
        let (loading, computing) = (bytes as f64 / rate, prompt_tokens as f64 * per_token);
        loading <= (decode_step.unwrap_or(0.0) + computing) * HIDDEN_SHARE
    }

    /// Seconds that a prompt token is taken to need, if that is known.
    #[must_use]
    pub fn seconds_per_token(&self) -> Option<f64> {
        self.seconds_per_token.typical()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DECODE_STEP: f64 = 0.007;
    const PER_TOKEN: f64 = 25e-6;
    const GIB: u64 = 1 << 30;

    /// Lets the model see steps that begin at `now`, with their seconds and prompt tokens.
    fn observe(model: &mut CostModel, mut now: f64, steps: &[(f64, u64, bool)]) {
        for &(seconds, tokens, loads) in steps {
            model.observe_step(Duration::from_secs_f64(now), tokens, loads);
            now += seconds;
        }
    }

    fn computing(tokens: u64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a test's small numbers")]
        let tokens = tokens as f64;
        tokens * PER_TOKEN
    }

    /// Prompts in a row of decode steps, of which `lead` are before the first; the time of each is
    /// seen `lag` steps later, and that of one prompt is multiplied.
    #[derive(Clone, Copy)]
    struct Pace {
        lead: usize,
        gap: usize,
        lag: usize,
        slow: Option<(usize, f64)>,
    }

    const PACE: Pace = Pace {
        lead: 4,
        gap: 8,
        lag: 0,
        slow: None,
    };

    fn serve(model: &mut CostModel, prompts: &[u64], pace: Pace) {
        let Pace { lead, gap, lag, .. } = pace;
        let mut steps = vec![(DECODE_STEP, 0, false); lead + prompts.len() * (gap + 1) + lag + 8];
        for (i, &prompt) in prompts.iter().enumerate() {
            let step = lead + i * (gap + 1);
            steps[step].1 = prompt;
            let slowed = pace
                .slow
                .filter(|slow| slow.0 == i)
                .map_or(1.0, |slow| slow.1);
            steps[step + lag].0 += computing(prompt) * slowed;
        }
        observe(model, 1.0, &steps);
    }

    fn assert_rate(model: &CostModel, tolerance: f64) -> Result<(), TestCaseError> {
        let found = model.seconds_per_token().unwrap();
        prop_assert!((found / PER_TOKEN - 1.0).abs() < tolerance, "{found}");
        Ok(())
    }

    #[test]
    fn what_is_unknown_hides_nothing() {
        let mut model = CostModel::new();
        assert!(!model.hides(0, 1000, true));
        model.set_load_rate(50e9);
        assert!(!model.hides(1, 1000, true));
        serve(&mut model, &[], PACE);
        assert!(model.hides(1, 1000, true) && !model.hides(1, 1000, false));
        serve(&mut model, &[1000; 2], PACE);
        assert!(model.hides(1, 1000, false));
    }

    #[test]
    fn the_slowest_worker_counts() {
        let mut model = CostModel::new();
        model.set_load_rate(50e9);
        model.set_load_rate(10e9);
        model.set_load_rate(40e9);
        serve(&mut model, &[1000; 4], PACE);
        // 1,024 tokens take 25.6 ms, of which a load may take 20.5: at 10 GB/s, 205 MB.
        assert!(model.hides(204_000_000, 1024, false) && !model.hides(206_000_000, 1024, false));
    }

    #[test]
    fn a_load_has_the_whole_step() {
        let mut model = CostModel::new();
        model.set_load_rate(50e9);
        serve(&mut model, &[1000; 4], PACE);
        // 5.4 ms of 7, and 21.5 ms of 28.
        assert!(model.hides(GIB / 4, 0, true) && !model.hides(GIB / 4, 0, false));
        assert!(model.hides(GIB, 840, true) && !model.hides(GIB, 840, false));
        assert!(!model.hides(GIB, 32, true));
    }

    /// Otherwise a long load would teach that computing is slow, and so hides longer ones.
    #[test]
    fn time_spent_waiting_for_a_load_is_not_that_of_tokens() {
        let mut model = CostModel::new();
        serve(&mut model, &[1000; 4], PACE);
        let before = model.seconds_per_token();
        observe(&mut model, 100.0, &[(0.3, 1000, true)]);
        serve(&mut model, &[], PACE);
        assert_eq!(model.seconds_per_token(), before);
    }

    /// A step that loads and computes a prompt's last token looks like a decode step.
    #[test]
    fn time_spent_waiting_for_a_load_is_not_that_of_decode_steps() {
        let mut model = CostModel::new();
        model.set_load_rate(50e9);
        serve(&mut model, &[1000; 4], PACE);
        for start in [100.0, 200.0, 300.0] {
            observe(&mut model, start, &[(0.3, 0, true); 3]);
            model.idle();
        }
        assert!(!model.hides(GIB, 32, true));
    }

    #[test]
    fn time_without_requests_is_nobodys() {
        let mut model = CostModel::new();
        serve(&mut model, &[1000; 2], PACE);
        let before = model.seconds_per_token();
        model.observe_step(Duration::from_secs(50), 1000, false);
        model.idle();
        serve(&mut model, &[], PACE);
        assert_eq!(model.seconds_per_token(), before);
    }

    proptest! {
        /// However far ahead the engine schedules, however prompts follow one another, and though an
        /// idle engine's first step is a prompt's.
        #[test]
        fn the_rate_of_prompt_tokens_is_found(
            prompts in prop::collection::vec(300u64..9000, 3..20),
            lead in 0usize..6, gap in 4usize..12, lag in 0usize..3,
        ) {
            let mut model = CostModel::new();
            serve(&mut model, &prompts, Pace { lead, gap, lag, slow: None });
            assert_rate(&model, 0.05)?;
        }

        /// Not even at the beginning is anything learned from the decode steps behind a prompt.
        #[test]
        fn the_first_prompts_teach_their_rate_or_nothing(
            prompts in prop::collection::vec(300u64..1000, 1..8), gap in 0usize..12,
        ) {
            let mut model = CostModel::new();
            serve(&mut model, &prompts, Pace { lead: 0, gap, ..PACE });
            if model.seconds_per_token().is_some() {
                assert_rate(&model, 0.05)?;
            }
        }

        #[test]
        fn the_rate_is_found_where_every_step_has_prompt_tokens(lag in 0usize..3) {
            let mut model = CostModel::new();
            serve(&mut model, &[1024; 200], Pace { gap: 0, lag, ..PACE });
            assert_rate(&model, 0.1)?;
        }

        /// As the one that waits for a kernel to be compiled, be it the only one.
        #[test]
        fn one_slow_prompt_teaches_nothing(
            prompts in prop::collection::vec(300u64..9000, 1..20),
            slow in 0usize..20, factor in 2.0f64..100.0,
        ) {
            let mut model = CostModel::new();
            let slow = Some((slow % prompts.len(), factor));
            serve(&mut model, &prompts, Pace { slow, ..PACE });
            if prompts.len() > 1 {
                assert_rate(&model, 0.05)?;
            } else {
                prop_assert_eq!(model.seconds_per_token(), None);
            }
        }

        /// Steps that wait for loads bound what they compute, so few of them wait in vain.
        #[test]
        fn too_high_a_rate_is_mended_by_the_loads_that_it_lets_through(
            factor in 3.0f64..100.0, tokens in 1u64..2000, megabytes in 400u32..4000,
        ) {
            let mut model = CostModel::new();
            model.set_load_rate(50e9);
            // Kernels of one kind after another are compiled.
            for _ in 0..RECENT {
                serve(&mut model, &[1000], Pace { slow: Some((0, factor)), ..PACE });
                model.idle();
            }
            let loading = f64::from(megabytes) * 1e6 / 50e9;
            let step = DECODE_STEP + computing(tokens);
            let mut stalls = 0;
            for i in 0..100 {
                if !model.hides(u64::from(megabytes) * 1_000_000, tokens, true) {
                    break;
                }
                let mut steps = [(DECODE_STEP, 0, false); 8];
                steps[0] = (step.max(loading), tokens, true);
                observe(&mut model, 1e3 + f64::from(i), &steps);
                model.idle();
                stalls += u32::from(loading > step + DECODE_STEP * STRETCH_NOISE);
            }
            prop_assert!(stalls <= 3, "{stalls}");
        }
    }
}
