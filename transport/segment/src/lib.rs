//! The shared host segment: one file on shared memory that holds a pool's rows.
//!
//! ```text
//! 0         4096                                                    data_offset                    end
//! ├─ header ─┼ board ┼ buckets ┼ bitmaps ┼ records ┼ shard headers ─┼─ row 0: rank 0 | rank 1 | … pad ─┼ … ─┤
//!            │       │         │         │         └ [row][rank], 16 bytes each
//!            │       │         │         └ [row], 32 bytes each
//!            │       │         └ [holder][row], a bit each; then [row], whether its bytes are proven
//!            │       └ of the index, 4 bytes each
//!            └ [rank][place], 8 bytes each; board, tables and rows each begin on a page
//! ```
//!
//! The scheduler's side and every worker of an engine open it by the engine's id; the first worker to
//! come creates it ([`SharedSegment::create_or_attach`]). A process that holds the segment holds a
//! shared `flock` on the file, so the kernel itself knows whether a segment is in use: a file that a
//! crash left behind is found unlocked and removed by whoever creates the next segment, and a
//! process that leaves last removes it. The scheduler's side attaches last and removes the name: vLLM
//! kills its processes at exit more often than it lets them clean up, and memory without a name is
//! freed whichever way they end.
//!
//! Two engines with one id cannot share a segment: each [`Holder`] has one place in it.
//!
//! Rows are written by the worker of the rank they belong to and read by everyone. Who may touch
//! which row when is decided by the pool; [`ShardState`] makes the outcome visible to it, so a save
//! is seen complete the moment it is, without a message.

mod board;
mod checksum;
mod directory;
mod error;
mod geometry;
mod header;
mod holder;
mod mapped;
mod name_lock;
mod open;
mod placement;
mod record;
mod region;
mod shard;
mod shared;
mod size;
mod tables;
mod unnamed;

pub use board::{LOAD_PLACES, LoadEnd};
pub use checksum::{CHECKSUM_KEYS, digest_piece, shard_checksum};
pub use directory::{HugePages, require_memory};
pub use error::SegmentError;
pub use geometry::{GeometryError, RowGeometry};
pub use holder::Holder;
pub use mapped::{MappedFile, create_sparse, reserve};
pub use open::SegmentOptions;
pub use placement::{MountHugePages, Numa, mount_huge_pages};
pub use record::SlotRecord;
pub use shard::{ShardState, ShardStatus};
pub use shared::{SegmentParts, SharedSegment};
pub use unnamed::{create_unnamed, give_name};
