//! Saves of one engine that its workers have been asked for and have not finished.

use std::collections::{HashMap, VecDeque};

use kvtide_segment::{ShardStatus, SharedSegment};

use super::slot_table::FillingSlot;

/// One save job in flight: the blocks of one request that become complete in one step.
#[derive(Debug)]
struct SaveJob {
    id: u64,
    /// Each block's slot, and the engine's block it is copied from.
    blocks: VecDeque<(FillingSlot, u32)>,
}

/// How a save of one block ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Saved {
    Complete(FillingSlot),
    Failed(FillingSlot),
}

/// Jobs in the order in which workers run them.
///
/// Workers publish every shard's outcome in the shared segment, so completion is seen by looking
/// there: no message, and no engine step, is needed.
#[derive(Debug, Default)]
pub(super) struct InFlightSaves {
    jobs: VecDeque<SaveJob>,
    sources: HashMap<u32, u64>,
    blocks: usize,
    next_id: u64,
}

impl InFlightSaves {
    /// Blocks in flight.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Registers a job; returns its id, which is never 0.
    pub(super) fn begin(&mut self, blocks: Vec<(FillingSlot, u32)>) -> u64 {
        self.next_id += 1;
        self.blocks += blocks.len();
        self.sources
            .extend(blocks.iter().map(|&(_, block)| (block, self.next_id)));
        self.jobs.push_back(SaveJob {
            id: self.next_id,
            blocks: blocks.into(),
        });
        self.next_id
    }

    /// Jobs that still read one of the engine's `blocks`.
    pub(super) fn reading(&self, blocks: &[u32]) -> Vec<u64> {
        if self.sources.is_empty() {
            return Vec::new();
        }
        let mut jobs: Vec<u64> = blocks
            .iter()
            .filter_map(|block| self.sources.get(block).copied())
            .collect();
        jobs.sort_unstable();
        jobs.dedup();
        jobs
    }

    /// What is still being filled.
    pub(super) fn into_slots(self) -> Vec<FillingSlot> {
        let blocks = self.jobs.into_iter().flat_map(|job| job.blocks);
        blocks.map(|(slot, _)| slot).collect()
    }

    /// Takes out what has ended, in order, up to the first block that is still being written.
    pub(super) fn collect(&mut self, segment: &SharedSegment, mut ended: impl FnMut(Saved)) {
        while let Some(job) = self.jobs.front_mut() {
            while let Some((slot, _)) = job.blocks.front() {
                let Some(ok) = outcome(segment, slot) else {
                    return;
                };
                let Some((slot, block)) = job.blocks.pop_front() else {
                    return;
                };
                self.blocks -= 1;
                if self.sources.get(&block) == Some(&job.id) {
                    self.sources.remove(&block);
                }
                ended(if ok {
                    Saved::Complete(slot)
                } else {
                    Saved::Failed(slot)
                });
            }
            self.jobs.pop_front();
        }
    }
}

/// `Some(whether it succeeded)` once every rank has finished its shard.
fn outcome(segment: &SharedSegment, slot: &FillingSlot) -> Option<bool> {
    let slot = slot.slot_ref();
    let mut sealed = true;
    for rank in 0..segment.geometry().ranks() {
        let state = segment.shard_state(slot.slot, rank)?;
        match state.status {
            _ if state.generation != slot.generation => return None,
            ShardStatus::Filling => return None,
            ShardStatus::Sealed => {}
            ShardStatus::Bad => sealed = false,
        }
    }
    Some(sealed)
}
