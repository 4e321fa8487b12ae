//! The mapped segment, and what is read and written in it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use memmap2::{Advice, MmapRaw};

use crate::directory;
use crate::error::{SegmentError, io_error};
use crate::geometry::{HEADER_BYTES, RowGeometry};
use crate::header;
use crate::mapped::MappedFile;
use crate::record::SlotRecord;
use crate::region::Region;
use crate::shard::{ShardHeader, ShardState};
use crate::tables::Tables;

/// Populated by one thread at a time; small enough that progress is seen.
const POPULATE_CHUNK_BYTES: usize = 1 << 30;
/// Populating is bound by the kernel clearing pages; more threads than this stop helping.
const POPULATE_THREADS_MAX: usize = 8;

/// A mapped segment. The last holder removes the file, if it still has its name.
#[derive(Debug)]
pub struct SharedSegment {
    /// All rows, in memory that may be shared with others.
    pub(crate) rows: Region,
    /// What the pool knows about them: buckets of its index, bits of holders, slots' records, shards'
    /// headers.
    tables: Tables,
    /// Where this engine's workers publish the ends of loads.
    pub(crate) board: Region,
    /// What this engine has for itself begins with it.
    pub(crate) header: Region,
    pub(crate) geometry: RowGeometry,
    pub(crate) origin: Origin,
}

/// Where a segment comes from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// A file of one engine.
    Engine(SegmentFile),
    /// Files of a pool that outlives the engine; their name for messages.
    Pool(PathBuf),
}

/// The files of a pool that outlives its engines.
#[derive(Clone, Debug)]
pub struct SegmentParts {
    /// The memory that holds rows, maybe also of other pools.
    pub memory: MappedFile,
    /// Where in it the first row begins.
    pub data_offset: usize,
    /// What the pool knows about its rows: [`RowGeometry::table_bytes`] behind a page that is its own.
    pub tables: MappedFile,
    /// What an engine has for itself: [`RowGeometry::own_bytes`].
    pub own: MappedFile,
}

/// The file of a segment of one engine.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    pub(crate) path: PathBuf,
    /// Holds the shared lock that marks the segment as in use.
    pub(crate) file: File,
    pub(crate) created: bool,
    pub(crate) on_huge_pages: bool,
    pub(crate) reclaimed: Vec<PathBuf>,
}

impl Drop for SegmentFile {
    fn drop(&mut self) {
        // This gives up the shared lock. Of several that leave together, the last to do so finds the
        // file unused; where removal fails, the next engine in this directory removes it.
        directory::remove_unused(&self.file, &self.path);
    }
}

impl SharedSegment {
    /// The parts of `map`, which has all of `geometry`; `None` if it is too short.
    pub(crate) fn of_map(
        map: &Arc<MmapRaw>,
        geometry: RowGeometry,
        file: SegmentFile,
    ) -> Option<Self> {
        let part = |offset, bytes| Region::new(map, offset, bytes);
        Some(Self {
            header: part(0, HEADER_BYTES)?,
            board: part(HEADER_BYTES, geometry.board_bytes())?,
            tables: Tables::of(
                &part(geometry.tables_offset(), geometry.table_bytes())?,
                &geometry,
            )?,
            rows: part(geometry.data_offset(), geometry.area_bytes())?,
            geometry,
            origin: Origin::Engine(file),
        })
    }

    /// A segment of `geometry` over the files of a pool; `path` is its name for messages.
    ///
    /// # Errors
    /// [`SegmentError::Mismatch`] when a file is too short for that.
    pub fn of_parts(
        parts: &SegmentParts,
        geometry: RowGeometry,
        path: &Path,
    ) -> Result<Self, SegmentError> {
        let (own, memory) = (&parts.own.map, &parts.memory.map);
        let part = |map, offset, bytes| Region::new(map, offset, bytes);
        let assemble = || {
            Some(Self {
                header: part(own, 0, HEADER_BYTES)?,
                board: part(own, HEADER_BYTES, geometry.board_bytes())?,
                tables: Tables::of(
                    &part(&parts.tables.map, HEADER_BYTES, geometry.table_bytes())?,
                    &geometry,
                )?,
                rows: part(memory, parts.data_offset, geometry.area_bytes())?,
                geometry,
                origin: Origin::Pool(path.to_owned()),
            })
        };
        assemble().ok_or_else(|| SegmentError::Mismatch {
            path: path.display().to_string(),
        })
    }

    /// Whether the header of what an engine has for itself says what this process takes the tables to
    /// be: it is of the same format, and of the same rows.
    #[must_use]
    pub fn has_its_header(&self) -> bool {
        header::says(&self.header, &self.geometry)
    }

    /// Writes the header of what an engine has for itself, which nobody else can open yet.
    pub fn write_header(&self) {
        header::write(&self.header, &self.geometry);
    }

