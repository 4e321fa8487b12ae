//! The life of every slot, in two words of its record.
//!
//! ```text
//!            fill           seal           evict (no holder)
//!   Free ─────────▶ Filling ─────▶ Sealed ────────────────▶ Free
//!                    │    │           │
//!               doom │    │ fail      │ doom
//!                    ▼    ▼           ▼     release (no holder)
//!             Abandoned ──▶ Doomed ◀──┘  ──────────────────▶ Free
//!                      seal or fail
//! ```
//!
//! The states are types where a slot is held ([`FreeSlot`], [`FillingSlot`], [`SealedSlot`]) so that
//! a wrong transition does not compile.
//!
//! One word has the generation and the state, and only the pool writes it. The other has a bit for each
//! session that has pinned the slot, and only that session writes the bit: it may be in another process,
//! which asks nobody, and when that dies the pool takes its bits out. What keeps the two from missing
//! each other is an order: a session sets its bit and then looks at the state, the pool announces that
//! the slot leaves and then looks at the bits. Whichever was later sees the other. So a pin succeeds
//! only on a block that stays until it is given back, and a slot with holders is never freed.

use kvtide_model::SlotRef;

#[cfg(not(loom))]
use kvtide_segment::SharedSegment;
#[cfg(all(test, not(loom)))]
use kvtide_segment::SlotRecord;
#[cfg(not(loom))]
use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering, in_order};

/// A slot with no block. Dropping it without giving it back would lose a row.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct FreeSlot(u32);

/// A slot that a worker writes.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct FillingSlot(SlotRef);

/// A slot whose block is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SealedSlot(SlotRef);

impl FreeSlot {
    /// Of a slot that [`Self::keep`] took apart.
    pub(super) fn kept(slot: u32) -> Self {
        Self(slot)
    }

    /// Which slot it is.
    pub(super) fn number(&self) -> u32 {
        self.0
    }

    /// For whoever keeps many of them as bits.
    pub(super) fn keep(self) -> u32 {
        self.0
    }
}

impl FillingSlot {
    pub(crate) fn slot_ref(&self) -> SlotRef {
        self.0
    }
}

impl SealedSlot {
    pub(crate) fn slot_ref(self) -> SlotRef {
        self.0
    }
}

/// Whose pins a bit of a slot's holders stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HolderBit(u64);

impl HolderBit {
    /// Sessions that can have a bit each.
    pub(crate) const SESSIONS: usize = 62;
    /// The thread that scrubs.
    pub(crate) const SCRUB: Self = Self(1 << 62);
    /// The pool itself, under its lock.
    pub(crate) const POOL: Self = Self(1 << 63);

    /// The number of the session whose bit it is.
    pub(crate) fn number(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// Of the session with this number, below [`HolderBit::SESSIONS`].
    pub(crate) fn of_session(number: usize) -> Option<Self> {
        (number < Self::SESSIONS).then(|| Self(1 << number))
    }
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    Free,
    Filling,
    Sealed,
    /// No longer in the index, but a worker still writes it.
    Abandoned,
    /// No longer in the index, and nobody writes it; freed when nobody holds it.
    Doomed,
}

/// generation (32 bits) | zeros | leaving (1 bit) | state (3 bits)
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word {
    generation: u32,
    state: SlotState,
    /// Whether the pool is about to free it, unless somebody holds it. Whoever held it before sees the
    /// state as it was.
    leaving: bool,
}

const LEAVING: u64 = 1 << 3;

impl Word {
    /// Whether a pin that is set before this is seen will last.
    fn takes_pins(self) -> bool {
        !self.leaving && matches!(self.state, SlotState::Filling | SlotState::Sealed)
    }

    fn pack(self) -> u64 {
        let state = match self.state {
            SlotState::Free => 0,
            SlotState::Filling => 1,
            SlotState::Sealed => 2,
            SlotState::Abandoned => 3,
            SlotState::Doomed => 4,
        };
        let leaving = if self.leaving { LEAVING } else { 0 };
        u64::from(self.generation) << 32 | leaving | state
    }

