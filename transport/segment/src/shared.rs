//! Creating, attaching, filling and removing the segment.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use crate::directory::{self, HugePages};
use crate::geometry::{HEADER_BYTES, RowGeometry};
use crate::shard::{ShardHeader, ShardState};
use crate::size::size;

const MAGIC: u64 = u64::from_le_bytes(*b"kvtide\x02\0");
/// Where the header counts holders, behind its words.
const HOLDERS_OFFSET: usize = 64;
/// Populated by one thread at a time; small enough that progress is seen.
const POPULATE_CHUNK_BYTES: usize = 1 << 30;
/// Populating is bound by the kernel clearing pages; more threads than this stop helping.
const POPULATE_THREADS_MAX: usize = 8;

/// How to make a segment.
#[derive(Clone, Debug)]
pub struct SegmentOptions {
    /// A directory on shared memory, usually `/dev/shm`.
    pub directory: PathBuf,
    /// The engine's instance id: the same for all of its processes, different for every engine.
    pub instance: String,
    /// Whether to prefer a hugetlbfs mount over `directory`.
    pub huge_pages: HugePages,
    /// How many times the segment is opened in all. The last to open it removes its name, and from
    /// then on the memory is the kernel's to free when the last holder ends, in whatever way.
    pub holders: u32,
    /// Memory that may be taken; only whoever creates the segment takes it.
    pub available_bytes: u64,
}

/// Why a segment could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The directory is smaller than the segment.
    #[error(
        "{directory} has {} free and the segment needs {}: lower `host_capacity_gb`, or enlarge the \
         mount (containers: --shm-size, or an emptyDir with medium Memory)",
        size(*free_bytes), size(*needed_bytes)
    )]
    NoSpace {
        /// Where.
        directory: String,
        /// Bytes free there.
        free_bytes: u64,
        /// Bytes needed.
        needed_bytes: usize,
    },
    /// The host has too little memory.
    #[error(
        "host_capacity_gb: the segment needs {} and {} are available: lower it",
        size(*needed_bytes), size(*available_bytes)
    )]
    NoMemory {
        /// Bytes needed.
        needed_bytes: usize,
        /// Bytes there are.
        available_bytes: u64,
    },
    /// Huge pages were required and there are too few.
    #[error(
        "`huge_pages` is \"require\", and no hugetlbfs mount has {} of free 2 MiB pages: reserve them \
         (sysctl vm.nr_hugepages) or set it to \"auto\"",
        size(*needed_bytes)
    )]
    NoHugePages {
        /// Bytes needed.
        needed_bytes: usize,
    },
    /// A segment of this name has another layout.
    #[error(
        "{path} belongs to an engine of another geometry: give every engine its own instance id"
    )]
    Mismatch {
        /// The file.
        path: String,
    },
    /// The operating system refused.
    #[error("cannot {operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A mapped segment. The last holder removes the file, if it still has its name.
