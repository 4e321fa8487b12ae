//! Sizes and offsets inside a segment.

use std::ops::Range;

use crate::board::{LOAD_PLACES, PLACE_BYTES};
use crate::header::RANKS_MAX;
use crate::record::{BUCKET_BYTES, SLOT_RECORD_BYTES};
use crate::shard::SHARD_HEADER_BYTES;
use crate::size::size;

/// Rows begin on this boundary, so that they can be read and written with `O_DIRECT`.
pub(crate) const ROW_ALIGN_BYTES: usize = 4096;
/// Most rows: their numbers, and one more, are 31 bits.
const ROWS_MAX: u32 = (1 << 31) - 1;
/// Holders that may have a bit for every row.
pub(crate) const HOLDERS_MAX: usize = 64;
/// Bits for every row: one of each holder, and one that says whether its bytes are proven.
pub(crate) const BITMAPS: usize = HOLDERS_MAX + 1;
/// Rows of which a word of a bitmap speaks.
const WORD_ROWS: u32 = u64::BITS;
const WORD_BYTES: usize = size_of::<u64>();
/// A line of the processor's cache: what different processes write lies in different ones.
const LINE_BYTES: usize = 64;
/// The segment's own header.
pub(crate) const HEADER_BYTES: usize = 4096;

/// How rows are laid out: one block of all ranks side by side, and the tables about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowGeometry {
    ranks: u32,
    layers: u32,
    layer_bytes: usize,
    rows: u32,
}

/// Why a geometry is impossible.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GeometryError {
    /// A count or size is zero, there are more ranks than the header has places for, or the product
    /// does not fit in memory.
    #[error("{ranks} ranks × {layers} layers × {layer_bytes} bytes do not make a row")]
    Impossible {
        /// Ranks.
        ranks: u32,
        /// Layers.
        layers: u32,
        /// Bytes of a block in one layer on one rank.
        layer_bytes: usize,
    },
    /// Not even one row fits.
    #[error(
        "{} is less than the {} that one row needs",
        size(*capacity_bytes), size(*needed_bytes)
    )]
    TooSmall {
        /// The capacity that was asked for.
        capacity_bytes: usize,
        /// What one row needs, its share of the tables included.
        needed_bytes: usize,
    },
}

impl RowGeometry {
    /// As many rows as fit in `capacity_bytes`, everything included.
    ///
    /// # Errors
    /// [`GeometryError`] when a row is impossible or does not fit.
    pub fn fit(
        ranks: u32,
        layers: u32,
        layer_bytes: usize,
        capacity_bytes: usize,
    ) -> Result<Self, GeometryError> {
        let impossible = GeometryError::Impossible {
            ranks,
            layers,
            layer_bytes,
        };
        let one = Self {
            ranks,
            layers,
            layer_bytes,
            rows: 1,
        };
        if !one.is_possible() {
            return Err(impossible);
        }
        let fits = |rows: u32| Self { rows, ..one }.total_bytes() <= capacity_bytes;
        if !fits(1) {
            return Err(GeometryError::TooSmall {
                capacity_bytes,
                needed_bytes: one.total_bytes(),
            });
        }
        let most = capacity_bytes / one.row_stride_bytes();
        let most = u32::try_from(most).unwrap_or(u32::MAX).min(ROWS_MAX);
        let rows = largest(1, most, fits);
        Ok(Self { rows, ..one })
    }

    /// All rows that can lie in `area_bytes` of memory which models share: the tables about them lie
    /// elsewhere.
    ///
    /// # Errors
    /// [`GeometryError`] when a row is impossible or does not fit.
    pub fn over(
        ranks: u32,
        layers: u32,
        layer_bytes: usize,
        area_bytes: usize,
    ) -> Result<Self, GeometryError> {
        let one = Self {
            ranks,
            layers,
            layer_bytes,
            rows: 1,
        };
        let rows = one
            .is_possible()
            .then(|| area_bytes / one.row_stride_bytes());
        match rows.map(u32::try_from) {
            Some(Ok(0)) => Err(GeometryError::TooSmall {
                capacity_bytes: area_bytes,
                needed_bytes: one.row_stride_bytes(),
            }),
            Some(Ok(rows)) if rows <= ROWS_MAX => Ok(Self { rows, ..one }),
            _ => Err(GeometryError::Impossible {
                ranks,
                layers,
                layer_bytes,
            }),
        }
    }

