//! The parts of Kubernetes' own objects that the controllers look at. Caches hold nothing else, so
//! that a thousand pods cost a few megabytes.

use std::time::Duration;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube_derive::Resource;
use serde::{Deserialize, Serialize};

use crate::meta::{owner_key, seconds};

/// A pod.
#[derive(Clone, Debug, Default, Resource, Serialize, Deserialize)]
#[resource(inherit = Pod, crates(kube_core = "kube_core"))]
pub struct ObservedPod {
    /// Metadata, less managed fields.
    pub metadata: ObjectMeta,
    /// Where it runs.
    #[serde(default)]
    pub spec: ObservedPodSpec,
    /// How it does.
    #[serde(default)]
    pub status: ObservedPodStatus,
}

/// The part of a pod's spec that matters.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObservedPodSpec {
    /// Its node.
    pub node_name: Option<String>,
    /// Containers that run before the others, or beside them.
    #[serde(default)]
    pub init_containers: Vec<ObservedInitContainer>,
}

/// A container that runs before the others, or beside them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObservedInitContainer {
    /// Its name.
    pub name: String,
    /// Always, if it runs beside the others.
    pub restart_policy: Option<String>,
}

impl ObservedInitContainer {
    fn is_sidecar(&self) -> bool {
        self.restart_policy.as_deref() == Some("Always")
    }
}

/// The part of a pod's status that matters.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObservedPodStatus {
    /// Pending, Running, Succeeded, Failed or Unknown.
    pub phase: Option<String>,
    /// Conditions.
    pub conditions: Vec<ObservedCondition>,
    /// Containers.
    pub container_statuses: Vec<ObservedContainer>,
    /// Containers that run before the others, or beside them.
    pub init_container_statuses: Vec<ObservedContainer>,
}

/// A condition of a pod or node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObservedCondition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// True, False or Unknown.
    pub status: String,
    /// When that last changed.
    pub last_transition_time: Option<Time>,
}

/// A container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObservedContainer {
    /// Its name.
    pub name: String,
    /// How often it was started again.
    pub restart_count: i32,
    /// What it does.
    pub state: ObservedContainerState,
}

/// What a container does.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ObservedContainerState {
    /// It waits.
    pub waiting: Option<ObservedWaiting>,
    /// It ended.
    pub terminated: Option<ObservedEnd>,
}

/// How a container ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObservedEnd {
    /// When.
    pub finished_at: Option<Time>,
}

/// Why a container waits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ObservedWaiting {
    /// In one word.
    pub reason: Option<String>,
}

