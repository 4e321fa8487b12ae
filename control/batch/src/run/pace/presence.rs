//! Is the upstream there, for one tenant and one model? Pure.
//!
//! What speaks against it are failures of requests that are not known to fail: those that are sent
//! for the first time, and those that were answered before. [`DOWN_AFTER`] of them in a row, and the
//! upstream counts as down: it is asked ever less often until something is answered. A request that
//! has failed while others were answered says nothing about the upstream.

use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row after which the upstream counts as down.
const DOWN_AFTER: u32 = 8;
/// The first pause; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// The longest pause that a `Retry-After` with 503 makes: one request in that time burdens nobody, and
/// finds out when the upstream is there earlier than it thought.
const ASKED_MAX: Duration = Duration::from_secs(30);

/// How it is that nobody answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::run) enum Absence {
    /// Refused connections, 502, 503, 504, 529.
    Unavailable,
    /// The upstream refuses this server's key: 401, 403.
    Refused,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Presence {
    in_a_row: u32,
    pauses: u32,
    /// When the last pause began: what was sent before tells nothing new.
    paused_at: Option<Instant>,
    /// Since when the key is refused, with no answer between, and nobody away.
    refused_since: Option<Instant>,
}

impl Presence {
    /// Somebody has answered. Whether that ends a pause or a search.
    pub(super) fn answered(&mut self) -> bool {
        let was_down = self.is_down();
        *self = Presence::default();
        was_down
    }

    /// A request that was sent at `began`, and is not known to fail, was not answered; the upstream may
    /// have `asked` to be left alone for a while. Gives back the pause that begins with it, if one
    /// does: requests that failed together make one.
    pub(super) fn missed(
        &mut self,
        absence: Absence,
        began: Instant,
        now: Instant,
        asked: Option<Duration>,
    ) -> Option<Duration> {
        match absence {
            Absence::Refused => {
                self.refused_since.get_or_insert(now);
            }
            // Whether the key would still be refused, nobody knows.
            Absence::Unavailable => self.refused_since = None,
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        let is_news = self.paused_at.is_none_or(|at| began >= at);
        if !self.is_down() || !is_news {
            return None;
        }
        let doublings = self.pauses.min(16);
        self.pauses += 1;
        self.paused_at = Some(now);
        let own = PAUSE_FIRST.saturating_mul(1 << doublings).min(PAUSE_MAX);
        Some(own.max(asked.unwrap_or_default().min(ASKED_MAX)))
    }

    /// Whether nobody is there, as far as is known.
    pub(super) fn is_down(&self) -> bool {
        self.in_a_row >= DOWN_AFTER
    }

    /// For how long the key was refused to everybody.
    pub(super) fn refused_for(&self, now: Instant) -> Option<Duration> {
        self.refused_since.map(|since| now.duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn miss(presence: &mut Presence, asked: Option<Duration>) -> Option<Duration> {
        let now = Instant::now();
        presence.missed(Absence::Unavailable, now, now, asked)
    }

    #[test]
    fn so_many_in_a_row_begin_pauses_that_double_up_to_a_limit() {
        let mut presence = Presence::default();
        for _ in 1..DOWN_AFTER {
            assert_eq!(miss(&mut presence, None), None);
        }
        assert_eq!(miss(&mut presence, None), Some(PAUSE_FIRST));
        assert_eq!(miss(&mut presence, None), Some(2 * PAUSE_FIRST));
        for _ in 0..99 {
            assert!(miss(&mut presence, None) <= Some(PAUSE_MAX));
        }
        assert_eq!(miss(&mut presence, None), Some(PAUSE_MAX));
        assert!(presence.answered());
        assert_eq!(miss(&mut presence, None), None);
    }

    #[test]
    fn requests_that_failed_together_make_one_pause() {
        let mut presence = Presence::default();
        let began = Instant::now();
        let now = began + Duration::from_secs(1);
        let pauses = (0..99).filter_map(|_| presence.missed(Absence::Refused, began, now, None));
        assert_eq!(pauses.count(), 1);
        let later = now + Duration::from_secs(1);
        assert!(
            presence
                .missed(Absence::Refused, later, later, None)
                .is_some()
        );
        assert_eq!(presence.refused_for(later), Some(Duration::from_secs(1)));
    }

    #[test]
    fn an_outage_says_nothing_of_how_long_a_key_is_refused() {
        let mut presence = Presence::default();
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        presence.missed(Absence::Refused, at(0), at(0), None);
        presence.missed(Absence::Unavailable, at(1), at(1), None);
        assert_eq!(presence.refused_for(at(1000)), None);
        presence.missed(Absence::Refused, at(1000), at(1000), None);
        let refused_for = presence.refused_for(at(1001));
        assert_eq!(refused_for, Some(Duration::from_secs(1)));
    }

    #[test]
    fn a_long_retry_after_delays_the_next_probe_only_so_far() {
        let mut presence = Presence::default();
        let asked = Some(Duration::from_secs(600));
        assert_eq!(miss(&mut presence, asked), None, "one alone pauses nobody");
        for _ in 2..DOWN_AFTER {
            miss(&mut presence, asked);
        }
        assert_eq!(miss(&mut presence, asked), Some(ASKED_MAX));
    }
}
