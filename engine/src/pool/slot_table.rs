//! The life of every slot, in one atomic word each.
//!
//! ```text
//!            fill           seal           evict (no pins)
//!   Free ─────────▶ Filling ─────▶ Sealed ────────────────▶ Free
//!                    │    │           │
//!               doom │    │ fail      │ doom
//!                    ▼    ▼           ▼     release (no pins)
//!             Abandoned ──▶ Doomed ◀──┘  ──────────────────▶ Free
//!                      seal or fail
//! ```
//!
//! The states are types where a slot is held ([`FreeSlot`], [`FillingSlot`], [`SealedSlot`]) so that
//! a wrong transition does not compile; the words exist because leases are pinned and dropped
//! without the pool's lock, from any thread. A pin succeeds only on the generation it names, and a
//! slot with pins is never freed.

use kvtide_model::SlotRef;

use crate::sync::{AtomicU64, Ordering};

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
    /// No longer in the index, and nobody writes it; freed when its last pin is gone.
    Doomed,
}

/// generation (32 bits) | state (3 bits) | pins (29 bits)
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word {
    generation: u32,
    state: SlotState,
    pins: u32,
}

const PINS_BITS: u32 = 29;
const PINS_MAX: u32 = (1 << PINS_BITS) - 1;

impl Word {
    fn pinned(self) -> Option<Self> {
        let live = matches!(self.state, SlotState::Filling | SlotState::Sealed);
        (live && self.pins < PINS_MAX).then_some(Self {
            pins: self.pins + 1,
            ..self
        })
    }

    fn pack(self) -> u64 {
        let state = match self.state {
            SlotState::Free => 0,
            SlotState::Filling => 1,
            SlotState::Sealed => 2,
            SlotState::Abandoned => 3,
            SlotState::Doomed => 4,
        };
        u64::from(self.generation) << 32 | state << PINS_BITS | u64::from(self.pins)
    }

    fn unpack(word: u64) -> Self {
        let [p0, p1, p2, p3, g0, g1, g2, g3] = word.to_le_bytes();
        let low = u32::from_le_bytes([p0, p1, p2, p3]);
        let state = match low >> PINS_BITS {
            0 => SlotState::Free,
            1 => SlotState::Filling,
            2 => SlotState::Sealed,
            3 => SlotState::Abandoned,
            _ => SlotState::Doomed,
        };
        Self {
            generation: u32::from_le_bytes([g0, g1, g2, g3]),
            state,
            pins: low & PINS_MAX,
        }
    }
}

/// All slots of a pool.
#[derive(Debug)]
pub(crate) struct SlotTable(Box<[AtomicU64]>);

