//! The memory of a node: one file of extents, which outlives the daemon, and what lies beside it.
//!
//! ```text
//! <directory>/kvtide-pool-<name>/
//!   lock              held by the daemon that has it
//!   ledger            which extents belong to which model; which engines there are
//!   memory            extents, one behind the other; rows and nothing else
//!   <namespace>       what a model's pool knows about its rows
//!   engine-<number>   what an engine has for itself; its processes hold a shared lock on it
//! ```

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use kvtide_model::NamespaceId;
use kvtide_segment::{
    HugePages, MappedFile, MountHugePages, Numa, RowGeometry, create_sparse, create_unnamed,
    give_name, mount_huge_pages, require_memory, reserve,
};
use rustix::fs::{FlockOperation, flock, statvfs};

use super::error::{NodeError, io_error};
use super::ledger::Ledger;
use super::options::NodeOptions;
use super::outlook::Found;

/// Memory is taken in such pieces, so that progress is seen.
const RESERVED_AT_ONCE: usize = 1 << 30;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Memory {
    directory: PathBuf,
    pub(super) file: File,
    pub(super) mapped: MappedFile,
    /// Held for as long as this is.
    _lock: File,
}

impl Memory {
    /// The memory of this name, with what its last life wrote down; made anew where there is none, or
    /// none of this size. `progress` hears of bytes taken, and of bytes in all.
    pub(super) fn open(
        options: &NodeOptions,
        nonce: u64,
        progress: &dyn Fn(usize, usize),
    ) -> Result<(Self, Ledger), NodeError> {
        let &NodeOptions {
            capacity_bytes,
            extent_bytes,
            ..
        } = options;
        let extents = capacity_bytes / extent_bytes.max(1);
        let extents = u32::try_from(extents).unwrap_or(u32::MAX);
        if extents == 0 {
            return Err(NodeError::TooSmall {
                capacity_bytes,
                extent_bytes,
            });
        }
        require_memory(&options.directory)?;
        let directory = NodeOptions::own_directory(&options.directory, &options.name);
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
            .create(&directory)
            .map_err(io_error("create", &directory))?;
        let lock = lock(&directory)?;
        let memory = directory.join("memory");
        let found = Found::look(options, &directory)?;
        if let Found::Useless { why } = &found {
            tracing::warn!(
                path = %directory.display(),
                why,
                "the memory that is there is given up, and the pool begins empty"
            );
        }
        let ledger = match found {
            Found::Memory(ledger) => ledger,
            Found::Nothing | Found::Useless { .. } => {
                clear(&directory)?;
                let file = make(
                    options,
                    &directory,
                    extents as usize * extent_bytes,
                    progress,
                )?;
                give_name(&file, &memory)?;
                Ledger::new(nonce, extent_bytes, extents)
            }
        };
        // Anew, also where it was just made: what was opened without a name has none for lsof(8).
        let file = File::options().read(true).write(true).open(&memory);
        let file = file.map_err(io_error("open", &memory))?;
        let mapped = MappedFile::of(&file, &memory)?;
        let opened = Self {
            directory,
            file,
            mapped,
            _lock: lock,
        };
        Ok((opened, ledger))
    }

    /// Writes down how things stand from now on.
    pub(super) fn note(&self, ledger: &Ledger) -> Result<(), NodeError> {
        let path = self.directory.join("ledger");
        ledger.write(&path).map_err(io_error("write", &path))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.directory
    }

    /// The tables of a model's pool, made if there are none of this size, and their path.
    pub(super) fn tables(
        &self,
        namespace: NamespaceId,
        geometry: &RowGeometry,
    ) -> Result<(File, PathBuf), NodeError> {
        let path = self.directory.join(namespace.to_string());
        let bytes = geometry.tables_file_bytes();
        let open = || File::options().read(true).write(true).open(&path);
        let found = open().ok().filter(|file| {
            let status = file.metadata();
            status.is_ok_and(|status| status.len() == bytes as u64)
        });
        if let Some(file) = found {
            return Ok((file, path));
        }
        remove(&path)?;
        let file = create_sparse(&path, bytes)?;
        Ok((file, path))
    }

