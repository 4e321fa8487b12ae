//! Why a node cannot be opened, or an engine not be taken.

use std::io;

use kvtide_model::wire::RefusalCode;
use kvtide_segment::SegmentError;

/// Why a node's memory cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// Another daemon has it.
    #[error(
        "memory.name: another daemon uses {path}; stop it, or set memory.name to another name for \
         this one"
    )]
    InUse {
        /// The directory of the memory.
        path: String,
    },
    /// The capacity is less than one extent.
    #[error(
        "memory.capacity: {capacity_bytes} bytes are less than one extent of {extent_bytes}; raise \
         it, or lower memory.extent"
    )]
    TooSmall {
        /// Bytes in all.
        capacity_bytes: usize,
        /// Bytes of an extent.
        extent_bytes: usize,
    },
    /// The file system has too little room.
    #[error(
        "memory.capacity: {directory} has {} MiB free, and {} MiB more are needed; lower it, or \
         enlarge the mount (mount -o remount,size=…; in Kubernetes the sizeLimit of its emptyDir)",
        free_bytes >> 20, needed_bytes.div_ceil(1 << 20)
    )]
    NoRoom {
        /// Where.
        directory: String,
        /// Bytes free there.
        free_bytes: u64,
        /// Bytes needed.
        needed_bytes: usize,
    },
    /// The directory's files are not in memory.
    #[error(
        "memory.directory: {directory} is on a file system of type {file_system}, which is not \
         memory; set it to a directory on tmpfs, such as /dev/shm"
    )]
    NotInMemory {
        /// Where.
        directory: String,
        /// What kind of file system it is.
        file_system: String,
    },
    /// The directory is mounted without huge pages.
    #[error(
        "memory.huge_pages: {directory} is mounted without huge pages; mount it with them (mount -o \
         remount,huge=within_size), or set memory.huge_pages to \"auto\""
    )]
    NoHugePages {
        /// Where.
        directory: String,
    },
    /// The kernel places no memory.
    #[error(
        "memory.numa: the kernel does not let this process place memory (mbind: {source}); allow the \
         call, which profiles of seccomp may forbid, or set memory.numa to \"none\""
    )]
    NotPlaced {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is there does not fit to what was written down about it.
    #[error("the pool's memory cannot be used: {0}; please report it with the log")]
    Segment(SegmentError),
    /// The operating system gives too little of something else.
    #[error("{what} cannot be had: {source}; look at the limits of this process")]
    System {
        /// Of what.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The operating system refused.
    #[error(
        "cannot {operation} {path}: {source}; look at the owner and the rights of memory.directory \
         and of what is in it"
    )]
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

impl From<SegmentError> for NodeError {
    fn from(error: SegmentError) -> Self {
        match error {
            SegmentError::NoSpace {
                directory,
                free_bytes,
                needed_bytes,
            } => Self::NoRoom {
                directory,
                free_bytes,
                needed_bytes,
            },
            SegmentError::NotInMemory {
                directory,
                file_system,
            } => Self::NotInMemory {
                directory,
                file_system,
            },
            SegmentError::Io {
                operation,
                path,
                source,
            } => Self::Io {
                operation,
                path,
                source,
            },
            other => Self::Segment(other),
        }
    }
}

/// Why an engine is not taken, in the words that it is told.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) code: RefusalCode,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// The operating system refused `operation` on `path`.
pub(super) fn io_error(
    operation: &'static str,
    path: &std::path::Path,
) -> impl FnOnce(io::Error) -> NodeError {
    let path = path.display().to_string();
    move |source| NodeError::Io {
        operation,
        path,
        source,
    }
}
