//! The lease on a batch: kept alive while the batch is worked on, and checked before every write.
//!
//! The database refuses what a lost lease would write. That the lease is also checked here, against
//! a clock that goes on while the process is stopped, keeps a server that was stopped for long from
//! even trying.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::error::Failure;
use crate::file::File;
use crate::state::{Batch, Change};
use crate::store::{Fence, Metadata, Part};

/// Share of the lease after which it is renewed.
const RENEWALS: u32 = 4;
/// How often at the least: it is also how a server learns of a cancellation that another took.
const RENEW_WITHIN: Duration = Duration::from_secs(3);

fn silent() -> Failure {
    Failure::internal("renewing a lease", "the database does not answer")
}

/// See the module's documentation.
pub(super) struct Lease {
    metadata: Arc<dyn Metadata>,
    fence: Fence,
    length: Duration,
    valid_until: Mutex<Instant>,
    batch: watch::Sender<Batch>,
    lost: CancellationToken,
}

impl Lease {
    /// A lease that was asked for at `since`.
    pub(super) fn new(
        metadata: Arc<dyn Metadata>,
        fence: Fence,
        batch: Batch,
        length: Duration,
        since: Instant,
    ) -> Lease {
        Lease {
            metadata,
            fence,
            length,
            valid_until: Mutex::new(since + length),
            batch: watch::Sender::new(batch),
            lost: CancellationToken::new(),
        }
    }

    pub(super) fn fence(&self) -> &Fence {
        &self.fence
    }

    /// The batch as it was last seen.
    pub(super) fn batch(&self) -> Batch {
        self.batch.borrow().clone()
    }

    /// Tells of changes to the batch.
    pub(super) fn watch(&self) -> watch::Receiver<Batch> {
        self.batch.subscribe()
    }

    /// Ends when the lease is lost.
    pub(super) fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Fails if the lease is lost, or has run out.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if self.lost.is_cancelled() || Instant::now() >= self.valid_until() {
            self.lost.cancel();
            return Err(self.fenced());
        }
        Ok(())
    }

    /// Changes the batch under this lease.
    pub(super) async fn change(
        &self,
        change: Change,
        parts: Vec<Part>,
        files: Vec<File>,
    ) -> Result<Batch, Failure> {
        self.check()?;
        let changed = self
            .metadata
            .change(&self.fence, change, parts, files)
            .await;
        match changed {
            Ok(batch) => {
                self.batch.send_replace(batch.clone());
                Ok(batch)
            }
            Err(failure) => {
                if matches!(failure, Failure::Fenced { .. }) {
                    self.lost.cancel();
                }
                Err(failure)
            }
        }
    }

    /// Renews the lease until it is dropped or lost, and whenever `nudge` says that there is news.
    pub(super) async fn keep(&self, nudge: &Notify) {
        let every = (self.length / RENEWALS).min(RENEW_WITHIN);
        loop {
            tokio::select! {
                () = self.lost.cancelled() => return,
                () = tokio::time::sleep(every) => {}
                () = nudge.notified() => {}
            }
            let since = Instant::now();
            let length_ms = i64::try_from(self.length.as_millis()).unwrap_or(i64::MAX);
            // A database that is silent must not keep the lease from running out here.
            let renewal = self.metadata.renew(&self.fence, length_ms);
            let renewed = timeout(self.length / 2, renewal).await;
            match renewed.unwrap_or_else(|_| Err(silent())) {
                Ok(batch) => {
                    *self.lock() = since + self.length;
                    self.batch.send_if_modified(|known| {
                        let changed = known.status() != batch.status();
                        if changed {
                            *known = batch;
                        }
                        changed
                    });
                }
                Err(Failure::Fenced { .. }) => self.lost.cancel(),
                Err(error) => {
                    tracing::warn!(batch = self.fence.batch, %error, "a lease was not renewed");
                    // The caller is told only if it runs out.
                    self.check().ok();
                }
            }
        }
    }

    fn fenced(&self) -> Failure {
        Failure::Fenced {
            batch: self.fence.batch.clone(),
        }
    }

    fn valid_until(&self) -> Instant {
        *self.lock()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.valid_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
