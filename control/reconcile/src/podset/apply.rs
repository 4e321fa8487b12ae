//! Brings the pods of a PodSet to the plan: deletes and creates them.

use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::EventType;
use kvtide_control_api::target::Target;
use kvtide_control_api::{PodSet, keys};
use kvtide_control_core::pod_set::build_pod;
use kvtide_control_core::recovery::RecoveryPlan;
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, resource};

use super::observe::Observed;
use crate::context::Context;
use crate::gangs::Ganging;
use crate::gangs::Wanted;

pub(super) async fn apply(
    set: &PodSet,
    target: &Target,
    observed: &Observed,
    plan: &RecoveryPlan,
    gang: &Ganging,
    context: &Context,
) -> Result<(), Error> {
    let (namespace, name) = target.names();
    // The PodGroup first: a pod that is seen before its group is scheduled alone.
    let asks = gang.asks(set.spec.pod_group_size);
    if let (Some(asks), Some(strategy)) = (asks, &set.spec.scheduling_strategy) {
        let wanted = Wanted {
            target,
            label: keys::POD_SET_NAME,
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
                observed.ailments(),
            )
            .await;
    }
    context.writer.delete_all(&pods, namespace, doomed).await?;
    let gang = gang.gang(name, context);
    let objects = plan
        .create
        .iter()
        .map(|&index| build_pod(set, index, gang.as_ref(), &target.owner_ref))
        .collect();
    context
        .writer
        .create_all(&target.uid, "Pod", &pods, namespace, objects)
        .await
}
