//! Which block to give up when the pool is full.

mod list;
mod lru;
mod s3_fifo;

use std::fmt::Debug;

use kvtide_model::BlockKey;

use crate::config::Eviction;

/// Candidates looked at before giving up: with so many pinned in a row, saving is throttled rather
/// than the scheduler held up.
const SCAN_MAX: usize = 1024;

/// Orders sealed and filling slots by how soon they should be given up.
///
/// A policy holds each slot at most once, between [`EvictionPolicy::insert`] and
/// [`EvictionPolicy::remove`] or [`EvictionPolicy::victim`].
pub(crate) trait EvictionPolicy: Send + Debug {
    /// `slot` now holds the block `key`.
    fn insert(&mut self, slot: u32, key: BlockKey);

    /// The block in `slot` was asked for.
    fn touch(&mut self, slot: u32);

    /// The chain of the block in `slot` has ended; called from its tail to its head, which is to go
    /// last.
    fn settle(&mut self, slot: u32);

    /// `slot` was freed by other means.
    fn remove(&mut self, slot: u32);

    /// Removes and returns the first slot in line for which `try_evict` succeeds, with its key as
    /// `key_of` tells it. `None` when there is none among the first candidates.
    fn victim(
        &mut self,
        key_of: &dyn Fn(u32) -> BlockKey,
        try_evict: &mut dyn FnMut(u32) -> bool,
    ) -> Option<u32>;

    /// Bytes that the policy has allocated.
    fn allocated_bytes(&self) -> usize;
}

/// The policy named `eviction` for a pool of `slots`.
pub(crate) fn policy(eviction: Eviction, slots: u32) -> Box<dyn EvictionPolicy> {
    match eviction {
        Eviction::S3Fifo => Box::new(s3_fifo::S3Fifo::new(slots)),
        Eviction::Lru => Box::new(lru::Lru::new(slots)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn key(slot: u32) -> BlockKey {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&slot.wrapping_mul(0x9E37_79B9).to_le_bytes());
        bytes[4..8].copy_from_slice(&slot.to_le_bytes());
        BlockKey::from_bytes(bytes)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u32),
        Touch(u32),
        Remove(u32),
        Victim { pinned: u32 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let slot = 0u32..12;
        let step = prop_oneof![
            3 => slot.clone().prop_map(Step::Insert),
            2 => slot.clone().prop_map(Step::Touch),
            1 => slot.clone().prop_map(Step::Remove),
            2 => slot.prop_map(|pinned| Step::Victim { pinned }),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        /// Against a plain set: whatever happens, a victim is a slot that is held and not pinned,
        /// and there is one exactly when such a slot exists.
        #[test]
        fn a_victim_is_always_a_held_unpinned_slot(steps in steps(), lru in any::<bool>()) {
            let eviction = if lru { Eviction::Lru } else { Eviction::S3Fifo };
            let mut policy = policy(eviction, 12);
            let mut held = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Insert(slot) => if held.insert(slot) { policy.insert(slot, key(slot)) },
                    Step::Touch(slot) => if held.contains(&slot) { policy.touch(slot) },
                    Step::Remove(slot) => if held.remove(&slot) { policy.remove(slot) },
                    Step::Victim { pinned } => {
                        let victim = policy.victim(&key, &mut |slot| slot != pinned);
                        let expected = held.iter().any(|&slot| slot != pinned);
                        prop_assert_eq!(victim.is_some(), expected);
                        if let Some(slot) = victim {
                            prop_assert!(slot != pinned && held.remove(&slot));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn lru_gives_up_the_block_that_was_longest_unused() {
        let mut policy = policy(Eviction::Lru, 4);
        (0..4).for_each(|slot| policy.insert(slot, key(slot)));
        policy.touch(0);
        let order: Vec<_> = (0..4)
            .map(|_| policy.victim(&key, &mut |_| true).unwrap())
            .collect();
        assert_eq!(order, [1, 2, 3, 0]);
    }

    /// Fills a pool of 100 with `first..100`, then replaces `rounds` blocks by new ones; what was
    /// given up, as numbers of blocks.
    fn scan(policy: &mut dyn EvictionPolicy, rounds: u32) -> Vec<u32> {
        let mut block_of: Vec<u32> = (0..100).collect();
        (100..100 + rounds)
            .map(|block| {
                let slot = policy.victim(&key, &mut |_| true).unwrap();
                policy.insert(slot, key(block));
                std::mem::replace(&mut block_of[slot as usize], block)
            })
            .collect()
    }

    #[test]
    fn s3_fifo_keeps_what_was_asked_for_again_through_a_scan() {
        let mut policy = policy(Eviction::S3Fifo, 100);
        (0..100).for_each(|slot| policy.insert(slot, key(slot)));
        (0..10).for_each(|slot| policy.touch(slot));
        let given_up = scan(&mut *policy, 500);
        assert!(
            given_up.iter().all(|&block| block >= 10),
            "a scan pushed out popular blocks"
        );
    }

    #[test]
    fn lru_does_not() {
        let mut policy = policy(Eviction::Lru, 100);
        (0..100).for_each(|slot| policy.insert(slot, key(slot)));
        (0..10).for_each(|slot| policy.touch(slot));
        assert!(scan(&mut *policy, 500).iter().any(|&block| block < 10));
    }

    /// Why LRU is the default: the next turn of a chat asks for its blocks for the first time after
    /// many others have been saved.
    #[test]
    fn a_first_reuse_after_a_quarter_of_the_turnover_is_found_by_lru_and_missed_by_s3_fifo() {
        let lost = |kind| {
            let mut policy = policy(kind, 100);
            (0..100).for_each(|slot| policy.insert(slot, key(slot)));
            (0..100).for_each(|slot| policy.touch(slot)); // Blocks that were of use once.
            let given_up = scan(&mut *policy, 25);
            given_up.iter().filter(|&&block| block >= 100).count()
        };
        assert_eq!(lost(Eviction::Lru), 0);
        assert!(lost(Eviction::S3Fifo) > 10);
    }

    #[test]
    fn s3_fifo_remembers_a_block_that_comes_back() {
        let mut policy = policy(Eviction::S3Fifo, 100);
        (0..100).for_each(|slot| policy.insert(slot, key(slot)));
        assert_eq!(policy.victim(&key, &mut |_| true), Some(0));
        policy.insert(0, key(0)); // given up, and wanted again at once
        assert!(!scan(&mut *policy, 500).contains(&0));
    }
}
