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
        "memory.name: another daemon uses {path}: stop it, or give this one another `memory.name`"
    )]
    InUse {
        /// The directory of the memory.
        path: String,
    },
    /// The capacity is less than one extent.
    #[error(
        "memory.capacity: {capacity_bytes} bytes are less than one extent of {extent_bytes}: raise \
         it, or lower `memory.extent`"
    )]
    TooSmall {
        /// Bytes in all.
        capacity_bytes: usize,
        /// Bytes of an extent.
        extent_bytes: usize,
    },
    /// Memory cannot be had.
    #[error(transparent)]
    Memory(#[from] SegmentError),
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
