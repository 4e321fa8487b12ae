//! Why a segment could not be made.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::holder::Holder;
use crate::size::size;

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
    /// The directory's files are not in memory.
    #[error(
        "segment_directory: {directory} is on a file system of type {file_system}, which is not \
         memory: set it to a directory on tmpfs, such as /dev/shm"
    )]
    NotInMemory {
        /// Where.
        directory: String,
        /// What kind of file system it is.
        file_system: String,
    },
    /// A segment of this name has another layout.
    #[error(
        "{path} is used by an engine with another KV cache shape: give each engine its own \
         `engine_id`"
    )]
    Mismatch {
        /// The file.
        path: String,
    },
    /// Another process is what this one is to the segment.
    #[error(
        "engine_id: another {holder} uses {path}: give each engine its own `engine_id` or leave it \
         out, wait until a killed engine has ended, and list kvtide once in a MultiConnector"
    )]
    Taken {
        /// What both are.
        holder: Holder,
        /// The file.
        path: String,
    },
    /// The scheduler's side found no segment with all workers in it.
    #[error(
        "engine_id: the workers of this engine do not use {path}: it was removed, or another engine \
         took it. Give each engine its own `engine_id` or leave it out, and let nothing remove \
         kvtide-* files while an engine starts"
    )]
    NoWorkers {
        /// Where the segment should be.
        path: String,
    },
    /// Another process has been making or removing the segment for too long.
    #[error(
        "engine_id: another process has locked {path} for {} s: end the engine with this `engine_id` \
         that hangs at its start, or choose another `engine_id`",
        waited.as_secs()
    )]
    Locked {
        /// The locked file.
        path: String,
        /// For how long this process has waited.
        waited: Duration,
    },
    /// A file with the segment's name belongs to somebody else.
    #[error(
        "engine_id: {path} belongs to the user with id {owner}: remove the file if no engine of that \
         user runs, or choose another `engine_id`"
    )]
    OtherUser {
        /// The file.
        path: String,
        /// Its owner.
        owner: u32,
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

/// The operating system refused `operation` on `path`.
pub(crate) fn io_error(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> SegmentError {
    let path = path.display().to_string();
    move |source| SegmentError::Io {
        operation,
        path,
        source,
    }
}
