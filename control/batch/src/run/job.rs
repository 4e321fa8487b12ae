//! One batch, from the state in which it was found to its end, or as far as the lease lasts.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::blobs::Blobs;
use crate::clock;
use crate::error::Failure;
use crate::input::{Entry, Index, Rules, Scan, scan};
use crate::run::assemble::{LineOrder, Lost, assemble};
use crate::run::flight::{Flight, Traffic, give_up};
use crate::run::lease::Lease;
use crate::run::outcome::Unanswered;
use crate::run::recorder::{Recorder, WAITING_MAX};
use crate::state::{Batch, Change, LineError, Status};
use crate::store::{Metadata, Part, Stage, Stream};

/// How long a clock that is set may go unnoticed by an expiry.
const CLOCK_CHECK: Duration = Duration::from_secs(30);

/// What an operator can set for each job.
#[derive(Clone, Copy, Debug)]
pub struct JobOptions {
    /// Requests of one batch at once.
    pub requests_at_once: usize,
    /// Whether one batch may name several models.
    pub mixed_models: bool,
    /// In which order the results stand.
    pub line_order: LineOrder,
    /// How long requests in flight may go on after a cancellation.
    pub cancel_grace: Duration,
    /// And when the server shuts down.
    pub drain: Duration,
}

/// Why no further requests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Cancelled,
    Expired,
    /// Another batch gets the job slot.
    MakingWay,
    ShuttingDown,
    LeaseLost,
}

/// See the module's documentation.
pub(super) struct Job {
    pub(super) metadata: Arc<dyn Metadata>,
    pub(super) blobs: Arc<dyn Blobs>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) lease: Arc<Lease>,
    pub(super) options: JobOptions,
    /// No further requests for this batch: another gets the job slot.
    pub(super) make_way: CancellationToken,
    /// No further requests.
    pub(super) shutdown: CancellationToken,
    /// Nothing more at all.
    pub(super) drained: CancellationToken,
}

/// The requests that are still to be sent, and where they are.
pub(super) struct Plan {
    input: Arc<File>,
    index: Index,
}

impl Job {
    /// Reads the input file. None if it cannot be used, which then ends the batch.
    pub(super) async fn validate(&self) -> Result<Option<Plan>, Failure> {
        let batch = self.lease.batch();
        let key = crate::file::blob_key(&batch.order.input_file_id);
        let input = match self.blobs.local(&key).await {
            Ok(input) => Arc::new(input),
            Err(Failure::Missing { .. }) => {
                let file = &batch.order.input_file_id;
                let error = LineError {
                    code: "input_file_unavailable".to_owned(),
                    message: format!("The input file {file} is not there any more."),
                    param: Some("input_file_id".to_owned()),
                    line: None,
                };
                self.refuse(&batch, vec![error]).await?;
                return Ok(None);
            }
            Err(failure) => return Err(failure),
        };
        let began = Instant::now();
        let scanned = self.scan(&batch, Arc::clone(&input)).await?;
        match scanned {
            Scan::Bad(errors) => {
                self.refuse(&batch, errors).await?;
                Ok(None)
            }
            Scan::Good(index) => {
                if batch.counts().total == 0 {
                    self.accept(&index, began).await?;
                }
                Ok(Some(Plan { input, index }))
            }
        }
    }

    async fn scan(&self, batch: &Batch, input: Arc<File>) -> Result<Scan, Failure> {
        const WHAT: &str = "validating an input file";
        let rules = Rules {
            endpoint: batch.order.endpoint,
            // What was found good stays good, also where the option was changed since.
            mixed_models: self.options.mixed_models || batch.counts().total > 0,
        };
        let (lost, shutdown) = (self.lease.lost().clone(), self.shutdown.clone());
        let scanning = spawn_blocking(move || {
            let go_on = || !lost.is_cancelled() && !shutdown.is_cancelled();
            let source = FromStart {
                file: &input,
                at: 0,
            };
            scan(source, rules, go_on)
        });
        match scanning.await.map_err(Failure::when(WHAT))? {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Err(Failure::Stopped),
            other => other.map_err(Failure::when(WHAT)),
        }
    }

