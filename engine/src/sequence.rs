//! One request's tokens, their block keys, and what it holds of the pool.

use std::time::{Duration, Instant};

use kvtide_model::{BlockKey, BlockMove, ChainHasher, ChainRoot, MediaItem};

use crate::pool::{Lease, Readiness};
use crate::session::{SavePlan, Session};

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
    held: Option<Held>,
}

/// A match, kept until it is used, for a request that waits may be asked about in every step.
#[derive(Debug)]
struct Held {
    /// Place of its first block in the chain.
    from: usize,
    lease: Lease,
    /// Leading blocks whose bytes were found to have their checksums.
    verified: usize,
    /// What [`Session::clears`] was.
    clears: u64,
}

impl Held {
    /// What of it is still right for a request that asks for the blocks from `from` on.
    fn still_right(mut self, session: &Session, from: usize, now: Instant) -> Option<Self> {
        let had = from.checked_sub(self.from)?;
        let is_current = self.clears == session.clears() && self.lease.is_current();
        if had >= self.lease.len() || self.lease.is_expired(now) || !is_current {
            return None;
        }
        if had > 0 {
            self.from = from;
            self.lease.skip(had);
            self.verified = self.verified.saturating_sub(had);
        }
        Some(self)
    }

    fn truncate(&mut self, blocks: usize) {
        self.lease.truncate(blocks);
        self.verified = self.verified.min(blocks);
    }
}

