//! What the tables say of a slot, beside the headers of its shards and the bits of its holders.

use std::sync::atomic::{AtomicU32, AtomicU64};

/// Bytes of a slot's record: a lookup reads hardly anything else, and two lie in one line of the
/// processor's cache.
pub(crate) const SLOT_RECORD_BYTES: usize = size_of::<SlotRecord>();
/// Bytes of a bucket of the index.
pub(crate) const BUCKET_BYTES: usize = size_of::<AtomicU32>();

/// A slot's record as it lies in the segment, shared between processes. What the words mean, and who
/// may write them when, is the pool's to say; zeros are a slot that was never used.
#[derive(Debug, Default)]
#[repr(C, align(32))]
pub struct SlotRecord {
    /// Generation, who fills the slot, and what it is doing.
    pub state: AtomicU64,
    /// The key of its block, in two halves.
    pub key: [AtomicU64; 2],
    /// The slot that follows in its bucket of the index, plus one; 0 ends it.
    pub next: AtomicU32,
    /// When it was last used, in seconds of Unix time.
    pub used_at: AtomicU32,
}