    fn unpack(word: u64) -> Self {
        let [_, _, _, _, g0, g1, g2, g3] = word.to_le_bytes();
        let state = match word & 0b111 {
            0 => SlotState::Free,
            1 => SlotState::Filling,
            2 => SlotState::Sealed,
            3 => SlotState::Abandoned,
            _ => SlotState::Doomed,
        };
        Self {
            generation: u32::from_le_bytes([g0, g1, g2, g3]),
            state,
            leaving: word & LEAVING != 0,
        }
    }
}

/// The two words of a slot.
struct Words<'a> {
    state: &'a AtomicU64,
    holders: &'a AtomicU64,
}

/// All slots of a pool, as everybody sees them who has the pool's memory.
#[derive(Debug)]
pub(crate) struct SlotTable(Storage);

#[cfg(not(loom))]
#[derive(Debug)]
enum Storage {
    Mapped(Arc<SharedSegment>),
    #[cfg(test)]
    Heap(Box<[SlotRecord]>),
}

#[cfg(not(loom))]
impl Storage {
    fn words(&self, slot: u32) -> Option<Words<'_>> {
        let record = match self {
            Self::Mapped(segment) => segment.record(slot)?,
            #[cfg(test)]
            Self::Heap(records) => records.get(slot as usize)?,
        };
        Some(Words {
            state: &record.state,
            holders: &record.holders,
        })
    }
}

/// Where loom watches the words.
#[cfg(loom)]
#[derive(Debug)]
struct Storage(Box<[(AtomicU64, AtomicU64)]>);

#[cfg(loom)]
impl Storage {
    fn words(&self, slot: u32) -> Option<Words<'_>> {
        let (state, holders) = self.0.get(slot as usize)?;
        Some(Words { state, holders })
    }
}

impl SlotTable {
    /// The slots of the rows of `segment`.
    #[cfg(not(loom))]
    pub(crate) fn of_segment(segment: Arc<SharedSegment>) -> Self {
        Self(Storage::Mapped(segment))
    }

    /// Only the models are for loom.
    #[cfg(loom)]
    pub(crate) fn of_segment(_: std::sync::Arc<kvtide_segment::SharedSegment>) -> Self {
        Self(Storage(Box::new([])))
    }

