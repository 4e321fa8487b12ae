//! How long a tenant is quiet after a 429 that does not say how long. Pure.

use std::time::Duration;

/// The pause after the first 429; it doubles with each that follows without an answer between, up to
/// [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    in_a_row: u32,
}

impl Backoff {
    /// A request was answered.
    pub(super) fn answered(&mut self) {
        self.in_a_row = 0;
    }

    /// 429 to a request that had one before. Whether others were answered since the tenant's last: then
    /// it is meant for this request alone, and nobody need be quiet.
    pub(super) fn is_for_one_alone(&mut self) -> bool {
        let others_answered = self.in_a_row == 0;
        if others_answered {
            self.in_a_row = 1;
        }
        others_answered
    }

    /// 429: how long to be quiet. That is what the upstream has `asked` for, if that is more than a
    /// moment; else between half and all of the exponential backoff, by `random`, so that tenants and
    /// servers that were refused together do not return together.
    pub(super) fn refused(&mut self, asked: Option<Duration>, random: u8) -> Duration {
        let doublings = self.in_a_row.min(16);
        self.in_a_row += 1;
        let pause = PAUSE_FIRST.saturating_mul(1 << doublings).min(PAUSE_MAX);
        let own = pause / 2 + pause.mul_f64(f64::from(random) / 510.0);
        asked.filter(|asked| *asked >= PAUSE_FIRST).unwrap_or(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_429_is_asked_ever_less_often_and_an_answer_ends_that() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.refused(None, 0), PAUSE_FIRST / 2);
        assert_eq!(backoff.refused(None, 255), 2 * PAUSE_FIRST);
        let attempts_in_an_hour = std::iter::repeat_with(|| backoff.refused(None, 128))
            .scan(Duration::ZERO, |passed, pause| {
                *passed += pause;
                (*passed < Duration::from_secs(3600)).then_some(())
            })
            .count();
        assert!(attempts_in_an_hour < 200, "{attempts_in_an_hour}");
        assert_eq!(backoff.refused(None, 255), PAUSE_MAX);
        backoff.answered();
        assert_eq!(backoff.refused(None, 255), PAUSE_FIRST);
    }

    #[test]
    fn what_the_upstream_asks_for_is_obeyed_unless_it_is_next_to_nothing() {
        let mut backoff = Backoff::default();
        let asked = Duration::from_secs(7);
        assert_eq!(backoff.refused(Some(asked), 0), asked);
        for nothing in [Duration::ZERO, Duration::from_millis(1)] {
            assert!(backoff.refused(Some(nothing), 0) >= PAUSE_FIRST);
        }
    }
}