    /// Ends a batch whose input cannot be used: it is rejected or, where requests were sent already,
    /// given up.
    async fn refuse(&self, batch: &Batch, errors: Vec<LineError>) -> Result<(), Failure> {
        if batch.counts().total == 0 {
            self.reject(errors).await
        } else {
            self.give_up(errors).await
        }
    }

    async fn reject(&self, errors: Vec<LineError>) -> Result<(), Failure> {
        let id = &self.lease.fence().batch;
        tracing::info!(batch = id, errors = errors.len(), "input file rejected");
        let change = Change::Reject { errors };
        self.lease.change(change, Vec::new(), Vec::new()).await?;
        Ok(())
    }

    async fn accept(&self, index: &Index, began: Instant) -> Result<(), Failure> {
        let change = Change::Validated {
            model: index.only_model().map(str::to_owned),
            total: index.entries.len() as u64,
        };
        let batch = self.lease.change(change, Vec::new(), Vec::new()).await?;
        metrics::histogram!("kvtide_batch_validation_seconds")
            .record(began.elapsed().as_secs_f64());
        tracing::info!(
            batch = batch.id,
            requests = index.entries.len(),
            took = ?began.elapsed(),
            "input file validated"
        );
        Ok(())
    }

    /// Sends what has no result yet, unless it is too late for that, and finishes the batch.
    pub(super) async fn run(&self, plan: Plan, stage: Stage) -> Result<(), Failure> {
        let Plan { input, index } = plan;
        let batch = self.lease.batch();
        let over = match (batch.status(), stage) {
            (Status::Cancelling, _) => Some(Why::Cancelled),
            // The database's clock says so.
            (_, Stage::End) => Some(Why::Expired),
            (_, Stage::Validate | Stage::Run) => None,
        };
        let mut done: HashSet<u32> = HashSet::new();
        for part in self.metadata.parts(&batch.id).await? {
            done.extend(part.lines);
        }
        let requests = index.entries.len();
        if !done.is_empty() {
            let recorded = done.len();
            tracing::info!(batch = batch.id, recorded, requests, "batch resumed");
        }
        let lanes = index.by_model_and_prefix();
        if done.len() < requests {
            self.complete(&batch, &input, lanes, done, over).await?;
        }
        self.finish(requests).await
    }

    /// Gets a result for every request that is not `done`: from the upstream, until it is `over`.
    async fn complete(
        &self,
        batch: &Batch,
        input: &Arc<File>,
        mut lanes: Vec<(String, Vec<Entry>)>,
        mut done: HashSet<u32>,
        over: Option<Why>,
    ) -> Result<(), Failure> {
        for (_, entries) in &mut lanes {
            entries.retain(|entry| !done.contains(&entry.line));
        }
        let recorder = Recorder::new(
            self.blobs.part_writer(self.lease.fence()),
            Arc::clone(&self.lease),
            self.blobs.gather(),
            self.traffic.shortage.clone(),
            self.drained.clone(),
        );
        let left = lanes.clone();
        let (recorder, why) = match over {
            Some(why) => (recorder, Some(why)),
            None => {
                let (recorder, recorded, why) = self.send(batch, input, lanes, recorder).await?;
                done.extend(recorded);
                (recorder, why)
            }
        };
        let left: Vec<Entry> = left
            .into_iter()
            .flat_map(|(_, entries)| entries)
            .filter(|entry| !done.contains(&entry.line))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        let unanswered = match why {
            Some(Why::Cancelled) => Unanswered {
                code: "batch_cancelled",
                message: "The batch was cancelled before this request was completed.",
            },
            Some(Why::Expired) => Unanswered {
                code: "batch_expired",
                message: "The completion window ended before this request was completed.",
            },
            Some(Why::MakingWay | Why::ShuttingDown | Why::LeaseLost) | None => {
                return Err(Failure::Stopped);
            }
        };
        let expired = why == Some(Why::Expired);
        let (outcomes, results) = mpsc::channel(WAITING_MAX);
        let (given_up, recorded) = tokio::join!(
            give_up(&batch.id, input, &left, unanswered, expired, outcomes),
            recorder.run(results)
        );
        recorded?;
        given_up
    }