    fn words(&self, slot: u32) -> Option<Words<'_>> {
        self.0.words(slot)
    }

    fn word(&self, slot: u32) -> Option<Word> {
        let word = self.words(slot)?.state.load(Ordering::Acquire);
        Some(Word::unpack(word))
    }

    // ---- for everybody

    /// The state of `slot`, if it still has the generation that is meant.
    pub(crate) fn state(&self, slot: SlotRef) -> Option<SlotState> {
        let word = self.word(slot.slot)?;
        (word.generation == slot.generation).then_some(word.state)
    }

    /// Whether `slot` still holds or awaits the block that is meant.
    pub(crate) fn holds(&self, slot: SlotRef) -> bool {
        matches!(
            self.state(slot),
            Some(SlotState::Filling | SlotState::Sealed)
        )
    }

    /// The generation that `slot` has now.
    pub(crate) fn current(&self, slot: u32) -> SlotRef {
        let generation = self.word(slot).map_or(0, |word| word.generation);
        SlotRef { slot, generation }
    }

    /// Sets a bit of a slot's holders. The slot, if it stays until the bit is taken out; whose block it
    /// is, the caller has to look now. `None`, and no bit, if it holds and awaits none.
    pub(crate) fn hold(&self, slot: u32, holder: HolderBit) -> Option<SlotRef> {
        let words = self.words(slot)?;
        // The bit before the look: see the module's documentation.
        words.holders.fetch_or(holder.0, Ordering::SeqCst);
        in_order();
        let word = Word::unpack(words.state.load(Ordering::SeqCst));
        if !word.takes_pins() {
            self.let_go(slot, holder);
            return None;
        }
        let generation = word.generation;
        Some(SlotRef { slot, generation })
    }

    /// The same of a slot that the caller holds.
    pub(crate) fn held(&self, slot: u32) -> Option<SlotRef> {
        let word = self.word(slot)?;
        let generation = word.generation;
        let live = matches!(word.state, SlotState::Filling | SlotState::Sealed);
        live.then_some(SlotRef { slot, generation })
    }

    /// Takes a bit out of all slots in `slots`: its session is gone.
    pub(crate) fn let_go_all(&self, slots: std::ops::Range<u32>, holder: HolderBit) {
        for slot in slots {
            if let Some(words) = self.words(slot)
                && words.holders.load(Ordering::Acquire) & holder.0 != 0
            {
                words.holders.fetch_and(!holder.0, Ordering::Release);
            }
        }
    }

    /// Takes a bit out again.
    pub(crate) fn let_go(&self, slot: u32, holder: HolderBit) {
        if let Some(words) = self.words(slot) {
            // What was read of the row was read before.
            words.holders.fetch_and(!holder.0, Ordering::Release);
        }
    }

    /// Whether `holder` is the only one that holds `slot`.
    pub(crate) fn is_held_by_one(&self, slot: u32, holder: HolderBit) -> bool {
        self.words(slot)
            .is_some_and(|words| words.holders.load(Ordering::Acquire) == holder.0)
    }

    // ---- for the pool alone, under its lock

    /// Whether `slot` is sealed, in any generation, and nobody holds it; the generation it has.
    pub(crate) fn evictable(&self, slot: u32) -> Option<SealedSlot> {
        let words = self.words(slot)?;
        let word = Word::unpack(words.state.load(Ordering::Acquire));
        let held = words.holders.load(Ordering::Acquire) != 0;
        (word.state == SlotState::Sealed && !held).then_some(SealedSlot(SlotRef {
            slot,
            generation: word.generation,
        }))
    }

    /// Whether anybody holds `slot`.
    #[cfg(all(test, loom))]
    fn is_held(&self, slot: u32) -> bool {
        self.words(slot)
            .is_some_and(|words| words.holders.load(Ordering::Acquire) != 0)
    }

    /// What an earlier life of the pool left in a slot: its reference and its state. Bits of others than
    /// the `living` are taken out.
    pub(crate) fn adopt(&self, slot: u32, living: &[HolderBit]) -> (SlotRef, SlotState) {
        let bits = living.iter().fold(0, |bits, bit| bits | bit.0);
        if let Some(words) = self.words(slot) {
            words.holders.fetch_and(bits, Ordering::AcqRel);
        }
        let state = self.word(slot).map_or(SlotState::Free, |word| word.state);
        let current = self.current(slot);
        // It may have been leaving.
        self.set(current, state);
        (current, state)
    }

    /// A slot that an earlier life of the pool left free.
    pub(crate) fn adopt_as_free(&self, slot: SlotRef) -> FreeSlot {
        self.set(slot, SlotState::Free);
        FreeSlot(slot.slot)
    }

    /// A slot whose block an earlier life left complete.
    pub(crate) fn adopt_as_sealed(&self, slot: SlotRef) {
        self.set(slot, SlotState::Sealed);
    }

    /// Nobody pins any more what an earlier life left in this slot.
    pub(crate) fn adopt_as_doomed(&self, slot: SlotRef) {
        self.set(slot, SlotState::Doomed);
    }

    /// The writer of a slot that an earlier life of the pool left is still at it.
    pub(crate) fn adopt_as_filling(&self, slot: SlotRef) -> FillingSlot {
        FillingSlot(slot)
    }

    /// A slot of a pool that holds nothing, whatever it was in before. Its generation goes on, and bits
    /// stay: a session that is about to find out that nothing is there takes its own out.
    pub(crate) fn reset(&self, slot: u32) -> FreeSlot {
        self.set(self.current(slot), SlotState::Free);
        FreeSlot(slot)
    }

    /// Free → Filling, in a new generation.
    pub(crate) fn fill(&self, slot: FreeSlot) -> FillingSlot {
        let slot = self.current(slot.0);
        let generation = slot.generation.wrapping_add(1);
        let filling = SlotRef { generation, ..slot };
        self.set(filling, SlotState::Filling);
        FillingSlot(filling)
    }

    /// The writer succeeded: Filling → Sealed, or Abandoned → Doomed, which returns `None`.
    pub(crate) fn seal(&self, slot: &FillingSlot) -> Option<SealedSlot> {
        self.writer_done(slot, SlotState::Sealed)
            .then_some(SealedSlot(slot.0))
    }

    /// The writer failed: Filling or Abandoned → Doomed; whether it was not abandoned before.
    pub(crate) fn fail(&self, slot: &FillingSlot) -> bool {
        self.writer_done(slot, SlotState::Doomed)
    }

    fn writer_done(&self, slot: &FillingSlot, next: SlotState) -> bool {
        let was = self.state(slot.0);
        match was {
            Some(SlotState::Filling) => self.set(slot.0, next),
            Some(SlotState::Abandoned) => self.set(slot.0, SlotState::Doomed),
            Some(SlotState::Free | SlotState::Sealed | SlotState::Doomed) | None => {}
        }
        was == Some(SlotState::Filling)
    }

    /// Sealed → Free, if nobody holds it.
    pub(crate) fn evict(&self, slot: SealedSlot) -> Option<FreeSlot> {
        self.leave(slot.0, SlotState::Sealed)
    }

    /// Sealed → Doomed, or Filling → Abandoned.
    pub(crate) fn doom(&self, slot: SlotRef) -> bool {
        match self.state(slot) {
            Some(SlotState::Filling) => self.set(slot, SlotState::Abandoned),
            Some(SlotState::Sealed) => self.set(slot, SlotState::Doomed),
            Some(SlotState::Free | SlotState::Abandoned | SlotState::Doomed) | None => {
                return false;
            }
        }
        true
    }

    /// Doomed → Free, if nobody holds it.
    pub(crate) fn release(&self, slot: SlotRef) -> Option<FreeSlot> {
        self.leave(slot, SlotState::Doomed)
    }

    /// Frees a slot that has `state`, if nobody holds it.
    fn leave(&self, slot: SlotRef, state: SlotState) -> Option<FreeSlot> {
        let words = self.words(slot.slot)?;
        if self.state(slot) != Some(state) || words.holders.load(Ordering::Acquire) != 0 {
            return None;
        }
        let leaving = Word {
            generation: slot.generation,
            state,
            leaving: true,
        };
        // The word before the look: see the module's documentation.
        words.state.store(leaving.pack(), Ordering::SeqCst);
        in_order();
        if words.holders.load(Ordering::SeqCst) != 0 {
            self.set(slot, state);
            return None;
        }
        self.set(slot, SlotState::Free);
        Some(FreeSlot(slot.slot))
    }

    fn set(&self, slot: SlotRef, state: SlotState) {
        let word = Word {
            generation: slot.generation,
            state,
            leaving: false,
        };
        if let Some(words) = self.words(slot.slot) {
            words.state.store(word.pack(), Ordering::Release);
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const A: HolderBit = HolderBit(1);
    const B: HolderBit = HolderBit(2);

    fn table() -> (SlotTable, FreeSlot) {
        let records = Box::new([SlotRecord::default()]);
        (SlotTable(Storage::Heap(records)), FreeSlot(0))
    }

    #[test]
    fn an_abandoned_slot_is_not_freed_before_its_writer_is_done() {
        let (table, free) = table();
        let filling = table.fill(free);
        let slot = filling.slot_ref();
        assert!(table.hold(0, A).is_some());
        assert!(table.doom(slot));
        table.let_go(0, A);
        assert_eq!(table.release(slot), None, "it is still written");
        assert_eq!(table.seal(&filling), None);
        assert!(table.release(slot).is_some());
    }

    #[test]
    fn a_slot_goes_through_its_life_and_a_held_one_is_not_evicted() {
        let (table, free) = table();
        assert_eq!(table.hold(0, A), None, "there is nothing in it");
        let filling = table.fill(free);
        let first = filling.slot_ref();
        assert_eq!(table.hold(0, A), Some(first));
        let sealed = table.seal(&filling).unwrap();
        assert_eq!(table.hold(0, B), Some(first));
        table.let_go(0, B);
        assert_eq!(table.evict(sealed), None, "one still holds it");
        assert_eq!(table.state(first), Some(SlotState::Sealed));
        table.let_go(0, A);
        let again = table.fill(table.evict(sealed).unwrap());
        assert_eq!(table.state(first), None, "the block that was meant is gone");
        assert_eq!(table.state(again.slot_ref()), Some(SlotState::Filling));
    }

    #[test]
    fn a_doomed_slot_is_freed_when_nobody_holds_it() {
        let (table, free) = table();
        let filling = table.fill(free);
        let slot = filling.slot_ref();
        table.seal(&filling).unwrap();
        assert!(table.hold(0, A).is_some() && table.hold(0, B).is_some());
        assert!(table.doom(slot));
        assert_eq!(table.hold(0, B), None, "doomed slots take no new pins");
        assert_eq!(table.release(slot), None);
        assert!(table.is_held_by_one(0, A));
        table.let_go(0, A);
        assert!(table.release(slot).is_some());
    }

    #[test]
    fn sessions_have_a_bit_each_and_none_has_that_of_the_pool() {
        let bits: Vec<_> = (0..70).filter_map(HolderBit::of_session).collect();
        assert_eq!(bits.len(), HolderBit::SESSIONS);
        let all = bits.iter().fold(0, |all, bit| all | bit.0);
        assert_eq!(all.count_ones(), 62);
        assert_eq!(all & (HolderBit::POOL.0 | HolderBit::SCRUB.0), 0);
    }
}

/// `make test-loom`; the models explore every interleaving of the threads in them.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    const A: HolderBit = HolderBit(1);
    const B: HolderBit = HolderBit(2);

    fn sealed_table() -> (Arc<SlotTable>, SealedSlot) {
        let words = (AtomicU64::new(0), AtomicU64::new(0));
        let table = SlotTable(Storage(Box::new([words])));
        let filling = table.fill(FreeSlot(0));
        let sealed = table.seal(&filling).unwrap();
        (Arc::new(table), sealed)
    }

    #[test]
    fn a_slot_is_never_both_held_and_evicted() {
        loom::model(|| {
            let (table, sealed) = sealed_table();
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.hold(0, A).is_some())
            };
            let evicted = table.evict(sealed).is_some();
            let held = session.join().unwrap();
            assert!(!(held && evicted), "both held and evicted");
        });
    }

    #[test]
    fn a_pin_that_succeeds_is_on_the_block_that_the_slot_then_has() {
        loom::model(|| {
            let (table, sealed) = sealed_table();
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.hold(0, A))
            };
            // Evicted if it can be, and filled with the next block at once.
            let next = table.evict(sealed).map(|free| table.fill(free));
            if let Some(slot) = session.join().unwrap() {
                let now = next.map_or(sealed.0, |filling| filling.slot_ref());
                assert_eq!(slot, now);
                assert!(table.is_held(0));
            }
        });
    }

    #[test]
    fn of_two_sessions_neither_takes_out_the_others_bit() {
        loom::model(|| {
            let (table, sealed) = sealed_table();
            let other = {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    if table.hold(0, B).is_some() {
                        table.let_go(0, B);
                    }
                })
            };
            let held = table.hold(0, A).is_some();
            assert!(held, "nobody evicts it");
            other.join().unwrap();
            assert!(table.is_held_by_one(0, A));
            assert!(table.evict(sealed).is_none());
        });
    }

    /// The control: looking first and acting later must be caught by the first model's claim.
    #[test]
    #[should_panic(expected = "both held and evicted")]
    fn control_check_then_act_is_caught() {
        loom::model(|| {
            let (table, sealed) = sealed_table();
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.hold(0, A).is_some())
            };
            let evicted = table.evictable(0).is_some();
            if evicted {
                table.set(sealed.0, SlotState::Free);
            }
            let held = session.join().unwrap();
            assert!(!(held && evicted), "both held and evicted");
        });
    }
}
