//! Conditions as AIBrix shapes them: like Kubernetes' own, with two more times.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Nobody knows.
    Unknown,
}

impl From<bool> for ConditionStatus {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// One condition of an object; at most one of each type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, in one CamelCase word.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Why, for a person.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When `status` last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<Time>,
    /// When anything of it last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update_time: Option<Time>,
    /// The same in microseconds; kept where another controller wrote it, never written here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update_micro_time: Option<MicroTime>,
}

/// The condition of a type, if it is there.
#[must_use]
pub fn find_condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.kind == kind)
}

/// Sets a condition. Its times move only when something moved: `lastTransitionTime` with the
/// status, `lastUpdateTime` with status, reason or message.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    kind: &str,
    status: impl Into<ConditionStatus>,
    reason: &str,
    message: impl Into<String>,
    now: &Time,
) {
    let (status, message) = (status.into(), message.into());
    let Some(existing) = conditions
        .iter_mut()
        .find(|condition| condition.kind == kind)
    else {
        conditions.push(Condition {
            kind: kind.to_owned(),
            status,
            reason: reason.to_owned(),
            message,
            last_transition_time: Some(now.clone()),
            last_update_time: Some(now.clone()),
            last_update_micro_time: None,
        });
        return;
    };
    if existing.status == status && existing.reason == reason && existing.message == message {
        return;
    }
    if existing.status != status || existing.last_transition_time.is_none() {
        existing.last_transition_time = Some(now.clone());
    }
    existing.status = status;
    reason.clone_into(&mut existing.reason);
    existing.message = message;
    existing.last_update_time = Some(now.clone());
    existing.last_update_micro_time = None;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Time {
        Time(k8s_openapi::jiff::Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn times_move_only_with_what_they_tell_of() {
        let mut conditions = Vec::new();
        set_condition(&mut conditions, "Ready", false, "Waiting", "1 of 2", &at(1));
        set_condition(&mut conditions, "Ready", false, "Waiting", "1 of 2", &at(2));
        assert_eq!(
            conditions[0].last_update_time,
            Some(at(1)),
            "nothing changed"
        );
        set_condition(&mut conditions, "Ready", false, "Waiting", "0 of 2", &at(3));
        assert_eq!(
            conditions[0].last_transition_time,
            Some(at(1)),
            "the status stood"
        );
        assert_eq!(conditions[0].last_update_time, Some(at(3)));
        set_condition(&mut conditions, "Ready", true, "Ready", "", &at(4));
        assert_eq!(conditions[0].last_transition_time, Some(at(4)));
        assert_eq!(conditions.len(), 1);
    }
}
