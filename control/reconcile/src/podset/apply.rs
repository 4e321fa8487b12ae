//! Brings the pods of a PodSet to the plan: deletes and creates them.

use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::{names_of, uid_of};
use kvtide_control_api::{PodSet, keys};
use kvtide_control_core::pod_set::build_pod;
use kvtide_control_core::recovery::RecoveryPlan;
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, owner_reference, resource};

use super::observe::Observed;
use crate::context::Context;
use crate::gangs::Ganging;
use crate::gangs::Wanted;

pub(super) async fn apply(
    set: &PodSet,
    observed: &Observed,
    plan: &RecoveryPlan,
    gang: &Ganging,
    context: &Context,
) -> Result<(), Error> {
    let (namespace, name) = names_of(&set.metadata);
    let uid = uid_of(&set.metadata);
    let owner = owner_reference::<PodSet>(&set.metadata);
    // The PodGroup first: a pod that is seen before its group is scheduled alone.
    let asks = gang.asks(set.spec.pod_group_size);
    if let (Some(asks), Some(strategy)) = (asks, &set.spec.scheduling_strategy) {
        let wanted = Wanted {
            parent: uid,
            namespace,
            name,
            label: (keys::POD_SET_NAME, name),
            owner: &owner,
            strategy,
            asks,
        };
        context
            .gangs
            .ensure(&context.writer, &context.ledger, wanted)
            .await?;
    }
    let pods = resource::<Pod>();
    for &at in &plan.force {
        if let Some(pod) = observed.pods.get(at) {
            context
                .writer
                .delete(&pods, namespace, &Doomed::of(&pod.metadata), true)
                .await?;
            let note = format!(
                "deleted pod {} by force: its node is out of service, or its \
                template opted in",
                pod.metadata.name.as_deref().unwrap_or_default()
            );
            context
                .tell::<PodSet>(&set.metadata, EventType::Warning, "ForcedDeletion", note)
                .await;
        }
    }
    let doomed: Vec<Doomed> = plan
        .delete
        .iter()
        .filter_map(|&at| observed.pods.get(at))
        .map(|pod| Doomed::of(&pod.metadata))
        .collect();
    if plan.attempt {
        context
            .tell::<PodSet>(
                &set.metadata,
                EventType::Warning,
                "Recovering",
                why(observed),
            )
            .await;
    }
    context.writer.delete_all(&pods, namespace, doomed).await?;
    let gang = gang.gang(name, context);
    let objects = plan
        .create
        .iter()
        .map(|&index| build_pod(set, index, gang.as_ref(), &owner))
        .collect();
    context
        .writer
        .create_all(uid, "Pod", &pods, namespace, objects)
        .await
}

/// Which pods are ill and with what.
pub(super) fn why(observed: &Observed) -> String {
    let policy = observed.view.policy;
    let ill = observed
        .pods
        .iter()
        .zip(&observed.view.pods)
        .filter_map(|(pod, view)| {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            view.ailment(policy)
                .map(|ailment| format!("pod {name} {ailment}"))
        });
    ill.collect::<Vec<_>>().join("; ")
}
