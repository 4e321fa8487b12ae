//! What people read: tables of what the daemon has answered.
//!
//! Pure: what depends on the clock gets the time. Texts that come from engines are shown without control
//! characters, so that no model's name can play with a terminal.

mod blocks;
mod outcome;
mod status;
mod table;
mod units;

pub use blocks::inspection;
pub use outcome::{pinned, purged, unpinned};
pub use status::status;
pub use units::size;
