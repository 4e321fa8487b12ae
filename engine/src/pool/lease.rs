//! Pins on a run of blocks, held by whoever is about to use them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtide_model::SlotRef;

use super::catalogue::Catalogue;
use super::location::Location;
use super::pins::Pins;

/// How far leased blocks can be loaded now, by their places in the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// All can.
    Ready,
    /// All before this one can; it is still to come.
    Arriving(usize),
    /// All before this one can; it will not come.
    Lost(usize),
}

/// Pins consecutive blocks of one request until it is dropped.
///
/// A lease that only records a match has a deadline: a request that is never scheduled must not hold
/// memory for ever. Dropping a lease returns every pin, on any thread, and asks the pool nothing.
#[derive(Debug)]
pub struct Lease {
    /// `None` where no pool can be used now: then nothing is leased.
    pins: Option<Arc<Pins>>,
    slots: Vec<SlotRef>,
    expires: Instant,
}

impl Lease {
    /// Of slots that are pinned already.
    pub(crate) fn new(pins: Arc<Pins>, slots: Vec<SlotRef>, ttl: Duration) -> Self {
        Self {
            pins: Some(pins),
            slots,
            expires: Instant::now() + ttl,
        }
    }

    /// Of nothing, where no pool can be used now.
    pub(crate) fn empty() -> Self {
        Self {
            pins: None,
            slots: Vec::new(),
            expires: Instant::now(),
        }
    }

    /// Where the leased blocks are looked up.
    pub(crate) fn catalogue(&self) -> Option<&Catalogue> {
        self.pins.as_ref().map(|pins| &**pins.catalogue())
    }

    /// Whether `slot` is leased once, here, and by nobody else.
    pub(crate) fn is_only_pin(&self, slot: SlotRef) -> bool {
        self.pins
            .as_ref()
            .is_some_and(|pins| pins.is_only_pin(slot))
    }

    fn unpin(&self, slots: &[SlotRef]) {
        if let Some(pins) = &self.pins {
            pins.unpin(slots);
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
        let catalogue = self.catalogue();
        let holds = |&slot: &SlotRef| catalogue.is_some_and(|of| of.slots.holds(slot));
        self.slots.iter().all(holds)
    }

    /// Adds the blocks of `next`, which follow these. The deadline stays.
    pub fn append(&mut self, mut next: Self) {
        self.slots.append(&mut next.slots);
    }

    /// Gives back the pins on the first `blocks`.
    pub fn skip(&mut self, blocks: usize) {
        let skipped: Vec<SlotRef> = self.slots.drain(..blocks.min(self.slots.len())).collect();
        self.unpin(&skipped);
    }

    /// Gives back the pins behind the first `blocks`.
    pub fn truncate(&mut self, blocks: usize) {
        if blocks < self.slots.len() {
            let rest = self.slots.split_off(blocks);
            self.unpin(&rest);
        }
    }

    /// Leading blocks that are complete, and whose bytes were seen to be right.
    #[must_use]
    pub fn complete_blocks(&self) -> usize {
        let catalogue = self.catalogue();
        let certain = |&&slot: &&SlotRef| catalogue.is_some_and(|of| of.is_certain(slot));
        self.slots.iter().take_while(certain).count()
    }

    /// How far the blocks from `place` on can be loaded now.
    #[must_use]
    pub fn readiness(&self, place: usize) -> Readiness {
        let Some(catalogue) = self.catalogue() else {
            return Readiness::Ready; // Nothing is leased.
        };
        for (place, &slot) in self.slots.iter().enumerate().skip(place) {
            match catalogue.location(slot) {
                Location::Memory => {}
                Location::Arriving(_) => return Readiness::Arriving(place),
                Location::Lost => return Readiness::Lost(place),
            }
        }
        Readiness::Ready
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.unpin(&self.slots);
    }
}
