//! Pods that are a replica by themselves and end soon after they were made: their replacements come
//! later each time, as those of groups do.
//!
//! What is counted is noted on the RoleSet, where it outlives the controller, by role and for one
//! template: a new one begins anew. A pod that ended after a long life is replaced at once and not
//! counted. Nothing is given up: there is no phase that would say so.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::recovery::Backoff;

/// What is noted of one role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Count {
    /// Hash of the template that the pods were made from.
    of: String,
    /// How often pods that ended early were replaced in a row.
    attempts: u32,
    /// When last, in seconds since the epoch.
    last_s: i64,
}

/// By role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EarlyEnds(BTreeMap<String, Count>);

impl EarlyEnds {
    /// What an annotation says; nothing where it is absent or not readable.
    #[must_use]
    pub fn read(annotation: Option<&str>) -> Self {
        annotation
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default()
    }

    /// What the annotation is to say.
    #[must_use]
    pub fn write(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| "{}".to_owned())
    }

    /// How often pods of a role ended early in a row, as far as that still counts.
    fn attempts(&self, role: &str, hash: &str, now_s: i64, backoff: Backoff) -> (u32, Duration) {
        let Some(count) = self.0.get(role).filter(|count| count.of == hash) else {
            return (0, Duration::ZERO);
        };
        let elapsed = now_s.saturating_sub(count.last_s);
        let elapsed = Duration::from_secs(elapsed.try_into().unwrap_or(0));
        // A pod that lived on after the longest pause ended late; this is another story.
        if elapsed >= backoff.longest.saturating_mul(2) {
            (0, Duration::ZERO)
        } else {
            (count.attempts, elapsed)
        }
    }

    /// How long pods of a role that ended early stay unreplaced; none once their time has come.
    #[must_use]
    pub fn wait(&self, role: &str, hash: &str, now_s: i64, backoff: Backoff) -> Option<Duration> {
        let (attempts, elapsed) = self.attempts(role, hash, now_s, backoff);
        let pause = backoff.after(attempts).unwrap_or(backoff.longest);
        let left = pause.saturating_sub(elapsed);
        (!left.is_zero()).then_some(left)
    }

    /// Notes that they are replaced now.
    pub fn note(&mut self, role: &str, hash: &str, now_s: i64, backoff: Backoff) {
        let (attempts, _) = self.attempts(role, hash, now_s, backoff);
        let count = Count {
            of: hash.to_owned(),
            attempts: attempts.saturating_add(1),
            last_s: now_s,
        };
        self.0.insert(role.to_owned(), count);
    }

    /// Forgets roles that are no more.
    pub fn retain(&mut self, is_role: impl Fn(&str) -> bool) {
        self.0.retain(|role, _| is_role(role));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_s(ends: &EarlyEnds, hash: &str, now_s: i64) -> u64 {
        let wait = ends.wait("a", hash, now_s, Backoff::default());
        wait.map_or(0, |wait| wait.as_secs())
    }

    #[test]
    fn replacements_come_later_each_time_up_to_the_longest_pause() {
        let backoff = Backoff::default();
        let (mut ends, mut now_s) = (EarlyEnds::default(), 1000);
        for expected in [0, 10, 20, 40, 80, 160, 300, 300, 300] {
            assert_eq!(wait_s(&ends, "h", now_s), expected);
            now_s += i64::try_from(expected).unwrap();
            assert_eq!(wait_s(&ends, "h", now_s), 0, "its time has come");
            ends.note("a", "h", now_s, backoff);
            ends = EarlyEnds::read(Some(&ends.write()));
        }
    }

    #[test]
    fn a_new_template_or_a_long_peace_begins_anew() {
        let mut ends = EarlyEnds::default();
        for now_s in [1000, 1010, 1030] {
            ends.note("a", "h", now_s, Backoff::default());
        }
        assert_eq!(wait_s(&ends, "h", 1031), 39);
        assert_eq!(wait_s(&ends, "other", 1031), 0);
        assert_eq!(wait_s(&ends, "h", 1030 + 600), 0);
        ends.note("a", "h", 1630, Backoff::default());
        assert_eq!(wait_s(&ends, "h", 1630), 10);
        ends.retain(|role| role != "a");
        assert_eq!(ends, EarlyEnds::default());
        assert_eq!(EarlyEnds::read(Some("x")), EarlyEnds::default());
    }
}
