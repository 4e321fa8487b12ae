//! How `--memory-mib` and the file descriptors that there are is shared out. Pure.
//!
//! ```text
//!   1/2   requests that are sent to the upstream, and their answers
//!   1/4   what callers send and read: uploads, downloads, lists, transfers to the object store
//!   1/4   connections
//! ```

use crate::blobs::TRANSFER_BYTES;
use crate::http::CONNECTION_BYTES;

/// Connections that a server takes at most, however much memory it has.
const CONNECTIONS_MAX: u64 = 4096;

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Budget {
    /// Bytes of requests to the upstream and of answers.
    pub(super) upstream_bytes: u64,
    /// Bytes of what callers send and read.
    pub(super) callers_bytes: u64,
    /// Connections from callers.
    pub(super) connections: usize,
    /// Files that are put into the object store at once.
    pub(super) transfers: usize,
}

impl Budget {
    /// Of so many bytes and file descriptors.
    pub(super) fn of(memory_bytes: u64, descriptors: u64, object_store: bool) -> Budget {
        let quarter = memory_bytes / 4;
        // Files, the database and requests to the upstream need descriptors, too.
        let connections = (quarter / CONNECTION_BYTES).min(descriptors / 2);
        let transfers = if object_store {
            (quarter / 2 / TRANSFER_BYTES).max(1)
        } else {
            0
        };
        Budget {
            upstream_bytes: memory_bytes / 2,
            callers_bytes: quarter.saturating_sub(transfers * TRANSFER_BYTES),
            connections: usize::try_from(connections.clamp(1, CONNECTIONS_MAX))
                .unwrap_or(usize::MAX),
            transfers: usize::try_from(transfers).unwrap_or(usize::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn all_parts_together_are_what_may_be_taken() {
        for memory_mib in [32, 100, 128, 1024, 65_536] {
            for object_store in [false, true] {
                let budget = Budget::of(memory_mib * MIB, 1 << 20, object_store);
                let together = budget.upstream_bytes
                    + budget.callers_bytes
                    + budget.connections as u64 * CONNECTION_BYTES
                    + budget.transfers as u64 * TRANSFER_BYTES;
                assert!(together <= memory_mib * MIB, "{budget:?}");
                assert!(budget.callers_bytes >= 3 * MIB, "{budget:?}");
                assert_eq!(budget.transfers > 0, object_store);
            }
        }
    }

    #[test]
    fn connections_leave_file_descriptors_for_the_work() {
        assert_eq!(Budget::of(128 * MIB, 1 << 20, false).connections, 1024);
        assert_eq!(Budget::of(128 * MIB, 256, false).connections, 128);
        assert_eq!(Budget::of(65_536 * MIB, u64::MAX, false).connections, 4096);
        assert_eq!(Budget::of(32 * MIB, 0, false).connections, 1);
    }
}
