//! How a node behaves.

use std::path::{Path, PathBuf};

use kvtide_segment::{HugePages, Numa};

use super::limits::Limits;
use crate::config::Eviction;
use crate::pool::holders::SlotHolder;

/// How a node behaves.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// A directory on shared memory, in which the node makes one of its own.
    pub directory: PathBuf,
    /// Tells nodes in one directory apart.
    pub name: String,
    /// Bytes of memory for rows, rounded down to whole extents.
    pub capacity_bytes: usize,
    /// Whether somebody chose the capacity. Otherwise memory that is there already keeps its size.
    pub capacity_is_chosen: bool,
    /// Bytes of an extent: the unit in which memory goes from one model to another.
    pub extent_bytes: usize,
    /// Whether memory that is made is taken in huge pages, as far as the mount of `directory` has
    /// some.
    pub huge_pages: HugePages,
    /// On which NUMA nodes memory that is made is taken.
    pub numa: Numa,
    /// Eviction policy of every pool.
    pub eviction: Eviction,
    /// Engines that are served at once, at most [`NodeOptions::SESSIONS_MAX`].
    pub sessions: usize,
    /// What tenants and models have at most and at least.
    pub limits: Limits,
    /// Rate of the background scrub of all rows; 0 turns it off.
    pub scrub_bytes_per_second: u64,
    /// What the daemon calls itself to engines, such as `kvtide 0.1.0`.
    pub server: String,
}

impl NodeOptions {
    /// Engines that a node can serve at once.
    pub const SESSIONS_MAX: usize = SlotHolder::SESSIONS;

    /// Where a node of this name has its rows.
    #[must_use]
    pub fn memory_file(directory: &Path, name: &str) -> PathBuf {
        Self::own_directory(directory, name).join("memory")
    }

    /// Where a node of this name has everything.
    pub(super) fn own_directory(directory: &Path, name: &str) -> PathBuf {
        directory.join(format!("kvtide-pool-{name}"))
    }
}
