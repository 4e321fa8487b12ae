//! Container restarts from before they counted.
//!
//! With FullRecreate a restarted container takes its group with it. What restarted before the policy
//! was set is no reason: it is noted on the PodSet, where it outlives the controller.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Restarts by pod's uid; pods that are not named had none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Baseline(BTreeMap<String, i32>);

impl Baseline {
    /// Of pods as they are now.
    pub fn of<'a>(pods: impl IntoIterator<Item = (&'a str, i32)>) -> Self {
        let restarted = pods.into_iter().filter(|(_, restarts)| *restarts > 0);
        Self(
            restarted
                .map(|(uid, restarts)| (uid.to_owned(), restarts))
                .collect(),
        )
    }

    /// What an annotation says; none where it is absent or not readable.
    #[must_use]
    pub fn read(annotation: Option<&str>) -> Option<Self> {
        serde_json::from_str(annotation?).ok()
    }

    /// What the annotation is to say.
    #[must_use]
    pub fn write(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| "{}".to_owned())
    }

    /// Whether a pod restarted since.
    #[must_use]
    pub fn is_exceeded(&self, uid: &str, restarts: i32) -> bool {
        restarts > self.0.get(uid).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_restarted_since_counts() {
        let baseline = Baseline::of([("a", 3), ("b", 0)]);
        let again = Baseline::read(Some(&baseline.write()));
        assert_eq!(again.as_ref(), Some(&baseline), "it outlives the process");
        let table = [
            ("a", 3, false),
            ("a", 4, true),
            ("b", 0, false),
            ("b", 1, true),
            ("new", 1, true),
        ];
        for (uid, restarts, expected) in table {
            assert_eq!(
                baseline.is_exceeded(uid, restarts),
                expected,
                "{uid} {restarts}"
            );
        }
        assert_eq!(Baseline::of([("a", 0)]).write(), "{}");
        assert_eq!(Baseline::read(Some("x")), None);
        assert_eq!(Baseline::read(None), None);
    }
}
