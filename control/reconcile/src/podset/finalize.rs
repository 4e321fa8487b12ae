//! The end of a PodSet: its pods first.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::controller::Action;
use kvtide_control_api::target::Target;
use kvtide_control_api::{PodSet, PodSetSpec, keys};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, resource};

use super::observe::{Terms, views_of};
use crate::cascade::{take_group, takes_children};
use crate::context::Context;

/// Lets a deleted PodSet go once its pods are gone. One that cannot be decoded has no `spec`: what
/// that would name besides follows by its owner references.
pub(super) async fn finalize(
    target: &Target,
    meta: &ObjectMeta,
    spec: Option<&PodSetSpec>,
    context: &Context,
) -> Result<Action, Error> {
    let kind = resource::<PodSet>();
    if !takes_children::<PodSet>(meta, keys::POD_SET_FINALIZER, context).await? {
        return Ok(Action::await_change());
    }
    let (namespace, uid) = (&target.namespace, &target.uid);
    let pods = context.pods_of(uid);
    let cached = |uid: &str| {
        pods.iter()
            .any(|pod| pod.metadata.uid.as_deref() == Some(uid))
    };
    let unseen = context.ledger.unseen(uid, "Pod", cached);
    let doomed: Vec<Doomed> = pods
        .iter()
        .filter(|pod| !context.is_going(&pod.metadata))
        .map(|pod| Doomed::of(&pod.metadata))
        .collect();
    context
        .writer
        .delete_all(&resource::<Pod>(), namespace, doomed)
        .await?;
    if !pods.is_empty() || !unseen.is_empty() {
        // Stuck pods still hold the set: they are forced under the same conditions as ever.
        let terms = Terms::of(meta, spec);
        let (views, look_again) = views_of(&pods, &terms, &context.now(), context);
        for (pod, view) in pods.iter().zip(&views) {
            if view.stuck {
                let doomed = Doomed::of(&pod.metadata);
                context
                    .writer
                    .delete(&resource::<Pod>(), namespace, &doomed, true)
                    .await?;
            }
        }
        return Ok(Action::requeue(
            look_again.unwrap_or(Duration::from_secs(30)),
        ));
    }
    let strategy = spec.and_then(|spec| spec.scheduling_strategy.as_ref());
    take_group(target, strategy, context).await?;
    context
        .writer
        .release(&kind, meta, keys::POD_SET_FINALIZER)
        .await?;
    Ok(Action::await_change())
}
