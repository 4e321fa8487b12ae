//! What the pool's lock protects: which blocks are held, which go next, and what is in flight.

use kvtide_model::{BlockKey, SlotRef};

use super::eviction::{self, EvictionPolicy};
use super::free_slots::FreeSlots;
use super::index::Index;
use super::saves::Saved;
use super::sessions::{NamespaceNumber, Sessions};
use super::slot_table::{FillingSlot, FreeSlot, SlotTable};
use super::{PoolCounters, PoolEvent, PoolOptions, Shared};
use crate::session::SessionId;

/// Blocks that may be in flight to the pool at once. Beyond this a save is throttled: its blocks
/// were computed faster than memory can be copied, and keeping the engine waiting for a cache would
/// turn the purpose around. 64 K blocks of 2 MiB are 128 GiB, far beyond what one step makes.
const SAVING_BLOCKS_MAX: usize = 1 << 16;
/// One in so many slots of a full pool may be free, so that chains that begin find a stretch. Half
/// of that is too little at times, and then nothing lies together for long.
const SPARE_SHARE: usize = 16;
/// Blocks given up at most for one that is saved.
const EVICTED_AT_ONCE: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct State {
    pub(super) index: Index,
    pub(super) policy: Box<dyn EvictionPolicy>,
    pub(super) free: FreeSlots,
    pub(super) sessions: Sessions,
    pub(super) counters: PoolCounters,
}

/// A block of a chain that the pool does not hold.
pub(super) struct Missing {
    /// Its place in the chain.
    pub(super) at: usize,
    key: BlockKey,
    /// Of the block before it.
    previous: Option<BlockKey>,
    /// The engine's.
    block: u32,
}

impl State {
    /// Of an empty pool.
    pub(super) fn new(rows: u32, every_slot: Vec<FreeSlot>, options: PoolOptions) -> Self {
        let mut free = FreeSlots::new(rows);
        every_slot.into_iter().for_each(|slot| free.put(slot));
        Self {
            index: Index::new(rows),
            policy: eviction::policy(options.eviction, rows),
            free,
            sessions: Sessions::default(),
            counters: PoolCounters::default(),
        }
    }

    /// Of `chain` from `from` on, of which `blocks` are the engine's: the slots of what is held, and
    /// what is not.
    pub(super) fn divide(
        &self,
        chain: &[BlockKey],
        from: usize,
        blocks: &[u32],
    ) -> (Vec<u32>, Vec<Missing>) {
        let (mut held, mut missing) = (Vec::new(), Vec::new());
        for ((at, &key), &block) in chain.iter().enumerate().skip(from).zip(blocks) {
            match self.index.find(key) {
                Some(slot) => held.push(slot),
                None => missing.push(Missing {
                    at,
                    key,
                    previous: at.checked_sub(1).map(|before| chain[before]),
                    block,
                }),
            }
        }
        (held, missing)
    }

    /// Takes slots for blocks that are `missing` behind those of `earlier` and between those in
    /// `held`, as far as there is room: with each, the engine's block that fills it.
    pub(super) fn fill(
        &mut self,
        slots: &SlotTable,
        namespace: NamespaceNumber,
        earlier: &[BlockKey],
        held: &[u32],
        missing: &[Missing],
    ) -> Vec<(FillingSlot, u32)> {
        if missing.is_empty() {
            return Vec::new();
        }
        // What this save evicts must not be what it continues.
        let mut pinned = slots.pin_all(held);
        let (mut may_evict, mut settled) = (true, false);
        let saving = self.sessions.saving_blocks();
        let mut filling: Vec<(FillingSlot, u32)> = Vec::with_capacity(missing.len());
        for each in missing {
            let previous = each.previous.and_then(|key| self.index.find(key));
            if !settled && self.must_evict(slots, previous) {
                // In use as well, and out of the way of a search for what is not.
                pinned.extend(slots.pin_all(&self.settle(earlier)));
                settled = true;
            }
            if saving + filling.len() >= SAVING_BLOCKS_MAX {
                break;
            }
            let Some(free) = self.take_slot(slots, previous, &mut may_evict) else {
                break; // What follows could not be used without this block.
            };
            let slot = slots.fill(free);
            self.index.insert(each.key, namespace, slot.slot_ref().slot);
            filling.push((slot, each.block));
        }
        // A chain is useless without its head, so the head is entered last and evicted last.
        for ((slot, _), each) in filling.iter().zip(missing).rev() {
            self.policy.insert(slot.slot_ref().slot, each.key);
        }
        for slot in pinned {
            slots.unpin(slot);
        }
        filling
    }

    /// Marks blocks of a chain as used: its head last, so that it is given up last.
    pub(super) fn used(&mut self, slots: &[u32]) {
        for &slot in slots.iter().rev() {
            self.policy.touch(slot);
        }
    }

