//! Wall-clock time as the API tells it: whole seconds since 1970.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, UTC.
pub type Seconds = u64;

/// Now.
#[must_use]
pub fn now() -> Seconds {
    // A clock before 1970 reads as 1970: nothing expires early.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
