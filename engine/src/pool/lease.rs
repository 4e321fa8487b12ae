//! Pins on a run of blocks, held by whoever is about to use them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtide_model::SlotRef;

use super::Shared;
use super::slot_table::SlotState;
use crate::sync::lock;

/// Whether leased blocks can be loaded now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// All are complete.
    Ready,
    /// Some are still being saved, the first of them at this place of the lease.
    Saving(usize),
    /// The blocks at these places of the lease were lost: their save failed.
    Lost(Vec<usize>),
}

/// Pins consecutive blocks of one request until it is dropped.
///
/// A lease that only records a match has a deadline: a request that is never scheduled must not hold
/// memory for ever. Dropping a lease returns every pin, on any thread; only the last pin of a block that was dropped
/// meanwhile takes the pool's lock.
#[derive(Debug)]
pub struct Lease {
    shared: Arc<Shared>,
    slots: Vec<SlotRef>,
    expires: Instant,
}

impl Lease {
    pub(super) fn new(shared: Arc<Shared>, slots: Vec<SlotRef>, ttl: Duration) -> Self {
        Self {
            shared,
            slots,
            expires: Instant::now() + ttl,
        }
    }

    /// The leased blocks, in the order of the request's tokens.
    #[must_use]
    pub fn slots(&self) -> &[SlotRef] {
        &self.slots
    }

    /// Number of leased blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether nothing is leased.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether the deadline has passed.
    #[must_use]
    pub fn is_expired(&self, now: Instant) -> bool {
        now >= self.expires
    }

    /// Whether a new lookup would find the same blocks: none has been lost or cleared since.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.slots.iter().all(|&slot| self.shared.slots.holds(slot))
    }

    /// Adds the blocks of `next`, which follow these. The deadline stays.
    pub fn append(&mut self, mut next: Self) {
        self.slots.append(&mut next.slots);
    }

    /// Gives back the pins on the first `blocks`.
    pub fn skip(&mut self, blocks: usize) {
        let skipped: Vec<SlotRef> = self.slots.drain(..blocks.min(self.slots.len())).collect();
        self.shared.unpin(&skipped);
    }

    /// Marks the blocks as used, so that they are given up later.
    pub fn mark_used(&self) {
        let mut state = lock(&self.shared.state);
        state.used_by_lease(&self.shared.slots, &self.slots);
    }

    /// Gives back the pins behind the first `blocks`.
    pub fn truncate(&mut self, blocks: usize) {
        if blocks < self.slots.len() {
            let rest = self.slots.split_off(blocks);
            self.shared.unpin(&rest);
        }
    }

    /// Leading blocks that are complete.
    #[must_use]
    pub fn complete_blocks(&self) -> usize {
        let sealed = |&slot: &SlotRef| self.shared.slots.state(slot) == Some(SlotState::Sealed);
        self.slots.iter().take_while(|slot| sealed(slot)).count()
    }

    /// Whether the blocks can be loaded now.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let mut saving = None;
        let mut lost = Vec::new();
        for (i, &slot) in self.slots.iter().enumerate() {
            match self.shared.slots.state(slot) {
                Some(SlotState::Sealed) => {}
                Some(SlotState::Filling) => saving = saving.or(Some(i)),
                // A reset dooms slots whose bytes are whole; they stay so while they are pinned.
                Some(SlotState::Doomed) if self.shared.is_intact(slot) => {}
                Some(SlotState::Abandoned | SlotState::Doomed | SlotState::Free) | None => {
                    lost.push(i);
                }
            }
        }
        match (lost.is_empty(), saving) {
            (false, _) => Readiness::Lost(lost),
            (true, Some(first)) => Readiness::Saving(first),
            (true, None) => Readiness::Ready,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.shared.unpin(&self.slots);
    }
}
