//! The end of a RoleSet: its pods and PodSets first.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::controller::Action;
use kvtide_control_api::target::Target;
use kvtide_control_api::{PodSet, RoleSet, SchedulingStrategy, keys};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, resource};

use crate::cascade::{take_group, takes_children};
use crate::context::Context;

/// Lets a deleted RoleSet go once its pods and PodSets are gone. Of one that cannot be decoded no
/// `strategy` is known: its PodGroup follows by its owner reference.
pub(super) async fn finalize(
    target: &Target,
    meta: &ObjectMeta,
    strategy: Option<&SchedulingStrategy>,
    context: &Context,
) -> Result<Action, Error> {
    let kind = resource::<RoleSet>();
    if !takes_children::<RoleSet>(meta, keys::ROLE_SET_FINALIZER, context).await? {
        return Ok(Action::await_change());
    }
    let (namespace, uid) = (&target.namespace, &target.uid);
    let pods = context.pods_of(uid);
    let groups = context.pod_sets.owned_by(uid);
    let doomed = |metas: Vec<&ObjectMeta>| -> Vec<Doomed> {
        metas
            .into_iter()
            .filter(|meta| !context.is_going(meta))
            .map(Doomed::of)
            .collect()
    };
    let pod_metas = pods.iter().map(|pod| &pod.metadata).collect();
    let group_metas = groups
        .iter()
        .map(|group| kube::Resource::meta(group.as_ref()))
        .collect();
    context
        .writer
        .delete_all(&resource::<PodSet>(), namespace, doomed(group_metas))
        .await?;
    context
        .writer
        .delete_all(&resource::<Pod>(), namespace, doomed(pod_metas))
        .await?;
    let unseen = ["Pod", "PodSet"]
        .into_iter()
        .any(|kind| !context.ledger.unseen(uid, kind, |_| false).is_empty());
    if !pods.is_empty() || !groups.is_empty() || unseen {
        return Ok(Action::requeue(Duration::from_secs(30)));
    }
    take_group(target, strategy, context).await?;
    context
        .writer
        .release(&kind, meta, keys::ROLE_SET_FINALIZER)
        .await?;
    Ok(Action::await_change())
}
