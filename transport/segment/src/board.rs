//! Where workers tell the scheduler's side that an async load has ended.
//!
//! What a worker tells in a step's output arrives when the step has been computed, and is acted upon
//! in the step after the next. The board is read when the scheduler decides.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::shared::SharedSegment;

/// Async loads that can be in flight at once.
pub const LOAD_PLACES: u32 = 256;
pub(crate) const PLACE_BYTES: usize = size_of::<AtomicU64>();

/// How one rank's part of a load has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadEnd {
    /// All blocks are there and had their checksums.
    Whole,
    /// Some are not; which, the worker's report says.
    Failed,
}

/// What a place holds: a job's number and how it ended; 0, from the beginning, is neither.
fn word(job: u64, end: LoadEnd) -> u64 {
    let how = match end {
        LoadEnd::Whole => 1,
        LoadEnd::Failed => 2,
    };
    job << 2 | how
}

impl SharedSegment {
    /// Tells that `rank`'s part of load `job`, to which the scheduler's side gave `place`, has ended.
    pub fn tell_load_end(&self, place: u32, rank: u32, job: u64, end: LoadEnd) {
        if let Some(cell) = self.board_cell(place, rank) {
            // What was loaded is visible to whoever reads this.
            cell.store(word(job, end), Ordering::Release);
        }
    }

    /// How `rank`'s part of load `job` at `place` has ended; `None` if it has not.
    #[must_use]
    pub fn load_end(&self, place: u32, rank: u32, job: u64) -> Option<LoadEnd> {
        let told = self.board_cell(place, rank)?.load(Ordering::Acquire);
        [LoadEnd::Whole, LoadEnd::Failed]
            .into_iter()
            .find(|&end| told == word(job, end))
    }
}
