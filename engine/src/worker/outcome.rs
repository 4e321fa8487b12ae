//! What becomes of each block of a load.

use std::ops::Range;
use std::time::Instant;

use kvtide_kernels::copy::{Registration, RowMove};
use kvtide_model::{BlockMove, SlotRef};
use kvtide_segment::ShardStatus;

/// How a load ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadOutcome {
    /// Places in the plan of the blocks that must not be used.
    pub failed: Vec<usize>,
    /// Slots whose bytes did not have their checksum.
    pub damaged: Vec<SlotRef>,
    /// Bytes copied.
    pub bytes: u64,
    /// From acceptance to end.
    pub seconds: f64,
}

/// A load's blocks as far as they have been copied.
#[derive(Debug)]
pub(super) struct Progress {
    /// Blocks of the plan.
    count: usize,
    /// Moves of the plan whose slots hold what it means, those slots, and their places in the plan.
    moves: Vec<RowMove>,
    slots: Vec<SlotRef>,
    places: Vec<usize>,
    /// Digest of each move, `None` unless it was copied.
    digests: Vec<Option<u64>>,
    accepted: Instant,
}

impl Progress {
    /// Leaves out the moves of `plan` whose slots do not hold what the plan means.
    pub(super) fn new(registration: &Registration, plan: &[BlockMove]) -> Self {
        let (segment, rank) = (registration.segment(), registration.rank());
        let holds = |slot: SlotRef| {
            segment.shard_state(slot.slot, rank).is_some_and(|state| {
                state.status == ShardStatus::Sealed && state.generation == slot.generation
            })
        };
        let mut progress = Self {
            count: plan.len(),
            moves: Vec::with_capacity(plan.len()),
            slots: Vec::with_capacity(plan.len()),
            places: Vec::with_capacity(plan.len()),
            digests: Vec::new(),
            accepted: Instant::now(),
        };
        for (place, planned) in plan.iter().enumerate() {
            if holds(planned.slot) {
                progress.moves.push(row_move(planned));
                progress.slots.push(planned.slot);
                progress.places.push(place);
            }
        }
        progress.digests = vec![None; progress.moves.len()];
        progress
    }

    /// What is to be copied.
    pub(super) fn moves(&self) -> &[RowMove] {
        &self.moves
    }

    /// Moves `range` were copied.
    pub(super) fn copied(&mut self, range: Range<usize>, digests: &[u64]) {
        for (entry, &digest) in self.digests[range].iter_mut().zip(digests) {
            *entry = Some(digest);
        }
    }

    /// Moves `range` were not, or not wholly, copied.
    pub(super) fn fail(&mut self, range: Range<usize>) {
        self.digests[range].fill(None);
    }

    /// The outcome, all moves having been copied.
    pub(super) fn outcome(mut self, registration: &Registration, digests: &[u64]) -> LoadOutcome {
        self.copied(0..self.moves.len(), digests);
        self.end(registration)
    }

    /// The outcome of a load of which nothing can be used.
    pub(super) fn into_failure(self) -> LoadOutcome {
        LoadOutcome {
            failed: (0..self.count).collect(),
            seconds: self.accepted.elapsed().as_secs_f64(),
            ..LoadOutcome::default()
        }
    }

    /// The outcome: every digest is compared with the checksum that the row was saved with.
    pub(super) fn end(self, registration: &Registration) -> LoadOutcome {
        let (segment, rank) = (registration.segment(), registration.rank());
        let mut outcome = LoadOutcome::default();
        let mut usable = vec![false; self.count];
        let copied = self.slots.iter().zip(&self.digests).zip(&self.places);
        for ((&slot, &digest), &place) in copied {
            let Some(digest) = digest else { continue };
            let expected = segment
                .shard_state(slot.slot, rank)
                .map(|state| state.checksum);
            if expected == Some(digest) {
                usable[place] = true;
                outcome.bytes += registration.layout().shard_bytes() as u64;
            } else {
                outcome.damaged.push(slot);
            }
        }
        outcome.failed = (0..self.count).filter(|&place| !usable[place]).collect();
        outcome.seconds = self.accepted.elapsed().as_secs_f64();
        outcome
    }
}

/// What is copied for a move of a plan.
pub(super) fn row_move(planned: &BlockMove) -> RowMove {
    RowMove {
        row: planned.slot.slot,
        block: planned.block,
    }
}