impl Sequence {
    /// An empty sequence; see [`ChainHasher::new`].
    #[must_use]
    pub fn new(root: ChainRoot, block_tokens: u32, media: Vec<MediaItem>) -> Self {
        Self {
            chain: ChainHasher::new(root, block_tokens, media),
            held: None,
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

    /// Whether the pool has the block at `place` of the chain; see [`Sequence::match_blocks`] for
    /// `certain`.
    #[must_use]
    pub fn is_held(&self, session: &Session, place: usize, certain: bool) -> bool {
        let key = self.chain.keys().get(place);
        key.is_some_and(|&key| session.holds(key, certain))
    }

    /// Asks the pool for the blocks from `from` on, up to `to` (exclusive), and holds what it has.
    ///
    /// What is held of the last match and still right stays so, with its deadline, and only what
    /// follows it is looked up. If it is `certain` that what is matched must be loadable, blocks
    /// that are still being saved are not matched.
    pub fn match_blocks(
        &mut self,
        session: &Session,
        from: usize,
        to: usize,
        certain: bool,
    ) -> Matched {
        let last = self.held.take(); // If it is not right any more, its pins go back first.
        let kept = last.and_then(|held| held.still_right(session, from, Instant::now()));
        let clears = session.clears();
        let next = from + kept.as_ref().map_or(0, |held| held.lease.len());
        let keys = self.chain.keys().get(next..to).unwrap_or_default();
        let found = session.lookup(keys);
        let mut complete_blocks = found.certain;
        let mut held = match kept {
            Some(mut kept) => {
                kept.lease.append(found.lease);
                complete_blocks = kept.lease.complete_blocks();
                kept
            }
            None => Held {
                from,
                lease: found.lease,
                verified: 0,
                clears,
            },
        };
        let limit = if certain { complete_blocks } else { usize::MAX };
        held.truncate(to.saturating_sub(from).min(limit));
        let blocks = held.lease.len();
        self.held = Some(held);
        Matched {
            blocks,
            complete: complete_blocks >= blocks,
        }
    }

    /// Compares the bytes of the first `blocks` of the match with their checksums, as far as that
    /// was not done before; returns how many of them are whole. The match ends before one that is
    /// not.
    pub fn verify(&mut self, session: &Session, blocks: usize) -> usize {
        let Some(held) = &mut self.held else {
            return 0;
        };
        let blocks = blocks.min(held.lease.len());
        let damaged = session.first_damaged(&held.lease, held.verified..blocks);
        let whole = damaged.unwrap_or(blocks);
        held.verified = held.verified.max(whole);
        if damaged.is_some() {
            held.lease.truncate(whole);
        }
        whole
    }

    /// Turns the last match into a load of its first blocks into the engine's `blocks`; `None` when
    /// the match is not held any more, began elsewhere, or is shorter.
    #[must_use]
    pub fn begin_load(&mut self, session: &Session, from: usize, blocks: Vec<u32>) -> Option<Load> {
        let Held {
            from: start,
            mut lease,
            ..
        } = self.held.take()?;
        (start == from && lease.len() >= blocks.len()).then(|| {
            lease.truncate(blocks.len());
            session.mark_used(&lease);
            Load {
                lease,
                blocks,
                planned: 0,
                since: Instant::now(),
            }
        })
    }

    /// Lets go of the last match.
    pub fn release(&mut self) {
        self.held = None;
    }

    /// Lets go of a match whose deadline has passed; whether there was one.
    pub fn expire(&mut self, now: Instant) -> bool {
        self.held
            .take_if(|held| held.lease.is_expired(now))
            .is_some()
    }

    /// Plans the save of the blocks from `from` on, which lie in the engine's `blocks`.
    #[must_use]
    pub fn plan_save(&self, session: &Session, from: usize, blocks: &[u32]) -> SavePlan {
        session.begin_save(self.chain.keys(), from, blocks)
    }

    /// The request has ended; see [`Session::settle`].
    pub fn settle(&self, session: &Session) {
        session.settle(self.chain.keys());
    }
}

/// Blocks that a load copies at once, unless it is with all that is left: a part costs a message and a
/// launch, some 50 µs, and so many blocks take a good millisecond on a fast link.
const PART_BLOCKS_MIN: usize = 32;

/// Blocks on their way into the engine's KV cache, pinned until this is dropped.
///
/// They go in parts, as they come into host memory, so that copying begins while the rest is still to
/// come.
#[derive(Debug)]
pub struct Load {
    lease: Lease,
    blocks: Vec<u32>,
    /// How many are in a part already.
    planned: usize,
    /// When the last part was planned.
    since: Instant,
}

/// Blocks of a load that can be copied, and follow those of the part before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadPart {
    /// What to copy.
    pub moves: Vec<BlockMove>,
    /// The engine's block that will not be loaded, nor any that follows it: only in the last part.
    pub lost: Option<u32>,
    /// Whether no other part follows.
    pub last: bool,
}

impl Load {
    /// The next part, or `None` while too little has come and less than `timeout` has passed since the
    /// last one. After that, what has come goes, and if that is nothing, the load ends.
    ///
    /// The load ends before the first block that is lost, or does not come in time: the engine
    /// recomputes from there.
    #[must_use]
    pub fn next_part(&mut self, now: Instant, timeout: Duration) -> Option<LoadPart> {
        let from = self.planned;
        let is_overdue = now.duration_since(self.since) >= timeout;
        let (end, lost) = match self.lease.readiness(from) {
            Readiness::Ready => (self.blocks.len(), false),
            Readiness::Lost(place) => (place, true),
            Readiness::Arriving(place) if place - from >= PART_BLOCKS_MIN => (place, false),
            // Nothing more may come for long.
            Readiness::Arriving(place) if is_overdue => (place, place == from),
            Readiness::Arriving(_) => return None,
        };
        self.planned = end;
        self.since = now;
        let pairs = self.lease.slots().iter().zip(&self.blocks);
        let pairs = pairs.skip(from).take(end - from);
        let part = LoadPart {
            moves: pairs
                .map(|(&slot, &block)| BlockMove { slot, block })
                .collect(),
            lost: self.blocks.get(end).copied().filter(|_| lost),
            last: lost || end == self.blocks.len(),
        };
        Some(part)
    }

    /// The engine's blocks.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}