impl ObservedPod {
    /// Whether its condition Ready holds.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        holds(&self.status.conditions, "Ready")
    }

    /// Since when it waits to be ready: since it ceased to be, or since it was made.
    #[must_use]
    pub fn waiting_since(&self) -> Option<&Time> {
        let ready = self.status.conditions.iter();
        let mut ready = ready.filter(|condition| condition.kind == "Ready");
        let turned = ready.find_map(|condition| condition.last_transition_time.as_ref());
        turned.or(self.metadata.creation_timestamp.as_ref())
    }

    /// Whether it ended, one way or the other.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.status.phase.as_deref(), Some("Failed" | "Succeeded"))
    }

    /// Whether it left the phase Pending.
    #[must_use]
    pub fn has_started(&self) -> bool {
        !matches!(self.status.phase.as_deref(), None | Some("Pending"))
    }

    fn containers(&self) -> impl Iterator<Item = &ObservedContainer> {
        self.status
            .container_statuses
            .iter()
            .chain(&self.status.init_container_statuses)
    }

    /// Containers that run as long as the pod. One that comes before them is tried again by the kubelet
    /// until it succeeds, and nothing of the pod has run yet that others could miss.
    fn lasting(&self) -> impl Iterator<Item = &ObservedContainer> {
        let sidecar = |status: &&ObservedContainer| {
            let mut specs = self.spec.init_containers.iter();
            specs.any(|spec| spec.name == status.name && spec.is_sidecar())
        };
        let before = self.status.init_container_statuses.iter();
        self.status
            .container_statuses
            .iter()
            .chain(before.filter(sidecar))
    }

    /// Whether a container waits in CrashLoopBackOff.
    #[must_use]
    pub fn is_crash_looping(&self) -> bool {
        self.lasting().any(|container| {
            let waiting = container.state.waiting.as_ref();
            waiting.and_then(|waiting| waiting.reason.as_deref()) == Some("CrashLoopBackOff")
        })
    }

    /// How long it was there until it ended; nothing where it does not say when that was, as one that a
    /// kubelet turns away.
    #[must_use]
    pub fn lifetime(&self) -> Duration {
        let ends = self.containers().filter_map(|container| {
            let end = container.state.terminated.as_ref()?;
            end.finished_at.as_ref()
        });
        let turns = self.status.conditions.iter();
        let turns = turns.filter_map(|condition| condition.last_transition_time.as_ref());
        let created = seconds(self.metadata.creation_timestamp.as_ref());
        // A container that was cut off has no end of its own, while one that ran before it has.
        let ended = ends.chain(turns).max();
        let lived = ended.map_or(0, |ended| ended.0.as_second() - created);
        Duration::from_secs(lived.try_into().unwrap_or(0))
    }

    /// How often containers were started again.
    #[must_use]
    pub fn restarts(&self) -> i32 {
        let counts = self.lasting().map(|container| container.restart_count);
        counts.fold(0, i32::saturating_add)
    }
}

/// Whether a condition is there and true.
#[must_use]
pub fn holds(conditions: &[ObservedCondition], kind: &str) -> bool {
    conditions
        .iter()
        .any(|condition| condition.kind == kind && condition.status == "True")
}

/// A node.
#[derive(Clone, Debug, Default, Resource, Serialize, Deserialize)]
#[resource(inherit = Node, crates(kube_core = "kube_core"))]
pub struct ObservedNode {
    /// Metadata.
    pub metadata: ObjectMeta,
    /// Its taints.
    #[serde(default)]
    pub spec: ObservedNodeSpec,
    /// How it does.
    #[serde(default)]
    pub status: ObservedNodeStatus,
}

/// The part of a node's spec that matters.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ObservedNodeSpec {
    /// Its taints.
    pub taints: Vec<ObservedTaint>,
}

/// A taint of a node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ObservedTaint {
    /// Its key.
    pub key: String,
}

/// The part of a node's status that matters.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ObservedNodeStatus {
    /// Conditions.
    pub conditions: Vec<ObservedCondition>,
}

impl ObservedNode {
    /// Since when it has not been ready; none while it is.
    #[must_use]
    pub fn not_ready_since(&self) -> Option<&Time> {
        let ready = self
            .status
            .conditions
            .iter()
            .find(|condition| condition.kind == "Ready")?;
        if ready.status == "True" {
            None
        } else {
            ready.last_transition_time.as_ref()
        }
    }

    /// Whether an administrator declared it dead, so that its pods may be deleted by force.
    #[must_use]
    pub fn is_out_of_service(&self) -> bool {
        self.spec
            .taints
            .iter()
            .any(|taint| taint.key == "node.kubernetes.io/out-of-service")
    }
}

/// A Service.
#[derive(Clone, Debug, Default, Resource, Serialize, Deserialize)]
#[resource(inherit = Service, crates(kube_core = "kube_core"))]
pub struct ObservedService {
    /// Metadata.
    pub metadata: ObjectMeta,
    /// What it selects.
    #[serde(default)]
    pub spec: ObservedServiceSpec,
}

/// The part of a Service's spec that matters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObservedServiceSpec {
    /// `None` for a headless one.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// Labels of the pods behind it.
    pub selector: std::collections::BTreeMap<String, String>,
    /// Whether pods that are not ready have addresses in DNS.
    pub publish_not_ready_addresses: bool,
}