    /// Forgets a model's tables.
    pub(super) fn remove_tables(&self, namespace: NamespaceId) -> Result<(), NodeError> {
        remove(&self.directory.join(namespace.to_string()))
    }

    /// A new file for what an engine has for itself.
    pub(super) fn create_own(&self, number: u8, bytes: usize) -> Result<PathBuf, NodeError> {
        let path = self.own_path(number);
        remove(&path)?;
        let file = create_sparse(&path, bytes)?;
        reserve(&file, &path, 0..bytes)?;
        Ok(path)
    }

    /// Where an engine has what is its own.
    pub(super) fn own_path(&self, number: u8) -> PathBuf {
        self.directory.join(format!("engine-{number}"))
    }
}

/// Takes memory for rows. It has no name yet: a daemon that ends meanwhile, however it does, leaves
/// nothing.
fn make(
    options: &NodeOptions,
    directory: &Path,
    bytes: usize,
    progress: &dyn Fn(usize, usize),
) -> Result<File, NodeError> {
    let mount = mount_huge_pages(&options.directory).unwrap_or(MountHugePages::Never);
    if options.huge_pages == HugePages::Require && mount == MountHugePages::Never {
        return Err(NodeError::NoHugePages {
            directory: options.directory.display().to_string(),
        });
    }
    // Taken piece by piece, too much would first take all that the machine has. A tmpfs without a limit
    // says that it has no blocks.
    let status =
        statvfs(directory).map_err(|errno| io_error("look at", directory)(errno.into()))?;
    let free_bytes = status.f_bavail.saturating_mul(status.f_frsize);
    if status.f_blocks > 0 && free_bytes < bytes as u64 {
        return Err(NodeError::NoRoom {
            directory: options.directory.display().to_string(),
            free_bytes,
            needed_bytes: bytes,
        });
    }
    let file = create_unnamed(directory, bytes)?;
    let asks = options.huge_pages != HugePages::Off && mount == MountHugePages::Advise;
    // For as long as its pages are taken: they are not the daemon's own.
    let map = (asks || options.numa != Numa::AsTold).then(|| MappedFile::of(&file, directory));
    let map = map.transpose()?;
    if let Some(map) = &map {
        map.place(options.numa)
            .map_err(|source| NodeError::NotPlaced { source })?;
    }
    for start in (0..bytes).step_by(RESERVED_AT_ONCE) {
        let piece = start..bytes.min(start + RESERVED_AT_ONCE);
        // What it does not take, or not in huge pages, is taken below.
        let populated = map.as_ref().filter(|_| asks);
        if let Some(Err(error)) = populated.map(|map| map.populate(piece.clone())) {
            tracing::debug!(%error, "no huge pages");
        }
        let end = piece.end;
        reserve(&file, directory, piece)?;
        progress(end, bytes);
    }
    Ok(file)
}

/// The rows of a model that lie in an extent.
pub(super) fn rows_of(geometry: &RowGeometry, extent: u32, extent_bytes: usize) -> Range<u32> {
    let start = extent as usize * extent_bytes;
    geometry.rows_within(start..start + extent_bytes)
}

fn lock(directory: &Path) -> Result<File, NodeError> {
    let path = directory.join("lock");
    let mut options = File::options();
    let file = options
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(NodeError::InUse {
            path: directory.display().to_string(),
        }),
        Err(errno) => Err(io_error("lock", &path)(errno.into())),
    }
}

/// Removes all but the lock. Engines that still have what is removed keep it, and get something
/// new.
fn clear(directory: &Path) -> Result<(), NodeError> {
    let entries = fs::read_dir(directory).map_err(io_error("read", directory))?;
    for entry in entries {
        let path = entry.map_err(io_error("read", directory))?.path();
        if path.file_name().is_some_and(|name| name != "lock") {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> Result<(), NodeError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}