impl SlotTable {
    /// `slots` free slots, and the table that follows them.
    pub(crate) fn new(slots: u32) -> (Self, Vec<FreeSlot>) {
        let word = Word {
            generation: 0,
            state: SlotState::Free,
            pins: 0,
        }
        .pack();
        let table = (0..slots).map(|_| AtomicU64::new(word)).collect();
        (Self(table), (0..slots).map(FreeSlot).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn allocated_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }

    /// The state of `slot`, if it still has the generation that is meant.
    pub(crate) fn state(&self, slot: SlotRef) -> Option<SlotState> {
        let word = Word::unpack(self.0.get(slot.slot as usize)?.load(Ordering::Acquire));
        (word.generation == slot.generation).then_some(word.state)
    }

    /// Whether `slot` still holds or awaits the block that is meant.
    pub(crate) fn holds(&self, slot: SlotRef) -> bool {
        matches!(
            self.state(slot),
            Some(SlotState::Filling | SlotState::Sealed)
        )
    }

    /// Whether `slot` is sealed, in any generation, and unpinned; the generation it has.
    pub(crate) fn evictable(&self, slot: u32) -> Option<SealedSlot> {
        let word = Word::unpack(self.0.get(slot as usize)?.load(Ordering::Acquire));
        (word.state == SlotState::Sealed && word.pins == 0).then_some(SealedSlot(SlotRef {
            slot,
            generation: word.generation,
        }))
    }

    /// The generation that `slot` has now.
    pub(crate) fn current(&self, slot: u32) -> SlotRef {
        let word = self
            .0
            .get(slot as usize)
            .map_or(0, |word| word.load(Ordering::Acquire));
        SlotRef {
            slot,
            generation: Word::unpack(word).generation,
        }
    }

    /// Pins `slot` in whatever generation it has, if it holds or awaits a block; tells which
    /// generation, and whether the block is complete.
    pub(crate) fn pin_current(&self, slot: u32) -> Option<(SlotRef, bool)> {
        let word = self.update(slot, Word::pinned)?;
        let generation = word.generation;
        Some((
            SlotRef { slot, generation },
            word.state == SlotState::Sealed,
        ))
    }

    /// Free → Filling, in a new generation.
    pub(crate) fn fill(&self, slot: FreeSlot) -> FillingSlot {
        let slot = slot.0;
        let next = |word: Word| Word {
            generation: word.generation.wrapping_add(1),
            state: SlotState::Filling,
            pins: 0,
        };
        let filled = self.update(slot, |word| Some(next(word)));
        let generation = filled.map_or(0, |before| next(before).generation);
        FillingSlot(SlotRef { slot, generation })
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
        let mut was_filling = false;
        self.transition(slot.0, |word| {
            was_filling = word.state == SlotState::Filling;
            match word.state {
                SlotState::Filling => Some(Word {
                    state: next,
                    ..word
                }),
                SlotState::Abandoned => Some(Word {
                    state: SlotState::Doomed,
                    ..word
                }),
                SlotState::Free | SlotState::Sealed | SlotState::Doomed => None,
            }
        });
        was_filling
    }

    /// Adds a pin, if the slot still holds or awaits the block that is meant.
    pub(crate) fn pin(&self, slot: SlotRef) -> bool {
        self.transition(slot, Word::pinned)
    }

    /// Pins those of `slots` that hold or await a block; the caller removes the pins.
    pub(crate) fn pin_all(&self, slots: &[u32]) -> Vec<SlotRef> {
        let pinned = slots.iter().filter_map(|&slot| self.pin_current(slot));
        pinned.map(|(slot, _)| slot).collect()
    }

    /// Removes a pin that the caller holds; `true` when it was the last one of a doomed slot.
    ///
    /// A pinned slot keeps its generation, so there is nothing to compare first.
    pub(crate) fn unpin(&self, slot: SlotRef) -> bool {
        let Some(word) = self.0.get(slot.slot as usize) else {
            return false;
        };
        let before = Word::unpack(word.fetch_sub(1, Ordering::AcqRel));
        debug_assert!(
            before.generation == slot.generation && before.pins > 0,
            "not pinned"
        );
        before.state == SlotState::Doomed && before.pins == 1
    }

    /// Sealed → Free, if nobody pins it.
    pub(crate) fn evict(&self, slot: SealedSlot) -> Option<FreeSlot> {
        self.transition(slot.0, |word| {
            (word.state == SlotState::Sealed && word.pins == 0).then_some(Word {
                state: SlotState::Free,
                ..word
            })
        })
        .then_some(FreeSlot(slot.0.slot))
    }

    /// Sealed → Doomed, or Filling → Abandoned.
    pub(crate) fn doom(&self, slot: SlotRef) -> bool {
        self.transition(slot, |word| match word.state {
            SlotState::Filling => Some(Word {
                state: SlotState::Abandoned,
                ..word
            }),
            SlotState::Sealed => Some(Word {
                state: SlotState::Doomed,
                ..word
            }),
            SlotState::Free | SlotState::Abandoned | SlotState::Doomed => None,
        })
    }

    /// Sealed → Doomed, if the caller's pin is the only one.
    pub(crate) fn doom_if_pinned_once(&self, slot: SlotRef) -> bool {
        self.transition(slot, |word| {
            (word.state == SlotState::Sealed && word.pins == 1).then_some(Word {
                state: SlotState::Doomed,
                ..word
            })
        })
    }

    /// Doomed → Free, if nobody pins it.
    pub(crate) fn release(&self, slot: SlotRef) -> Option<FreeSlot> {
        self.transition(slot, |word| {
            (word.state == SlotState::Doomed && word.pins == 0).then_some(Word {
                state: SlotState::Free,
                ..word
            })
        })
        .then_some(FreeSlot(slot.slot))
    }

    /// Applies `change` to the slot's word unless its generation is another or `change` declines.
    fn transition(&self, slot: SlotRef, mut change: impl FnMut(Word) -> Option<Word>) -> bool {
        self.update(slot.slot, |word| {
            (word.generation == slot.generation)
                .then(|| change(word))
                .flatten()
        })
        .is_some()
    }

    fn update(&self, slot: u32, mut change: impl FnMut(Word) -> Option<Word>) -> Option<Word> {
        self.0
            .get(slot as usize)?
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                change(Word::unpack(word)).map(Word::pack)
            })
            .ok()
            .map(Word::unpack)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn an_abandoned_slot_is_not_freed_before_its_writer_is_done() {
        let (table, mut free) = SlotTable::new(1);
        let filling = table.fill(free.pop().unwrap());
        let slot = filling.slot_ref();
        assert!(table.pin(slot));
        assert!(table.doom(slot));
        assert!(!table.unpin(slot), "the writer frees it, not the last pin");
        assert_eq!(table.release(slot), None);
        assert_eq!(table.seal(&filling), None);
        assert!(table.release(slot).is_some());
    }

