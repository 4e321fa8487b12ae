//! The header of one rank's shard of one row.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a shard header in the segment.
pub(crate) const SHARD_HEADER_BYTES: usize = size_of::<ShardHeader>();

/// What became of the latest save of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardStatus {
    /// Bytes are being written, or never were.
    Filling,
    /// Bytes and checksum are complete.
    Sealed,
    /// The save failed, or the bytes were found damaged.
    Bad,
}

/// A shard header, read at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardState {
    /// Generation of the slot for which this shard was written.
    pub generation: u32,
    /// How far that got.
    pub status: ShardStatus,
    /// Checksum of the bytes; meaningful when sealed.
    pub checksum: u64,
}

/// A shard header as it lies in the segment, shared between processes.
///
/// `state` holds the generation in its upper half and the status in its lower. The writer stores
/// the checksum first and then `state` with release order; a reader that sees a sealed state with
/// acquire order therefore sees its checksum, and the bytes written before it.
///
/// Generations fence writers: one that was held up until its slot was filled anew, by itself or by
/// somebody else, changes no header any more. Bytes that it still stores are found by the checksum.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct ShardHeader {
    state: AtomicU64,
    checksum: AtomicU64,
}

const FILLING: u64 = 0;
const SEALED: u64 = 1;
const BAD: u64 = 2;

impl ShardHeader {
    /// Older → Filling; whether `generation` is newer than what was there.
    pub(crate) fn begin(&self, generation: u32) -> bool {
        let begun = self.change(word(generation, FILLING), |now| is_newer(generation, now));
        // The bytes that follow must not become visible before the state that disowns the old ones.
        std::sync::atomic::fence(Ordering::SeqCst);
        begun
    }

    /// Filling → Sealed; whether the shard was still being filled for `generation`.
    pub(crate) fn seal(&self, generation: u32, checksum: u64) -> bool {
        let filling = word(generation, FILLING);
        if self.state.load(Ordering::Acquire) != filling {
            return false;
        }
        // A writer that is held up between these two may spoil the checksum of whoever fills the slot
        // anew: that row is found damaged then, and computed again.
        self.checksum.store(checksum, Ordering::Relaxed);
        self.change(word(generation, SEALED), |now| now == filling)
    }

    /// Anything not newer → Bad; whether it was not newer than `generation`.
    pub(crate) fn condemn(&self, generation: u32) -> bool {
        self.change(word(generation, BAD), |now| {
            is_newer(generation, now) || generation_of(now) == generation
        })
    }

    /// Older → Bad: nobody has begun the shard for `generation`, and nobody may any more. Whether that
    /// was so.
    pub(crate) fn refuse(&self, generation: u32) -> bool {
        self.change(word(generation, BAD), |now| is_newer(generation, now))
    }

    /// Newer → Bad: no slot of `generation` has had it, so the header is damaged, and nothing could be
    /// begun for the generations that come next.
    pub(crate) fn mend(&self, generation: u32) {
        self.change(word(generation, BAD), |now| {
            generation_of(now) != generation && !is_newer(generation, now)
        });
    }

    pub(crate) fn read(&self) -> ShardState {
        let state = self.state.load(Ordering::Acquire);
        let checksum = self.checksum.load(Ordering::Relaxed);
        let status = match state & 0xffff_ffff {
            SEALED => ShardStatus::Sealed,
            FILLING => ShardStatus::Filling,
            _ => ShardStatus::Bad,
        };
        ShardState {
            generation: generation_of(state),
            status,
            checksum,
        }
    }

    fn change(&self, next: u64, may: impl Fn(u64) -> bool) -> bool {
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                may(now).then_some(next)
            })
            .is_ok()
    }
}

fn word(generation: u32, status: u64) -> u64 {
    u64::from(generation) << 32 | status
}

fn generation_of(state: u64) -> u32 {
    let [_, _, _, _, g0, g1, g2, g3] = state.to_le_bytes();
    u32::from_le_bytes([g0, g1, g2, g3])
}

/// Whether `generation` comes after that of `state`. Generations wrap, so the nearer way round counts.
fn is_newer(generation: u32, state: u64) -> bool {
    let ahead = generation.wrapping_sub(generation_of(state));
    (1..1 << 31).contains(&ahead)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> ShardHeader {
        ShardHeader {
            state: AtomicU64::new(0),
            checksum: AtomicU64::new(0),
        }
    }

    #[test]
    fn a_shard_is_filled_and_sealed_for_one_generation_after_the_other() {
        let header = header();
        for generation in [1, 2, 7] {
            assert!(header.begin(generation));
            assert_eq!(header.read().status, ShardStatus::Filling);
            assert!(header.seal(generation, generation.into()));
            let sealed = ShardState {
                generation,
                status: ShardStatus::Sealed,
                checksum: generation.into(),
            };
            assert_eq!(header.read(), sealed);
        }
    }

    #[test]
    fn a_writer_that_was_held_up_changes_nothing_of_a_newer_generation() {
        let header = header();
        assert!(header.begin(3));
        // It stops here, its session is closed, and the slot is filled by somebody else.
        assert!(header.condemn(3));
        assert!(header.begin(4));
        assert!(!header.seal(3, 33));
        assert!(!header.condemn(3));
        assert!(!header.begin(3));
        assert!(header.seal(4, 44));
        assert!(!header.seal(3, 33));
        assert!(!header.condemn(3));
        assert!(!header.begin(3));
        assert_eq!(header.read().checksum, 44);
        assert_eq!(header.read().status, ShardStatus::Sealed);
    }

    #[test]
    fn a_condemned_shard_is_not_sealed_nor_begun_again_for_its_generation() {
        let header = header();
        assert!(header.condemn(5), "before its writer has begun");
        assert!(!header.begin(5));
        assert!(!header.seal(5, 1));
        assert_eq!(header.read().status, ShardStatus::Bad);
    }

    #[test]
    fn a_shard_that_was_begun_cannot_be_refused_and_one_that_was_refused_not_begun() {
        let header = header();
        assert!(header.begin(3) && !header.refuse(3));
        assert!(header.seal(3, 1) && !header.refuse(3));
        assert!(header.refuse(4));
        assert!(!header.begin(4) && header.begin(5));
    }

    #[test]
    fn a_shard_that_is_ahead_of_its_slot_is_mended_and_no_other_is() {
        let header = header();
        assert!(header.begin(7) && !header.begin(3));
        header.mend(2);
        assert_eq!(header.read().status, ShardStatus::Bad);
        assert!(!header.begin(2) && header.begin(3) && header.seal(3, 33));
        for generation in [3, 4] {
            header.mend(generation);
            assert_eq!(header.read().status, ShardStatus::Sealed);
        }
    }

    #[test]
    fn generations_wrap() {
        let header = header();
        for generation in [1 << 30, 1 << 31, 3 << 30, u32::MAX, 0, 1] {
            assert!(header.begin(generation), "{generation}");
        }
        assert!(!header.begin(u32::MAX));
    }
}
