//! Which of an engine's processes has the segment.

use std::fmt;

/// One of the processes, or sides within one, that share a segment.
///
/// An engine has each of them once: a second one is another engine's, or the same engine's second
/// connector, and would read and write what it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The worker of a rank.
    Worker(u32),
    /// The scheduler's side. It comes when all workers have the segment.
    Scheduler,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker(rank) => write!(f, "worker of rank {rank}"),
            Self::Scheduler => f.write_str("scheduler"),
        }
    }
}
