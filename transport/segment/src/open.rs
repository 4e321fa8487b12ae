//! Making a segment, or finding that of the same engine.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use crate::directory::{self, HugePages};
use crate::error::{SegmentError, io_error};
use crate::geometry::{HEADER_BYTES, RowGeometry};
use crate::header;
use crate::holder::Holder;
use crate::name_lock::{self, NameLock};
use crate::region::Region;
use crate::shared::{SegmentFile, SharedSegment};

/// Others hold a file's exclusive lock only while they look whether it is in use.
const SHARE_PATIENCE: Duration = Duration::from_secs(10);
const SHARE_POLL: Duration = Duration::from_millis(1);
/// A file that was just made or found may be removed by who looks for unused ones at that moment.
/// That it happens so often in a row is no coincidence.
const TRIES: u32 = 100;

/// How to make a segment.
#[derive(Clone, Debug)]
pub struct SegmentOptions {
    /// A directory on shared memory, usually `/dev/shm`.
    pub directory: PathBuf,
    /// The engine's id: the same for all of its processes, different for every engine.
    pub instance: String,
    /// Which of them this is.
    pub holder: Holder,
    /// Whether to prefer a hugetlbfs mount over `directory`.
    pub huge_pages: HugePages,
    /// Memory that may be taken; only whoever creates the segment takes it.
    pub available_bytes: u64,
}

impl SharedSegment {
    /// Attaches to the segment of `options.instance`, or, a worker, creates it if there is none.
    ///
    /// Creation reserves all of the memory, so that running out is an error here and not a SIGBUS
    /// later; [`SharedSegment::populate`] then maps it. A segment that exists keeps the number of
    /// rows that it was created with: how much memory is available, from which a default capacity
    /// follows, looks different to whoever comes second. `on_wait` hears now and then of the file
    /// for which this waits, and for how long it has.
    ///
    /// The scheduler's side comes last and removes the name: nobody else can attach then, and an
    /// engine that is killed leaves nothing behind.
    ///
    /// # Errors
    /// [`SegmentError`] when memory, rights or an agreement on the geometry are missing, or when
    /// another engine has the same id.
    pub fn create_or_attach(
        options: &SegmentOptions,
        geometry: RowGeometry,
        on_wait: &dyn Fn(&Path, Duration),
    ) -> Result<Self, SegmentError> {
        let directory = &options.directory;
        directory::require_memory(directory)?;
        let name = directory::file_name(&options.instance);
        let _lock = NameLock::acquire(directory, &name, name_lock::PATIENCE, on_wait)?;
        for _ in 0..TRIES {
            let segment = match Self::find(options, &name, geometry)? {
                None if options.holder == Holder::Scheduler => {
                    let path = directory.join(&name).display().to_string();
                    return Err(SegmentError::NoWorkers { path });
                }
                None => Self::create(options, &name, geometry)?,
                found => found,
            };
            if let Some(segment) = segment {
                segment.enter(options.holder)?;
                return Ok(segment);
            }
        }
        let path = directory.join(&name).display().to_string();
        Err(SegmentError::NoWorkers { path })
    }

    /// Takes `holder`'s place in what an engine has for itself.
    ///
    /// # Errors
    /// [`SegmentError::Taken`] when another process has it.
    pub fn take_place(&self, holder: Holder) -> Result<(), SegmentError> {
        let path = || self.path().display().to_string();
        if self.arrive(holder) {
            return Ok(());
        }
        let path = path();
        Err(SegmentError::Taken { holder, path })
    }

    /// Takes `holder`'s place in the segment. An engine has only itself in it then: for each rank
    /// one worker has the place, the others get an error, and a scheduler's side only comes when all
    /// of its workers have got theirs.
    fn enter(&self, holder: Holder) -> Result<(), SegmentError> {
        if holder == Holder::Scheduler && !self.has_all_workers() {
            let path = self.path().display().to_string();
            return Err(SegmentError::NoWorkers { path });
        }
        self.take_place(holder)?;
        if holder == Holder::Scheduler {
            fs::remove_file(self.path()).map_err(io_error("remove", self.path()))?;
        }
        Ok(())
    }

    /// The segment that other processes of this engine have.
    fn find(
        options: &SegmentOptions,
        name: &str,
        geometry: RowGeometry,
    ) -> Result<Option<Self>, SegmentError> {
        // It lies where pages were free when it was made.
        let on_huge_pages = match options.huge_pages {
            HugePages::Off => None,
            HugePages::Auto | HugePages::Require => directory::huge_page_mount(0),
        };
        for directory in on_huge_pages.iter().chain([&options.directory]) {
            let path = directory.join(name);
            let Some(file) = directory::open_existing(&path)? else {
                continue;
            };
            // What a crash left under the same name is made anew.
            if directory::remove_unused(&file, &path) {
                continue;
            }
            if let Some(file) = share(file, &path)? {
                let on_huge_pages = *directory != options.directory;
                return Self::attach(file, path, geometry, on_huge_pages).map(Some);
            }
        }
        Ok(None)
    }