/// A ControllerRevision.
#[derive(Clone, Debug, Default, Resource, Serialize, Deserialize)]
#[resource(inherit = ControllerRevision, crates(kube_core = "kube_core"))]
pub struct ObservedRevision {
    /// Metadata.
    pub metadata: ObjectMeta,
    /// What it recorded.
    #[serde(default)]
    pub data: serde_json::Value,
    /// Its place in history.
    #[serde(default)]
    pub revision: i64,
}

impl ObservedRevision {
    /// Drops what other kinds' revisions recorded: those of every StatefulSet and DaemonSet come by,
    /// each with a whole pod template.
    pub fn forget_foreign_data(&mut self) {
        if owner_key(&self.metadata, "StormService").is_none() {
            self.data = serde_json::Value::Null;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_lived_until_the_last_that_is_known_of_it() {
        let ended = |at: &str| json!({"state": {"terminated": {"finishedAt": at}}});
        let two = [ended("2026-01-01T00:01:00Z"), ended("2026-01-01T00:00:30Z")];
        let ready = json!({"type": "Ready", "status": "False",
            "lastTransitionTime": "2026-01-01T01:00:00Z"});
        let table = [
            (json!({}), 0),
            (json!({"containerStatuses": two}), 60),
            (json!({"conditions": [ready]}), 3600),
            (
                json!({"initContainerStatuses": [ended("2026-01-01T00:01:00Z")],
                    "conditions": [ready]}),
                3600,
            ),
            (
                json!({"containerStatuses": [ended("2025-12-31T00:00:00Z")]}),
                0,
            ),
        ];
        for (status, expected) in table {
            let pod: ObservedPod = serde_json::from_value(json!({
                "metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"},
                "status": status,
            }))
            .unwrap();
            assert_eq!(pod.lifetime().as_secs(), expected, "{status}");
        }
    }

    #[test]
    fn what_runs_before_the_pod_does_not_count_as_its_failure() {
        let looping = json!({"waiting": {"reason": "CrashLoopBackOff"}});
        let failing = json!([{"name": "first", "restartCount": 3, "state": looping}]);
        // As an init container, as a sidecar, as a container.
        let always = json!([{"name": "first", "restartPolicy": "Always"}]);
        let table = [
            (
                json!([{"name": "first"}]),
                "initContainerStatuses",
                (0, false),
            ),
            (always, "initContainerStatuses", (3, true)),
            (json!([]), "containerStatuses", (3, true)),
        ];
        for (init, kind, expected) in table {
            let pod: ObservedPod = serde_json::from_value(json!({
                "metadata": {"name": "p"}, "spec": {"initContainers": init},
                "status": {kind: failing},
            }))
            .unwrap();
            assert_eq!((pod.restarts(), pod.is_crash_looping()), expected, "{init}");
        }
    }

    #[test]
    fn only_revisions_of_storm_services_keep_their_data() {
        let group = crate::GROUP;
        let table = [
            ("StormService", format!("{group}/v1alpha1"), true),
            ("StatefulSet", "apps/v1".to_owned(), false),
            ("DaemonSet", "apps/v1".to_owned(), false),
        ];
        for (kind, api_version, kept) in table {
            let mut revision: ObservedRevision = serde_json::from_value(json!({
                "metadata": {"name": "r", "ownerReferences": [{"apiVersion": api_version,
                    "kind": kind, "name": "o", "uid": "u", "controller": true}]},
                "data": {"spec": {}}, "revision": 3,
            }))
            .unwrap();
            revision.forget_foreign_data();
            assert_eq!(!revision.data.is_null(), kept, "{kind}");
            assert_eq!(revision.revision, 3, "{kind}");
        }
        let mut orphan = ObservedRevision {
            data: json!({}),
            ..ObservedRevision::default()
        };
        orphan.forget_foreign_data();
        assert!(orphan.data.is_null());
    }
}