    /// Whether such rows can be laid out at all.
    fn is_possible(&self) -> bool {
        let product = (self.ranks as usize)
            .checked_mul(self.layers as usize)
            .and_then(|n| n.checked_mul(self.layer_bytes))
            .filter(|&bytes| bytes > 0 && bytes < usize::MAX / 8);
        product.is_some() && self.ranks as usize <= RANKS_MAX
    }

    /// The same rows, `rows` of them; `None` if they are more than can be addressed.
    #[must_use]
    pub fn with_rows(self, rows: u32) -> Option<Self> {
        let bits = BITMAPS.div_ceil(8);
        let per_row = self.row_stride_bytes() + self.row_table_bytes() + 2 * BUCKET_BYTES + bits;
        let bytes = (rows as usize).checked_mul(per_row)?;
        let addressable = (1..=ROWS_MAX).contains(&rows) && bytes < usize::MAX / 8;
        addressable.then_some(Self { rows, ..self })
    }

    /// The rows that lie in a stretch of the memory that the rows are in.
    #[must_use]
    pub fn rows_within(&self, bytes: Range<usize>) -> Range<u32> {
        let stride = self.row_stride_bytes();
        let row = |number: usize| u32::try_from(number).map_or(self.rows, |n| n.min(self.rows));
        let (start, end) = (row(bytes.start.div_ceil(stride)), row(bytes.end / stride));
        start..end.max(start)
    }

