//! What the pool's lock protects: which blocks are held, which go next, and what is in flight.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use kvtide_model::{BlockKey, SlotRef};

use super::catalogue::Catalogue;
use super::eviction::{self, EvictionPolicy};
use super::free_slots::FreeSlots;
use super::holders::SlotHolder;
use super::index::IndexWriter;
use super::sessions::{Saved, Sessions};
use super::slot_table::{FillingSlot, FreeSlot, SlotState, SlotTable};
use super::{Filling, PoolCounters, PoolEvent, PoolOptions};
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
/// Doomed blocks that are looked at whenever the pool is, whether they are still held.
const LOOKED_AT_ONCE: usize = 256;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct State {
    pub(super) index: IndexWriter,
    pub(super) policy: Box<dyn EvictionPolicy>,
    pub(super) free: FreeSlots,
    /// The rows that are the pool's.
    pub(super) rows: Vec<Range<u32>>,
    pub(super) sessions: Sessions,
    /// Blocks that are dropped and that somebody still holds. A session gives up its pins without a
    /// word, so the pool looks.
    pub(super) doomed: VecDeque<SlotRef>,
    /// Seconds of Unix time when the pool was last looked at.
    pub(super) now: u64,
    /// Until when nothing is evicted.
    pub(super) pinned_until: u64,
    pub(super) counters: PoolCounters,
}

/// A block of a chain that the pool does not hold.
pub(super) struct Missing {
    /// Its place in the chain.
    pub(super) at: usize,
    key: BlockKey,
    /// Of the block before it.
    previous: Option<BlockKey>,
}

impl State {
    /// Of a pool without a slot.
    pub(super) fn new(catalogue: &Catalogue, options: PoolOptions) -> Self {
        let rows = catalogue.segment.geometry().rows();
        Self {
            index: IndexWriter::new(&catalogue.segment),
            policy: eviction::policy(options.eviction, rows),
            free: FreeSlots::new(rows),
            rows: Vec::new(),
            sessions: Sessions::default(),
            doomed: VecDeque::new(),
            now: 0,
            pinned_until: 0,
            counters: PoolCounters::default(),
        }
    }

    /// Takes `rows` into the pool, whatever was in them before.
    pub(super) fn grow(&mut self, slots: &SlotTable, rows: Range<u32>) {
        self.own(rows.clone());
        rows.for_each(|slot| self.free.put(slots.reset(slot)));
    }

    pub(super) fn own(&mut self, rows: Range<u32>) {
        self.free.own(rows.end - rows.start);
        self.rows.push(rows);
    }

    /// Of `chain` from `from` up to `end`: the slots of what is held, and what is not.
    pub(super) fn divide(
        &self,
        chain: &[BlockKey],
        from: usize,
        end: usize,
    ) -> (Vec<u32>, Vec<Missing>) {
        let (mut held, mut missing) = (Vec::new(), Vec::new());
        for (at, &key) in chain.iter().enumerate().take(end).skip(from) {
            match self.index.find(key) {
                Some(slot) => held.push(slot),
                None => missing.push(Missing {
                    at,
                    key,
                    previous: at.checked_sub(1).map(|before| chain[before]),
                }),
            }
        }
        (held, missing)
    }

    /// Takes slots for blocks that are `missing` behind those of `earlier` and between those in
    /// `held`, as far as there is room.
    pub(super) fn fill(
        &mut self,
        catalogue: &Catalogue,
        session: SessionId,
        earlier: &[BlockKey],
        held: &[u32],
        missing: &[Missing],
    ) -> Vec<Filling> {
        if missing.is_empty() {
            return Vec::new();
        }
        let Some(filler) = self.sessions.holder(session) else {
            return Vec::new();
        };
        let slots = &catalogue.slots;
        // What this save evicts must not be what it continues.
        let mut pinned = hold_all(slots, held);
        let (mut may_evict, mut settled) = (true, false);
        let saving = self.sessions.saving_blocks();
        let mut filling: Vec<FillingSlot> = Vec::with_capacity(missing.len());
        for each in missing {
            let previous = each.previous.and_then(|key| self.index.find(key));
            if !settled && self.must_evict(previous) {
                // In use as well, and out of the way of a search for what is not.
                pinned.extend(hold_all(slots, &self.settle(earlier)));
                settled = true;
            }
            if saving + filling.len() >= SAVING_BLOCKS_MAX {
                break;
            }
            let Some(free) = self.take_slot(slots, previous, &mut may_evict) else {
                break; // What follows could not be used without this block.
            };
            self.index.insert(each.key, free.number());
            catalogue.note_used(free.number(), self.now);
            filling.push(slots.fill(free, filler));
        }
        // A chain is useless without its head, so the head is entered last and evicted last.
        for (slot, each) in filling.iter().zip(missing).rev() {
            self.policy.insert(slot.slot_ref().slot, each.key);
        }
        for slot in pinned {
            slots.let_go(slot, SlotHolder::POOL);
        }
        let begun = filling.iter().zip(missing).map(|(slot, missing)| Filling {
            at: missing.at,
            slot: slot.slot_ref(),
        });
        let begun = begun.collect();
        self.sessions.fill(session, filling);
        begun
    }

    /// Marks blocks of a chain as used: its head last, so that it is given up last.
    pub(super) fn used(&mut self, catalogue: &Catalogue, slots: &[u32]) {
        for &slot in slots.iter().rev() {
            self.policy.touch(slot);
            catalogue.note_used(slot, self.now);
        }
    }