    /// Maps every page now, rather than at the first copy that touches it.
    ///
    /// `progress` hears of (bytes done, bytes in all) from time to time, from several threads.
    ///
    /// # Errors
    /// [`SegmentError::Io`] when the kernel cannot provide the memory.
    pub fn populate(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<(), SegmentError> {
        let map = self.rows.map();
        let total = map.len();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let next = AtomicUsize::new(0);
        let work = || -> io::Result<()> {
            loop {
                let start = next.fetch_add(POPULATE_CHUNK_BYTES, Ordering::Relaxed);
                if start >= total {
                    return Ok(());
                }
                let length = POPULATE_CHUNK_BYTES.min(total - start);
                map.advise_range(Advice::PopulateWrite, start, length)?;
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
            done => done.map_err(io_error("populate", self.path())),
        }
    }

    /// The rows' geometry.
    #[must_use]
    pub fn geometry(&self) -> &RowGeometry {
        &self.geometry
    }

    /// Its file, or that of the pool's memory.
    #[must_use]
    pub fn path(&self) -> &Path {
        match &self.origin {
            Origin::Engine(file) => &file.path,
            Origin::Pool(path) => path,
        }
    }

    fn file(&self) -> Option<&SegmentFile> {
        match &self.origin {
            Origin::Engine(file) => Some(file),
            Origin::Pool(_) => None,
        }
    }

    /// Whether this process made the segment, rather than finding it.
    #[must_use]
    pub fn created(&self) -> bool {
        self.file().is_some_and(|file| file.created)
    }

    /// Whether the segment lies on a hugetlbfs mount.
    #[must_use]
    pub fn on_huge_pages(&self) -> bool {
        self.file().is_some_and(|file| file.on_huge_pages)
    }

    /// Dead segments that were removed when this one was created.
    #[must_use]
    pub fn reclaimed(&self) -> &[PathBuf] {
        self.file().map_or(&[], |file| &file.reclaimed)
    }

    /// Address and bytes of the map that the rows lie in, for a driver that registers it.
    #[must_use]
    pub fn range(&self) -> (*mut u8, usize) {
        let map = self.rows.map();
        (map.as_mut_ptr(), map.len())
    }

    /// Bytes from where [`SharedSegment::range`] begins to the first row.
    #[must_use]
    pub fn data_offset(&self) -> usize {
        self.rows.offset()
    }

    /// Address of `rank`'s shard of `row`, good for [`RowGeometry::shard_bytes`] bytes; `None` when
    /// out of range.
    #[must_use]
    pub fn shard_address(&self, row: u32, rank: u32) -> Option<*mut u8> {
        let offset = self.geometry.shard_offset(row, rank)?;
        self.rows.address(offset, self.geometry.shard_bytes())
    }

    /// The record of the slot whose row is `row`; `None` when out of range.
    #[must_use]
    pub fn record(&self, row: u32) -> Option<&SlotRecord> {
        self.tables.records.get(row as usize)
    }

    /// A bucket of the index over the slots: the first slot in it, plus one; `None` when out of range.
    #[must_use]
    pub fn bucket(&self, bucket: u32) -> Option<&AtomicU32> {
        self.tables.buckets.get(bucket as usize)
    }

    /// A bit for each holder that there is; a holder's own are to be looked at only if it is set.
    #[must_use]
    pub fn holders_in_use(&self) -> Option<&AtomicU64> {
        self.tables.in_use()
    }

    /// A word of the rows that `holder` has pinned, 64 rows each; `None` when out of range.
    #[must_use]
    pub fn held_rows(&self, holder: u32, word: u32) -> Option<&AtomicU64> {
        self.tables.held(holder, word)
    }

    /// A word of the rows whose bytes are proven to be right, 64 rows each; `None` when out of range.
    #[must_use]
    pub fn proven_rows(&self, word: u32) -> Option<&AtomicU64> {
        self.tables.proven(word)
    }

    fn header(&self, row: u32, rank: u32) -> Option<&ShardHeader> {
        self.tables.header(row, rank)
    }

    /// A cell of the board of loads; `None` when out of range.
    pub(crate) fn board_cell(&self, place: u32, rank: u32) -> Option<&AtomicU64> {
        self.board.shared(self.geometry.board_offset(place, rank)?)
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

    /// Marks a shard as unusable that nobody has begun for `generation`; from then on nobody can.
    pub fn refuse_shard(&self, row: u32, rank: u32, generation: u32) {
        if let Some(header) = self.header(row, rank) {
            header.refuse(generation);
        }
    }

    /// Makes a shard's header bad that is ahead of its slot's `generation`, as only damaged memory has
    /// it: the next generation can be begun then.
    pub fn mend_shard(&self, row: u32, rank: u32, generation: u32) {
        if let Some(header) = self.header(row, rank) {
            header.mend(generation);
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
