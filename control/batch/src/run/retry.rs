//! What an attempt's end means, and when to try again. Pure.

use std::time::{Duration, SystemTime};

use crate::run::pace::Absence;

/// The longest pause that an upstream's `Retry-After` may ask for: what asks for more is asked again.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10 * 60);
/// The longest pause between attempts otherwise.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// An answer that goes to the output file.
    Success,
    /// An answer that would be the same again.
    Permanent,
    /// The upstream asks for less: 429. Not held against the request.
    Overloaded,
    /// Nobody is there who could answer, or would. Held against the request only while others are
    /// answered.
    Absent(Absence),
    /// Something that another attempt may mend: 500, 408, 409, a torn connection.
    Transient,
}

impl Verdict {
    /// What an HTTP status means. `quota_ended` is whether a 429 says that waiting does not help.
    pub(super) fn of_status(status: u16, quota_ended: bool) -> Verdict {
        match status {
            200..=299 => Verdict::Success,
            429 if quota_ended => Verdict::Permanent,
            429 => Verdict::Overloaded,
            401 | 403 => Verdict::Absent(Absence::Refused),
            502..=504 | 529 => Verdict::Absent(Absence::Unavailable),
            408 | 409 | 425 | 500..=599 => Verdict::Transient,
            _ => Verdict::Permanent,
        }
    }

    /// Label in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Verdict::Success => "success",
            Verdict::Permanent => "permanent",
            Verdict::Overloaded => "overloaded",
            Verdict::Absent(Absence::Unavailable) => "unavailable",
            Verdict::Absent(Absence::Refused) => "refused",
            Verdict::Transient => "transient",
        }
    }
}

/// The failures of one request that are held against it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failures {
    count: u32,
    /// 429s in a row, up to the last attempt; not held against it.
    overloads: u32,
    /// Answers of its model when it was first sent, or when it last failed.
    answers: u64,
    /// Whether nobody was there for it when it last failed.
    is_doubtful: bool,
}

impl Failures {
    /// None yet; its model has given so many `answers` when it is first sent.
    pub(super) fn new(answers: u64) -> Failures {
        Failures {
            count: 0,
            overloads: 0,
            answers,
            is_doubtful: false,
        }
    }

    /// The same for a batch that goes on after a while: its model has given so many `answers` by now, and
    /// what was known of the upstream is old.
    pub(super) fn resumed(self, answers: u64) -> Failures {
        Failures {
            count: self.count,
            overloads: 0,
            answers,
            is_doubtful: false,
        }
    }

    /// An attempt has failed. Whether that is held against the request: that nobody was there is not,
    /// unless others were answered since it was first sent or failed before.
    pub(super) fn add(&mut self, verdict: Verdict, answers: u64) -> bool {
        let others_answered = answers > std::mem::replace(&mut self.answers, answers);
        let held = match verdict {
            Verdict::Success | Verdict::Permanent | Verdict::Transient => true,
            Verdict::Overloaded => false,
            Verdict::Absent(_) => others_answered,
        };
        self.count += u32::from(held);
        self.overloads = match verdict {
            Verdict::Overloaded => self.overloads.saturating_add(1),
            _ => 0,
        };
        self.is_doubtful = matches!(verdict, Verdict::Absent(_));
        held
    }

    /// How many.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// How many 429s in a row it had last.
    pub(super) fn overloads(&self) -> u32 {
        self.overloads
    }

    /// Whether nobody was there for it when it last failed.
    pub(super) fn is_doubtful(&self) -> bool {
        self.is_doubtful
    }

    /// Whether it is known, with so many `answers`, that it is not for nobody's being there that the next
    /// attempt would fail.
    pub(super) fn is_clear(&self, answers: u64) -> bool {
        !self.is_doubtful || answers > self.answers
    }
}

/// How often, and how soon.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Attempts that may fail, for one request.
    pub attempts_max: u32,
    /// The pause after the first failure; it doubles with each.
    pub backoff: Duration,
}

impl RetryPolicy {
    /// How long to wait after failure number `failures`, from 1: between half and all of the
    /// exponential backoff, by `random`, so that requests that failed together do not return
    /// together; longer if the upstream has `asked` for it, and never shorter.
    pub(super) fn pause(&self, failures: u32, random: u8, asked: Option<Duration>) -> Duration {
        let doublings = failures.saturating_sub(1).min(16);
        let backoff = self.backoff.saturating_mul(1 << doublings).min(BACKOFF_MAX);
        let pause = backoff / 2 + backoff.mul_f64(f64::from(random) / 510.0);
        pause.max(asked.unwrap_or_default())
    }
}

