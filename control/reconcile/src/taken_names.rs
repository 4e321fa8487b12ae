//! Names that children cannot have, because other objects have them or carry them in their labels: what
//! was orphaned or released keeps its name, and its labels are what others select by.
//!
//! Reads the caches. One that is behind costs a refusal, never a second child: candidates are always
//! tried in the same order.

use std::collections::HashSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kvtide_control_api::keys;
use kvtide_control_api::meta::{Key, label, names_of, owner_uid, uid_of};
use kvtide_control_api::observed::ObservedPod;
use kvtide_control_core::names;

use super::context::Context;

/// Names of RoleSets that pods and PodSets carry whose RoleSet is gone.
pub(super) fn left_behind(namespace: &str, context: &Context) -> HashSet<String> {
    let sets = context.role_sets.all();
    let sets = sets.iter().map(|set| set.as_ref().meta());
    let here: HashSet<&str> = sets.filter_map(|meta| meta.uid.as_deref()).collect();
    let (groups, pods) = (context.pod_sets.all(), context.pods.all());
    let groups = groups.iter().map(|group| group.as_ref().meta());
    let pods = pods.iter().map(|pod| &pod.metadata);
    // Pods of PodSets belong to those.
    let pods = pods.filter(|meta| label(meta, keys::POD_SET_NAME).is_empty());
    let is_left = |child: &&ObjectMeta| {
        let owner = owner_uid(child).unwrap_or_default();
        names_of(child).0 == namespace && !context.is_going(child) && !here.contains(owner)
    };
    let left = groups.chain(pods).filter(is_left);
    left.map(|meta| label(meta, keys::ROLE_SET_NAME).to_owned())
        .collect()
}

/// Among names of replicas of a RoleSet.
pub(super) struct TakenNames<'a> {
    set: &'a ObjectMeta,
    context: &'a Context,
}

impl<'a> TakenNames<'a> {
    /// Of the RoleSet with this metadata.
    pub(super) fn to(set: &'a ObjectMeta, context: &'a Context) -> Self {
        Self { set, context }
    }

    fn key(&self, name: &str) -> Key {
        Key {
            namespace: names_of(self.set).0.to_owned(),
            name: name.to_owned(),
        }
    }

    /// Whether a pod of this name is not the RoleSet's. One that is going may take its time.
    pub(super) fn has_pod(&self, name: &str) -> bool {
        self.foreign_pod(name).is_some()
    }

    /// The same of a PodSet, or of the pods that one of this name and size left behind. Those of one that
    /// was deleted are on their way out: its successor keeps its name.
    pub(super) fn has_group(&self, name: &str, size: i32) -> bool {
        if let Some(group) = self.context.pod_sets.get(&self.key(name)) {
            let meta = group.as_ref().meta();
            return owner_uid(meta) != Some(uid_of(self.set));
        }
        let left_behind = |index: i32| {
            let pod = self.foreign_pod(&names::pod_set_pod(name, index));
            pod.is_some_and(|pod| !self.context.is_going(&pod.metadata))
        };
        (0..size).any(left_behind)
    }

    fn foreign_pod(&self, name: &str) -> Option<Arc<ObservedPod>> {
        let found = self.context.pods.get(&self.key(name));
        found.filter(|pod| owner_uid(&pod.metadata) != Some(uid_of(self.set)))
    }
}