    /// See [`super::Pool::settle`]; the slots. What follows a block that is lost is of no use, and
    /// not put before what is.
    pub(super) fn settle(&mut self, chain: &[BlockKey]) -> Vec<u32> {
        let slots = chain.iter().map_while(|&key| self.index.find(key));
        let slots: Vec<u32> = slots.collect();
        for &slot in slots.iter().rev() {
            self.policy.settle(slot);
        }
        slots
    }

    /// Whether [`State::take_slot`] has to give up blocks.
    fn must_evict(&self, slots: &SlotTable, previous: Option<u32>) -> bool {
        let spare = (slots.len() / SPARE_SHARE).max(1);
        let room = self.free.can_follow(previous) || self.free.has_stretch();
        !room && self.free.len() < spare
    }

    /// A slot to fill for the block behind the one in slot `previous`.
    ///
    /// A full pool gives up some more blocks than this one needs until a whole stretch is free: what
    /// is next in line was mostly saved together. `may_evict` becomes false when nothing can be
    /// given up, so that a save finds that out once.
    fn take_slot(
        &mut self,
        slots: &SlotTable,
        previous: Option<u32>,
        may_evict: &mut bool,
    ) -> Option<FreeSlot> {
        for _ in 0..EVICTED_AT_ONCE {
            if !*may_evict || !self.must_evict(slots, previous) {
                break;
            }
            *may_evict = self.evict(slots);
        }
        self.free.take(previous)
    }

    /// Gives up a block that nobody uses; whether there was one.
    fn evict(&mut self, slots: &SlotTable) -> bool {
        let Self {
            policy,
            index,
            free,
            ..
        } = self;
        let victim = policy.victim(&|slot| index.key_of(slot), &mut |slot| {
            let freed = slots.evictable(slot).and_then(|sealed| slots.evict(sealed));
            freed.map(|slot| free.put(slot)).is_some()
        });
        let Some(victim) = victim else {
            return false;
        };
        if let Some(key) = index.remove_slot(victim) {
            let namespace = index.namespace_of(victim);
            self.sessions.record(namespace, PoolEvent::Removed(key));
        }
        self.counters.evicted_blocks += 1;
        true
    }

    /// Frees a doomed slot that nobody uses any more.
    pub(super) fn release(&mut self, slots: &SlotTable, slot: SlotRef) {
        if let Some(free) = slots.release(slot) {
            self.free.put(free);
        }
    }

    pub(super) fn poll(&mut self, shared: &Shared) {
        for ended in self.sessions.collect(&shared.segment) {
            match ended {
                Saved::Complete(filling) => self.seal(&shared.slots, &filling),
                Saved::Failed(filling) => self.fail(&shared.slots, &filling),
            }
        }
    }

    fn seal(&mut self, slots: &SlotTable, filling: &FillingSlot) {
        let slot = filling.slot_ref();
        if slots.seal(filling).is_some() {
            self.counters.saved_blocks += 1;
            let namespace = self.index.namespace_of(slot.slot);
            let key = self.index.key_of(slot.slot);
            self.sessions.record(namespace, PoolEvent::Stored(key));
        } else {
            // Cleared while it was being saved.
            self.release(slots, slot);
        }
    }

    fn fail(&mut self, slots: &SlotTable, filling: &FillingSlot) {
        let slot = filling.slot_ref();
        self.counters.failed_blocks += 1;
        if slots.fail(filling) {
            self.forget(slot.slot);
        }
        self.release(slots, slot);
    }

    /// Ends a session: what it was filling has failed, and whoever still writes it is fenced.
    pub(super) fn close(&mut self, shared: &Shared, session: SessionId) {
        self.poll(shared);
        let ranks = shared.segment.geometry().ranks();
        for filling in self.sessions.close(session) {
            let slot = filling.slot_ref();
            for rank in 0..ranks {
                let segment = &shared.segment;
                segment.condemn_shard(slot.slot, rank, slot.generation);
            }
            self.fail(&shared.slots, &filling);
        }
    }

    /// Drops every block of `namespace`. Those that are pinned or being saved go as soon as they no
    /// longer are.
    pub(super) fn clear(&mut self, shared: &Shared, namespace: NamespaceNumber) {
        self.poll(shared);
        for slot in self.index.remove_namespace(namespace) {
            self.policy.remove(slot);
            let slot = shared.slots.current(slot);
            shared.slots.doom(slot);
            self.release(&shared.slots, slot);
        }
        self.sessions.record(namespace, PoolEvent::Cleared);
    }

    /// Takes `slot` out of index and policy.
    pub(super) fn forget(&mut self, slot: u32) {
        if let Some(key) = self.index.remove_slot(slot) {
            self.policy.remove(slot);
            let namespace = self.index.namespace_of(slot);
            self.sessions.record(namespace, PoolEvent::Removed(key));
        }
    }
}
