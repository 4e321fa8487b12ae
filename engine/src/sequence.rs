//! One request's tokens, their block keys, and what it holds of the pool.

use std::time::Instant;

use kvtide_model::{BlockKey, BlockMove, ChainHasher, ChainRoot, MediaItem};

use crate::config::Verify;
use crate::pool::{Lease, Pool, Readiness, SavePlan};
use crate::session::Session;

/// A run of blocks that the pool can supply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matched {
    /// How many blocks.
    pub blocks: usize,
    /// Whether all are complete and can be loaded at once.
    pub complete: bool,
}

/// A request as the pool sees it.
#[derive(Debug)]
pub struct Sequence {
    chain: ChainHasher,
    matched: Option<(usize, Lease)>,
}

impl Sequence {
    /// An empty sequence; see [`ChainHasher::new`].
    #[must_use]
    pub fn new(root: ChainRoot, block_tokens: u32, media: Vec<MediaItem>) -> Self {
        Self {
            chain: ChainHasher::new(root, block_tokens, media),
            matched: None,
        }
    }

    /// Appends tokens and hashes the blocks that they complete.
    pub fn extend(&mut self, tokens: &[u32]) {
        self.chain.extend(tokens);
    }

    /// Tokens so far.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.chain.tokens()
    }

    /// Keys of all full blocks.
    #[must_use]
    pub fn keys(&self) -> &[BlockKey] {
        self.chain.keys()
    }

    /// Asks the pool for the blocks from `from` on, up to `to` (exclusive), and holds what it has
    /// in place of what was held before.
    ///
    /// Under [`Verify::Always`] the bytes of complete blocks are checked here. If it is `certain`
    /// that what is matched must be loadable, blocks that are still being saved are not matched.
    pub fn match_blocks(
        &mut self,
        pool: &Pool,
        from: usize,
        to: usize,
        verify: Verify,
        certain: bool,
    ) -> Matched {
        self.matched = None; // Pins of the former attempt go back first.
        let keys = self.chain.keys().get(from..to).unwrap_or_default();
        let found = pool.lookup(keys);
        let (mut lease, mut complete) = (found.lease, found.complete);
        if certain && !complete {
            lease.truncate(lease.complete_blocks());
            complete = true;
        }
        if verify == Verify::Always
            && complete
            && let Some(place) = pool.first_damaged(&lease)
        {
            lease.truncate(place);
        }
        let matched = Matched {
            blocks: lease.len(),
            complete,
        };
        if matched.blocks > 0 {
            self.matched = Some((from, lease));
        }
        matched
    }

    /// Turns the last match into a load of its first blocks into the engine's `blocks`; `None` when
    /// the match is not held any more, began elsewhere, or is shorter.
    #[must_use]
    pub fn begin_load(&mut self, from: usize, blocks: Vec<u32>) -> Option<Load> {
        let (start, mut lease) = self.matched.take()?;
        (start == from && lease.len() >= blocks.len()).then(|| {
            lease.truncate(blocks.len());
            Load {
                lease,
                blocks,
                since: Instant::now(),
            }
        })
    }

    /// Lets go of the last match.
    pub fn release(&mut self) {
        self.matched = None;
    }

    /// Lets go of a match whose deadline has passed; whether there was one.
    pub fn expire(&mut self, now: Instant) -> bool {
        self.matched
            .take_if(|(_, lease)| lease.is_expired(now))
            .is_some()
    }

    /// Plans the save of the blocks from `from` on, which lie in the engine's `blocks`.
    #[must_use]
    pub fn plan_save(&self, session: &Session, from: usize, blocks: &[u32]) -> SavePlan {
        session.begin_save(self.chain.keys(), from, blocks)
    }

    /// The request has ended; see [`Pool::settle`].
    pub fn settle(&self, pool: &Pool) {
        pool.settle(self.chain.keys());
    }
}

/// Blocks on their way into the engine's KV cache, pinned until this is dropped.
#[derive(Debug)]
pub struct Load {
    lease: Lease,
    blocks: Vec<u32>,
    since: Instant,
}

/// What a load amounts to once its blocks are known complete or lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadPlan {
    /// What to copy.
    pub moves: Vec<BlockMove>,
    /// Blocks of the engine that will not be loaded.
    pub lost: Vec<u32>,
}

impl Load {
    /// The plan, or `None` while blocks are still being saved and `timeout` has not passed.
    ///
    /// Only what precedes the first lost block is copied: the engine recomputes from there.
    #[must_use]
    pub fn plan(&self, now: Instant, timeout: std::time::Duration) -> Option<LoadPlan> {
        let lost = match self.lease.readiness() {
            Readiness::Ready => Vec::new(),
            Readiness::Lost(places) => places,
            Readiness::Saving(_) if now.duration_since(self.since) < timeout => return None,
            Readiness::Saving(first) => vec![first],
        };
        let usable = lost.first().copied().unwrap_or(self.blocks.len());
        let pairs = self.lease.slots().iter().zip(&self.blocks).take(usable);
        Some(LoadPlan {
            moves: pairs
                .map(|(&slot, &block)| BlockMove { slot, block })
                .collect(),
            lost: lost
                .iter()
                .filter_map(|&place| self.blocks.get(place).copied())
                .collect(),
        })
    }

    /// The engine's blocks.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}
