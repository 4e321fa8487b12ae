//! StormService: a service made of RoleSets.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube_derive::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, DisruptionTolerance, RoleSetSpec, RoleStatus, RolloutBudget};

/// What a StormService is asked to be.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "orchestration.aibrix.ai",
    version = "v1alpha1",
    kind = "StormService",
    plural = "stormservices",
    shortname = "stsvc",
    namespaced,
    crates(kube_core = "kube_core"),
    status = "StormServiceStatus",
    derive = "PartialEq",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.scalingTargetSelector"
    ),
    printcolumn = r#"{"name":"Replicas","type":"integer","jsonPath":".spec.replicas"}"#,
    printcolumn = r#"{"name":"ReadyReplicas","type":"integer","jsonPath":".status.readyReplicas","description":"RoleSets that are ready"}"#,
    printcolumn = r#"{"name":"Updated","type":"integer","jsonPath":".status.updatedReplicas","description":"RoleSets that have the present template"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Paused","type":"boolean","jsonPath":".spec.paused"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct StormServiceSpec {
    /// How many RoleSets; one where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Must match the labels of `template`. RoleSets are found by who owns them.
    pub selector: LabelSelector,
    /// Whether RoleSets have fixed indices.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stateful: bool,
    /// What each RoleSet is made from.
    pub template: RoleSetTemplate,
    /// How a changed template reaches the RoleSets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_strategy: Option<UpdateStrategy>,
    /// How many old revisions are kept; ten where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision_history_limit: Option<i32>,
    /// Stops rollouts; scaling goes on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Accepted and not read, as in AIBrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disruption_tolerance: Option<DisruptionTolerance>,
}

/// A RoleSet to be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RoleSetTemplate {
    /// Labels and annotations of the RoleSets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<TemplateMeta>,
    /// Their spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<RoleSetSpec>,
}

/// The part of an object's metadata that a template may have. Only labels and annotations are read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateMeta {
    /// Passed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finalizers: Option<Vec<String>>,
    /// Passed on; `selector` must match them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// Not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// How a changed template reaches the RoleSets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdateStrategy {
    /// RollingUpdate where it is not given.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<UpdateType>,
    /// The budget, in RoleSets.
    #[serde(flatten)]
    pub budget: RolloutBudget,
}

/// Whether RoleSets take a change one after the other or all at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UpdateType {
    /// Within the budget.
    #[default]
    RollingUpdate,
    /// All at once; each RoleSet keeps to its roles' budgets.
    InPlaceUpdate,
}

/// What was last observed of a StormService. Counts are of RoleSets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StormServiceStatus {
    /// The generation that the rest of the status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// All that are there, going ones included.
    #[serde(default)]
    pub replicas: i32,
    /// Those that are ready.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Those that are not.
    #[serde(default)]
    pub not_ready_replicas: i32,
    /// Those of the revision that was complete last.
    #[serde(default)]
    pub current_replicas: i32,
    /// Those of the wanted revision whose roles have all rolled.
    #[serde(default)]
    pub updated_replicas: i32,
    /// Those of them that are ready.
    #[serde(default)]
    pub updated_ready_replicas: i32,
    /// The ControllerRevision that was complete last.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub current_revision: String,
    /// The ControllerRevision of the present template.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub update_revision: String,
    /// How often a revision's name was already taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collision_count: Option<i32>,
    /// One pod of each RoleSet, for the scale subresource.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scaling_target_selector: String,
    /// Ready, Progressing, ReplicaFailure and others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Roles summed over all RoleSets. Counts are of pods, or of PodSets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub role_statuses: Vec<RoleStatus>,
}
