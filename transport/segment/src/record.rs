//! What the tables say of a slot, beside the headers of its shards.

use std::sync::atomic::{AtomicU32, AtomicU64};

/// Bytes of a slot's record: one line of the processor's cache, for a lookup reads hardly anything else.
pub(crate) const SLOT_RECORD_BYTES: usize = size_of::<SlotRecord>();
/// Bytes of a bucket of the index.
pub(crate) const BUCKET_BYTES: usize = size_of::<AtomicU32>();

/// A slot's record as it lies in the segment, shared between processes. What the words mean, and who
/// may write them when, is the pool's to say; zeros are a slot that was never used.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct SlotRecord {
    /// Generation, and what the slot is doing.
    pub state: AtomicU64,
    /// A bit for each session that has pinned the slot.
    pub holders: AtomicU64,
    /// The key of its block, in two halves.
    pub key: [AtomicU64; 2],
    /// The slot that follows in its bucket of the index, plus one; 0 ends it.
    pub next: AtomicU64,
    /// The session that fills it.
    pub filler: AtomicU64,
    /// When it was last used, in seconds of Unix time.
    pub used_at: AtomicU64,
    /// In which life of the pool the bytes were last known to have their checksum.
    pub proven: AtomicU64,
}
