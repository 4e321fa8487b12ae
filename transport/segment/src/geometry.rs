//! Sizes and offsets inside a segment.

use crate::board::{LOAD_PLACES, PLACE_BYTES};
use crate::shard::SHARD_HEADER_BYTES;
use crate::size::size;

/// Rows begin on this boundary, so that they can be read and written with `O_DIRECT`.
pub(crate) const ROW_ALIGN_BYTES: usize = 4096;
/// The segment's own header.
pub(crate) const HEADER_BYTES: usize = 4096;

/// How rows are laid out: one block of all ranks side by side.
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
    /// A count or size is zero, or the product does not fit in memory.
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
        "a capacity of {} holds no row, of which one needs {}",
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
        let product = (ranks as usize)
            .checked_mul(layers as usize)
            .and_then(|n| n.checked_mul(layer_bytes))
            .filter(|&bytes| bytes > 0 && bytes < usize::MAX / 4);
        if product.is_none() {
            return Err(impossible);
        }
        let needed_bytes = one.total_bytes();
        if capacity_bytes < needed_bytes {
            return Err(GeometryError::TooSmall {
                capacity_bytes,
                needed_bytes,
            });
        }
        let per_row = one.row_stride_bytes() + ranks as usize * SHARD_HEADER_BYTES;
        // The table is padded to a row boundary: leave room for it.
        let rows = (capacity_bytes - one.table_offset() - ROW_ALIGN_BYTES) / per_row;
        let rows = u32::try_from(rows)
            .unwrap_or(u32::MAX)
            .clamp(1, u32::MAX - 1);
        Ok(Self { rows, ..one })
    }

    /// The same rows, `rows` of them; `None` if they are more than can be addressed.
    pub(crate) fn with_rows(self, rows: u32) -> Option<Self> {
        let per_row = self.row_stride_bytes() + self.ranks as usize * SHARD_HEADER_BYTES;
        let bytes = (rows as usize).checked_mul(per_row)?;
        (bytes < usize::MAX / 4).then_some(Self { rows, ..self })
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

    /// Offset of the cell of `rank` for the load at `place` of the board; `None` when out of range.
    pub(crate) fn board_offset(&self, place: u32, rank: u32) -> Option<usize> {
        (place < LOAD_PLACES && rank < self.ranks).then(|| {
            let index = rank as usize * LOAD_PLACES as usize + place as usize;
            HEADER_BYTES + index * PLACE_BYTES
        })
    }

    /// Offset of the first shard header, behind the board.
    fn table_offset(&self) -> usize {
        let board = self.ranks as usize * LOAD_PLACES as usize * PLACE_BYTES;
        HEADER_BYTES + board.next_multiple_of(ROW_ALIGN_BYTES)
    }

    /// Bytes of all shard headers.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        self.rows as usize * self.ranks as usize * SHARD_HEADER_BYTES
    }

    /// Offset of the first row.
    #[must_use]
    pub fn data_offset(&self) -> usize {
        self.table_offset() + self.table_bytes().next_multiple_of(ROW_ALIGN_BYTES)
    }

    /// Bytes of the whole segment.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.data_offset() + self.rows as usize * self.row_stride_bytes()
    }

    /// Offset of `rank`'s header of `row`; `None` when out of range.
    pub(crate) fn shard_header_offset(&self, row: u32, rank: u32) -> Option<usize> {
        (row < self.rows && rank < self.ranks).then(|| {
            let index = row as usize * self.ranks as usize + rank as usize;
            self.table_offset() + index * SHARD_HEADER_BYTES
        })
    }

    /// Offset of `rank`'s shard of `row`; `None` when out of range.
    #[must_use]
    pub fn shard_offset(&self, row: u32, rank: u32) -> Option<usize> {
        (row < self.rows && rank < self.ranks).then(|| {
            self.data_offset()
                + row as usize * self.row_stride_bytes()
                + rank as usize * self.shard_bytes()
        })
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
                needed_bytes: 4096 + 4096 + 4096 + (4 << 20)
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
            let end = g.shard_offset(last, ranks - 1).unwrap() + g.shard_bytes();
            prop_assert!(end <= g.total_bytes());
            prop_assert_eq!(g.shard_offset(last, 0).unwrap() % ROW_ALIGN_BYTES, 0);
            prop_assert!(g.shard_header_offset(last, ranks - 1).unwrap() + SHARD_HEADER_BYTES <= g.data_offset());
            let board = g.board_offset(LOAD_PLACES - 1, ranks - 1).unwrap() + PLACE_BYTES;
            prop_assert!(board <= g.shard_header_offset(0, 0).unwrap());
            prop_assert!(g.shard_offset(g.rows(), 0).is_none());
            prop_assert!(g.shard_offset(0, ranks).is_none());
            // At most the padding and one row are left unused.
            let slack = capacity - g.total_bytes();
            prop_assert!(slack < g.row_stride_bytes() + 16 * ranks as usize + 2 * ROW_ALIGN_BYTES);
        }
    }
}
