//! The memory that requests in flight and their results share, in units, as permits of semaphores.

use tokio::sync::OwnedSemaphorePermit;

use crate::input::LINE_BYTES_MAX;
use crate::run::answer::MEMORY_BYTES;
use crate::run::upstream::READ_BUFFER_BYTES;

/// Unit of the memory that requests in flight share.
const MEMORY_UNIT: u64 = 1 << 10;

/// A request's share of the memory.
pub(super) type Memory = [OwnedSemaphorePermit; 2];

/// Memory that one request takes besides its line: its answer, the result that is made of it, and what
/// the connection has read ahead. Longer answers go to scratch files.
pub(super) const ANSWER_UNITS_BYTES: u64 = 2 * MEMORY_BYTES as u64 + READ_BUFFER_BYTES as u64;

/// Units of all `memory_bytes` that the requests for one model may take: half, so that a model that
/// does not answer leaves room for others; though never less than the longest request.
pub(super) fn of_a_model(memory_bytes: u64) -> usize {
    let longest = 2 * LINE_BYTES_MAX as u64 + ANSWER_UNITS_BYTES + MEMORY_UNIT;
    units((memory_bytes / 2).max(longest.min(memory_bytes))) as usize
}

/// Units of memory for so many bytes.
pub(super) fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(MEMORY_UNIT)).unwrap_or(u32::MAX)
}

/// So many units of a share of the memory, or all if it has fewer; the rest is given back.
pub(super) fn keep(mut share: OwnedSemaphorePermit, units: u32) -> OwnedSemaphorePermit {
    share.split(units as usize).unwrap_or(share)
}