    /// Sends requests until all have results or something ends that; gives back which have results, and
    /// what has ended it.
    async fn send(
        &self,
        batch: &Batch,
        input: &Arc<File>,
        lanes: Vec<(String, Vec<Entry>)>,
        recorder: Recorder,
    ) -> Result<(Recorder, Vec<u32>, Option<Why>), Failure> {
        let supervision = Supervision::new();
        let (outcomes, results) = mpsc::channel(WAITING_MAX);
        let flight = Arc::new(Flight {
            traffic: Arc::clone(&self.traffic),
            batch: batch.id.clone(),
            tenant: batch.tenant.clone(),
            endpoint: batch.order.endpoint,
            input: Arc::clone(input),
            slots: Arc::new(Semaphore::new(self.options.requests_at_once)),
            outcomes,
            stop: supervision.stop.clone(),
            abort: supervision.abort.clone(),
        });
        let sending = async {
            let sent = tokio::select! {
                sent = fly(flight, lanes) => sent,
                never = self.supervise(&supervision) => match never {},
            };
            // The recorder's failure is what explains that nobody takes results any more.
            if sent.is_err() {
                supervision.abort.cancel();
            }
            sent
        };
        let (sent, recorded) = tokio::join!(sending, recorder.run(results));
        let (recorder, recorded) = recorded?;
        sent?;
        Ok((recorder, recorded, supervision.why.get().copied()))
    }

    /// Watches for what ends the sending early. Never ends by itself.
    async fn supervise(&self, supervision: &Supervision) -> std::convert::Infallible {
        let grace = tokio::select! {
            () = self.lease.lost().cancelled() => supervision.stop(Why::LeaseLost, Duration::ZERO),
            () = self.shutdown.cancelled() => {
                supervision.stop(Why::ShuttingDown, self.options.drain)
            }
            // What is being answered would be asked for again.
            () = self.make_way.cancelled() => {
                supervision.stop(Why::MakingWay, self.traffic.timeout)
            }
            () = self.expiry() => supervision.stop(Why::Expired, Duration::ZERO),
            () = self.cancellation() => {
                supervision.stop(Why::Cancelled, self.options.cancel_grace)
            }
        };
        tokio::select! {
            () = tokio::time::sleep(grace) => {}
            () = self.lease.lost().cancelled() => {}
            () = self.drained.cancelled() => {}
        }
        supervision.abort.cancel();
        std::future::pending().await
    }

