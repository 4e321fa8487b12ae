//! What the caches show of a RoleSet.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::DeserializeGuard;
use kvtide_control_api::meta::{is_paused, owner_key, owner_uid, scaling_role};
use kvtide_control_api::target::Target;
use kvtide_control_api::{RoleSet, StormService};
use kvtide_control_core::role_units::Found;
use kvtide_control_core::seen::Seen;

use crate::context::Context;

/// Reads the caches.
pub(super) fn dereference(set: &RoleSet, target: &Target, context: &Context) -> Found {
    let pods = context.pods_of(&target.uid);
    let groups = context.pod_sets.owned_by(&target.uid);
    let cached = |uid: &str| {
        let metas = pods.iter().map(|pod| &pod.metadata);
        let mut metas = metas.chain(groups.iter().map(|group| group.as_ref().meta()));
        metas.any(|meta| meta.uid.as_deref() == Some(uid))
    };
    let unseen = |kind: &str| {
        let unseen = context.ledger.unseen(&target.uid, kind, cached).into_iter();
        unseen.map(|meta| context.seen_meta(meta)).collect()
    };
    let (unseen_pods, unseen_groups) = (unseen("Pod"), unseen("PodSet"));
    let owner = owner(&set.metadata, context);
    let groups = groups.iter().map(|group| Seen {
        going: context.is_going(group.as_ref().meta()),
        object: match &group.0 {
            Ok(group) => Ok(group.clone()),
            Err(broken) => Err(broken.metadata.clone()),
        },
    });
    Found {
        groups: groups.collect(),
        unseen_pods,
        unseen_groups,
        paused: owner.as_deref().is_some_and(is_paused),
        scaling_role: owner.and_then(|owner| scaling_role(owner.meta()).map(str::to_owned)),
        pods: pods.into_iter().map(|pod| context.seen_pod(pod)).collect(),
    }
}

/// The StormService of a RoleSet with this metadata. It is asked itself, so that what it says holds at
/// once, and no RoleSet is written for it.
fn owner(meta: &ObjectMeta, context: &Context) -> Option<Arc<DeserializeGuard<StormService>>> {
    let owner = context.services.get(&owner_key(meta, "StormService")?)?;
    (owner.meta().uid.as_deref() == owner_uid(meta)).then_some(owner)
}
