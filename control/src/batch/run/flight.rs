//! Requests on their way: each is read from the input file when its turn has come, sent as often as
//! it takes, and its result handed to the recorder.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::batch::blobs::Blobs;
use crate::batch::endpoint::Endpoint;
use crate::batch::error::Failure;
use crate::batch::id;
use crate::batch::input::{Entry, Request};
use crate::batch::run::answer::{self, Answer, MEMORY_BYTES};
use crate::batch::run::body::with_priority;
use crate::batch::run::outcome::{Outcome, Unanswered};
use crate::batch::run::pace::{Pace, Paces, Turn};
use crate::batch::run::retry::{Failures, RetryPolicy, Verdict};
use crate::batch::run::upstream::{NoAnswer, Upstream};

/// Unit of the memory that requests in flight share.
const MEMORY_UNIT: u64 = 1 << 10;

/// What all requests of all jobs share.
pub(super) struct Traffic {
    pub(super) upstream: Arc<Upstream>,
    pub(super) blobs: Arc<dyn Blobs>,
    pub(super) paces: Paces,
    /// Memory for requests and answers, in units of [`MEMORY_UNIT`].
    pub(super) memory: Arc<Semaphore>,
    pub(super) retry: RetryPolicy,
    pub(super) timeout: Duration,
    pub(super) priority: Option<i64>,
}

/// Units of memory for so many bytes.
pub(super) fn memory_units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(MEMORY_UNIT)).unwrap_or(u32::MAX)
}

/// The requests of one batch.
pub(super) struct Flight {
    pub(super) traffic: Arc<Traffic>,
    pub(super) batch: String,
    pub(super) tenant: String,
    pub(super) endpoint: Endpoint,
    pub(super) input: Arc<File>,
    /// Requests of this batch at once.
    pub(super) slots: Arc<Semaphore>,
    pub(super) outcomes: mpsc::Sender<Outcome>,
    /// No further requests.
    pub(super) stop: CancellationToken,
    /// Leave those that are under way.
    pub(super) abort: CancellationToken,
}

/// A request that may be sent now.
struct Ready {
    entry: Entry,
    line: Bytes,
    turn: Turn,
    slot: OwnedSemaphorePermit,
    memory: OwnedSemaphorePermit,
}

