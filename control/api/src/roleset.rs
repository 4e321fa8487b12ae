//! RoleSet: one complete copy of a service, made of roles.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube_derive::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, PodTemplate, RecoveryPolicy, SchedulingStrategy};

/// What a RoleSet consists of.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "orchestration.aibrix.ai",
    version = "v1alpha1",
    kind = "RoleSet",
    plural = "rolesets",
    namespaced,
    crates(kube_core = "kube_core"),
    status = "RoleSetStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct RoleSetSpec {
    /// The roles, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<RoleSpec>,
    /// In which order roles roll; Sequential where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_strategy: Option<RoleUpdateOrder>,
    /// Gang scheduling of the whole RoleSet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduling_strategy: Option<SchedulingStrategy>,
}

/// In which order the roles of a RoleSet roll.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RoleUpdateOrder {
    /// All at once, each within its own budget.
    Parallel,
    /// One after the other, by `upgradeOrder`.
    #[default]
    Sequential,
    /// All in steps; no role gets a step ahead of another.
    Interleave,
}

/// A budget of a rollout, as numbers or percentages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutBudget {
    /// How many may be missing; percentages round down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<IntOrString>,
    /// How many may be there beyond the wanted number; percentages round up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_surge: Option<IntOrString>,
}

/// Kept for AIBrix, which never reads it either.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DisruptionTolerance {
    /// How many may be taken away by others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<IntOrString>,
}

/// One role: alike pods, or alike groups of pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RoleSpec {
    /// Its name, unique in the RoleSet.
    pub name: String,
    /// How many pods, or PodSets where `podGroupSize` is above 1; one where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Roles with a lower number roll first; roles without one roll last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub upgrade_order: Option<i32>,
    /// How many pods make one replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub pod_group_size: Option<i32>,
    /// The budget of this role's rollout, in replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_strategy: Option<RolloutBudget>,
    /// Whether replicas have fixed indices.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stateful: bool,
    /// What each pod is made from.
    #[serde(default)]
    pub template: PodTemplate,
    /// Accepted and not read, as in AIBrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disruption_tolerance: Option<DisruptionTolerance>,
    /// Gang scheduling of each PodSet of this role; not read where `podGroupSize` is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduling_strategy: Option<SchedulingStrategy>,
    /// How a PodSet of this role recovers; not read where `podGroupSize` is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_policy: Option<RecoveryPolicy>,
    /// Roles that must be ready before this one is created for the first time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dependencies: Vec<String>,
}

/// What was last observed of a RoleSet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RoleSetStatus {
    /// The generation that the rest of the status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Each role.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<RoleStatus>,
    /// Ready, Progressing, ReplicaFailure and others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// What was last observed of a role. Counts are of pods, or of PodSets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RoleStatus {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// All that are not going.
    pub replicas: i32,
    /// Those that are ready.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Those that are not.
    #[serde(default)]
    pub not_ready_replicas: i32,
    /// Those made from the role's present template.
    #[serde(default)]
    pub updated_replicas: i32,
    /// Those of them that are ready.
    #[serde(default)]
    pub updated_ready_replicas: i32,
}
