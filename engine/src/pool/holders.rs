//! Who has pinned which slot: for each session a bit of every slot, in a bitmap of its own.
//!
//! Only the session itself writes its bitmap, from one thread at a time, so that a pin is an ordinary
//! store; when it is gone the pool clears it. Whoever asks who holds a slot looks into the bitmaps of all
//! holders that there are ([`Holders::enter`]).

#[cfg(not(loom))]
use kvtide_segment::SharedSegment;
#[cfg(not(loom))]
use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering};

/// Slots of which a word speaks.
const WORD_SLOTS: u32 = u64::BITS;

/// Whose pins a bitmap has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotHolder(u8);

impl SlotHolder {
    /// Sessions that can have a bitmap each.
    pub(crate) const SESSIONS: usize = 62;
    /// The thread that scrubs.
    pub(crate) const SCRUB: Self = Self(62);
    /// The pool itself, under its lock.
    pub(crate) const POOL: Self = Self(63);

    /// The session with this number, below [`SlotHolder::SESSIONS`].
    pub(crate) fn of_session(number: usize) -> Option<Self> {
        let number = u8::try_from(number).ok()?;
        (usize::from(number) < Self::SESSIONS).then_some(Self(number))
    }

    /// The number of its bitmap.
    pub(crate) fn number(self) -> u8 {
        self.0
    }

    /// The bit that stands for it where all holders of a slot are told in one number.
    pub(crate) fn bit(self) -> u64 {
        1 << self.0
    }
}

/// The bitmaps of all holders.
#[derive(Debug)]
pub(super) struct Holders(Storage);

#[cfg(not(loom))]
#[derive(Debug)]
enum Storage {
    Mapped(Arc<SharedSegment>),
    /// Of one word each.
    #[cfg(test)]
    Heap {
        in_use: AtomicU64,
        words: Box<[AtomicU64]>,
    },
}

#[cfg(not(loom))]
impl Storage {
    fn in_use(&self) -> Option<&AtomicU64> {
        match self {
            Self::Mapped(segment) => segment.holders_in_use(),
            #[cfg(test)]
            Self::Heap { in_use, .. } => Some(in_use),
        }
    }

    fn word(&self, holder: SlotHolder, word: u32) -> Option<&AtomicU64> {
        match self {
            Self::Mapped(segment) => segment.held_rows(holder.0.into(), word),
            #[cfg(test)]
            Self::Heap { words, .. } => words.get(usize::from(holder.0)).filter(|_| word == 0),
        }
    }

    fn words(&self) -> u32 {
        match self {
            Self::Mapped(segment) => segment.geometry().bitmap_words(),
            #[cfg(test)]
            Self::Heap { .. } => 1,
        }
    }
}

/// Where loom watches the words, of one word for each holder.
#[cfg(loom)]
#[derive(Debug)]
struct Storage {
    in_use: AtomicU64,
    words: Box<[AtomicU64]>,
}

#[cfg(loom)]
impl Storage {
    fn in_use(&self) -> Option<&AtomicU64> {
        Some(&self.in_use)
    }

    fn word(&self, holder: SlotHolder, _: u32) -> Option<&AtomicU64> {
        self.words.get(usize::from(holder.0))
    }

    fn words(&self) -> u32 {
        1
    }
}

impl Holders {
    #[cfg(not(loom))]
    pub(super) fn of_segment(segment: Arc<SharedSegment>) -> Self {
        Self(Storage::Mapped(segment))
    }

    /// Of at most 64 slots and so many holders.
    #[cfg(test)]
    pub(super) fn on_heap(holders: usize) -> Self {
        let in_use = AtomicU64::new(0);
        let words = (0..holders).map(|_| AtomicU64::new(0)).collect();
        #[cfg(not(loom))]
        return Self(Storage::Heap { in_use, words });
        #[cfg(loom)]
        return Self(Storage { in_use, words });
    }

    /// Only the models are for loom.
    #[cfg(loom)]
    pub(super) fn of_segment(_: std::sync::Arc<kvtide_segment::SharedSegment>) -> Self {
        let (in_use, words) = (AtomicU64::new(0), Box::default());
        Self(Storage { in_use, words })
    }