#[derive(Debug)]
pub struct SharedSegment {
    map: MmapRaw,
    geometry: RowGeometry,
    path: PathBuf,
    directory: PathBuf,
    /// Holds the shared lock that marks the segment as in use.
    file: File,
    created: bool,
    on_huge_pages: bool,
    reclaimed: Vec<PathBuf>,
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SegmentError {
    let path = path.display().to_string();
    move |source| SegmentError::Io {
        operation,
        path,
        source,
    }
}

impl SharedSegment {
    /// Attaches to the segment of `options.instance`, or creates it if there is none.
    ///
    /// Creation reserves all of the memory, so that running out is an error here and not a SIGBUS
    /// later; [`SharedSegment::populate`] then maps it. A segment that exists keeps the number of
    /// rows that it was created with: how much memory is available, from which a default capacity
    /// follows, looks different to whoever comes second.
    ///
    /// # Errors
    /// [`SegmentError`] when memory, rights or an agreement on the geometry are missing.
    pub fn create_or_attach(
        options: &SegmentOptions,
        geometry: RowGeometry,
    ) -> Result<Self, SegmentError> {
        let directory = &options.directory;
        let _serial = directory::lock(directory).map_err(io_error("lock", directory))?;
        let name = directory::file_name(&options.instance);
        let bytes = geometry.total_bytes();
        let mount = match options.huge_pages {
            HugePages::Off => None,
            HugePages::Auto | HugePages::Require => {
                directory::huge_page_mount(directory::huge_page_round(bytes))
            }
        };
        // Another process of this engine may have chosen either place when pages were free.
        let candidates = mount.iter().chain([directory]).map(|d| d.join(&name));
        for path in candidates.chain(hugetlb_paths(&name)) {
            match File::options().read(true).write(true).open(&path) {
                Ok(file) if !directory::is_unused(&file) => {
                    return Self::attach(file, path, options, geometry);
                }
                // Left by a crash under the same name: make it anew.
                Ok(_) => fs::remove_file(&path).map_err(io_error("remove", &path))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error("open", &path)(error)),
            }
        }
        let mut reclaimed = directory::reclaim(directory).map_err(io_error("read", directory))?;
        if let Some(mount) = &mount {
            reclaimed.extend(directory::reclaim(mount).map_err(io_error("read", mount))?);
        }
        if bytes as u64 > options.available_bytes {
            let available_bytes = options.available_bytes;
            return Err(SegmentError::NoMemory {
                needed_bytes: bytes,
                available_bytes,
            });
        }
        if mount.is_none() && options.huge_pages == HugePages::Require {
            return Err(SegmentError::NoHugePages {
                needed_bytes: bytes,
            });
        }
        let on_huge_pages = mount.is_some();
        let path = mount.as_ref().unwrap_or(directory).join(name);
        let mut segment = Self::create(path, directory, geometry, on_huge_pages)?;
        segment.reclaimed = reclaimed;
        segment.count_holder(options.holders)?;
        Ok(segment)
    }

    fn create(
        path: PathBuf,
        directory: &Path,
        geometry: RowGeometry,
        on_huge_pages: bool,
    ) -> Result<Self, SegmentError> {
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(io_error("create", &path))?;
        let made = Self::reserve(&file, &path, geometry, on_huge_pages).and_then(|map| {
            flock(&file, FlockOperation::LockShared)
                .map_err(|e| io_error("lock", &path)(e.into()))?;
            Ok(map)
        });
        let map = made.inspect_err(|_| {
            // The error that is returned says more than a failure to clean up would.
            let _ = fs::remove_file(&path);
        })?;
        let segment = Self {
            map,
            geometry,
            path,
            directory: directory.to_path_buf(),
            file,
            created: true,
            on_huge_pages,
            reclaimed: Vec::new(),
        };
        segment.write_header();
        Ok(segment)
    }

