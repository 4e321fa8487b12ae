//! Is the engine still as fast as with next to nothing to do? Pure.
//!
//! What is judged is the time that this server's own requests take for each unit of their work. It
//! grows as soon as they slow each other down, or others do, and that is long before an engine is
//! full and says so. The best that was seen is the measure. It grows old: an engine that became
//! slower for good would be starved, and one that was always busy would be the measure of itself.
//! So the limit is lowered now and then until the best has been seen anew.

use std::time::Duration;

use tokio::time::Instant;

use crate::state::Usage;

/// Weight of the newest answer in the average.
const WEIGHT: f64 = 0.1;
/// Answers after which an average says something.
const ANSWERS_MIN: u32 = 5;
/// Work of a request beside its tokens, in tokens of output: so that answers of one token do not set
/// a standard for long ones.
const WORK_MIN: f64 = 16.0;
/// Tokens of a prompt that are as much work as one of the output. Engines read a prompt in parallel.
const PROMPT_TOKENS: f64 = 64.0;
/// Seconds per unit of work that make no difference to anybody.
const SLACK_S: f64 = 0.000_25;
/// How old the best may grow.
const BEST_AGE: Duration = Duration::from_secs(300);
/// The limit while the best is looked for.
const PROBE_LIMIT: usize = 2;
/// At most one part in so many of all time is spent on that.
const PROBE_SHARE: u32 = 20;

/// What follows from an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// There is room for more.
    Grow,
    /// There is not much.
    Hold,
    /// There are too many.
    Cut,
    /// Let there be so many, whatever was said before.
    Set(usize),
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Latency {
    /// How many times longer than at its best an answer may take.
    tolerance: f64,
    average: Average,
    /// Seconds that an answer takes, whatever its work.
    seconds: Average,
    best: f64,
    best_at: Option<Instant>,
    best_lasts: Duration,
    probe: Option<Probe>,
}

#[derive(Debug)]
struct Probe {
    began: Instant,
    /// The limit before.
    limit: usize,
    average: Average,
}

#[derive(Debug, Default)]
struct Average {
    value: f64,
    answers: u32,
}

impl Average {
    fn add(&mut self, sample: f64) {
        self.answers = self.answers.saturating_add(1);
        self.value += (sample - self.value) * WEIGHT.max(1.0 / f64::from(self.answers));
    }
}

impl Latency {
    pub(super) fn new(tolerance: f64) -> Latency {
        Latency {
            tolerance,
            average: Average::default(),
            seconds: Average::default(),
            best: f64::INFINITY,
            best_at: None,
            best_lasts: BEST_AGE,
            probe: None,
        }
    }

    /// How long an answer takes; zero while none was seen.
    pub(super) fn typical(&self) -> Duration {
        Duration::from_secs_f64(self.seconds.value)
    }

    /// Takes an answer that was asked for at `began` and has come `now`, under `limit`.
    pub(super) fn judge(
        &mut self,
        began: Instant,
        now: Instant,
        usage: &Usage,
        limit: usize,
    ) -> Judgement {
        let seconds = now.duration_since(began).as_secs_f64();
        self.seconds.add(seconds);
        let sample = seconds / work(usage);
        if let Some(probe) = &mut self.probe {
            // What began before has run beside too many others.
            if began < probe.began {
                return Judgement::Hold;
            }
            probe.average.add(sample);
            if probe.average.answers < ANSWERS_MIN {
                return Judgement::Hold;
            }
            return self.probed(now);
        }
        self.average.add(sample);
        if self.average.answers < ANSWERS_MIN {
            return Judgement::Grow;
        }
        let average = self.average.value;
        if average < self.best {
            self.best = average;
            self.best_at = Some(now);
        }
        if average <= self.best + SLACK_S {
            return self.grow_or_probe(now, limit);
        }
        let ratio = average / self.best;
        if ratio <= 1.0 + (self.tolerance - 1.0) / 2.0 {
            return self.grow_or_probe(now, limit);
        }
        if ratio <= self.tolerance {
            return match self.grow_or_probe(now, limit) {
                Judgement::Grow => Judgement::Hold,
                probe => probe,
            };
        }
        if limit <= 1 {
            // It is not this server that slows it down.
            self.best = average;
            self.best_at = Some(now);
            return Judgement::Hold;
        }
        Judgement::Cut
    }

