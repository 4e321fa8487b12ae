//! S3-FIFO: three static FIFO queues (Yang et al., "FIFO queues are all you need for cache
//! eviction", SOSP 2023).
//!
//! New blocks enter a small queue. One that is asked for again before it reaches the end moves to
//! the main queue; one that is not is given up, and remembered for a while: if it comes back, it
//! enters the main queue directly. So a long prompt that is never repeated passes through a tenth
//! of the pool and leaves the rest alone.

use kvtide_model::BlockKey;

use super::list::{Links, Queue};
use super::{EvictionPolicy, SCAN_MAX};

/// The small queue's share of the pool: one in this many slots, as in the paper.
const SMALL_SHARE: usize = 10;
/// Uses are counted up to this, as in the paper.
const USES_MAX: u8 = 3;

/// Candidates at the end of a scan that are given up however often they were used.
const INSIST: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Small,
    Main,
}

/// The policy's state: eleven bytes a slot, and a fingerprint for every block remembered.
#[derive(Debug)]
pub(super) struct S3Fifo {
    links: Links,
    small: Queue,
    main: Queue,
    small_target: usize,
    entries: Box<[(Place, u8)]>,
    ghosts: Ghosts,
}

/// Fingerprints of blocks given up lately.
///
/// Direct-mapped: a new one takes the place of an older one with the same low bits, so the memory is
/// fixed and the oldest fade out, which is all that a ghost queue has to do.
#[derive(Debug)]
struct Ghosts(Box<[u32]>);

impl Ghosts {
    fn new(slots: u32) -> Self {
        Self(vec![0; (slots as usize).next_power_of_two()].into_boxed_slice())
    }

    /// The place for `key`, and its fingerprint there; zero means empty.
    fn place(&mut self, key: BlockKey) -> (&mut u32, u32) {
        let hash = key.table_hash();
        let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
        let fingerprint = u32::from_le_bytes([e, f, g, h]) | 1;
        let index = u32::from_le_bytes([a, b, c, d]) as usize & (self.0.len() - 1);
        (&mut self.0[index], fingerprint)
    }

    fn remember(&mut self, key: BlockKey) {
        let (place, fingerprint) = self.place(key);
        *place = fingerprint;
    }

    fn recall(&mut self, key: BlockKey) -> bool {
        let (place, fingerprint) = self.place(key);
        let found = *place == fingerprint;
        if found {
            *place = 0;
        }
        found
    }
}

impl S3Fifo {
    pub(super) fn new(slots: u32) -> Self {
        Self {
            links: Links::new(slots),
            small: Queue::new(),
            main: Queue::new(),
            small_target: (slots as usize / SMALL_SHARE).max(1),
            entries: vec![(Place::Small, 0); slots as usize].into_boxed_slice(),
            ghosts: Ghosts::new(slots),
        }
    }

    fn enter(&mut self, slot: u32, place: Place, uses: u8) {
        self.entries[slot as usize] = (place, uses);
        match place {
            Place::Small => self.small.push_head(&mut self.links, slot),
            Place::Main => self.main.push_head(&mut self.links, slot),
        }
    }
}

impl EvictionPolicy for S3Fifo {
    fn insert(&mut self, slot: u32, key: BlockKey) {
        let place = if self.ghosts.recall(key) {
            Place::Main
        } else {
            Place::Small
        };
        self.enter(slot, place, 0);
    }

    fn touch(&mut self, slot: u32) {
        let (_, uses) = &mut self.entries[slot as usize];
        *uses = (*uses + 1).min(USES_MAX);
    }

    fn settle(&mut self, slot: u32) {
        let (place, uses) = self.entries[slot as usize];
        // Those that were asked for have another chance at the end of the queue; to move them, too,
        // would keep them from ever reaching it.
        if uses == 0 {
            self.remove(slot);
            self.enter(slot, place, uses);
        }
    }

    fn remove(&mut self, slot: u32) {
        match self.entries[slot as usize].0 {
            Place::Small => self.small.unlink(&mut self.links, slot),
            Place::Main => self.main.unlink(&mut self.links, slot),
        }
    }

    fn victim(
        &mut self,
        key_of: &dyn Fn(u32) -> BlockKey,
        try_evict: &mut dyn FnMut(u32) -> bool,
    ) -> Option<u32> {
        // A slot is passed over at most once for each counted use, once to change queue, and once
        // for being pinned. Where everything is popular, the last candidates go regardless.
        let held = self.small.len() + self.main.len();
        let scan = (held * (usize::from(USES_MAX) + 2)).min(SCAN_MAX + INSIST);
        let mut main_was_pinned = false;
        for candidate in 0..scan {
            let over_share = self.small.len() > self.small_target;
            let from_small =
                self.small.len() > 0 && (over_share || self.main.len() == 0 || main_was_pinned);
            let queue = if from_small {
                &mut self.small
            } else {
                &mut self.main
            };
            let slot = queue.pop_tail(&mut self.links)?;
            let (place, uses) = self.entries[slot as usize];
            let uses = if candidate < SCAN_MAX { uses } else { 0 };
            match (place, uses) {
                (Place::Small, 0) if try_evict(slot) => {
                    self.ghosts.remember(key_of(slot));
                    return Some(slot);
                }
                (Place::Main, 0) if try_evict(slot) => return Some(slot),
                // Pinned: in use by someone, so it counts as asked for.
                (Place::Main, 0) => {
                    main_was_pinned = true;
                    self.enter(slot, Place::Main, 0);
                }
                (Place::Small, _) => self.enter(slot, Place::Main, 0),
                (Place::Main, _) => self.enter(slot, Place::Main, uses - 1),
            }
        }
        None
    }

    fn allocated_bytes(&self) -> usize {
        self.links.allocated_bytes() + size_of_val(&*self.entries) + size_of_val(&*self.ghosts.0)
    }
}
