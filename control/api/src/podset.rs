//! PodSet: several pods that live and die as one replica of a role.

use kube_derive::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, PodTemplate, SchedulingStrategy};

/// What a PodSet consists of.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "orchestration.aibrix.ai",
    version = "v1alpha1",
    kind = "PodSet",
    plural = "podsets",
    namespaced,
    crates(kube_core = "kube_core"),
    status = "PodSetStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"ReadyPods","type":"integer","jsonPath":".status.readyPods"}"#,
    printcolumn = r#"{"name":"TotalPods","type":"integer","jsonPath":".status.totalPods"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PodSetSpec {
    /// How many pods.
    #[schemars(range(min = 2, max = 100))]
    pub pod_group_size: i32,
    /// What each pod is made from.
    pub template: PodTemplate,
    /// Whether the role that made it is stateful.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stateful: bool,
    /// What happens when a pod fails; ReplaceUnhealthy where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_policy: Option<RecoveryPolicy>,
    /// Gang scheduling of this PodSet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduling_strategy: Option<SchedulingStrategy>,
}

/// What happens when a pod of a PodSet fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RecoveryPolicy {
    /// That pod is replaced.
    #[default]
    ReplaceUnhealthy,
    /// All pods are deleted, and made anew once all are gone.
    FullRecreate,
    /// AIBrix v0.5.0's spelling of `FullRecreate`.
    Recreate,
}

impl RecoveryPolicy {
    /// Whether one failed pod takes the whole group with it.
    #[must_use]
    pub fn recreates_all(self) -> bool {
        matches!(self, Self::FullRecreate | Self::Recreate)
    }
}

/// Where a PodSet is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PodSetPhase {
    /// No pod runs.
    Pending,
    /// At least one pod runs.
    Running,
    /// All pods are ready.
    Ready,
    /// Recovery was given up.
    Failed,
}

/// What was last observed of a PodSet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodSetStatus {
    /// The generation that the rest of the status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Pods that are ready.
    pub ready_pods: i32,
    /// Pods that are there and not going.
    pub total_pods: i32,
    /// Where it is in its life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<PodSetPhase>,
    /// Ready, Progressing, Recovering and others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
