//! The life of every slot: a word of its record, and a bit in the bitmap of each who has pinned it.
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
//! The word has the generation and the state, and only the pool writes it. The bits are the sessions',
//! which may be in other processes and ask nobody ([`super::holders`]). What keeps the two from missing
//! each other is an order: a session claims a slot by its bit and then looks at the state, the pool
//! announces that the slot leaves and then looks at the bits. Both put a fence between the two, so
//! whichever was later sees the other. So a pin succeeds only on a block that stays until it is given
//! back, and a slot with holders is never freed. One fence does for many claims.

use kvtide_model::SlotRef;

#[cfg(not(loom))]
use kvtide_segment::SharedSegment;
#[cfg(not(loom))]
use std::sync::Arc;

use super::holders::{Holders, SlotHolder};
use crate::sync::{AtomicU64, Ordering, fence};

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

/// generation (32 bits) | zeros | filler (8 bits) | zeros | leaving (1 bit) | state (3 bits)
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word {
    generation: u32,
    /// Number of the session that fills, or has filled, the slot in this generation.
    filler: u8,
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
        let filler = u64::from(self.filler) << 8;
        u64::from(self.generation) << 32 | filler | leaving | state
    }

    fn unpack(word: u64) -> Self {
        let [_, filler, _, _, g0, g1, g2, g3] = word.to_le_bytes();
        let state = match word & 0b111 {
            0 => SlotState::Free,
            1 => SlotState::Filling,
            2 => SlotState::Sealed,
            3 => SlotState::Abandoned,
            _ => SlotState::Doomed,
        };
        Self {
            generation: u32::from_le_bytes([g0, g1, g2, g3]),
            filler,
            state,
            leaving: word & LEAVING != 0,
        }
    }
}

/// All slots of a pool, as everybody sees them who has the pool's memory.
#[derive(Debug)]
pub(crate) struct SlotTable {
    states: Storage,
    holders: Holders,
}

#[cfg(not(loom))]
#[derive(Debug)]
enum Storage {
    Mapped(Arc<SharedSegment>),
    #[cfg(test)]
    Heap(Box<[AtomicU64]>),
}

#[cfg(not(loom))]
impl Storage {
    fn word(&self, slot: u32) -> Option<&AtomicU64> {
        match self {
            Self::Mapped(segment) => Some(&segment.record(slot)?.state),
            #[cfg(test)]
            Self::Heap(words) => words.get(slot as usize),
        }
    }
}

/// Where loom watches the words.
#[cfg(loom)]
#[derive(Debug)]
struct Storage(Box<[AtomicU64]>);

#[cfg(loom)]
impl Storage {
    fn word(&self, slot: u32) -> Option<&AtomicU64> {
        self.0.get(slot as usize)
    }
}

impl SlotTable {
    /// The slots of the rows of `segment`.
    #[cfg(not(loom))]
    pub(crate) fn of_segment(segment: Arc<SharedSegment>) -> Self {
        Self {
            states: Storage::Mapped(Arc::clone(&segment)),
            holders: Holders::of_segment(segment),
        }
    }

    /// Only the models are for loom.
    #[cfg(loom)]
    pub(crate) fn of_segment(segment: std::sync::Arc<kvtide_segment::SharedSegment>) -> Self {
        Self {
            states: Storage(Box::new([])),
            holders: Holders::of_segment(segment),
        }
    }

    /// One slot, and a few holders.
    #[cfg(test)]
    fn of_one() -> (Self, FreeSlot) {
        let states = Box::new([AtomicU64::new(0)]);
        #[cfg(not(loom))]
        let states = Storage::Heap(states);
        #[cfg(loom)]
        let states = Storage(states);
        let holders = Holders::on_heap(2);
        let table = Self { states, holders };
        (table, FreeSlot(0))
    }

