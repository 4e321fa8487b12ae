//! The first page of what an engine has for itself: what its rows are like, which memory it is, and
//! which of its processes have it.
//!
//! ```text
//! 0       8      16      24           32    40      64
//! ├ magic ┼ ranks ┼ layers ┼ layer bytes ┼ rows ┼ nonce ┼ … ┼ scheduler | rank 0 | rank 1 | … , a byte each
//! ```

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::geometry::{HEADER_BYTES, RowGeometry};
use crate::holder::Holder;
use crate::region::Region;
use crate::shared::SharedSegment;

const MAGIC: u64 = u64::from_le_bytes(*b"kvtide\x05\0");
const WORD_BYTES: usize = size_of::<u64>();
const ROWS_OFFSET: usize = 4 * WORD_BYTES;
const NONCE_OFFSET: usize = 5 * WORD_BYTES;
/// Where it is noted which holders have come.
const HOLDERS_OFFSET: usize = 64;
/// As many as have a byte in the header, besides the scheduler.
pub(crate) const RANKS_MAX: usize = HEADER_BYTES - HOLDERS_OFFSET - 1;

/// What the header says of `geometry`.
fn words(geometry: &RowGeometry) -> [u64; 5] {
    let [a, b, c, d] = geometry.to_words();
    [MAGIC, a, b, c, d]
}

/// Whether a header says that `geometry` is the one of its rows.
pub(crate) fn says(header: &Region, geometry: &RowGeometry) -> bool {
    let mut words = words(geometry).into_iter().enumerate();
    words.all(|(at, word)| read(header, at * WORD_BYTES) == Some(word))
}

fn read(header: &Region, offset: usize) -> Option<u64> {
    let word: &AtomicU64 = header.shared(offset)?;
    Some(word.load(Ordering::Acquire))
}

/// Writes the header of memory that nobody else can open yet.
pub(crate) fn write(header: &Region, geometry: &RowGeometry) {
    // Random by the operating system's random numbers, from which the keys are drawn.
    let nonce = RandomState::new().build_hasher().finish();
    let words = words(geometry).into_iter().enumerate();
    let places = words.map(|(at, word)| (at * WORD_BYTES, word));
    for (offset, word) in places.chain([(NONCE_OFFSET, nonce)]) {
        if let Some(place) = header.shared::<AtomicU64>(offset) {
            place.store(word, Ordering::Release);
        }
    }
}

/// The geometry that a header tells, which is `expected` in all but the number of rows; `None` if it
/// is another one.
pub(crate) fn read_geometry(header: &Region, expected: RowGeometry) -> Option<RowGeometry> {
    let rows = u32::try_from(read(header, ROWS_OFFSET)?).ok()?;
    let geometry = expected.with_rows(rows)?;
    says(header, &geometry).then_some(geometry)
}

impl SharedSegment {
    /// A number that no other segment has, also not one that has had the same name.
    #[must_use]
    pub fn nonce(&self) -> u64 {
        read(&self.header, NONCE_OFFSET).unwrap_or(0)
    }

    /// Notes that `holder` has come; whether it is the first.
    pub(crate) fn arrive(&self, holder: Holder) -> bool {
        self.place(holder)
            .is_some_and(|place| place.swap(1, Ordering::AcqRel) == 0)
    }

    /// Whether the workers of all ranks have come.
    #[must_use]
    pub fn has_all_workers(&self) -> bool {
        (0..self.geometry.ranks()).all(|rank| {
            self.place(Holder::Worker(rank))
                .is_some_and(|place| place.load(Ordering::Acquire) != 0)
        })
    }

    fn place(&self, holder: Holder) -> Option<&AtomicU8> {
        let index = match holder {
            Holder::Scheduler => 0,
            Holder::Worker(rank) if rank < self.geometry.ranks() => rank as usize + 1,
            Holder::Worker(_) => return None,
        };
        // There are at most RANKS_MAX ranks (see RowGeometry), so it lies in the header's page.
        self.header.shared(HOLDERS_OFFSET + index)
    }
}
