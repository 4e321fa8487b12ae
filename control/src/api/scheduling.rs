//! Gang scheduling: which scheduler's PodGroup a RoleSet or a PodSet gets.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    /// The number of members that was given: at least one. AIBrix takes 0, which means the same as none.
    #[must_use]
    pub fn min_member(&self) -> Option<i32> {
        let godel = self.godel_scheduling_strategy.as_ref();
        let coscheduling = self.coscheduling_scheduling_strategy.as_ref();
        let volcano = self.volcano_scheduling_strategy.as_ref();
        let given = godel
            .and_then(|godel| godel.min_member)
            .or(coscheduling.and_then(|coscheduling| coscheduling.min_member))
            .or(volcano.and_then(|volcano| volcano.min_member));
        given.filter(|members| *members >= 1)
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
