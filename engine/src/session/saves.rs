//! Saves of one engine that its workers have been asked for and have not finished.

use std::collections::{HashMap, VecDeque};

use kvtide_model::{BlockMove, SlotRef};

use crate::pool::catalogue::Catalogue;

/// One save job in flight: the blocks of one request that become complete in one step.
#[derive(Debug)]
struct SaveJob {
    id: u64,
    /// Each block's slot, and the engine's block it is copied from.
    blocks: VecDeque<(SlotRef, u32)>,
}

/// Jobs in the order in which workers run them, and which of the engine's blocks they read.
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
    pub(super) fn begin(&mut self, moves: &[BlockMove]) -> u64 {
        self.next_id += 1;
        self.blocks += moves.len();
        let blocks = moves.iter().map(|each| (each.slot, each.block));
        self.sources
            .extend(blocks.clone().map(|(_, block)| (block, self.next_id)));
        self.jobs.push_back(SaveJob {
            id: self.next_id,
            blocks: blocks.collect(),
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

    /// Takes out what has ended, in order, up to the first block that is still being written.
    pub(super) fn collect(&mut self, catalogue: &Catalogue) {
        while let Some(job) = self.jobs.front_mut() {
            while let Some(&(slot, block)) = job.blocks.front() {
                // A slot that has been filled anew since has ended, too.
                let is_same = catalogue.slots.state(slot).is_some();
                if is_same && catalogue.saved(slot).is_arriving() {
                    return;
                }
                job.blocks.pop_front();
                self.blocks -= 1;
                if self.sources.get(&block) == Some(&job.id) {
                    self.sources.remove(&block);
                }
            }
            self.jobs.pop_front();
        }
    }
}
