//! Marks the pod that stands for a RoleSet where an autoscaler counts pods: a label on the pod, not in its
//! template, so that no pod is replaced for it.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kvtide_control_api::meta::{group_index, label, names_of, seconds, uid_of};
use kvtide_control_api::{RoleSet, keys};
use kvtide_control_core::role_plan::ReplicaState;
use kvtide_control_core::role_units::{Observed, Unit};
use kvtide_control_core::scaling_target::{Candidate, choose};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;
use serde_json::{Value, json};

use crate::context::Context;

/// See the module. The new pod is marked before the old one no longer is.
pub(super) async fn mark_scaling_target(
    set: &RoleSet,
    observed: &Observed,
    context: &Context,
) -> Result<(), Error> {
    if label(&set.metadata, keys::STORM_SERVICE_NAME).is_empty() {
        return Ok(());
    }
    let pods = candidates(set, observed, context);
    let views: Vec<Candidate> = pods.iter().map(|(view, _)| view.clone()).collect();
    let chosen = choose(&views);
    if let Some((view, meta)) = chosen.and_then(|at| pods.get(at))
        && !view.marked
    {
        mark(meta, json!("true"), context).await?;
    }
    for (at, (view, meta)) in pods.iter().enumerate() {
        if view.marked && Some(at) != chosen {
            mark(meta, Value::Null, context).await?;
        }
    }
    Ok(())
}

/// Takes the mark off a replica that is let go, or it would be counted beside its successor. Returns
/// whether the replica itself was changed by that, and not pods of it.
pub(super) async fn unmark(unit: &Unit, context: &Context) -> Result<bool, Error> {
    let is_marked = |meta: &ObjectMeta| !label(meta, keys::SCALING_TARGET).is_empty();
    for pod in context.pods_of(uid_of(&unit.meta)) {
        if is_marked(&pod.metadata) {
            mark(&pod.metadata, Value::Null, context).await?;
        }
    }
    let marked = is_marked(&unit.meta);
    if marked {
        mark(&unit.meta, Value::Null, context).await?;
    }
    Ok(marked)
}

/// Labels this pod, and not a later one of its name.
async fn mark(meta: &ObjectMeta, value: Value, context: &Context) -> Result<(), Error> {
    let patch = json!({"metadata": {
        "uid": meta.uid, "labels": {keys::SCALING_TARGET: value},
    }});
    let (namespace, name) = names_of(meta);
    let (kind, writer) = (resource::<Pod>(), &context.writer);
    writer
        .merge_unless_gone(&kind, namespace, name, &patch)
        .await
}

/// The pods that stay, those of groups as well.
fn candidates(
    set: &RoleSet,
    observed: &Observed,
    context: &Context,
) -> Vec<(Candidate, ObjectMeta)> {
    let mut found = Vec::new();
    for (at, role) in set.spec.roles.iter().enumerate() {
        let preferred = observed.scaling_role.as_deref() == Some(&role.name);
        let rank = if preferred { 0 } else { at + 1 };
        let units = observed.roles.get(&role.name);
        let units = units.iter().flat_map(|units| &units.units);
        // Also not what was deleted just now.
        for unit in units.filter(|unit| unit.stays() && !context.is_going(&unit.meta)) {
            let slot = unit.replica.index;
            let mut add = |meta: &ObjectMeta, ready: bool, place: Option<i32>| {
                let view = Candidate {
                    rank,
                    ready,
                    marked: !label(meta, keys::SCALING_TARGET).is_empty(),
                    index: (slot, place),
                    created_s: seconds(meta.creation_timestamp.as_ref()),
                    name: names_of(meta).1.to_owned(),
                };
                found.push((view, meta.clone()));
            };
            if unit.is_group {
                for pod in context.pods_of(uid_of(&unit.meta)) {
                    if !context.is_going(&pod.metadata) && !pod.is_finished() {
                        let place = group_index(&pod.metadata);
                        add(&pod.metadata, pod.is_ready(), place);
                    }
                }
            } else {
                add(&unit.meta, unit.replica.state == ReplicaState::Ready, None);
            }
        }
    }
    found
}