    #[test]
    fn a_slot_goes_through_its_life_and_a_stale_reference_pins_nothing() {
        let (table, mut free) = SlotTable::new(1);
        let filling = table.fill(free.pop().unwrap());
        let first = filling.slot_ref();
        assert_eq!(table.state(first), Some(SlotState::Filling));
        assert!(table.pin(first));
        let sealed = table.seal(&filling).unwrap();
        assert_eq!(table.evict(sealed), None, "pinned slots are not evicted");
        assert!(!table.unpin(first));
        let again = table.fill(table.evict(sealed).unwrap());
        assert!(!table.pin(first), "the block that was meant is gone");
        assert!(table.pin(again.slot_ref()));
    }

    #[test]
    fn a_doomed_slot_is_freed_by_its_last_pin() {
        let (table, mut free) = SlotTable::new(1);
        let filling = table.fill(free.pop().unwrap());
        let slot = filling.slot_ref();
        table.seal(&filling).unwrap();
        assert!(table.pin(slot) && table.pin(slot));
        assert!(table.doom(slot));
        assert!(!table.pin(slot), "doomed slots take no new pins");
        assert_eq!(table.release(slot), None);
        assert!(!table.unpin(slot));
        assert!(table.unpin(slot));
        assert!(table.release(slot).is_some());
    }
}

/// `make test-loom`; the models explore every interleaving of the threads in them.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    fn sealed_table() -> (Arc<SlotTable>, SealedSlot) {
        let (table, mut free) = SlotTable::new(1);
        let filling = table.fill(free.pop().unwrap());
        let sealed = table.seal(&filling).unwrap();
        (Arc::new(table), sealed)
    }

    #[test]
    fn a_slot_is_never_both_pinned_and_evicted() {
        loom::model(|| {
            let (table, sealed) = sealed_table();
            let lease = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.pin(sealed.0))
            };
            let evicted = table.evict(sealed).is_some();
            let pinned = lease.join().unwrap();
            assert!(pinned != evicted);
        });
    }

    #[test]
    fn exactly_one_thread_learns_that_a_doomed_slot_lost_its_last_pin() {
        loom::model(|| {
            let (table, sealed) = sealed_table();
            assert!(table.pin(sealed.0) && table.pin(sealed.0));
            assert!(table.doom(sealed.0));
            let other = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.unpin(sealed.0))
            };
            let mine = table.unpin(sealed.0);
            assert!(mine != other.join().unwrap());
            assert!(table.release(sealed.0).is_some());
        });
    }

    /// The control: looking first and acting later must be caught by the first model's claim.
    #[test]
    #[should_panic(expected = "both pinned and evicted")]
    fn control_check_then_act_is_caught() {
        loom::model(|| {
            let (table, sealed) = sealed_table();
            let lease = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.pin(sealed.0))
            };
            let evicted = table.evictable(sealed.0.slot).is_some();
            if evicted {
                let word = Word {
                    generation: sealed.0.generation,
                    state: SlotState::Free,
                    pins: 0,
                };
                table.0[0].store(word.pack(), Ordering::Release);
            }
            let pinned = lease.join().unwrap();
            assert!(pinned != evicted, "both pinned and evicted");
        });
    }
}
