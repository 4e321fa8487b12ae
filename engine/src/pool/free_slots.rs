//! Which slots are free, and which of them is filled next.
//!
//! Rows that lie next to each other are loaded by one command of a copy engine, rows that lie apart
//! cost a command each or multiprocessors that the model needs. Chains grow side by side, some by a
//! block a step, so each grows in stretches of its own: a block goes directly behind the one before
//! it, or else begins a stretch that nobody is in.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::slot_table::FreeSlot;

/// Slots of a stretch, a byte of bits: an eighth of the copies. Longer ones would need fewer still,
/// and would leave more rows unused where chains end.
const STRETCH: u32 = u8::BITS;

/// The free slots of a pool.
#[derive(Debug)]
pub(super) struct FreeSlots {
    /// A bit for each slot, set while its [`FreeSlot`] is kept here.
    stretches: Box<[u8]>,
    /// Stretches with free slots, by their longest run of them: the longest last, and of equal ones
    /// the lowest very last.
    by_room: BTreeSet<(u32, Reverse<u32>)>,
    slots: u32,
    /// Slots that are the pool's, free or not.
    owned: u32,
    free: u32,
}

impl FreeSlots {
    /// None yet, of a pool of `slots`.
    pub(super) fn new(slots: u32) -> Self {
        Self {
            stretches: vec![0; slots.div_ceil(STRETCH) as usize].into_boxed_slice(),
            by_room: BTreeSet::new(),
            slots,
            owned: 0,
            free: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.free as usize
    }

    /// Slots that are the pool's, free or not.
    pub(super) fn owned(&self) -> usize {
        self.owned as usize
    }

    /// So many slots are the pool's from now on.
    pub(super) fn own(&mut self, slots: u32) {
        self.owned += slots;
    }

    /// Takes `slot` out of the pool, if it is free; whether it was.
    pub(super) fn disown(&mut self, slot: u32) -> bool {
        let free = self.holds(slot);
        if free {
            self.remove(slot);
            self.owned -= 1;
        }
        free
    }

    /// Whether a chain that begins finds a stretch of its own.
    pub(super) fn has_stretch(&self) -> bool {
        let roomiest = self.by_room.last();
        roomiest.is_some_and(|&(_, Reverse(at))| self.is_whole(at))
    }

    /// Whether the slot behind `previous` is free.
    pub(super) fn can_follow(&self, previous: Option<u32>) -> bool {
        previous.is_some_and(|slot| self.holds(slot + 1))
    }

    pub(super) fn put(&mut self, slot: FreeSlot) {
        let slot = slot.keep();
        debug_assert!(!self.holds(slot), "slot {slot} was free already");
        let (at, bit) = (slot / STRETCH, 1 << (slot % STRETCH));
        self.change(at, self.stretches[at as usize] | bit);
        self.free += 1;
    }

    /// The slot for the block that follows the one in slot `previous`, or begins a chain.
    pub(super) fn take(&mut self, previous: Option<u32>) -> Option<FreeSlot> {
        let slot = match previous {
            Some(slot) if self.can_follow(previous) => slot + 1,
            _ => self.roomiest()?,
        };
        self.remove(slot);
        Some(FreeSlot::kept(slot))
    }

    fn remove(&mut self, slot: u32) {
        let (at, bit) = (slot / STRETCH, 1 << (slot % STRETCH));
        self.change(at, self.stretches[at as usize] & !bit);
        self.free -= 1;
    }

    /// Bytes that all this takes, about: a node of the tree may be half empty.
    pub(super) fn allocated_bytes(&self) -> usize {
        let entry = 2 * size_of::<(u32, Reverse<u32>)>();
        size_of_val(&*self.stretches) + self.stretches.len() * entry
    }

    /// Whether `slot` is free.
    pub(super) fn holds(&self, slot: u32) -> bool {
        let stretch = self.stretches.get((slot / STRETCH) as usize);
        stretch.is_some_and(|bits| bits & (1 << (slot % STRETCH)) != 0)
    }

    fn is_whole(&self, at: u32) -> bool {
        let size = STRETCH.min(self.slots - at * STRETCH);
        self.stretches[at as usize].count_ones() == size
    }

    /// Where a chain has most room: the begin of the longest run.
    fn roomiest(&self) -> Option<u32> {
        let &(_, Reverse(at)) = self.by_room.last()?;
        let (_, begin) = longest_run(self.stretches[at as usize]);
        Some(at * STRETCH + begin)
    }

    fn change(&mut self, at: u32, bits: u8) {
        let was = std::mem::replace(&mut self.stretches[at as usize], bits);
        let (room_was, room) = (longest_run(was).0, longest_run(bits).0);
        if room_was == room {
            return;
        }
        if room_was > 0 {
            self.by_room.remove(&(room_was, Reverse(at)));
        }
        if room > 0 {
            self.by_room.insert((room, Reverse(at)));
        }
    }
}

/// Length and begin of the longest run of set bits, the lowest of equal ones.
fn longest_run(mut bits: u8) -> (u32, u32) {
    let (mut length, mut begin) = (0, 0);
    // In every round a bit stays as long as one more that is set follows it.
    while bits != 0 {
        length += 1;
        begin = bits.trailing_zeros();
        bits &= bits >> 1;
    }
    (length, begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(slots: u32) -> FreeSlots {
        let mut free = FreeSlots::new(slots);
        (0..slots).for_each(|slot| free.put(FreeSlot::kept(slot)));
        free
    }

    fn take(free: &mut FreeSlots, previous: Option<u32>) -> Option<u32> {
        free.take(previous).map(FreeSlot::keep)
    }

    #[test]
    fn chains_grow_side_by_side_in_stretches_of_their_own() {
        let mut free = all(4 * STRETCH);
        let mut ends = [None; 4];
        for _ in 0..STRETCH {
            for end in &mut ends {
                *end = take(&mut free, *end);
            }
        }
        assert_eq!(ends, [7, 15, 23, 31].map(Some));
        assert_eq!((free.len(), take(&mut free, None)), (0, None));
    }

    #[test]
    fn a_chain_goes_on_in_the_next_stretch() {
        let slots = 2 * STRETCH + 3;
        let mut free = all(slots);
        let mut end = None;
        for slot in 0..slots {
            end = take(&mut free, end);
            assert_eq!(end, Some(slot));
        }
    }

    #[test]
    fn without_a_whole_stretch_a_chain_takes_the_longest_run() {
        let mut free = all(STRETCH);
        for slot in 0..STRETCH {
            assert_eq!(take(&mut free, slot.checked_sub(1)), Some(slot));
        }
        for slot in [0, 1, 3, 4, 5, 7] {
            free.put(FreeSlot::kept(slot));
        }
        assert!(!free.has_stretch());
        assert_eq!(take(&mut free, Some(5)), Some(3), "6 is taken");
        assert_eq!(take(&mut free, Some(3)), Some(4));
    }

    #[test]
    fn chains_that_find_no_whole_stretch_do_not_crowd_into_one() {
        let mut free = all(2 * STRETCH);
        for _ in 0..2 {
            assert!(take(&mut free, None).is_some());
        }
        let ends = [take(&mut free, None), take(&mut free, None)];
        assert_eq!(ends, [1, 9].map(Some));
        assert_eq!(ends.map(|end| take(&mut free, end)), [2, 10].map(Some));
    }

    #[test]
    fn the_longest_run_is_found() {
        for (bits, run) in [
            (0, (0, 0)),
            (0b1, (1, 0)),
            (0b0101_0101, (1, 0)),
            (0b0101_1101, (3, 2)),
            (0b1110_0111, (3, 0)),
            (u8::MAX, (8, 0)),
        ] {
            assert_eq!(longest_run(bits), run, "{bits:08b}");
        }
    }

    #[test]
    fn a_stretch_is_whole_again_when_all_its_slots_came_back() {
        let mut free = all(2 * STRETCH);
        let taken: Vec<_> = (0..3).map(|_| free.take(None)).collect();
        assert!(
            !free.has_stretch(),
            "each began one, the third is in the first"
        );
        taken.into_iter().flatten().for_each(|slot| free.put(slot));
        assert!(free.has_stretch());
        assert_eq!((free.len(), take(&mut free, None)), (16, Some(0)));
    }

    #[test]
    fn the_last_slot_has_none_behind_it() {
        let free = all(STRETCH);
        assert!(!free.can_follow(Some(STRETCH - 1)));
        assert!(!free.can_follow(None));
    }
}