    fn reserve(
        file: &File,
        path: &Path,
        geometry: RowGeometry,
        on_huge_pages: bool,
    ) -> Result<MmapRaw, SegmentError> {
        let bytes = geometry.total_bytes();
        let length = if on_huge_pages {
            directory::huge_page_round(bytes)
        } else {
            bytes
        };
        let parent = path.parent().unwrap_or(path);
        let status = rustix::fs::fstatvfs(file).map_err(|e| io_error("stat", path)(e.into()))?;
        let free_bytes = status.f_bavail * status.f_frsize;
        let no_space = || SegmentError::NoSpace {
            directory: parent.display().to_string(),
            free_bytes,
            needed_bytes: bytes,
        };
        // A tmpfs without a size limit reports no blocks at all.
        if status.f_blocks > 0 && !on_huge_pages && (length as u64) > free_bytes {
            return Err(no_space());
        }
        file.set_len(length as u64)
            .map_err(io_error("size", path))?;
        match fallocate(file, FallocateFlags::empty(), 0, length as u64) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOSPC | rustix::io::Errno::NOMEM) => return Err(no_space()),
            Err(errno) => return Err(io_error("reserve memory for", path)(errno.into())),
        }
        let map = MmapOptions::new()
            .len(length)
            .map_raw(file)
            .map_err(io_error("map", path))?;
        if !on_huge_pages {
            // Transparent huge pages where the kernel grants them to shared memory; a hint only.
            let _ = map.advise(Advice::HugePage);
        }
        Ok(map)
    }

    fn attach(
        file: File,
        path: PathBuf,
        options: &SegmentOptions,
        geometry: RowGeometry,
    ) -> Result<Self, SegmentError> {
        flock(&file, FlockOperation::LockShared).map_err(|e| io_error("lock", &path)(e.into()))?;
        let length = file.metadata().map_err(io_error("stat", &path))?.len();
        let mismatch = || SegmentError::Mismatch {
            path: path.display().to_string(),
        };
        let length = usize::try_from(length).map_err(|_| mismatch())?;
        if length < HEADER_BYTES {
            return Err(mismatch());
        }
        let map = MmapOptions::new()
            .len(length)
            .map_raw(&file)
            .map_err(io_error("map", &path))?;
        // SAFETY: the map is page-aligned and at least as long as the header, which its creator
        // wrote before it let go of the directory that the caller has locked since.
        let header = unsafe { map.as_ptr().cast::<[u64; 5]>().read() };
        let [magic, ranks, layers, layer_bytes, rows] = header;
        let geometry = u32::try_from(rows)
            .ok()
            .and_then(|rows| geometry.with_rows(rows));
        let geometry = geometry
            .filter(|g| header_words(g) == [magic, ranks, layers, layer_bytes, rows])
            .filter(|g| magic == MAGIC && g.total_bytes() <= length)
            .ok_or_else(mismatch)?;
        let directory = options.directory.clone();
        let on_huge_pages = path.parent() != Some(&*directory);
        let segment = Self {
            map,
            geometry,
            path,
            directory,
            file,
            created: false,
            on_huge_pages,
            reclaimed: Vec::new(),
        };
        segment.count_holder(options.holders)?;
        Ok(segment)
    }

    /// Counts this holder, and removes the name if it is the last that is expected: nobody else can
    /// attach then, and an engine that is killed leaves nothing behind.
    fn count_holder(&self, expected: u32) -> Result<(), SegmentError> {
        let before = self.holders().fetch_add(1, Ordering::AcqRel);
        if before + 1 >= u64::from(expected) {
            fs::remove_file(&self.path).map_err(io_error("remove", &self.path))?;
        }
        Ok(())
    }

    /// Counts those that ever opened the segment; it lies behind the header's words.
    fn holders(&self) -> &AtomicU64 {
        let address = self
            .map
            .as_mut_ptr()
            .wrapping_add(HOLDERS_OFFSET)
            .cast::<AtomicU64>();
        // SAFETY: the offset is a multiple of 8 inside the header page of the map, no other field
        // covers it, and it is only ever accessed as an atomic; the map lives as long as `self`.
        unsafe { &*address }
    }

    /// Whether the file still has its name; another segment may bear the same one later.
    fn has_name(&self) -> bool {
        rustix::fs::fstat(&self.file).is_ok_and(|status| status.st_nlink > 0)
    }

    fn write_header(&self) {
        let words = header_words(&self.geometry);
        // SAFETY: the map is at least HEADER_BYTES long and page-aligned, and nobody else has the
        // segment yet: its creator holds the directory's lock until this returns.
        unsafe { self.map.as_mut_ptr().cast::<[u64; 5]>().write(words) };
    }

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
        if !self.has_name() {
            return;
        }
        // Nothing can be done about a failure here: the next engine on the node reclaims the file.
        if let Some(_serial) = directory::lock_soon(&self.directory)
            && self.has_name()
            && directory::is_unused(&self.file)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What the first bytes of a segment say.
fn header_words(geometry: &RowGeometry) -> [u64; 5] {
    let [a, b, c, d] = geometry.to_words();
    [MAGIC, a, b, c, d]
}

/// Where a segment named `name` would be on hugetlbfs, whether or not pages are free now.
fn hugetlb_paths(name: &str) -> Option<PathBuf> {
    let path = directory::huge_page_mount(0)?.join(name);
    path.exists().then_some(path)
}
