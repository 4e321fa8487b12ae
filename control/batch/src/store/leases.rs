//! Who works on which batch.

use async_trait::async_trait;

use crate::error::Failure;
use crate::file::File;
use crate::state::{Batch, Change};
use crate::store::Part;

/// The right to work on a batch: given by [`Leases::acquire`], void as soon as somebody else was given
/// a higher epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The batch.
    pub batch: String,
    /// Counts the owners that the batch has had.
    pub epoch: i64,
}

/// What a batch needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its input file has to be validated.
    Validate,
    /// Its requests have to be sent.
    Run,
    /// It has to be ended without sending more: it was cancelled, or its window has ended.
    End,
}

/// A tenant's work for one model: what job slots are shared out by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    /// Whose work it is.
    pub tenant: String,
    /// For which model; none while that is not known, or where it is for several.
    pub model: Option<String>,
}

impl Share {
    /// What a batch is part of.
    #[must_use]
    pub fn of(batch: &Batch) -> Share {
        Share {
            tenant: batch.tenant.clone(),
            model: batch.model.clone(),
        }
    }

    /// As the databases compare it. Tenants' names have no line feeds.
    pub(super) fn key(&self) -> String {
        let model = self.model.as_deref().unwrap_or_default();
        format!("{}\n{model}", self.tenant)
    }
}

/// Leases on batches, and what is written under them. See [`Metadata`](super::Metadata).
#[async_trait]
pub trait Leases: Send + Sync {
    /// Takes up to `limit` live batches at this stage that nobody works on, for `lease_ms`: those of
    /// the shares in `last` after all others; first those of tenants, then of models, for whom the
    /// fewest are being worked on; then the oldest.
    async fn acquire(
        &self,
        server: &str,
        stage: Stage,
        last: &[Share],
        lease_ms: i64,
        limit: u32,
    ) -> Result<Vec<(Batch, Fence)>, Failure>;
    /// Of which shares validated batches wait to be run; at most `limit`.
    async fn waiting(&self, limit: u32) -> Result<Vec<Share>, Failure>;
    /// Prolongs a lease, and gives the batch as it is now.
    ///
    /// # Errors
    /// [`Failure::Fenced`] when somebody else has it.
    async fn renew(&self, fence: &Fence, lease_ms: i64) -> Result<Batch, Failure>;
    /// Gives a batch back to whoever takes it next, not before `pause_ms` have passed.
    async fn release(&self, fence: &Fence, pause_ms: i64) -> Result<(), Failure>;
    /// Changes a batch, adds the parts that go with the change and the files that it names. A
    /// change whose parts are there already was made before, and is not made again.
    ///
    /// # Errors
    /// [`Failure::Fenced`] when somebody else has the lease; nothing is then written.
    async fn change(
        &self,
        fence: &Fence,
        change: Change,
        parts: Vec<Part>,
        files: Vec<File>,
    ) -> Result<Batch, Failure>;
}
