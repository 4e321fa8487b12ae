//! What everybody reads of a pool who has its memory: which blocks are there, and in which state.

use std::sync::Arc;

use kvtide_model::{BlockKey, SlotRef};
use kvtide_segment::{ShardStatus, SharedSegment};

use super::index::Index;
use super::slot_table::{SlotState, SlotTable};

/// Slots, index and rows of a pool. Reading it takes no lock, and asks no other process.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) slots: SlotTable,
    pub(crate) index: Index,
    pub(crate) segment: Arc<SharedSegment>,
}

/// How far the block is that a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It can be loaded.
    Complete,
    /// It is being saved.
    Saving,
    /// It never will be complete, or is gone.
    Lost,
}

impl Catalogue {
    pub(crate) fn new(segment: Arc<SharedSegment>) -> Self {
        Self {
            slots: SlotTable::of_segment(Arc::clone(&segment)),
            index: Index::of(&segment),
            segment,
        }
    }

    /// Whether `key` is held or, unless it has to be `complete`, being saved.
    pub(crate) fn holds(&self, key: BlockKey, complete: bool) -> bool {
        let slot = self.index.find(key).map(|slot| self.slots.current(slot));
        slot.is_some_and(|slot| match self.progress(slot) {
            Progress::Complete => true,
            Progress::Saving => !complete,
            Progress::Lost => false,
        })
    }

    /// How far the block is that is meant. What has been saved is known at once, also before the pool
    /// has taken note of it.
    pub(crate) fn progress(&self, slot: SlotRef) -> Progress {
        match self.slots.state(slot) {
            Some(SlotState::Sealed) => Progress::Complete,
            Some(SlotState::Filling) => self.saved(slot),
            // A reset dooms slots whose bytes are whole; they stay so while they are held.
            Some(SlotState::Doomed) if self.saved(slot) == Progress::Complete => Progress::Complete,
            Some(SlotState::Abandoned | SlotState::Doomed | SlotState::Free) | None => {
                Progress::Lost
            }
        }
    }

    /// What the headers of its shards say of a slot.
    pub(crate) fn saved(&self, slot: SlotRef) -> Progress {
        let mut progress = Progress::Complete;
        for rank in 0..self.segment.geometry().ranks() {
            let state = self.segment.shard_state(slot.slot, rank);
            let Some(state) = state.filter(|state| state.generation == slot.generation) else {
                return Progress::Saving;
            };
            match state.status {
                ShardStatus::Sealed => {}
                ShardStatus::Filling => return Progress::Saving,
                ShardStatus::Bad => progress = Progress::Lost,
            }
        }
        progress
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
