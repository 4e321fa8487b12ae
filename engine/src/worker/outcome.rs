//! What becomes of each block of a load.

use std::ops::Range;
use std::time::Instant;

use kvtide_kernels::copy::Registration;
use kvtide_kernels::segment::ShardStatus;
use kvtide_model::{BlockMove, SlotRef};

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
    /// Moves whose slots hold what the plan means, and their places in the plan.
    moves: Vec<BlockMove>,
    places: Vec<usize>,
    /// Digest of each move, `None` unless it was copied.
    digests: Vec<Option<u64>>,
    accepted: Instant,
}

impl Progress {
    /// Leaves out the moves of `plan` whose slots do not hold what the plan means.
    pub(super) fn new(registration: &Registration, plan: Vec<BlockMove>) -> Self {
        let (segment, rank) = (registration.segment(), registration.rank());
        let holds = |step: &BlockMove| {
            segment
                .shard_state(step.slot.slot, rank)
                .is_some_and(|state| {
                    state.status == ShardStatus::Sealed && state.generation == step.slot.generation
                })
        };
        let count = plan.len();
        let good = plan.into_iter().enumerate().filter(|(_, step)| holds(step));
        let (places, moves): (Vec<usize>, Vec<BlockMove>) = good.unzip();
        Self {
            count,
            digests: vec![None; moves.len()],
            moves,
            places,
            accepted: Instant::now(),
        }
    }

    /// What is to be copied.
    pub(super) fn moves(&self) -> &[BlockMove] {
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
        let copied = self.moves.iter().zip(&self.digests).zip(&self.places);
        for ((step, &digest), &place) in copied {
            let Some(digest) = digest else { continue };
            let expected = segment
                .shard_state(step.slot.slot, rank)
                .map(|state| state.checksum);
            if expected == Some(digest) {
                usable[place] = true;
                outcome.bytes += registration.layout().shard_bytes() as u64;
            } else {
                outcome.damaged.push(step.slot);
            }
        }
        outcome.failed = (0..self.count).filter(|&place| !usable[place]).collect();
        outcome.seconds = self.accepted.elapsed().as_secs_f64();
        outcome
    }
}