    fn attach(
        file: File,
        path: PathBuf,
        geometry: RowGeometry,
        on_huge_pages: bool,
    ) -> Result<Self, SegmentError> {
        let mismatch = || SegmentError::Mismatch {
            path: path.display().to_string(),
        };
        let length = file.metadata().map_err(io_error("stat", &path))?.len();
        let length = usize::try_from(length).map_err(|_| mismatch())?;
        if length == 0 {
            return Err(mismatch());
        }
        let map = map(&file, &path, length)?;
        let map = Arc::new(map);
        let geometry = Region::new(&map, 0, HEADER_BYTES)
            .and_then(|header| header::read_geometry(&header, geometry))
            .ok_or_else(mismatch)?;
        let file = SegmentFile {
            path: path.clone(),
            file,
            created: false,
            on_huge_pages,
            reclaimed: Vec::new(),
        };
        Self::of_map(&map, geometry, file).ok_or_else(mismatch)
    }

    /// A new segment; `None` if its file was removed while it was made.
    fn create(
        options: &SegmentOptions,
        name: &str,
        geometry: RowGeometry,
    ) -> Result<Option<Self>, SegmentError> {
        let directory = &options.directory;
        let needed_bytes = geometry.total_bytes();
        let mount = match options.huge_pages {
            HugePages::Off => None,
            HugePages::Auto | HugePages::Require => {
                directory::huge_page_mount(directory::huge_page_round(needed_bytes))
            }
        };
        let mut reclaimed = directory::reclaim(directory).map_err(io_error("read", directory))?;
        if let Some(mount) = &mount {
            reclaimed.extend(directory::reclaim(mount).map_err(io_error("read", mount))?);
        }
        if needed_bytes as u64 > options.available_bytes {
            let available_bytes = options.available_bytes;
            return Err(SegmentError::NoMemory {
                needed_bytes,
                available_bytes,
            });
        }
        let on_huge_pages = match mount {
            Some(mount) => match Self::create_at(mount.join(name), geometry, true, &reclaimed) {
                // Another engine was faster to take the pages.
                Err(SegmentError::NoSpace { .. }) => None,
                made => Some(made?),
            },
            None => None,
        };
        let made = match on_huge_pages {
            Some(made) => made,
            None if options.huge_pages == HugePages::Require => {
                return Err(SegmentError::NoHugePages { needed_bytes });
            }
            None => Self::create_at(directory.join(name), geometry, false, &reclaimed)?,
        };
        Ok(made)
    }

    /// A new segment at `path`; `None` as in [`SharedSegment::create`].
    fn create_at(
        path: PathBuf,
        geometry: RowGeometry,
        on_huge_pages: bool,
        reclaimed: &[PathBuf],
    ) -> Result<Option<Self>, SegmentError> {
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = match options.open(&path) {
            Ok(file) => file,
            // Left by a crash, and another process looks at it just now.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            Err(error) => return Err(io_error("create", &path)(error)),
        };
        // From here on the file counts as used.
        let Some(file) = share(file, &path)? else {
            return Ok(None);
        };
        let map = reserve(&file, &path, geometry, on_huge_pages).inspect_err(|_| {
            // The error that is returned says more than a failure to clean up would.
            let _ = fs::remove_file(&path);
        })?;
        let file = SegmentFile {
            path,
            file,
            created: true,
            on_huge_pages,
            reclaimed: reclaimed.to_vec(),
        };
        let segment = Self::of_map(&Arc::new(map), geometry, file);
        if let Some(segment) = &segment {
            header::write(&segment.header, &geometry);
        }
        Ok(segment)
    }
}

/// Marks a file as used; `None` if it has lost its name before.
fn share(file: File, path: &Path) -> Result<Option<File>, SegmentError> {
    let begun = Instant::now();
    while let Err(errno) = flock(&file, FlockOperation::NonBlockingLockShared) {
        if errno != rustix::io::Errno::WOULDBLOCK {
            return Err(io_error("lock", path)(errno.into()));
        }
        let waited = begun.elapsed();
        if waited >= SHARE_PATIENCE {
            let path = path.display().to_string();
            return Err(SegmentError::Locked { path, waited });
        }
        std::thread::sleep(SHARE_POLL);
    }
    Ok(directory::is_at(&file, path).then_some(file))
}

fn map(file: &File, path: &Path, length: usize) -> Result<MmapRaw, SegmentError> {
    MmapOptions::new()
        .len(length)
        .map_raw(file)
        .map_err(io_error("map", path))
}

/// Takes the memory of a new segment.
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
    let map = map(file, path, length)?;
    if !on_huge_pages {
        // Transparent huge pages where the kernel grants them to shared memory; a hint only.
        let _ = map.advise(Advice::HugePage);
    }
    Ok(map)
}
