//! What the pool counts.

/// Totals since the pool was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Blocks whose save completed.
    pub saved_blocks: u64,
    /// Blocks whose save failed.
    pub failed_blocks: u64,
    /// Blocks that were not saved because too much was in flight or pinned.
    pub throttled_blocks: u64,
    /// Blocks given up to make room.
    pub evicted_blocks: u64,
    /// Blocks dropped because their bytes did not have their checksum.
    pub damaged_blocks: u64,
    /// Blocks whose bytes were compared with their checksums when they were matched.
    pub verified_blocks: u64,
    /// Blocks that the background scrub has checked.
    pub scrubbed_blocks: u64,
}

/// What the pool holds at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolGauges {
    /// Slots in all.
    pub slots: usize,
    /// Slots that hold nothing.
    pub free: usize,
    /// Blocks being saved.
    pub saving: usize,
    /// Blocks that can be matched, those being saved included.
    pub held: usize,
    /// Bytes of all tables about blocks, the shard headers in the segment included.
    pub index_bytes: usize,
}