/// Reads `retry-after-ms` or `Retry-After`, which has seconds or, from some gateways, a date (RFC 9110
/// §10.2.3).
pub(super) fn retry_after(
    milliseconds: Option<&str>,
    seconds_or_date: Option<&str>,
    now: SystemTime,
) -> Option<Duration> {
    let read = |text: Option<&str>, unit: f64| {
        let value: f64 = text?.trim().parse().ok()?;
        (value.is_finite() && value >= 0.0)
            .then(|| Duration::from_secs_f64((value * unit).min(RETRY_AFTER_MAX.as_secs_f64())))
    };
    let until = |date: Option<&str>| {
        let date = httpdate::parse_http_date(date?.trim()).ok()?;
        // One that has passed asks for no pause.
        let left = date.duration_since(now).unwrap_or_default();
        Some(left.min(RETRY_AFTER_MAX))
    };
    read(milliseconds, 0.001)
        .or_else(|| read(seconds_or_date, 1.0))
        .or_else(|| until(seconds_or_date))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_judged_by_what_another_attempt_would_bring() {
        for (status, verdict) in [
            (200, Verdict::Success),
            (400, Verdict::Permanent),
            (401, Verdict::Absent(Absence::Refused)),
            (403, Verdict::Absent(Absence::Refused)),
            (404, Verdict::Permanent),
            (422, Verdict::Permanent),
            (408, Verdict::Transient),
            (429, Verdict::Overloaded),
            (500, Verdict::Transient),
            (502, Verdict::Absent(Absence::Unavailable)),
            (503, Verdict::Absent(Absence::Unavailable)),
            (302, Verdict::Permanent),
        ] {
            assert_eq!(Verdict::of_status(status, false), verdict, "{status}");
        }
        assert_eq!(Verdict::of_status(429, true), Verdict::Permanent);
    }

    #[test]
    fn that_nobody_is_there_is_held_against_a_request_only_while_others_are_answered() {
        let nobody = Verdict::Absent(Absence::Unavailable);
        let mut alone = Failures::new(5);
        for _ in 0..100 {
            assert!(!alone.add(nobody, 5));
            assert!(!alone.is_clear(5));
        }
        assert_eq!(alone.count(), 0);
        assert!(alone.is_clear(6), "another was answered");
        assert!(alone.add(Verdict::Transient, 5));
        let mut unlucky = Failures::new(0);
        for answers in [1, 1, 2, 9] {
            unlucky.add(nobody, answers);
            assert!(!unlucky.add(Verdict::Overloaded, answers));
        }
        assert_eq!(unlucky.count(), 3);
    }

    #[test]
    fn pauses_double_up_to_a_limit_and_vary() {
        let policy = RetryPolicy {
            attempts_max: 5,
            backoff: Duration::from_millis(500),
        };
        assert_eq!(policy.pause(1, 0, None), Duration::from_millis(250));
        assert_eq!(policy.pause(1, 255, None), Duration::from_millis(500));
        assert_eq!(policy.pause(3, 255, None), Duration::from_secs(2));
        assert_eq!(policy.pause(99, 255, None), BACKOFF_MAX);
        let nothing = Some(Duration::ZERO);
        assert_eq!(policy.pause(1, 255, nothing), Duration::from_millis(500));
        let long = Some(Duration::from_secs(7));
        assert_eq!(policy.pause(1, 255, long), Duration::from_secs(7));
    }

    #[test]
    fn retry_after_is_read_in_all_forms_and_nonsense_is_not() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        let retry_after = |milliseconds, other| retry_after(milliseconds, other, now);
        assert_eq!(retry_after(None, Some("7")), Some(Duration::from_secs(7)));
        for (date, left) in [
            ("Sun, 06 Nov 1994 08:49:37 GMT", Duration::from_secs(7)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Duration::ZERO),
            ("Mon, 07 Nov 1994 08:49:37 GMT", RETRY_AFTER_MAX),
        ] {
            assert_eq!(retry_after(None, Some(date)), Some(left), "{date}");
        }
        assert_eq!(
            retry_after(Some("250"), Some("7")),
            Some(Duration::from_millis(250))
        );
        assert_eq!(retry_after(None, Some("1e30")), Some(RETRY_AFTER_MAX));
        for nonsense in ["-1", "soon", "NaN", "inf", "", "Sun, 06 Nov"] {
            assert_eq!(retry_after(None, Some(nonsense)), None, "{nonsense}");
        }
    }
}