impl Flight {
    /// Sends the requests for one model, in this order, and waits for their results.
    pub(super) async fn lane(
        self: Arc<Flight>,
        model: String,
        entries: Vec<Entry>,
    ) -> Result<(), Failure> {
        let pace = self.traffic.paces.of(&model);
        let mut sent = JoinSet::new();
        for entry in entries {
            let ready = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                ready = self.prepare(&pace, entry) => ready?,
            };
            sent.spawn(Arc::clone(&self).request(Arc::clone(&pace), ready));
            while let Some(ended) = sent.try_join_next() {
                ended.map_err(Failure::when("a request's task"))??;
            }
        }
        while let Some(ended) = sent.join_next().await {
            ended.map_err(Failure::when("a request's task"))??;
        }
        Ok(())
    }

    async fn prepare(&self, pace: &Arc<Pace>, entry: Entry) -> Result<Ready, Failure> {
        const WHAT: &str = "waiting for a request's turn";
        let slot = Arc::clone(&self.slots)
            .acquire_owned()
            .await
            .map_err(Failure::when(WHAT))?;
        // Memory before the turn, as for repetitions: the other way round, requests with memory and
        // requests with turns could wait for each other.
        let units = memory_units(u64::from(entry.bytes) + MEMORY_BYTES as u64);
        let memory = Arc::clone(&self.traffic.memory)
            .acquire_many_owned(units)
            .await
            .map_err(Failure::when(WHAT))?;
        let line = read_line(&self.input, entry).await?;
        let turn = pace.turn().await;
        Ok(Ready {
            entry,
            line,
            turn,
            slot,
            memory,
        })
    }

    async fn request(self: Arc<Flight>, pace: Arc<Pace>, ready: Ready) -> Result<(), Failure> {
        let Ready {
            entry,
            line,
            turn,
            slot,
            memory,
        } = ready;
        let in_flight = metrics::gauge!("kvtide_batch_requests_in_flight");
        in_flight.increment(1.0);
        let mut outcome = tokio::select! {
            outcome = self.attempts(&pace, entry, &line, turn) => Some(outcome),
            () = self.abort.cancelled() => None,
        };
        in_flight.decrement(1.0);
        drop(slot);
        if let Some(Ok(outcome)) = &mut outcome {
            outcome.memory = Some(memory);
        }
        match outcome {
            // Whoever closed the channel knows why.
            Some(outcome) => self
                .outcomes
                .send(outcome?)
                .await
                .map_err(|_| Failure::Stopped),
            None => Ok(()),
        }
    }

    /// Sends a request until there is a result.
    async fn attempts(
        &self,
        pace: &Arc<Pace>,
        entry: Entry,
        line: &Bytes,
        turn: Turn,
    ) -> Result<Outcome, Failure> {
        let request: Request<'_> =
            serde_json::from_slice(line).map_err(Failure::when("reading a validated line"))?;
        let id = id::of_request(&self.batch, entry.line);
        let body = self.body(line, request.body)?;
        let mut failures = Failures::new(pace.answers());
        let mut turn = Some(turn);
        loop {
            let mut current = match turn.take() {
                Some(turn) => turn,
                None => pace.turn().await,
            };
            current.begin();
            let result = self.ask(&id, body.clone()).await;
            let (verdict, asked_pause, tokens) = match &result {
                Ok(answer) => (
                    answer.verdict,
                    answer.retry_after,
                    answer.usage.output_tokens,
                ),
                Err(NoAnswer::Local(_)) => {
                    // Not the upstream's fault: nothing is learnt about it.
                    (Verdict::Permanent, None, 0)
                }
                Err(none) => (none.verdict(), None, 0),
            };
            current.end(verdict, asked_pause, tokens);
            metrics::counter!("kvtide_batch_attempts_total", "verdict" => verdict.as_str())
                .increment(1);
            let held_against = failures.add(verdict, pace.answers());
            let last = matches!(verdict, Verdict::Success | Verdict::Permanent)
                || failures.count() >= self.traffic.retry.attempts_max;
            if last {
                return self.outcome(&id, &request.custom_id, entry.line, result);
            }
            metrics::counter!("kvtide_batch_retries_total", "verdict" => verdict.as_str())
                .increment(1);
            // What is not held against the request has slowed down the pace; here it only keeps a
            // limit of one from spinning.
            let count = failures.count();
            let nth = if held_against { count } else { 1 };
            let [random, ..] = *blake3::hash(format!("{id}{count}").as_bytes()).as_bytes();
            let pause = self.traffic.retry.pause(nth, random, asked_pause);
            tokio::time::sleep(pause).await;
        }
    }

    async fn ask(&self, id: &str, body: Bytes) -> Result<Answer, NoAnswer> {
        let traffic = &self.traffic;
        let asking = async {
            let response = traffic
                .upstream
                .send(self.endpoint, id, &self.tenant, body)
                .await?;
            answer::read(response, traffic.blobs.as_ref()).await
        };
        tokio::time::timeout(traffic.timeout, asking)
            .await
            .unwrap_or(Err(NoAnswer::TimedOut(traffic.timeout)))
    }

    /// The body to send: the client's, byte for byte, unless the operator wants a priority in it.
    fn body(&self, line: &Bytes, body: &RawValue) -> Result<Bytes, Failure> {
        match self.traffic.priority {
            None => Ok(line.slice_ref(body.get().as_bytes())),
            Some(priority) => with_priority(body.get(), priority)
                .map(Bytes::from)
                .map_err(Failure::when("reading a validated line")),
        }
    }

    fn outcome(
        &self,
        id: &str,
        custom_id: &str,
        line: u32,
        result: Result<Answer, NoAnswer>,
    ) -> Result<Outcome, Failure> {
        match result {
            Ok(answer) => Ok(Outcome::answered(id, custom_id, line, answer)),
            // The batch is taken up again when the disk is well.
            Err(NoAnswer::Local(failure)) => Err(failure),
            Err(none) => {
                tracing::debug!(batch = self.batch, line, error = %none, "a request has failed");
                let message = none.to_string();
                let why = Unanswered {
                    code: none.code(),
                    message: &message,
                };
                Ok(Outcome::unanswered(id, custom_id, line, why))
            }
        }
    }
}

/// Reads one line of the input file.
async fn read_line(input: &Arc<File>, entry: Entry) -> Result<Bytes, Failure> {
    const WHAT: &str = "reading the input file";
    let input = Arc::clone(input);
    spawn_blocking(move || {
        let mut line = vec![0; entry.bytes as usize];
        input.read_exact_at(&mut line, entry.offset)?;
        Ok(Bytes::from(line))
    })
    .await
    .map_err(Failure::when(WHAT))?
    .map_err(|error: std::io::Error| Failure::internal(WHAT, error))
}

/// Gives every one of `entries` the same result, without asking: what is left of a batch that was
/// cancelled or has expired.
pub(super) async fn give_up(
    batch: &str,
    input: &Arc<File>,
    entries: &[Entry],
    why: Unanswered<'_>,
    expired: bool,
    outcomes: mpsc::Sender<Outcome>,
) -> Result<(), Failure> {
    for entry in entries {
        let line = read_line(input, *entry).await?;
        let request: Request<'_> =
            serde_json::from_slice(&line).map_err(Failure::when("reading a validated line"))?;
        let id = id::of_request(batch, entry.line);
        let mut outcome = Outcome::unanswered(&id, &request.custom_id, entry.line, why);
        outcome.expired = expired;
        outcomes.send(outcome).await.map_err(|_| Failure::Stopped)?;
    }
    Ok(())
}
