//! What belongs to one engine of those that use a pool: its saves, what it is told of its namespace,
//! and its right to clear it.
//!
//! A pool outlives its engines. When a session is dropped, however its engine ended, nothing of it is
//! left: what it was filling is condemned, so that nobody waits for bytes that will not come, and a
//! writer that still runs is fenced by the generations of the shards' headers. Its bytes are not: before
//! engines in several processes share a pool, a slot that may still be written has to wait for its
//! writer. What it has saved stays.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtide_model::{BlockKey, NamespaceId};

use crate::pool::{Pool, PoolEvent, SavePlan};

/// Tells the sessions of one pool apart; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionId(u64);

impl SessionId {
    pub(crate) fn new(number: u64) -> Self {
        Self(number)
    }
}

/// Why a session cannot be opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionError {
    /// As many are open as a pool serves.
    #[error("the pool serves {max} engines already; stop one of them")]
    TooMany {
        /// How many it serves.
        max: usize,
    },
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Session {
    pool: Arc<Pool>,
    id: SessionId,
}

impl Session {
    /// A session of an engine whose blocks are those of `namespace`. With `events` it is told what
    /// becomes of them, whoever saved them.
    ///
    /// # Errors
    /// [`SessionError`] when the pool serves too many engines.
    pub fn open(
        pool: &Arc<Pool>,
        namespace: NamespaceId,
        events: bool,
    ) -> Result<Self, SessionError> {
        Ok(Self {
            id: pool.open_session(namespace, events)?,
            pool: Arc::clone(pool),
        })
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Plans the save of `chain`'s blocks from `from` on, which lie in the engine's `blocks`, as far
    /// as the pool does not hold them already; those that it holds are marked as used.
    #[must_use]
    pub fn begin_save(&self, chain: &[BlockKey], from: usize, blocks: &[u32]) -> SavePlan {
        self.pool.begin_save(self.id, chain, from, blocks)
    }

    /// Jobs of this engine that still read one of its `blocks` and must end before it is overwritten.
    #[must_use]
    pub fn saves_reading(&self, blocks: &[u32]) -> Vec<u64> {
        self.pool.saves_reading(self.id, blocks)
    }

    /// Takes note of the saves that workers have finished since the last call. Returns this engine's
    /// blocks that are still in flight.
    #[must_use]
    pub fn poll(&self) -> usize {
        self.pool.poll_session(self.id)
    }

    /// Waits until no save of this engine is in flight, at most for `limit`; returns whether that was
    /// reached.
    #[must_use]
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.poll() > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }

    /// Drops every block of this engine's namespace, also those that others saved. Blocks that are
    /// pinned or being saved go as soon as they no longer are.
    pub fn clear(&self) {
        self.pool.clear_namespace_of(self.id);
    }

    /// What happened in this engine's namespace since the last call, oldest first.
    #[must_use]
    pub fn take_events(&self) -> Vec<PoolEvent> {
        self.pool.take_events(self.id)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.pool.close_session(self.id);
    }
}