    fn word(&self, slot: u32) -> Option<Word> {
        let word = self.states.word(slot)?.load(Ordering::Acquire);
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

    /// Whoever pins calls this before, once.
    pub(crate) fn enter(&self, holder: SlotHolder) {
        self.holders.enter(holder);
    }

    /// Claims a slot, whatever it has; see [`SlotTable::claimed`].
    pub(crate) fn claim(&self, slot: u32, holder: SlotHolder) {
        self.holders.set(slot, holder);
    }

    /// Makes the claims of this thread known, before it looks what they are on.
    pub(crate) fn publish_claims() {
        fence(Ordering::SeqCst);
    }

    /// What a slot has that was claimed and published: it stays until the claim is given up. Whose block
    /// it is, the caller has to look now. `None` if it has and awaits none, and then the claim is to be
    /// given up.
    pub(crate) fn claimed(&self, slot: u32) -> Option<(SlotRef, SlotState)> {
        let word = self.word(slot)?;
        let generation = word.generation;
        word.takes_pins()
            .then_some((SlotRef { slot, generation }, word.state))
    }

    /// Claims one slot and publishes that. The slot, if it stays until it is let go; whose block it is,
    /// the caller has to look now. `None`, and no claim, if it has and awaits none.
    pub(crate) fn hold(&self, slot: u32, holder: SlotHolder) -> Option<SlotRef> {
        self.claim(slot, holder);
        Self::publish_claims();
        let claimed = self.claimed(slot);
        if claimed.is_none() {
            self.let_go(slot, holder);
        }
        claimed.map(|(slot, _)| slot)
    }

    /// What a slot has that the caller holds: it may be leaving in vain.
    pub(crate) fn held(&self, slot: u32) -> Option<(SlotRef, SlotState)> {
        let word = self.word(slot)?;
        let generation = word.generation;
        let live = matches!(word.state, SlotState::Filling | SlotState::Sealed);
        live.then_some((SlotRef { slot, generation }, word.state))
    }

    /// Gives a claim up.
    pub(crate) fn let_go(&self, slot: u32, holder: SlotHolder) {
        self.holders.take_out(slot, holder);
    }

    /// Gives up all claims of a session that is gone.
    pub(crate) fn let_go_all(&self, holder: SlotHolder) {
        self.holders.leave(holder);
    }

    /// A bit for each who holds `slot`.
    pub(crate) fn holders(&self, slot: u32) -> u64 {
        self.holders.of(slot)
    }

    /// Whether `holder` is the only one that holds `slot`.
    pub(crate) fn is_held_by_one(&self, slot: u32, holder: SlotHolder) -> bool {
        self.holders.of(slot) == holder.bit()
    }

    /// Number of the session that fills, or has filled, the block that `slot` has.
    pub(crate) fn filler(&self, slot: u32) -> u8 {
        self.word(slot).map_or(u8::MAX, |word| word.filler)
    }

    // ---- for the pool alone, under its lock

    /// Whether `slot` is sealed, in any generation, and nobody holds it; the generation it has.
    pub(crate) fn evictable(&self, slot: u32) -> Option<SealedSlot> {
        let word = self.word(slot)?;
        let is_free = word.state == SlotState::Sealed && self.holders.of(slot) == 0;
        is_free.then_some(SealedSlot(SlotRef {
            slot,
            generation: word.generation,
        }))
    }

    /// Gives up all claims of an earlier life of the pool but those of the `living`.
    pub(crate) fn keep_only(&self, living: &[SlotHolder]) {
        self.holders.keep_only(living);
    }

    /// What an earlier life of the pool left in a slot: its reference and its state.
    pub(crate) fn adopt(&self, slot: u32) -> (SlotRef, SlotState) {
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

    /// A slot of a pool that holds nothing, whatever it was in before. Its generation goes on, and so do
    /// claims: a session that is about to find out that nothing is there gives its own up.
    pub(crate) fn reset(&self, slot: u32) -> FreeSlot {
        self.set(self.current(slot), SlotState::Free);
        FreeSlot(slot)
    }

    /// Free → Filling, in a new generation, by a session.
    pub(crate) fn fill(&self, slot: FreeSlot, filler: SlotHolder) -> FillingSlot {
        let slot = self.current(slot.0);
        let generation = slot.generation.wrapping_add(1);
        let filling = SlotRef { generation, ..slot };
        self.store(
            slot.slot,
            Word {
                generation,
                filler: filler.number(),
                state: SlotState::Filling,
                leaving: false,
            },
            Ordering::Release,
        );
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
        let word = self.word(slot.slot)?;
        let is_meant = word.generation == slot.generation && word.state == state;
        if !is_meant || self.holders.of(slot.slot) != 0 {
            return None;
        }
        let leaving = Word {
            leaving: true,
            ..word
        };
        self.store(slot.slot, leaving, Ordering::Relaxed);
        // The word before the look: see the module's documentation.
        fence(Ordering::SeqCst);
        if self.holders.of(slot.slot) != 0 {
            self.set(slot, state);
            return None;
        }
        self.set(slot, SlotState::Free);
        Some(FreeSlot(slot.slot))
    }

    /// Of the same filler as before.
    fn set(&self, slot: SlotRef, state: SlotState) {
        let word = Word {
            generation: slot.generation,
            filler: self.filler(slot.slot),
            state,
            leaving: false,
        };
        self.store(slot.slot, word, Ordering::Release);
    }

    fn store(&self, slot: u32, word: Word, ordering: Ordering) {
        if let Some(place) = self.states.word(slot) {
            place.store(word.pack(), ordering);
        }
    }
}

/// Sessions that may pin in `table`.
#[cfg(test)]
fn two_sessions(table: &SlotTable) -> [SlotHolder; 2] {
    let sessions = [0, 1].map(|n| SlotHolder::of_session(n).unwrap());
    sessions.iter().for_each(|&each| table.enter(each));
    sessions
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn table() -> (SlotTable, FreeSlot, [SlotHolder; 2]) {
        let (table, free) = SlotTable::of_one();
        let sessions = two_sessions(&table);
        (table, free, sessions)
    }

    #[test]
    fn an_abandoned_slot_is_not_freed_before_its_writer_is_done() {
        let (table, free, [a, _]) = table();
        let filling = table.fill(free, a);
        let slot = filling.slot_ref();
        assert!(table.hold(0, a).is_some());
        assert!(table.doom(slot));
        table.let_go(0, a);
        assert_eq!(table.release(slot), None, "it is still written");
        assert_eq!(table.seal(&filling), None);
        assert!(table.release(slot).is_some());
    }

    #[test]
    fn a_slot_goes_through_its_life_and_a_held_one_is_not_evicted() {
        let (table, free, [a, b]) = table();
        assert_eq!(table.hold(0, a), None, "there is nothing in it");
        let filling = table.fill(free, a);
        let first = filling.slot_ref();
        assert_eq!(table.hold(0, a), Some(first));
        let sealed = table.seal(&filling).unwrap();
        assert_eq!(table.hold(0, b), Some(first));
        table.let_go(0, b);
        assert_eq!(table.evict(sealed), None, "one still holds it");
        assert_eq!(table.state(first), Some(SlotState::Sealed));
        table.let_go(0, a);
        let again = table.fill(table.evict(sealed).unwrap(), b);
        assert_eq!(table.state(first), None, "the block that was meant is gone");
        assert_eq!(table.state(again.slot_ref()), Some(SlotState::Filling));
    }

    #[test]
    fn a_doomed_slot_is_freed_when_nobody_holds_it() {
        let (table, free, [a, b]) = table();
        let filling = table.fill(free, a);
        let slot = filling.slot_ref();
        table.seal(&filling).unwrap();
        assert!(table.hold(0, a).is_some() && table.hold(0, b).is_some());
        assert!(table.doom(slot));
        assert_eq!(table.hold(0, b), None, "doomed slots take no new pins");
        assert_eq!(table.release(slot), None);
        assert!(table.is_held_by_one(0, a));
        table.let_go(0, a);
        assert!(table.release(slot).is_some());
    }
}

/// `make test-loom`; the models explore every interleaving of the threads in them.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    fn sealed_table() -> (Arc<SlotTable>, SealedSlot, [SlotHolder; 2]) {
        let (table, free) = SlotTable::of_one();
        let [a, b] = two_sessions(&table);
        let filling = table.fill(free, a);
        let sealed = table.seal(&filling).unwrap();
        (Arc::new(table), sealed, [a, b])
    }

