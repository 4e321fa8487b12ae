//! What the pool knows about the rows of a segment: where each of its tables lies, found once.

use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::geometry::{BITMAPS, HOLDERS_MAX, RowGeometry};
use crate::record::SlotRecord;
use crate::region::{Array, Region};
use crate::shard::ShardHeader;

/// The tables of one segment; see [`crate`] for how they lie.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) buckets: Array<AtomicU32>,
    /// One word.
    in_use: Array<AtomicU64>,
    /// All bitmaps, one behind the other.
    bitmaps: Array<AtomicU64>,
    pub(crate) records: Array<SlotRecord>,
    headers: Array<ShardHeader>,
    /// Words of each bitmap that are used, and from one bitmap to the next.
    words: u32,
    bitmap_stride: usize,
    ranks: u32,
}

impl Tables {
    /// Those of `geometry`; `None` if the region ends before.
    pub(crate) fn of(region: &Region, geometry: &RowGeometry) -> Option<Self> {
        let rows = geometry.rows() as usize;
        let bitmap_stride = geometry.bitmap_stride_words();
        let headers = rows.checked_mul(geometry.ranks() as usize)?;
        Some(Self {
            buckets: region.array(0, geometry.buckets() as usize)?,
            in_use: region.array(geometry.in_use_offset(), 1)?,
            bitmaps: region.array(geometry.bitmaps_offset(), BITMAPS * bitmap_stride)?,
            records: region.array(geometry.records_offset(), rows)?,
            headers: region.array(geometry.shard_headers_offset(), headers)?,
            words: geometry.bitmap_words(),
            bitmap_stride,
            ranks: geometry.ranks(),
        })
    }

    pub(crate) fn in_use(&self) -> Option<&AtomicU64> {
        self.in_use.get(0)
    }

    /// A word of the rows that `holder` has pinned.
    pub(crate) fn held(&self, holder: u32, word: u32) -> Option<&AtomicU64> {
        let holder = holder as usize;
        (holder < HOLDERS_MAX).then(|| self.bitmap(holder, word))?
    }

    /// A word of the rows that are proven.
    pub(crate) fn proven(&self, word: u32) -> Option<&AtomicU64> {
        self.bitmap(HOLDERS_MAX, word)
    }

    fn bitmap(&self, bitmap: usize, word: u32) -> Option<&AtomicU64> {
        let at = bitmap * self.bitmap_stride + word as usize;
        (word < self.words).then(|| self.bitmaps.get(at))?
    }

    pub(crate) fn header(&self, row: u32, rank: u32) -> Option<&ShardHeader> {
        let at = row as usize * self.ranks as usize + rank as usize;
        (rank < self.ranks).then(|| self.headers.get(at))?
    }
}
