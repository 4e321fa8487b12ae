//! Creates that a client may send again.

use crate::clock::Seconds;
use crate::store::values::integer;

/// How long a create that a client sends again is recognised.
pub const RETRY_WINDOW_S: Seconds = 15 * 60;

/// A create that may be the repetition of an earlier one.
#[derive(Clone, Debug)]
pub struct Create {
    /// Hash of what was asked for.
    pub digest: String,
    /// Whether the client says that it has tried before.
    pub is_retry: bool,
}

impl Create {
    /// Since when the same may have been created by an earlier attempt; none if this is the first.
    /// It arrives at `now`.
    pub(super) fn repeats_since(&self, now: Seconds) -> Option<i64> {
        self.is_retry
            .then(|| integer(now.saturating_sub(RETRY_WINDOW_S)))
    }
}
