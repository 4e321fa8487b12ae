//! Wall-clock time as the API tells it: whole seconds since 1970.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds since 1970, UTC.
pub type Seconds = u64;

/// Now.
#[must_use]
pub fn now() -> Seconds {
    since_epoch().as_secs()
}

/// Now, in milliseconds since 1970; leases are kept in them.
#[must_use]
pub fn now_ms() -> i64 {
    i64::try_from(since_epoch().as_millis()).unwrap_or(i64::MAX)
}

fn since_epoch() -> Duration {
    // A clock before 1970 reads as 1970: nothing expires early.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
