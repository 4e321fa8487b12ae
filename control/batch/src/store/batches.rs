//! What is known of batches, whoever works on them.

use async_trait::async_trait;

use crate::clock::Seconds;
use crate::error::Failure;
use crate::state::{Batch, Status};
use crate::store::values::natural;
use crate::store::{Create, Listed, Page};

/// How many batches may be waiting or in progress.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// Of all tenants together.
    pub all: u64,
    /// Of each tenant.
    pub tenant: u64,
}

impl Places {
    /// Whether one more batch may be added to so many.
    pub(super) fn check(&self, all: u64, tenant: u64) -> Result<(), Failure> {
        if tenant >= self.tenant {
            return Err(Failure::Crowded {
                live: tenant,
                whose: "of your",
            });
        }
        if all >= self.all {
            return Err(Failure::Crowded {
                live: all,
                whose: "of all tenants'",
            });
        }
        Ok(())
    }
}

/// What batches are selected by, beside their document.
pub(super) struct Columns<'a> {
    pub(super) live: bool,
    pub(super) validated: bool,
    pub(super) model: Option<&'a str>,
    /// When it has to end without sending more: 0 if that was asked for, else when its window ends.
    pub(super) due_at: Seconds,
}

impl Columns<'_> {
    pub(super) fn of(batch: &Batch) -> Columns<'_> {
        let cancelling = batch.status() == Status::Cancelling;
        Columns {
            live: !batch.status().is_terminal(),
            // A file without requests does not become valid.
            validated: batch.counts().total > 0,
            model: batch.model.as_deref(),
            due_at: if cancelling { 0 } else { batch.expires_at },
        }
    }
}

/// What the queue looks like, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Batches that have not ended.
    pub live: u64,
    /// Of these, those that nobody works on, and that do not rest.
    pub waiting: u64,
    /// When the oldest of these was created.
    pub oldest_waiting_at: Option<Seconds>,
}

impl Queue {
    pub(super) fn of(live: i64, waiting: i64, oldest_waiting_at: Option<i64>) -> Queue {
        Queue {
            live: natural(live),
            waiting: natural(waiting),
            oldest_waiting_at: oldest_waiting_at.map(natural),
        }
    }
}

/// Batches, as their owners see them. See [`Metadata`](super::Metadata).
#[async_trait]
pub trait Batches: Send + Sync {
    /// Adds a batch, or gives back the one that the same create has added before, if that one is still
    /// to be completed.
    ///
    /// # Errors
    /// [`Failure::Crowded`] when there are as many as `places` allows.
    async fn add_batch(
        &self,
        batch: Batch,
        create: Create,
        places: Places,
    ) -> Result<Batch, Failure>;
    /// A batch of this tenant.
    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<Batch>, Failure>;
    /// The batches of this tenant, if `page.after` is none or one of them.
    async fn batches(&self, tenant: &str, page: Page) -> Result<Option<Listed<Batch>>, Failure>;
    /// Marks a batch of this tenant for cancellation.
    ///
    /// # Errors
    /// [`Failure::Illegal`] when it has ended otherwise.
    async fn cancel(&self, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure>;
    /// Counts what waits.
    async fn queue(&self) -> Result<Queue, Failure>;
}
