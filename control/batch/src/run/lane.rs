//! The requests of a batch for one model, on their way: which is sent next and when, and what follows
//! from how it went. Knows nothing of what is sent, nor how.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::input::Entry;
use crate::run::pace::{Absence, Against, Pace, Turn};
use crate::run::queue::{Next, Outlook, Purpose, Queue, Sending};
use crate::run::retry::{Failures, RetryPolicy, Verdict};
use crate::state::Usage;

/// See the module's documentation.
pub(super) struct Lane {
    pub(super) pace: Arc<Pace>,
    queue: Mutex<Queue>,
    /// A request has ended.
    changed: Notify,
    policy: RetryPolicy,
}

/// How an attempt went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    pub(super) verdict: Verdict,
    /// How long the upstream wants to be left alone.
    pub(super) asked: Option<Duration>,
    pub(super) usage: Usage,
}

/// What follows from an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// What came of it is the request's result.
    Result,
    /// The request is sent again.
    Again,
    /// Nothing: the request has its result.
    Nothing,
}

impl Lane {
    /// Of the requests, some have `failed` before, by their lines.
    pub(super) fn new(
        pace: Arc<Pace>,
        entries: Vec<Entry>,
        failed: HashMap<u32, Failures>,
        policy: RetryPolicy,
    ) -> Lane {
        let answers = pace.answers();
        let failed = failed
            .into_iter()
            .map(|(line, failures)| (line, failures.resumed(answers)))
            .collect();
        let queue = Queue::new(entries, failed, Instant::now());
        pace.load.to_repeat(queue.to_repeat());
        Lane {
            pace,
            queue: Mutex::new(queue),
            changed: Notify::new(),
            policy,
        }
    }

    /// Waits until a request can be sent; false when all have their results. For one caller.
    pub(super) async fn has_more(&self) -> bool {
        loop {
            let outlook = self.outlook();
            let until = match self.lock().next(&outlook) {
                Next::Send => return true,
                Next::Nothing => return false,
                Next::Wait(until) => until,
            };
            let due = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Waits for the model, and chooses what to ask it; none if there is nothing to be asked any more.
    pub(super) async fn take(&self) -> Option<(Sending, Turn)> {
        let turn = self.pace.turn().await;
        let outlook = self.outlook();
        let sending = self.lock().take(&outlook)?;
        if matches!(sending.purpose, Purpose::Again | Purpose::Alone) {
            self.pace.load.repeated(1);
        }
        Some((sending, turn))
    }

    /// Says how an attempt went. `random` spreads what failed together, `reason` is for the log.
    pub(super) fn end(
        &self,
        sending: &Sending,
        turn: Turn,
        report: &Report,
        random: u8,
        reason: impl FnOnce() -> String,
    ) -> Step {
        let Report {
            verdict,
            asked,
            usage,
        } = *report;
        // What was cleared only because it is waited for no more was not cleared by an answer.
        let against = if self.pace.gave_up() {
            Against::Upstream
        } else {
            sending.against(verdict)
        };
        if let Some(pause) = turn.end(verdict, against, asked, &usage) {
            let (model, reason) = (self.pace.model(), reason());
            tracing::warn!(
                model,
                ?pause,
                reason,
                "the upstream is not available; pausing"
            );
        }
        metrics::counter!("kvtide_batch_attempts_total", "verdict" => verdict.as_str())
            .increment(1);
        let mut failures = sending.failures;
        let held = failures.add(verdict, self.pace.answers());
        let is_witness = sending.purpose == Purpose::Witness;
        let gave_up = verdict == Verdict::Absent(Absence::Refused) && self.pace.gave_up();
        let has_result = matches!(verdict, Verdict::Success | Verdict::Permanent)
            || (failures.count() >= self.policy.attempts_max && !is_witness)
            || gave_up;
        if has_result {
            let tokens = (verdict == Verdict::Success).then_some(usage.total_tokens);
            self.lock().ended(sending, tokens);
        } else {
            // That nobody was there has slowed down the pace; here it only keeps a limit of one from
            // spinning. A 429 may be for this request alone: its own pauses grow as well.
            let nth = if held {
                failures.count()
            } else {
                failures.overloads().max(1)
            };
            let due = Instant::now() + self.policy.pause(nth, random, asked);
            if !is_witness {
                self.pace.load.to_repeat(1);
            }
            self.lock().failed(sending, failures, due);
        }
        self.changed.notify_one();
        match (is_witness, has_result) {
            (true, _) => Step::Nothing,
            (false, true) => Step::Result,
            (false, false) => {
                metrics::counter!("kvtide_batch_retries_total", "verdict" => verdict.as_str())
                    .increment(1);
                Step::Again
            }
        }
    }

    /// How often requests that have no result yet have failed, by their lines.
    pub(super) fn failures(&self) -> HashMap<u32, Failures> {
        self.lock().failures()
    }

    fn outlook(&self) -> Outlook {
        Outlook {
            now: Instant::now(),
            answers: self.pace.answers(),
            is_down: self.pace.is_down(),
            gave_up: self.pace.gave_up(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let left = self.lock().to_repeat();
        self.pace.load.repeated(left);
    }
}

#[cfg(test)]
mod tests;
