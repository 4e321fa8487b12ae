//! Records results: gathers what comes in for a moment, writes it behind what is there, and enters it
//! in the database, which is what makes it a result. Dies with the lease.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::blobs::{PartWriter, Piece};
use crate::error::Failure;
use crate::run::lease::Lease;
use crate::run::outcome::Outcome;
use crate::run::shortage::{Shortage, Trouble};
use crate::state::{Change, Usage};
use crate::store::{Part, Stream};

/// Results that may wait for the recorder. Those in memory are also bounded by their bytes.
pub(super) const WAITING_MAX: usize = 1024;
/// Results written at once.
const GROUP_MAX: usize = 4096;
/// Bytes after which results are written without waiting for more.
const GROUP_BYTES: u64 = 4 << 20;

/// See the module's documentation.
pub(super) struct Recorder {
    parts: Box<dyn PartWriter>,
    lease: Arc<Lease>,
    gather: Duration,
    /// While a write fails, nothing more is asked for.
    shortage: Shortage,
    /// The server has shut down: what cannot be written now is asked for again by the next.
    drained: CancellationToken,
    /// Lines recorded.
    recorded: Vec<u32>,
}

impl Recorder {
    pub(super) fn new(
        parts: Box<dyn PartWriter>,
        lease: Arc<Lease>,
        gather: Duration,
        shortage: Shortage,
        drained: CancellationToken,
    ) -> Recorder {
        Recorder {
            parts,
            lease,
            gather,
            shortage,
            drained,
            recorded: Vec::new(),
        }
    }

    /// Records what comes until no more can come; gives back the lines recorded by this recorder.
    pub(super) async fn run(
        mut self,
        mut outcomes: mpsc::Receiver<Outcome>,
    ) -> Result<(Recorder, Vec<u32>), Failure> {
        while let Some(first) = outcomes.recv().await {
            let until = Instant::now() + self.gather;
            let mut bytes = first.bytes();
            let mut group = vec![first];
            while bytes < GROUP_BYTES && group.len() < GROUP_MAX {
                match timeout_at(until, outcomes.recv()).await {
                    Ok(Some(next)) => {
                        bytes += next.bytes();
                        group.push(next);
                    }
                    Ok(None) | Err(_) => break,
                }
            }
            self.record(group).await?;
        }
        let recorded = std::mem::take(&mut self.recorded);
        Ok((self, recorded))
    }

    async fn record(&mut self, group: Vec<Outcome>) -> Result<(), Failure> {
        let mut usage = Usage::default();
        let mut expired = false;
        let mut texts: [Vec<Piece>; 2] = Default::default();
        let mut lines: [Vec<u32>; 2] = Default::default();
        // Given back only when the group is recorded: what waits here still takes memory.
        let mut memory = Vec::new();
        for outcome in group {
            usage.add(&outcome.usage);
            expired |= outcome.expired;
            let which = usize::from(outcome.stream == Stream::Error);
            texts[which].extend(outcome.text);
            lines[which].push(outcome.line);
            memory.push(outcome.memory);
        }
        let counts = [lines[0].len() as u64, lines[1].len() as u64];
        let mut parts = Vec::new();
        for (stream, text, lines) in [Stream::Output, Stream::Error]
            .into_iter()
            .zip(texts)
            .zip(lines)
            .map(|((stream, text), lines)| (stream, text, lines))
        {
            if lines.is_empty() {
                continue;
            }
            let text = Arc::new(text);
            let mut trouble = None;
            let extent = loop {
                self.lease.check()?;
                match self.parts.append(stream, Arc::clone(&text)).await {
                    Ok(extent) => break extent,
                    Err(error) => self.pause(&mut trouble, &error).await?,
                }
            };
            self.recorded.extend_from_slice(&lines);
            parts.push(Part {
                stream,
                key: extent.key,
                offset: extent.offset,
                bytes: extent.bytes,
                lines,
            });
        }
        let [completed, failed] = counts;
        let change = Change::Record {
            completed,
            failed,
            usage,
            expired,
        };
        let mut trouble = None;
        loop {
            // Entering the same parts twice has no effect: a commit whose answer was lost is
            // found again.
            match self
                .lease
                .change(change.clone(), parts.clone(), Vec::new())
                .await
            {
                Ok(_) => break,
                Err(error @ (Failure::Fenced { .. } | Failure::Illegal(_))) => return Err(error),
                Err(error) => self.pause(&mut trouble, &error).await?,
            }
        }
        for (stream, count) in ["output", "error"].into_iter().zip(counts) {
            metrics::counter!("kvtide_batch_results_total", "file" => stream).increment(count);
        }
        drop(memory);
        Ok(())
    }

    /// Waits before the next attempt, as long as the lease can be kept.
    async fn pause(&self, trouble: &mut Option<Trouble>, error: &Failure) -> Result<(), Failure> {
        let batch = &self.lease.fence().batch;
        let trouble = trouble.get_or_insert_with(|| self.shortage.of_room());
        tokio::select! {
            () = trouble.wait(batch, error) => self.lease.check(),
            () = self.lease.lost().cancelled() => self.lease.check(),
            () = self.drained.cancelled() => Err(Failure::Stopped),
        }
    }
}