    fn grow_or_probe(&mut self, now: Instant, limit: usize) -> Judgement {
        let old = self
            .best_at
            .is_some_and(|at| now.duration_since(at) > self.best_lasts);
        if !old || limit <= PROBE_LIMIT {
            return Judgement::Grow;
        }
        self.probe = Some(Probe {
            began: now,
            limit,
            average: Average::default(),
        });
        Judgement::Set(PROBE_LIMIT)
    }

    fn probed(&mut self, now: Instant) -> Judgement {
        let Some(probe) = self.probe.take() else {
            return Judgement::Hold;
        };
        self.best = probe.average.value;
        self.best_at = Some(now);
        self.best_lasts = BEST_AGE.max(now.duration_since(probe.began) * PROBE_SHARE);
        self.average = probe.average;
        Judgement::Set(probe.limit)
    }
}

/// How much was to be done, in tokens of output.
fn work(usage: &Usage) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts of tokens are small")]
    let (output, prompt) = (
        usage.output_tokens as f64,
        usage.input_tokens.saturating_sub(usage.cached_tokens) as f64,
    );
    WORK_MIN + output + prompt / PROMPT_TOKENS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine whose answers take longer the more it has to do, in time that passes by itself.
    struct Engine {
        latency: Latency,
        now: Instant,
        limit: usize,
    }

    impl Engine {
        fn new() -> Engine {
            Engine {
                latency: Latency::new(1.3),
                now: Instant::now(),
                limit: 4,
            }
        }

        /// One answer: a tenth of a second a token, and a hundredth more for each other request.
        fn answer(&mut self, slower: f64) -> Judgement {
            let began = self.now;
            let others = u32::try_from(self.limit - 1).unwrap();
            let seconds = (0.1 + 0.01 * f64::from(others)) * 116.0 * slower;
            self.now += Duration::from_secs_f64(seconds);
            let usage = Usage {
                output_tokens: 100,
                ..Usage::default()
            };
            let judgement = self.latency.judge(began, self.now, &usage, self.limit);
            match judgement {
                Judgement::Grow => self.limit += 1,
                Judgement::Cut => self.limit = (self.limit * 9 / 10).max(1),
                Judgement::Set(limit) => self.limit = limit,
                Judgement::Hold => {}
            }
            judgement
        }
    }

    #[test]
    fn the_limit_stays_where_answers_take_little_longer_than_at_their_best() {
        let mut engine = Engine::new();
        for _ in 0..300 {
            engine.answer(1.0);
        }
        for _ in 0..1000 {
            engine.answer(1.0);
            assert!((2..=12).contains(&engine.limit), "{}", engine.limit);
        }
    }

    #[test]
    fn the_best_is_looked_for_again_and_does_not_creep_up() {
        let mut engine = Engine::new();
        let mut probes = 0;
        for _ in 0..ANSWERS_MIN {
            engine.answer(1.0);
        }
        for _ in 0..5000 {
            probes += u32::from(engine.answer(1.0) == Judgement::Set(PROBE_LIMIT));
            assert!(engine.latency.best < 0.16, "{}", engine.latency.best);
        }
        assert!(probes > 1);
        // With two at once it is 0.11.
        assert!(engine.latency.best < 0.12, "{}", engine.latency.best);
    }

    #[test]
    fn an_engine_that_is_slower_for_good_becomes_the_measure() {
        let mut engine = Engine::new();
        for _ in 0..100 {
            engine.answer(1.0);
        }
        for _ in 0..500 {
            engine.answer(5.0);
        }
        assert!(engine.limit > 1, "it is not starved");
        assert!(engine.latency.best > 0.4);
    }

    #[test]
    fn long_prompts_are_more_work() {
        let short = Usage {
            output_tokens: 10,
            ..Usage::default()
        };
        let long = Usage {
            input_tokens: 6400,
            cached_tokens: 3200,
            ..short
        };
        assert!((work(&long) - work(&short) - 50.0).abs() < 1e-9);
    }
}