    /// Ranks whose shards make a row.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.ranks
    }

    /// Layers of a block.
    #[must_use]
    pub fn layers(&self) -> u32 {
        self.layers
    }

    /// Bytes of a block in one layer on one rank.
    #[must_use]
    pub fn layer_bytes(&self) -> usize {
        self.layer_bytes
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Bytes of one rank's shard of a row.
    #[must_use]
    pub fn shard_bytes(&self) -> usize {
        self.layers as usize * self.layer_bytes
    }

    /// Bytes of KV cache in a row, padding not counted.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.ranks as usize * self.shard_bytes()
    }

    /// Bytes from one row to the next.
    #[must_use]
    pub fn row_stride_bytes(&self) -> usize {
        self.row_bytes().next_multiple_of(ROW_ALIGN_BYTES)
    }

    /// Buckets of the index over all rows: at least one a row, and a power of two.
    #[must_use]
    pub fn buckets(&self) -> u32 {
        self.rows.next_power_of_two()
    }

    /// Bytes of the board, padding included.
    #[must_use]
    pub fn board_bytes(&self) -> usize {
        let board = self.ranks as usize * LOAD_PLACES as usize * PLACE_BYTES;
        board.next_multiple_of(ROW_ALIGN_BYTES)
    }

    /// Bytes of what an engine has for itself: a header and the board.
    #[must_use]
    pub fn own_bytes(&self) -> usize {
        HEADER_BYTES + self.board_bytes()
    }

    /// Bytes of the file with the tables of a pool that outlives its engines.
    #[must_use]
    pub fn tables_file_bytes(&self) -> usize {
        HEADER_BYTES + self.table_bytes()
    }

    /// What of that file the tables need for any rows at all, and for these.
    #[must_use]
    pub fn tables_file_ranges(&self, rows: &Range<u32>) -> [Range<usize>; 3] {
        let of = |start: usize, each: usize| {
            let start = HEADER_BYTES + start;
            start + rows.start as usize * each..start + rows.end as usize * each
        };
        let headers = self.shard_headers_offset();
        [
            0..HEADER_BYTES + self.records_offset(),
            of(self.records_offset(), SLOT_RECORD_BYTES),
            of(headers, self.ranks as usize * SHARD_HEADER_BYTES),
        ]
    }

    /// Offset in the board of the cell of `rank` for the load at `place`; `None` when out of range.
    pub(crate) fn board_offset(&self, place: u32, rank: u32) -> Option<usize> {
        (place < LOAD_PLACES && rank < self.ranks).then(|| {
            let index = rank as usize * LOAD_PLACES as usize + place as usize;
            index * PLACE_BYTES
        })
    }

    /// Bytes that the tables have for one row, besides its bucket of the index.
    fn row_table_bytes(&self) -> usize {
        SLOT_RECORD_BYTES + self.ranks as usize * SHARD_HEADER_BYTES
    }

    /// Bytes of all tables about rows (buckets, bitmaps, slots' records, shards' headers), padding
    /// included.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        let rows = self.rows as usize * self.row_table_bytes();
        (self.records_offset() + rows).next_multiple_of(ROW_ALIGN_BYTES)
    }

    /// Offset in the tables of the word that says which holders there are; bitmaps follow, a line
    /// later.
    pub(crate) fn in_use_offset(&self) -> usize {
        (self.buckets() as usize * BUCKET_BYTES).next_multiple_of(LINE_BYTES)
    }

    /// Words of each bitmap.
    #[must_use]
    pub fn bitmap_words(&self) -> u32 {
        self.rows.div_ceil(WORD_ROWS)
    }

    /// Words from one bitmap to the next.
    pub(crate) fn bitmap_stride_words(&self) -> usize {
        let words = self.bitmap_words() as usize;
        words.next_multiple_of(LINE_BYTES / WORD_BYTES)
    }

    /// Offset in the tables of the bitmaps: those of the holders come first, then that of the rows that
    /// are proven.
    pub(crate) fn bitmaps_offset(&self) -> usize {
        self.in_use_offset() + LINE_BYTES
    }

    /// Offset in the tables of the first slot's record.
    pub(crate) fn records_offset(&self) -> usize {
        let bitmaps = BITMAPS * self.bitmap_stride_words() * WORD_BYTES;
        (self.bitmaps_offset() + bitmaps).next_multiple_of(ROW_ALIGN_BYTES)
    }

    /// Offset in the tables of the first row's headers of shards, one for each rank.
    pub(crate) fn shard_headers_offset(&self) -> usize {
        self.records_offset() + self.rows as usize * SLOT_RECORD_BYTES
    }

    /// Offset of the tables in a segment of one engine, behind the board.
    pub(crate) fn tables_offset(&self) -> usize {
        HEADER_BYTES + self.board_bytes()
    }

    /// Offset of the first row in a segment of one engine.
    #[must_use]
    pub fn data_offset(&self) -> usize {
        self.tables_offset() + self.table_bytes()
    }

    /// Bytes of all rows.
    #[must_use]
    pub fn area_bytes(&self) -> usize {
        self.rows as usize * self.row_stride_bytes()
    }

    /// Bytes of a whole segment of one engine.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.data_offset() + self.area_bytes()
    }

    /// Offset of `rank`'s shard of `row` from the first row on; `None` when out of range.
    #[must_use]
    pub fn shard_offset(&self, row: u32, rank: u32) -> Option<usize> {
        (row < self.rows && rank < self.ranks)
            .then(|| row as usize * self.row_stride_bytes() + rank as usize * self.shard_bytes())
    }

    /// The geometry as the words stored in the segment's header.
    pub(crate) fn to_words(self) -> [u64; 4] {
        [
            self.ranks.into(),
            self.layers.into(),
            self.layer_bytes as u64,
            self.rows.into(),
        ]
    }
}

