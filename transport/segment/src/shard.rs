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
#[repr(C)]
pub(crate) struct ShardHeader {
    state: AtomicU64,
    checksum: AtomicU64,
}

const FILLING: u64 = 0;
const SEALED: u64 = 1;
const BAD: u64 = 2;

impl ShardHeader {
    fn store(&self, generation: u32, status: u64) {
        self.state
            .store(u64::from(generation) << 32 | status, Ordering::Release);
    }

    pub(crate) fn begin(&self, generation: u32) {
        self.store(generation, FILLING);
        // The bytes that follow must not become visible before the state that disowns the old ones.
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    pub(crate) fn seal(&self, generation: u32, checksum: u64) {
        self.checksum.store(checksum, Ordering::Relaxed);
        self.store(generation, SEALED);
    }

    pub(crate) fn condemn(&self, generation: u32) {
        self.store(generation, BAD);
    }

    pub(crate) fn read(&self) -> ShardState {
        let state = self.state.load(Ordering::Acquire);
        let checksum = self.checksum.load(Ordering::Relaxed);
        let [_, _, _, _, g0, g1, g2, g3] = state.to_le_bytes();
        let status = match state & 0xffff_ffff {
            SEALED => ShardStatus::Sealed,
            FILLING => ShardStatus::Filling,
            _ => ShardStatus::Bad,
        };
        ShardState {
            generation: u32::from_le_bytes([g0, g1, g2, g3]),
            status,
            checksum,
        }
    }
}
