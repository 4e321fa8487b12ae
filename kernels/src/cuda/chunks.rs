//! In which pieces a large range of host memory is registered with the driver.

use std::ops::Range;

/// Bytes of one registration at most: drivers refuse 512 GiB and more in one call, with an error that
/// speaks of too little memory.
pub(crate) const CHUNK_BYTES: usize = 64 << 30;

/// Rows at equal distances in a range, and how many of them one registration has. None lies in two: the
/// driver refuses a copy that crosses from one registration into the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunks {
    /// Bytes of the range.
    bytes: usize,
    /// Bytes before the first row.
    first_row: usize,
    /// Bytes from one row to the next; a multiple of the page.
    stride: usize,
    /// Rows of a registration; the last may have fewer.
    rows: usize,
}

impl Chunks {
    /// Those of at most `most` bytes each, unless a row alone has more.
    pub(crate) fn of(bytes: usize, first_row: usize, stride: usize, most: usize) -> Self {
        Self {
            bytes,
            first_row,
            stride,
            rows: (most.saturating_sub(first_row) / stride.max(1)).max(1),
        }
    }

    /// The registrations, as places in the range, which they cover without a gap.
    pub(crate) fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        let end = move |rows: usize| self.first_row + rows * self.stride;
        let count = self.bytes.saturating_sub(self.first_row);
        let count = count.div_ceil((self.rows * self.stride).max(1)).max(1);
        (0..count).map(move |i| {
            let start = if i == 0 { 0 } else { end(i * self.rows) };
            let stop = end((i + 1) * self.rows).min(self.bytes);
            start..if i + 1 == count { self.bytes } else { stop }
        })
    }

    /// Whether `row` is the first of its registration, and not the first of all.
    pub(crate) fn begins_with(self, row: u32) -> bool {
        row != 0 && (row as usize).is_multiple_of(self.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn registrations_cover_the_range_and_no_row_lies_in_two(
            first_row in (0usize..4).prop_map(|pages| pages * 4096),
            stride in (1usize..9).prop_map(|pages| pages * 4096),
            rows in 0u32..200,
            tail in 0usize..4096,
            most in 1usize..(1 << 20),
        ) {
            let bytes = first_row + rows as usize * stride + tail;
            let chunks = Chunks::of(bytes, first_row, stride, most);
            let ranges: Vec<_> = chunks.ranges().collect();
            prop_assert_eq!(ranges[0].start, 0);
            prop_assert_eq!(ranges[ranges.len() - 1].end, bytes);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            prop_assert!(ranges.iter().all(|range| range.start % 4096 == 0));
            for range in &ranges[..ranges.len() - 1] {
                prop_assert!(range.len() <= most.max(first_row + stride));
            }
            for row in 0..rows {
                let start = first_row + row as usize * stride;
                let holder = ranges.iter().position(|range| range.contains(&start)).unwrap();
                prop_assert!(start + stride <= ranges[holder].end);
                let before = start.checked_sub(stride).filter(|_| row > 0);
                let crosses = before.is_some_and(|before| !ranges[holder].contains(&before));
                prop_assert_eq!(chunks.begins_with(row), crosses);
            }
        }
    }

    #[test]
    fn what_one_call_takes_is_one_registration() {
        let chunks = Chunks::of(10 << 30, 4096, 1 << 20, CHUNK_BYTES);
        assert_eq!(chunks.ranges().count(), 1);
        assert_eq!(chunks.ranges().next(), Some(0..10 << 30));
    }
}