    /// The same for blocks that a session has loaded. One that was lost or cleared since is in no queue
    /// any more.
    pub(super) fn used_if_held(&mut self, catalogue: &Catalogue, used: &[SlotRef]) {
        let held = used.iter().filter(|&&slot| catalogue.slots.holds(slot));
        let held: Vec<u32> = held.map(|slot| slot.slot).collect();
        self.counters.used_blocks += used.len() as u64;
        self.used(catalogue, &held);
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
    fn must_evict(&self, previous: Option<u32>) -> bool {
        let room = self.free.can_follow(previous) || self.free.has_stretch();
        !room && self.free.len() < self.spare()
    }

    /// Whether an operator keeps everything from eviction.
    pub(super) fn is_pinned(&self) -> bool {
        self.now < self.pinned_until
    }

    /// See [`super::Pool::spare_rows`].
    pub(super) fn spare(&self) -> usize {
        (self.free.owned() / SPARE_SHARE).max(1)
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
            if !*may_evict || !self.must_evict(previous) {
                break;
            }
            *may_evict = self.evict(slots);
        }
        self.free.take(previous)
    }

    /// Gives up a block that nobody uses; whether there was one.
    fn evict(&mut self, slots: &SlotTable) -> bool {
        if self.is_pinned() {
            return false;
        }
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
            self.sessions.record(PoolEvent::Removed(key));
        }
        self.counters.evicted_blocks += 1;
        true
    }

    /// Frees a doomed slot when nobody holds it any more.
    pub(super) fn release(&mut self, slots: &SlotTable, slot: SlotRef) {
        match slots.release(slot) {
            Some(free) => self.free.put(free),
            None => self.doomed.push_back(slot),
        }
    }

    pub(super) fn poll(&mut self, catalogue: &Catalogue) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let before = std::mem::replace(&mut self.now, since.map_or(0, |since| since.as_secs()));
        // All of them once a second; mostly they end in their order.
        let all = self.now != before;
        for ended in self.sessions.collect(catalogue, all, self.now) {
            match ended {
                Saved::Complete(filling) => self.seal(catalogue, &filling),
                Saved::Failed(filling) => self.fail(&catalogue.slots, &filling),
            }
        }
        for _ in 0..self.doomed.len().min(LOOKED_AT_ONCE) {
            let Some(slot) = self.doomed.pop_front() else {
                return;
            };
            self.release(&catalogue.slots, slot);
        }
    }

    fn seal(&mut self, catalogue: &Catalogue, filling: &FillingSlot) {
        let slots = &catalogue.slots;
        let slot = filling.slot_ref();
        catalogue.note_proven(slot.slot);
        if slots.seal(filling).is_some() {
            self.counters.saved_blocks += 1;
            let key = self.index.key_of(slot.slot);
            self.sessions.record(PoolEvent::Stored(key));
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
    pub(super) fn close(&mut self, catalogue: &Catalogue, session: SessionId) {
        self.poll(catalogue);
        let ranks = catalogue.segment.geometry().ranks();
        for filling in self.sessions.close(session) {
            let slot = filling.slot_ref();
            if catalogue.saved(slot).is_memory() {
                self.seal(catalogue, &filling);
                continue;
            }
            for rank in 0..ranks {
                let segment = &catalogue.segment;
                segment.condemn_shard(slot.slot, rank, slot.generation);
            }
            self.fail(&catalogue.slots, &filling);
        }
    }

    /// Drops every block. Those that are held or being saved go as soon as they no longer are.
    pub(super) fn clear(&mut self, catalogue: &Catalogue) {
        self.poll(catalogue);
        for slot in self.index.clear() {
            self.policy.remove(slot);
            let slot = catalogue.slots.current(slot);
            let sealed = catalogue.slots.state(slot) == Some(SlotState::Sealed);
            catalogue.slots.doom(slot);
            // What is being saved comes back when its writer is done.
            if sealed {
                self.release(&catalogue.slots, slot);
            }
        }
        self.sessions.record(PoolEvent::Cleared);
    }

    /// Drops a block whose bytes are damaged, unless it is gone.
    pub(super) fn drop_damaged(&mut self, slots: &SlotTable, slot: SlotRef) {
        let sealed = slots.state(slot) == Some(SlotState::Sealed);
        if slots.doom(slot) {
            self.forget(slot.slot);
            self.counters.damaged_blocks += 1;
            if sealed {
                self.release(slots, slot);
            }
        }
    }

    /// Takes `slot` out of index and policy.
    pub(super) fn forget(&mut self, slot: u32) {
        if let Some(key) = self.index.remove_slot(slot) {
            self.policy.remove(slot);
            self.sessions.record(PoolEvent::Removed(key));
        }
    }
}

/// Holds those of `slots` that have or await a block, so that the pool does not give them up; the
/// slots that are held now.
fn hold_all(slots: &SlotTable, each: &[u32]) -> Vec<u32> {
    for &slot in each {
        slots.claim(slot, SlotHolder::POOL);
    }
    SlotTable::publish_claims();
    let held = each.iter().filter(|&&slot| {
        let stays = slots.claimed(slot).is_some();
        if !stays {
            slots.let_go(slot, SlotHolder::POOL);
        }
        stays
    });
    held.copied().collect()
}
