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
use kvtide_segment::{MappedFile, RowGeometry, create_sparse, require_memory, reserve};
use rustix::fs::{FlockOperation, flock};

use super::error::{NodeError, io_error};
use super::ledger::Ledger;
use super::options::NodeOptions;

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
        let total_bytes = extents as usize * extent_bytes;
        let is_there = memory.exists();
        let found = Ledger::read(&directory.join("ledger")).filter(|ledger| {
            let length = fs::metadata(&memory).map(|status| status.len());
            let bytes = ledger.extents as usize * ledger.extent_bytes;
            (ledger.extents == extents || !options.capacity_is_chosen)
                && ledger.extent_bytes == extent_bytes
                && length.is_ok_and(|length| length == bytes as u64)
        });
        let (file, ledger) = match found {
            Some(ledger) => {
                let file = File::options().read(true).write(true).open(&memory);
                (file.map_err(io_error("open", &memory))?, ledger)
            }
            None => {
                if is_there {
                    tracing::warn!(
                        path = %directory.display(),
                        "the memory that is there has another capacity, extent or format, or no sound \
                         ledger: it is given up, and the pool begins empty"
                    );
                }
                clear(&directory)?;
                let file = create_sparse(&memory, total_bytes)?;
                for start in (0..total_bytes).step_by(RESERVED_AT_ONCE) {
                    let end = total_bytes.min(start + RESERVED_AT_ONCE);
                    reserve(&file, &memory, start..end).inspect_err(|_| {
                        // The error says more than a failure to clean up would.
                        let _ = fs::remove_file(&memory);
                    })?;
                    progress(end, total_bytes);
                }
                (file, Ledger::new(nonce, extent_bytes, extents))
            }
        };
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

/// Removes all but the lock. Engines that still have what is removed keep it, and get something new.
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