    #[test]
    fn a_slot_is_never_both_held_and_evicted() {
        loom::model(|| {
            let (table, sealed, [a, b]) = sealed_table();
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.hold(0, a).is_some())
            };
            let evicted = table.evict(sealed).is_some();
            let held = session.join().unwrap();
            assert!(!(held && evicted), "both held and evicted");
        });
    }

    #[test]
    fn a_pin_that_succeeds_is_on_the_block_that_the_slot_then_has() {
        loom::model(|| {
            let (table, sealed, [a, b]) = sealed_table();
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.hold(0, a))
            };
            // Evicted if it can be, and filled with the next block at once.
            let next = table.evict(sealed).map(|free| table.fill(free, a));
            if let Some(slot) = session.join().unwrap() {
                let now = next.map_or(sealed.0, |filling| filling.slot_ref());
                assert_eq!(slot, now);
                assert_ne!(table.holders(0), 0);
            }
        });
    }

    #[test]
    fn of_two_sessions_neither_takes_out_the_others_bit() {
        loom::model(|| {
            let (table, sealed, [a, b]) = sealed_table();
            let other = {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    if table.hold(0, b).is_some() {
                        table.let_go(0, b);
                    }
                })
            };
            let held = table.hold(0, a).is_some();
            assert!(held, "nobody evicts it");
            other.join().unwrap();
            assert!(table.is_held_by_one(0, a));
            assert!(table.evict(sealed).is_none());
        });
    }

    #[test]
    fn a_session_that_comes_while_a_slot_is_evicted_holds_it_or_knows_that_it_does_not() {
        loom::model(|| {
            let (table, free) = SlotTable::of_one();
            let [a, b] = [0, 1].map(|n| SlotHolder::of_session(n).unwrap());
            let sealed = table.seal(&table.fill(free, a)).unwrap();
            let table = Arc::new(table);
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    table.enter(b);
                    table.hold(0, b).is_some()
                })
            };
            let evicted = table.evict(sealed).is_some();
            let held = session.join().unwrap();
            assert!(!(held && evicted), "both held and evicted");
        });
    }

    /// The control: claims that are looked at before they are published must be caught.
    #[test]
    #[should_panic(expected = "both held and evicted")]
    fn control_claims_without_a_fence_are_caught() {
        loom::model(|| {
            let (table, sealed, [a, _]) = sealed_table();
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    table.claim(0, a);
                    table.claimed(0).is_some()
                })
            };
            let evicted = table.evict(sealed).is_some();
            let held = session.join().unwrap();
            assert!(!(held && evicted), "both held and evicted");
        });
    }

    /// The control: looking first and acting later must be caught by the first model's claim.
    #[test]
    #[should_panic(expected = "both held and evicted")]
    fn control_check_then_act_is_caught() {
        loom::model(|| {
            let (table, sealed, [a, b]) = sealed_table();
            let session = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.hold(0, a).is_some())
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