/// The largest number from `low` to `high` that fits; `low` does, and so does all below one that does.
fn largest(low: u32, high: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut above) = (low, high.max(low) + 1);
    while above - low > 1 {
        let middle = low + (above - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            above = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_capacity_below_one_row_is_refused_with_what_a_row_needs() {
        let error = RowGeometry::fit(2, 32, 65536, 1 << 20).unwrap_err();
        assert_eq!(
            error,
            GeometryError::TooSmall {
                capacity_bytes: 1 << 20,
                needed_bytes: 4096 + 4096 + 12288 + (4 << 20)
            }
        );
    }

    #[test]
    fn zero_and_overflowing_sizes_are_refused() {
        for (ranks, layers, bytes) in [
            (0, 1, 1),
            (1, 0, 1),
            (1, 1, 0),
            (u32::MAX, u32::MAX, 1 << 40),
            (4032, 1, 1),
        ] {
            assert!(matches!(
                RowGeometry::fit(ranks, layers, bytes, usize::MAX),
                Err(GeometryError::Impossible { .. })
            ));
        }
    }

    proptest! {
        #[test]
        fn rows_fill_the_capacity_and_never_overlap(
            ranks in 1u32..9, layers in 1u32..9, layer_bytes in 1usize..20_000,
            capacity in 1usize..(64 << 20),
        ) {
            let Ok(g) = RowGeometry::fit(ranks, layers, layer_bytes, capacity) else { return Ok(()) };
            prop_assert!(g.total_bytes() <= capacity);
            let last = g.rows() - 1;
            let end = g.data_offset() + g.shard_offset(last, ranks - 1).unwrap() + g.shard_bytes();
            prop_assert!(end <= g.total_bytes());
            prop_assert_eq!(g.data_offset() % ROW_ALIGN_BYTES, 0);
            prop_assert_eq!(g.shard_offset(last, 0).unwrap() % ROW_ALIGN_BYTES, 0);
            let rows = g.rows() as usize;
            let buckets = g.buckets() as usize * BUCKET_BYTES;
            prop_assert!(buckets <= g.in_use_offset());
            prop_assert!(g.in_use_offset() + WORD_BYTES <= g.bitmaps_offset());
            prop_assert!(g.bitmap_words() as usize * 64 >= rows);
            let bits = BITMAPS * g.bitmap_stride_words() * WORD_BYTES;
            prop_assert!(g.bitmaps_offset() + bits <= g.records_offset());
            let records = rows * SLOT_RECORD_BYTES;
            prop_assert!(g.records_offset() + records <= g.shard_headers_offset());
            let headers = rows * ranks as usize * SHARD_HEADER_BYTES;
            prop_assert!(g.shard_headers_offset() + headers <= g.table_bytes());
            let board = g.board_offset(LOAD_PLACES - 1, ranks - 1).unwrap() + PLACE_BYTES;
            prop_assert!(board <= g.board_bytes());
            prop_assert!(g.shard_offset(g.rows(), 0).is_none());
            prop_assert!(g.shard_offset(0, ranks).is_none());
            // Not one row more would have fitted.
            let more = g.with_rows(g.rows() + 1).unwrap();
            prop_assert!(more.total_bytes() > capacity);
        }

        #[test]
        fn stretches_of_shared_memory_share_no_row(
            ranks in 1u32..4, layers in 1u32..9, layer_bytes in 1usize..20_000,
            extent in 1usize..(4 << 20), extents in 1usize..9,
        ) {
            let area = extents * extent;
            let Ok(g) = RowGeometry::over(ranks, layers, layer_bytes, area) else { return Ok(()) };
            let mut next = 0;
            for at in 0..extents {
                let bytes = at * extent..(at + 1) * extent;
                for row in g.rows_within(bytes.clone()) {
                    prop_assert!(row >= next);
                    next = row + 1;
                    let start = g.shard_offset(row, 0).unwrap();
                    prop_assert!(bytes.start <= start && start + g.row_stride_bytes() <= bytes.end);
                }
            }
            prop_assert!(next <= g.rows());
        }
    }
}
