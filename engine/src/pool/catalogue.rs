//! What everybody reads of a pool who has its memory: which blocks are there, and in which state.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvtide_model::{BlockKey, SlotRef};
use kvtide_segment::{ShardStatus, SharedSegment};

use super::index::Index;
use super::location::{Arriving, Location, Source};
use super::slot_table::{SlotState, SlotTable};

/// Slots, index and rows of a pool. Reading it takes no lock, and asks no other process.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) slots: SlotTable,
    pub(crate) index: Index,
    pub(crate) segment: Arc<SharedSegment>,
}

/// A block that is held or being saved, for people.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeldBlock {
    pub(crate) key: BlockKey,
    pub(crate) slot: SlotRef,
    pub(crate) saving: bool,
    /// A bit for each who holds it.
    pub(crate) holders: u64,
}

impl Catalogue {
    pub(crate) fn new(segment: Arc<SharedSegment>) -> Self {
        Self {
            slots: SlotTable::of_segment(Arc::clone(&segment)),
            index: Index::of(&segment),
            segment,
        }
    }

    /// Whether `key` is held or, unless it has to be `certain` that it can be loaded, being saved.
    pub(crate) fn holds(&self, key: BlockKey, certain: bool) -> bool {
        let slot = self.index.find(key).map(|slot| self.slots.current(slot));
        slot.is_some_and(|slot| match certain {
            true => self.is_certain(slot),
            false => self.location(slot) != Location::Lost,
        })
    }

    /// Whether a load of the block that is meant will succeed, unless its memory fails: it is complete,
    /// and the bytes were seen to be right.
    pub(crate) fn is_certain(&self, slot: SlotRef) -> bool {
        match self.slots.state(slot) {
            Some(state) => self.is_certain_in(slot, state),
            None => false,
        }
    }

    /// The same of a slot that was seen in this state.
    pub(crate) fn is_certain_in(&self, slot: SlotRef, state: SlotState) -> bool {
        match state {
            SlotState::Sealed => self.is_proven(slot.slot),
            _ => self.location(slot).is_memory(),
        }
    }

    /// Whether the bytes of a sealed slot were saved, or compared with their checksum, in this life of
    /// the pool. A load compares them in any case; one that cannot be taken back needs it done before.
    pub(crate) fn is_proven(&self, slot: u32) -> bool {
        let word = self.segment.proven_rows(slot / u64::BITS);
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (slot % u64::BITS) != 0)
    }

    /// Notes that they were.
    pub(crate) fn note_proven(&self, slot: u32) {
        if let Some(word) = self.segment.proven_rows(slot / u64::BITS) {
            word.fetch_or(1 << (slot % u64::BITS), Ordering::Release);
        }
    }

    /// A life of the pool begins: nothing is proven.
    pub(crate) fn prove_nothing(&self) {
        let words = 0..self.segment.geometry().bitmap_words();
        for word in words.filter_map(|word| self.segment.proven_rows(word)) {
            word.store(0, Ordering::Release);
        }
    }

    /// The block that a slot has.
    pub(crate) fn block(&self, slot: u32) -> Option<HeldBlock> {
        let slot = self.slots.current(slot);
        self.slots.holds(slot).then(|| HeldBlock {
            key: self.index.key_of(slot.slot),
            slot,
            saving: self.slots.state(slot) == Some(SlotState::Filling),
            holders: self.slots.holders(slot.slot),
        })
    }

    /// Refuses the shards of a slot that nobody has begun.
    pub(crate) fn refuse(&self, slot: SlotRef) {
        for rank in 0..self.segment.geometry().ranks() {
            self.segment.refuse_shard(slot.slot, rank, slot.generation);
        }
    }

    /// Makes shards' headers usable for a slot's next generation that were damaged in an earlier life.
    pub(crate) fn mend(&self, slot: SlotRef) {
        for rank in 0..self.segment.geometry().ranks() {
            self.segment.mend_shard(slot.slot, rank, slot.generation);
        }
    }

    /// When a slot was last used, in seconds of Unix time.
    pub(crate) fn used_at(&self, slot: u32) -> u64 {
        let record = self.segment.record(slot);
        record.map_or(0, |record| record.used_at.load(Ordering::Relaxed).into())
    }

    /// Notes that it was used.
    pub(crate) fn note_used(&self, slot: u32, at: u64) {
        if let Some(record) = self.segment.record(slot) {
            let at = u32::try_from(at).unwrap_or(u32::MAX); // In the year 2106.
            record.used_at.store(at, Ordering::Relaxed);
        }
    }

    /// Where the block is that is meant. What has been saved is known at once, also before the pool has
    /// taken note of it.
    pub(crate) fn location(&self, slot: SlotRef) -> Location {
        match self.slots.state(slot) {
            Some(SlotState::Sealed) => Location::Memory,
            Some(SlotState::Filling) => self.saved(slot),
            // A reset dooms slots whose bytes are whole; they stay so while they are held.
            Some(SlotState::Abandoned | SlotState::Doomed) if self.saved(slot).is_memory() => {
                Location::Memory
            }
            Some(SlotState::Abandoned | SlotState::Doomed | SlotState::Free) | None => {
                Location::Lost
            }
        }
    }

    /// What the headers of its shards say of a slot.
    pub(crate) fn saved(&self, slot: SlotRef) -> Location {
        let arriving = Location::Arriving(Arriving {
            source: Source::Engine,
            bytes: self.segment.geometry().row_bytes() as u64,
        });
        let mut location = Location::Memory;
        for rank in 0..self.segment.geometry().ranks() {
            let state = self.segment.shard_state(slot.slot, rank);
            let Some(state) = state.filter(|state| state.generation == slot.generation) else {
                return arriving;
            };
            match state.status {
                ShardStatus::Sealed => {}
                ShardStatus::Filling => return arriving,
                ShardStatus::Bad => location = Location::Lost,
            }
        }
        location
    }

    /// Whether the bytes of `slot`, which the caller holds, have their checksums.
    pub(crate) fn bytes_match(&self, slot: SlotRef) -> bool {
        (0..self.segment.geometry().ranks()).all(|rank| {
            let state = self.segment.shard_state(slot.slot, rank);
            state.is_some_and(|state| {
                state.generation == slot.generation
                    && state.status == ShardStatus::Sealed
                    && self.segment.compute_checksum(slot.slot, rank) == Some(state.checksum)
            })
        })
    }
}
