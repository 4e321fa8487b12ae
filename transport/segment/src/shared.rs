//! The mapped segment, and what is read and written in it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use memmap2::{Advice, MmapRaw};

use crate::directory;
use crate::error::{SegmentError, io_error};
use crate::geometry::RowGeometry;
use crate::shard::{ShardHeader, ShardState};

/// Populated by one thread at a time; small enough that progress is seen.
const POPULATE_CHUNK_BYTES: usize = 1 << 30;
/// Populating is bound by the kernel clearing pages; more threads than this stop helping.
const POPULATE_THREADS_MAX: usize = 8;

/// A mapped segment. The last holder removes the file, if it still has its name.
#[derive(Debug)]
pub struct SharedSegment {
    pub(crate) map: MmapRaw,
    pub(crate) geometry: RowGeometry,
    pub(crate) path: PathBuf,
    /// Holds the shared lock that marks the segment as in use.
    pub(crate) file: File,
    pub(crate) created: bool,
    pub(crate) on_huge_pages: bool,
    pub(crate) reclaimed: Vec<PathBuf>,
}

impl SharedSegment {
    /// Maps every page now, rather than at the first copy that touches it.
    ///
    /// `progress` hears of (bytes done, bytes in all) from time to time, from several threads.
    ///
    /// # Errors
    /// [`SegmentError::Io`] when the kernel cannot provide the memory.
    pub fn populate(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<(), SegmentError> {
        let total = self.map.len();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let next = AtomicUsize::new(0);
        let work = || -> io::Result<()> {
            loop {
                let start = next.fetch_add(POPULATE_CHUNK_BYTES, Ordering::Relaxed);
                if start >= total {
                    return Ok(());
                }
                let length = POPULATE_CHUNK_BYTES.min(total - start);
                self.map
                    .advise_range(Advice::PopulateWrite, start, length)?;
                progress(start + length, total);
            }
        };
        let done = std::thread::scope(|scope| {
            let count = threads
                .min(POPULATE_THREADS_MAX)
                .min(total.div_ceil(POPULATE_CHUNK_BYTES));
            let helpers: Vec<_> = (1..count).map(|_| scope.spawn(work)).collect();
            let mine = work();
            helpers
                .into_iter()
                .map(|h| h.join().unwrap_or(Ok(())))
                .fold(mine, Result::and)
        });
        match done {
            // Kernels before 5.14 do not know the advice; pages are then mapped at first use.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                Ok(())
            }
            done => done.map_err(io_error("populate", &self.path)),
        }
    }

    /// The rows' geometry.
    #[must_use]
    pub fn geometry(&self) -> &RowGeometry {
        &self.geometry
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this process made the segment, rather than finding it.
    #[must_use]
    pub fn created(&self) -> bool {
        self.created
    }

    /// Whether the segment lies on a hugetlbfs mount.
    #[must_use]
    pub fn on_huge_pages(&self) -> bool {
        self.on_huge_pages
    }

    /// Dead segments that were removed when this one was created.
    #[must_use]
    pub fn reclaimed(&self) -> &[PathBuf] {
        &self.reclaimed
    }

    /// Address and bytes of the whole map, for a driver that registers it.
    #[must_use]
    pub fn range(&self) -> (*mut u8, usize) {
        (self.map.as_mut_ptr(), self.map.len())
    }

    /// Address of `rank`'s shard of `row`, good for [`RowGeometry::shard_bytes`] bytes; `None` when
    /// out of range.
    #[must_use]
    pub fn shard_address(&self, row: u32, rank: u32) -> Option<*mut u8> {
        let offset = self.geometry.shard_offset(row, rank)?;
        Some(self.map.as_mut_ptr().wrapping_add(offset))
    }

    fn header(&self, row: u32, rank: u32) -> Option<&ShardHeader> {
        let offset = self.geometry.shard_header_offset(row, rank)?;
        let address = self
            .map
            .as_mut_ptr()
            .wrapping_add(offset)
            .cast::<ShardHeader>();
        // SAFETY: the offset lies inside the map and is a multiple of 16 (see RowGeometry); the
        // header is made of atomics, for which any bit pattern and concurrent access are fine; the
        // map lives as long as `self`.
        Some(unsafe { &*address })
    }

    /// A cell of the board of loads; `None` when out of range.
    pub(crate) fn board_cell(&self, place: u32, rank: u32) -> Option<&AtomicU64> {
        let offset = self.geometry.board_offset(place, rank)?;
        let address = self.map.as_mut_ptr().wrapping_add(offset).cast();
        // SAFETY: the offset lies inside the map and is a multiple of 8 (see RowGeometry), and the
        // cell is only ever accessed as an atomic; the map lives as long as `self`.
        Some(unsafe { &*address })
    }

    /// Reads a shard's header; `None` when out of range.
    #[must_use]
    pub fn shard_state(&self, row: u32, rank: u32) -> Option<ShardState> {
        self.header(row, rank).map(ShardHeader::read)
    }

    /// Disowns the bytes of a shard before they are overwritten for `generation`; whether they may be.
    /// If not, the slot has been filled anew since, or its save was given up.
    #[must_use]
    pub fn begin_shard(&self, row: u32, rank: u32, generation: u32) -> bool {
        self.header(row, rank)
            .is_some_and(|header| header.begin(generation))
    }

    /// Publishes the bytes of a shard as complete; whether it was still being filled for `generation`.
    pub fn seal_shard(&self, row: u32, rank: u32, generation: u32, checksum: u64) -> bool {
        self.header(row, rank)
            .is_some_and(|header| header.seal(generation, checksum))
    }

    /// Marks a shard as unusable: its save failed. Nothing happens if the slot has been filled anew.
    pub fn condemn_shard(&self, row: u32, rank: u32, generation: u32) {
        if let Some(header) = self.header(row, rank) {
            header.condemn(generation);
        }
    }

    /// Checksum of a shard's bytes as they are now; `None` when out of range.
    ///
    /// The caller holds the row pinned, so that nobody writes it meanwhile.
    #[must_use]
    pub fn compute_checksum(&self, row: u32, rank: u32) -> Option<u64> {
        let address = self.shard_address(row, rank)?;
        // SAFETY: `shard_address` is good for `shard_bytes`. A writer of this row would make the
        // bytes, and so the checksum, meaningless, but the pool lets nobody fill a pinned slot.
        let shard = unsafe { std::slice::from_raw_parts(address, self.geometry.shard_bytes()) };
        Some(crate::shard_checksum(shard, self.geometry.layer_bytes()))
    }
}

impl Drop for SharedSegment {
    fn drop(&mut self) {
        // This gives up the shared lock. Of several that leave together, the last to do so finds the
        // file unused; where removal fails, the next engine in this directory removes it.
        directory::remove_unused(&self.file, &self.path);
    }
}
