//! Requests on their way: each is read from the input file when its turn has come ([`Lane`] says when),
//! sent, and its result handed to the recorder.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::blobs::Blobs;
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::id;
use crate::input::{Entry, Request};
use crate::run::answer::{self, Answer, Keep, Patience};
use crate::run::body::with_priority;
use crate::run::lane::{Lane, Report, Step};
use crate::run::memory::{ANSWER_UNITS_BYTES, Memory, keep, units};
use crate::run::outcome::{Outcome, Unanswered};
use crate::run::pace::{Paces, Turn};
use crate::run::queue::Sending;
use crate::run::remembered::Remembered;
use crate::run::retry::RetryPolicy;
use crate::run::shortage::Shortage;
use crate::run::upstream::{NoAnswer, Upstream};
use crate::state::Usage;

/// What all requests of all jobs share.
pub(super) struct Traffic {
    pub(super) upstream: Arc<Upstream>,
    pub(super) blobs: Arc<dyn Blobs>,
    pub(super) paces: Paces,
    pub(super) shortage: Shortage,
    pub(super) remembered: Remembered,
    /// Memory for requests and answers, in [`units`].
    pub(super) memory: Arc<Semaphore>,
    pub(super) retry: RetryPolicy,
    pub(super) timeout: Duration,
    pub(super) priority: Option<i64>,
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
    sending: Sending,
    line: Bytes,
    turn: Turn,
    memory: Memory,
    /// One of the batch's places for requests in flight.
    slot: OwnedSemaphorePermit,
}

impl Flight {
    /// Sends the requests for one model, and waits for their results.
    pub(super) async fn lane(
        self: Arc<Flight>,
        model: String,
        entries: Vec<Entry>,
    ) -> Result<(), Failure> {
        let pace = self.traffic.paces.of(&model, &self.tenant);
        let remembered = &self.traffic.remembered;
        let failed = remembered.take(&self.batch, &model);
        let lane = Arc::new(Lane::new(pace, entries, failed, self.traffic.retry));
        let mut sent = JoinSet::new();
        while let Some(ready) = self.prepare_beside(&lane, &mut sent).await? {
            sent.spawn(Arc::clone(&self).request(Arc::clone(&lane), ready));
        }
        while let Some(ended) = sent.join_next().await {
            ended.map_err(Failure::when("a request's task"))??;
        }
        remembered.keep(&self.batch, &model, lane.failures());
        Ok(())
    }