    /// From now on the bitmap of `holder` is looked at. Whoever pins calls this before.
    pub(super) fn enter(&self, holder: SlotHolder) {
        if let Some(in_use) = self.0.in_use() {
            in_use.fetch_or(holder.bit(), Ordering::SeqCst);
        }
    }

    /// Sets the bit of `slot`. Others see it when `holder` has passed a fence.
    pub(super) fn set(&self, slot: u32, holder: SlotHolder) {
        if let Some(word) = self.0.word(holder, slot / WORD_SLOTS) {
            // Nobody else writes it. Whoever sees this store sees what earlier ones of the word
            // have released, too.
            let bits = word.load(Ordering::Relaxed);
            word.store(bits | bit(slot), Ordering::Release);
        }
    }

    /// Takes the bit of `slot` out. What was read of the row was read before.
    pub(super) fn take_out(&self, slot: u32, holder: SlotHolder) {
        if let Some(word) = self.0.word(holder, slot / WORD_SLOTS) {
            let bits = word.load(Ordering::Relaxed);
            word.store(bits & !bit(slot), Ordering::Release);
        }
    }

    /// Takes all bits of a holder out that is gone, and looks at its bitmap no more.
    pub(super) fn leave(&self, holder: SlotHolder) {
        for word in 0..self.0.words() {
            if let Some(word) = self.0.word(holder, word)
                && word.load(Ordering::Relaxed) != 0
            {
                word.store(0, Ordering::Release);
            }
        }
        if let Some(in_use) = self.0.in_use() {
            in_use.fetch_and(!holder.bit(), Ordering::SeqCst);
        }
    }

    /// The same for all but the `staying`.
    pub(super) fn keep_only(&self, staying: &[SlotHolder]) {
        for holder in (0..64).map(SlotHolder) {
            if !staying.contains(&holder) {
                self.leave(holder);
            }
        }
    }

    /// A bit for each holder that has pinned `slot`.
    pub(super) fn of(&self, slot: u32) -> u64 {
        let in_use = self
            .0
            .in_use()
            .map_or(0, |word| word.load(Ordering::Acquire));
        each(in_use)
            .filter(|&holder| {
                let word = self.0.word(holder, slot / WORD_SLOTS);
                word.is_some_and(|word| word.load(Ordering::Acquire) & bit(slot) != 0)
            })
            .fold(0, |bits, holder| bits | holder.bit())
    }
}

/// The holders whose bits are set.
fn each(mut bits: u64) -> impl Iterator<Item = SlotHolder> {
    std::iter::from_fn(move || {
        let lowest = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        u8::try_from(lowest)
            .ok()
            .filter(|&n| n < 64)
            .map(SlotHolder)
    })
}

/// The bit of `slot` in its word.
fn bit(slot: u32) -> u64 {
    1 << (slot % WORD_SLOTS)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sessions_have_a_bitmap_each_and_none_has_that_of_the_pool() {
        let sessions: Vec<_> = (0..70).filter_map(SlotHolder::of_session).collect();
        assert_eq!(sessions.len(), SlotHolder::SESSIONS);
        let all = sessions.iter().fold(0, |all, holder| all | holder.bit());
        assert_eq!(all.count_ones(), 62);
        assert_eq!(all & (SlotHolder::POOL.bit() | SlotHolder::SCRUB.bit()), 0);
    }

    #[test]
    fn what_one_holder_pins_and_gives_back_is_nobody_elses() {
        let holders = Holders::on_heap(64);
        let [a, b] = [0, 61].map(|n| SlotHolder::of_session(n).unwrap());
        for holder in [a, b, SlotHolder::POOL] {
            holders.enter(holder);
            holders.set(5, holder);
            holders.set(63, holder);
        }
        assert_eq!(holders.of(5), a.bit() | b.bit() | SlotHolder::POOL.bit());
        holders.take_out(5, b);
        assert_eq!(holders.of(5), a.bit() | SlotHolder::POOL.bit());
        assert_eq!(holders.of(63).count_ones(), 3);
        holders.leave(a);
        assert_eq!(holders.of(5), SlotHolder::POOL.bit());
        holders.keep_only(&[b]);
        assert_eq!((holders.of(5), holders.of(63)), (0, b.bit()));
    }
}
