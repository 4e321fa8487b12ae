//! What a node finds of its last life, before anything is changed.

use std::fs;
use std::io;
use std::path::Path;

use super::error::{NodeError, io_error};
use super::ledger::{FORMAT, Ledger, Unread};
use super::options::NodeOptions;

/// What is to come of the memory that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// There is none.
    New,
    /// It is taken over.
    Kept {
        /// Its capacity.
        bytes: u64,
    },
    /// It is given up: the pool begins empty, and engines that were attached have to be started
    /// anew.
    Anew {
        /// Why.
        why: String,
    },
}

/// The same, with what the last life wrote down where it is taken over.
pub(super) enum Found {
    Nothing,
    Memory(Ledger),
    Useless { why: String },
}

impl Outlook {
    /// What a node with these options would find now. Changes nothing.
    ///
    /// # Errors
    /// [`NodeError::Io`] when this process may not look.
    pub fn of(options: &NodeOptions) -> Result<Self, NodeError> {
        let directory = NodeOptions::own_directory(&options.directory, &options.name);
        Ok(match Found::look(options, &directory)? {
            Found::Nothing => Self::New,
            Found::Memory(ledger) => Self::Kept {
                bytes: u64::from(ledger.extents) * ledger.extent_bytes as u64,
            },
            Found::Useless { why } => Self::Anew { why },
        })
    }
}

impl Found {
    /// Looks at the memory in `directory`.
    pub(super) fn look(options: &NodeOptions, directory: &Path) -> Result<Self, NodeError> {
        let memory = directory.join("memory");
        let length = match fs::metadata(&memory) {
            Ok(status) => status.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Nothing),
            Err(error) => return Err(io_error("look at", &memory)(error)),
        };
        let useless = |why: String| Ok(Self::Useless { why });
        let ledger = match Ledger::read(&directory.join("ledger")) {
            Ok(ledger) => ledger,
            Err(Unread::Missing) => return useless("its ledger is missing".into()),
            Err(Unread::Damaged) => return useless("its ledger is damaged".into()),
            Err(Unread::Format(format)) => {
                return useless(format!(
                    "its format is {format}, and that of this version {FORMAT}"
                ));
            }
        };
        let mib = |bytes: u64| bytes >> 20;
        let extent_bytes = ledger.extent_bytes as u64;
        let bytes = u64::from(ledger.extents) * extent_bytes;
        if ledger.extent_bytes != options.extent_bytes {
            return useless(format!(
                "memory.extent is {} MiB, and was {} MiB",
                mib(options.extent_bytes as u64),
                mib(extent_bytes)
            ));
        }
        let extents = options.capacity_bytes / options.extent_bytes.max(1);
        if options.capacity_is_chosen && ledger.extents as usize != extents {
            return useless(format!(
                "memory.capacity is {} MiB in whole extents, and was {} MiB",
                mib((extents * options.extent_bytes) as u64),
                mib(bytes)
            ));
        }
        if length != bytes {
            return useless(format!("it has {length} bytes instead of {bytes}"));
        }
        Ok(Self::Memory(ledger))
    }
}
