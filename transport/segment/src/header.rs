//! The first page of a segment: what lies in it, which segment it is, and who has it.
//!
//! ```text
//! 0       8      16      24           32    40      64
//! ├ magic ┼ ranks ┼ layers ┼ layer bytes ┼ rows ┼ nonce ┼ … ┼ scheduler | rank 0 | rank 1 | … , a byte each
//! ```

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU8, Ordering};

use crate::geometry::{HEADER_BYTES, RowGeometry};
use crate::holder::Holder;
use crate::shared::SharedSegment;

const MAGIC: u64 = u64::from_le_bytes(*b"kvtide\x03\0");
const NONCE_OFFSET: usize = 40;
/// Where it is noted which holders have come.
const HOLDERS_OFFSET: usize = 64;
/// As many as have a byte in the header, besides the scheduler.
pub(crate) const RANKS_MAX: usize = HEADER_BYTES - HOLDERS_OFFSET - 1;

/// What the header says of `geometry`.
fn words(geometry: &RowGeometry) -> [u64; 5] {
    let [a, b, c, d] = geometry.to_words();
    [MAGIC, a, b, c, d]
}

impl SharedSegment {
    /// Writes the header of a segment that nobody else can open yet.
    pub(crate) fn write_header(&self) {
        // Random by the operating system's random numbers, from which the keys are drawn.
        let nonce = RandomState::new().build_hasher().finish();
        let start = self.map.as_mut_ptr();
        // SAFETY: the map is page-aligned and at least HEADER_BYTES long, both offsets are multiples
        // of 8 inside it, and its creator holds the name's lock until this has returned.
        unsafe {
            start.cast::<[u64; 5]>().write(words(&self.geometry));
            start.wrapping_add(NONCE_OFFSET).cast::<u64>().write(nonce);
        }
    }

    /// The geometry that the header of a map of `length` bytes tells, which is `expected` in all but
    /// the number of rows; `None` if it is another one.
    pub(crate) fn read_geometry(
        map: &memmap2::MmapRaw,
        expected: RowGeometry,
    ) -> Option<RowGeometry> {
        if map.len() < HEADER_BYTES {
            return None;
        }
        // SAFETY: the map is page-aligned and at least as long as the header, which its creator
        // wrote before it let go of the name's lock, which the caller holds.
        let header = unsafe { map.as_ptr().cast::<[u64; 5]>().read() };
        let [_, _, _, _, rows] = header;
        let geometry = expected.with_rows(u32::try_from(rows).ok()?)?;
        (header == words(&geometry) && geometry.total_bytes() <= map.len()).then_some(geometry)
    }

    /// A number that no other segment has, also not one that has had the same name.
    #[must_use]
    pub fn nonce(&self) -> u64 {
        // SAFETY: as in `write_header`; nobody writes it again once a segment can be opened.
        unsafe {
            self.map
                .as_ptr()
                .wrapping_add(NONCE_OFFSET)
                .cast::<u64>()
                .read()
        }
    }

    /// Notes that `holder` has come; whether it is the first.
    pub(crate) fn arrive(&self, holder: Holder) -> bool {
        self.place(holder)
            .is_some_and(|place| place.swap(1, Ordering::AcqRel) == 0)
    }

    /// Whether the workers of all ranks have come.
    pub(crate) fn has_all_workers(&self) -> bool {
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
        let address = self.map.as_mut_ptr().wrapping_add(HOLDERS_OFFSET + index);
        // SAFETY: there are at most RANKS_MAX ranks (see RowGeometry), so the byte lies in the header
        // page, no other field covers it, and it is only ever accessed as an atomic; the map lives as
        // long as `self`.
        Some(unsafe { &*address.cast::<AtomicU8>() })
    }
}