    async fn expiry(&self) {
        let expires_at = self.lease.batch().expires_at;
        loop {
            let left = Duration::from_secs(expires_at.saturating_sub(clock::now()));
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(CLOCK_CHECK)).await;
        }
    }

    async fn cancellation(&self) {
        let mut batch = self.lease.watch();
        let cancelled = batch.wait_for(|batch| batch.status() == Status::Cancelling);
        if cancelled.await.is_err() {
            // The channel closes only with the lease, and this ends before.
            std::future::pending::<()>().await;
        }
    }

    async fn finish(&self, requests: usize) -> Result<(), Failure> {
        let batch = self
            .lease
            .change(Change::Finalize, Vec::new(), Vec::new())
            .await?;
        let parts = self.metadata.parts(&batch.id).await?;
        check_complete(&parts, requests)?;
        let files = match self.assemble(&batch, &parts, Lost::Refused).await {
            Err(Failure::Missing { key }) => {
                tracing::error!(batch = batch.id, key, "results are lost");
                return self
                    .give_up(vec![LineError {
                        code: "results_unavailable".to_owned(),
                        message: "Some results are not there any more.".to_owned(),
                        param: None,
                        line: None,
                    }])
                    .await;
            }
            files => files?,
        };
        let change = Change::Finish {
            output_file_id: files.output_id(),
            error_file_id: files.error_id(),
        };
        self.end(change, files).await
    }

    /// Ends a batch that cannot be finished with the results that are there.
    async fn give_up(&self, errors: Vec<LineError>) -> Result<(), Failure> {
        let batch = self.lease.batch();
        tracing::error!(batch = batch.id, ?errors, "a batch is given up");
        let parts = self.metadata.parts(&batch.id).await?;
        let files = self.assemble(&batch, &parts, Lost::LeftOut).await?;
        let change = Change::GiveUp {
            errors,
            output_file_id: files.output_id(),
            error_file_id: files.error_id(),
        };
        self.end(change, files).await
    }

    async fn assemble(&self, batch: &Batch, parts: &[Part], lost: Lost) -> Result<Files, Failure> {
        let (blobs, lease) = (self.blobs.as_ref(), self.lease.as_ref());
        let order = self.options.line_order;
        let output = (parts, Stream::Output);
        let error = (parts, Stream::Error);
        Ok(Files {
            output: assemble(blobs, lease, batch, output, lost, order).await?,
            error: assemble(blobs, lease, batch, error, lost, order).await?,
        })
    }

    async fn end(&self, change: Change, files: Files) -> Result<(), Failure> {
        let files = files.output.into_iter().chain(files.error).collect();
        let batch = self.lease.change(change, Vec::new(), files).await?;
        let counts = batch.counts();
        metrics::counter!("kvtide_batch_batches_ended_total", "status" => batch.status().as_str())
            .increment(1);
        tracing::info!(
            batch = batch.id,
            status = %batch.status(),
            completed = counts.completed,
            failed = counts.failed,
            "batch ended"
        );
        Ok(())
    }
}

/// The files of a batch that ends.
struct Files {
    output: Option<crate::file::File>,
    error: Option<crate::file::File>,
}

impl Files {
    fn output_id(&self) -> Option<String> {
        self.output.as_ref().map(|file| file.id.clone())
    }

    fn error_id(&self) -> Option<String> {
        self.error.as_ref().map(|file| file.id.clone())
    }
}

async fn fly(flight: Arc<Flight>, lanes: Vec<(String, Vec<Entry>)>) -> Result<(), Failure> {
    let mut flying = JoinSet::new();
    for (model, entries) in lanes {
        flying.spawn(Arc::clone(&flight).lane(model, entries));
    }
    // Each lane has its own; the recorder ends with the last of them.
    drop(flight);
    let mut result = Ok(());
    while let Some(landed) = flying.join_next().await {
        let landed = landed.map_err(Failure::when("a model's task")).flatten();
        result = result.and(landed);
    }
    result
}

/// Every request has one result: what the whole design is for, so it is looked at before files are
/// handed out.
fn check_complete(parts: &[Part], requests: usize) -> Result<(), Failure> {
    let count: usize = parts.iter().map(|part| part.lines.len()).sum();
    let distinct: HashSet<u32> = parts
        .iter()
        .flat_map(|part| part.lines.iter().copied())
        .collect();
    if count == requests && distinct.len() == requests {
        return Ok(());
    }
    Err(Failure::internal(
        "finishing a batch",
        format!(
            "{count} results of {} lines for {requests} requests",
            distinct.len()
        ),
    ))
}

/// Stops the sending, and remembers why.
struct Supervision {
    stop: CancellationToken,
    abort: CancellationToken,
    why: OnceLock<Why>,
}

impl Supervision {
    fn new() -> Supervision {
        Supervision {
            stop: CancellationToken::new(),
            abort: CancellationToken::new(),
            why: OnceLock::new(),
        }
    }

    fn stop(&self, why: Why, grace: Duration) -> Duration {
        // The first reason is the one that counts.
        self.why.get_or_init(|| why);
        self.stop.cancel();
        grace
    }
}

/// Reads a shared file from its beginning without moving the position that others use.
struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = std::os::unix::fs::FileExt::read_at(self.file, buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