    /// Waits until a request may be sent, and reads it; none if no more is to be sent. Those that were
    /// `sent` may end meanwhile.
    async fn prepare_beside(
        &self,
        lane: &Lane,
        sent: &mut JoinSet<Result<(), Failure>>,
    ) -> Result<Option<Ready>, Failure> {
        let prepare = self.prepare(lane);
        tokio::pin!(prepare);
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ok(None),
                Some(ended) = sent.join_next() => {
                    ended.map_err(Failure::when("a request's task"))??;
                }
                ready = &mut prepare => return ready,
            }
        }
    }

    async fn prepare(&self, lane: &Lane) -> Result<Option<Ready>, Failure> {
        const WHAT: &str = "waiting for a request's turn";
        let traffic = &self.traffic;
        while lane.has_more().await {
            let slot = Arc::clone(&self.slots).acquire_owned().await;
            let slot = slot.map_err(Failure::when(WHAT))?;
            traffic.shortage.well().await;
            // Memory only with the turn: what waits for its turn, perhaps for hours, takes none. Whoever
            // has memory is being answered or recorded, and waits for no turn.
            let Some((sending, turn)) = lane.take().await else {
                continue;
            };
            let needed = units(self.bytes_of(sending.entry));
            let of_model = Arc::clone(lane.pace.memory()).acquire_many_owned(needed);
            let of_model = of_model.await.map_err(Failure::when(WHAT))?;
            let of_all = Arc::clone(&traffic.memory).acquire_many_owned(needed);
            let of_all = of_all.await.map_err(Failure::when(WHAT))?;
            return Ok(Some(Ready {
                line: read_line(&self.input, sending.entry).await?,
                sending,
                turn,
                memory: [of_model, of_all],
                slot,
            }));
        }
        Ok(None)
    }

    /// Memory that a request takes while it is sent and answered.
    fn bytes_of(&self, entry: Entry) -> u64 {
        // A priority is put into a copy.
        let copies = if self.traffic.priority.is_some() {
            2
        } else {
            1
        };
        u64::from(entry.bytes) * copies + ANSWER_UNITS_BYTES
    }

    async fn request(self: Arc<Flight>, lane: Arc<Lane>, ready: Ready) -> Result<(), Failure> {
        let in_flight = metrics::gauge!("kvtide_batch_requests_in_flight");
        in_flight.increment(1.0);
        let outcome = tokio::select! {
            outcome = self.attempt(&lane, ready) => outcome,
            () = self.abort.cancelled() => Ok(None),
        };
        in_flight.decrement(1.0);
        match outcome? {
            // Whoever closed the channel knows why.
            Some(outcome) => self
                .outcomes
                .send(outcome)
                .await
                .map_err(|_| Failure::Stopped),
            None => Ok(()),
        }
    }

    /// Sends a request once; gives back its result, if it then has one.
    async fn attempt(&self, lane: &Lane, ready: Ready) -> Result<Option<Outcome>, Failure> {
        let Ready {
            sending,
            line,
            mut turn,
            memory,
            slot,
        } = ready;
        let id = id::of_request(&self.batch, sending.entry.line);
        let request: Request<'_> =
            serde_json::from_slice(&line).map_err(Failure::when("reading a validated line"))?;
        let body = self.body(&line, request.body)?;
        let Some(result) = self.ask(&mut turn, &id, body).await else {
            return Ok(None);
        };
        let report = match &result {
            Ok(answer) => Report {
                verdict: answer.verdict,
                asked: answer.retry_after,
                usage: answer.usage,
            },
            Err(none) => Report {
                verdict: none.verdict(),
                asked: None,
                usage: Usage::default(),
            },
        };
        let count = sending.failures.count();
        let [random, ..] = *blake3::hash(format!("{id}{count}").as_bytes()).as_bytes();
        let reason = || match &result {
            Ok(answer) => format!("it answers with status {}", answer.status),
            Err(none) => none.to_string(),
        };
        let step = lane.end(&sending, turn, &report, random, reason);
        drop(slot);
        if step != Step::Result {
            return Ok(None);
        }
        let line = sending.entry.line;
        let mut outcome = self.outcome(&id, &request.custom_id, line, result)?;
        // Until it is recorded, the result takes what it is long, not what it might have been.
        let needed = units(outcome.memory_bytes());
        outcome.memory = Some(memory.map(|share| keep(share, needed)));
        Ok(Some(outcome))
    }

    /// Asks, as soon as this server is able to; nobody if no more is to be sent by then.
    async fn ask(
        &self,
        turn: &mut Turn,
        id: &str,
        body: Bytes,
    ) -> Option<Result<Answer, NoAnswer>> {
        let mut shortage = None;
        loop {
            turn.begin();
            let asked = self.ask_once(id, body.clone()).await;
            let Err(error @ NoAnswer::Exhausted(_)) = &asked else {
                return Some(asked);
            };
            let shortage = shortage.get_or_insert_with(|| {
                turn.could_not_begin();
                self.traffic.shortage.of_connections(&self.batch, error)
            });
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                () = shortage.rest() => {}
            }
        }
    }

    async fn ask_once(&self, id: &str, body: Bytes) -> Result<Answer, NoAnswer> {
        let traffic = &self.traffic;
        let mut patience = Patience::new(traffic.timeout);
        let asking = traffic.upstream.send(self.endpoint, id, &self.tenant, body);
        let response = patience.wait_for(asking).await??;
        let keep = Keep {
            blobs: traffic.blobs.as_ref(),
            shortage: &traffic.shortage,
            batch: &self.batch,
        };
        answer::read(response, keep, &mut patience).await
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
            // Nothing that the upstream or the disk could mend.
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
