//! Gang scheduling: which scheduler's PodGroup a RoleSet or a PodSet gets.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// A union: at most one of the three is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SchedulingStrategy {
    /// A PodGroup of Gödel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub godel_scheduling_strategy: Option<GodelStrategy>,
    /// A PodGroup of the coscheduling plugin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coscheduling_scheduling_strategy: Option<CoschedulingStrategy>,
    /// A PodGroup of Volcano.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volcano_scheduling_strategy: Option<VolcanoStrategy>,
}

/// What Gödel's PodGroup takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GodelStrategy {
    /// Pods that must fit at once; computed where it is not given.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "at_least_one"
    )]
    #[schemars(range(min = 1))]
    pub min_member: Option<i32>,
    /// Priority class of the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// How long members wait for each other, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule_timeout_seconds: Option<i32>,
    /// The application the group counts to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application: Option<String>,
    /// Affinity between the group's members; passed on as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Value>,
}

/// What coscheduling's PodGroup takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CoschedulingStrategy {
    /// Pods that must fit at once; computed where it is not given.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "at_least_one"
    )]
    #[schemars(range(min = 1))]
    pub min_member: Option<i32>,
    /// Resources that must be free at once; passed on as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_resources: Option<BTreeMap<String, Value>>,
    /// How long members wait for each other, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule_timeout_seconds: Option<i32>,
}

/// What Volcano's PodGroup takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolcanoStrategy {
    /// Pods that must fit at once; computed where it is not given.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "at_least_one"
    )]
    #[schemars(range(min = 1))]
    pub min_member: Option<i32>,
    /// The same for each task; a task is a role's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_task_member: Option<BTreeMap<String, i32>>,
    /// The queue the group's resources come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// Priority class of the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Resources that must be free at once; passed on as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_resources: Option<BTreeMap<String, Value>>,
}

/// The scheduler whose PodGroup is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheduler {
    /// Gödel.
    Godel,
    /// The coscheduling plugin of kube-scheduler.
    Coscheduling,
    /// Volcano.
    Volcano,
}

impl Scheduler {
    /// Group and version of its PodGroup.
    #[must_use]
    pub fn api_version(self) -> (&'static str, &'static str) {
        match self {
            Self::Godel => ("scheduling.godel.kubewharf.io", "v1alpha1"),
            Self::Coscheduling => ("scheduling.x-k8s.io", "v1alpha1"),
            Self::Volcano => ("scheduling.volcano.sh", "v1beta1"),
        }
    }
}

impl SchedulingStrategy {
    /// The number of members that was given.
    #[must_use]
    pub fn min_member(&self) -> Option<i32> {
        let godel = self.godel_scheduling_strategy.as_ref();
        let coscheduling = self.coscheduling_scheduling_strategy.as_ref();
        let volcano = self.volcano_scheduling_strategy.as_ref();
        godel
            .and_then(|godel| godel.min_member)
            .or(coscheduling.and_then(|coscheduling| coscheduling.min_member))
            .or(volcano.and_then(|volcano| volcano.min_member))
    }

    /// Which scheduler is meant; none where the union is empty.
    #[must_use]
    pub fn scheduler(&self) -> Option<Scheduler> {
        if self.godel_scheduling_strategy.is_some() {
            Some(Scheduler::Godel)
        } else if self.coscheduling_scheduling_strategy.is_some() {
            Some(Scheduler::Coscheduling)
        } else if self.volcano_scheduling_strategy.is_some() {
            Some(Scheduler::Volcano)
        } else {
            None
        }
    }

    /// How many members of the union are set; more than one is invalid.
    #[must_use]
    pub fn variants(&self) -> usize {
        usize::from(self.godel_scheduling_strategy.is_some())
            + usize::from(self.coscheduling_scheduling_strategy.is_some())
            + usize::from(self.volcano_scheduling_strategy.is_some())
    }
}

/// What AIBrix stored as 0 means the same as nothing. It is dropped when it is read, because a copy of
/// it, in a RoleSet or PodSet, would be refused.
fn at_least_one<'de, D: Deserializer<'de>>(from: D) -> Result<Option<i32>, D::Error> {
    let given = Option::<i32>::deserialize(from)?;
    Ok(given.filter(|members| *members >= 1))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_stored_min_member_below_one_is_in_no_copy() {
        let schedulers = [
            "godelSchedulingStrategy",
            "coschedulingSchedulingStrategy",
            "volcanoSchedulingStrategy",
        ];
        for scheduler in schedulers {
            let copy = |members: Value| {
                let stored = json!({scheduler: {"minMember": members}});
                let read: SchedulingStrategy = serde_json::from_value(stored).unwrap();
                serde_json::to_value(read).unwrap()
            };
            for nothing in [json!(0), json!(-1), Value::Null] {
                assert_eq!(copy(nothing), json!({scheduler: {}}));
            }
            assert_eq!(copy(json!(1)), json!({scheduler: {"minMember": 1}}));
        }
    }
}
