//! Brings the replicas of a RoleSet to the plan: deletes, changes and creates pods and PodSets.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::{annotation, label, names_of};
use kvtide_control_api::target::Target;
use kvtide_control_api::{PodSet, RecoveryPolicy, RoleSet, RoleSpec, keys};
use kvtide_control_core::pod::{Marks, Place};
use kvtide_control_core::role_plan::{ReplicaState, RolePlan};
use kvtide_control_core::role_units::{Observed, Unit, is_group};
use kvtide_control_core::{names, pod_group, pod_set};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, resource};

use super::scaling_target::unmark;
use crate::context::Context;
use crate::gangs::Ganging;
use crate::gangs::Wanted;
use crate::taken_names::TakenNames;

/// Labels of a RoleSet that its pods inherit, as in AIBrix.
const INHERITED_LABELS: [&str; 2] = ["name", "previous-owner"];

/// Candidates for a replica's name; far more than a role's replicas.
const NAMES_MAX: u32 = 1 << 20;

pub(super) async fn apply(
    set: &RoleSet,
    target: &Target,
    observed: &Observed,
    plans: &[RolePlan],
    gang: &Ganging,
    context: &Context,
) -> Result<(), Error> {
    let (namespace, name) = target.names();
    // The PodGroup first: a pod that is seen before its group is scheduled alone.
    let asks = gang.asks(pod_group::role_set_members(&set.spec));
    if let (Some(asks), Some(strategy)) = (asks, &set.spec.scheduling_strategy) {
        let wanted = Wanted {
            target,
            label: keys::ROLE_SET_NAME,
            strategy,
            asks,
        };
        if context
            .gangs
            .ensure(&context.writer, &context.ledger, wanted)
            .await?
        {
            tracing::debug!(%namespace, %name, "applied the PodGroup");
        }
    }
    // Deletions before creations: what is created may need the room.
    let mut doomed_pods = Vec::new();
    let mut doomed_groups = Vec::new();
    let planned = set.spec.roles.iter().zip(plans).flat_map(|(role, plan)| {
        let units = observed.roles.get(&role.name);
        plan.delete
            .iter()
            .filter_map(move |&at| units.and_then(|units| units.units.get(at)))
    });
    for unit in planned
        .chain(&observed.orphans)
        .filter(|unit| unit.meta.uid.is_some())
    {
        let doomed = if unit.is_group {
            &mut doomed_groups
        } else {
            &mut doomed_pods
        };
        doomed.push(Doomed::of(&unit.meta));
    }
    context
        .writer
        .delete_all(&resource::<Pod>(), namespace, doomed_pods)
        .await?;
    context
        .writer
        .delete_all(&resource::<PodSet>(), namespace, doomed_groups)
        .await?;
    // What is refused for one replica or role must not keep the others from replacing theirs.
    let mut result = release(target, set, observed, context).await;
    result = result.and(update_groups(target, set, observed, context).await);
    for (role, plan) in set.spec.roles.iter().zip(plans) {
        tell_of_step(set, role, observed, plan, context).await;
        let created = create(target, set, role, observed, plan, gang, context).await;
        result = result.and(created);
    }
    result
}

/// Tells of one step of a role's rollout.
async fn tell_of_step(
    set: &RoleSet,
    role: &RoleSpec,
    observed: &Observed,
    plan: &RolePlan,
    context: &Context,
) {
    let units = observed.roles.get(&role.name);
    let units = units.map_or(&[][..], |units| &units.units);
    let is_going = |unit: &Unit| matches!(unit.replica.state, ReplicaState::Going { .. });
    let outdated = units.iter().enumerate();
    let outdated = outdated.filter(|(_, unit)| !unit.replica.updated && !is_going(unit));
    let (doomed, left): (Vec<_>, Vec<_>) = outdated.partition(|(at, _)| plan.delete.contains(at));
    if plan.is_empty() || doomed.is_empty() && left.is_empty() {
        return;
    }
    let (name, generation) = (&role.name, set.metadata.generation.unwrap_or(0));
    let (deleted, created, left) = (doomed.len(), plan.create.len(), left.len());
    let note = format!(
        "role {name} (generation {generation}): deleting {deleted} outdated replicas, creating \
         {created} new ones; {left} outdated ones are left"
    );
    context
        .tell::<RoleSet>(&set.metadata, EventType::Normal, "Rollout", note)
        .await;
}

/// Lets replicas go that somebody took the role's name off, to look at them in peace: as ReplicaSets
/// do, they are made nobody's and replaced.
async fn release(
    target: &Target,
    set: &RoleSet,
    observed: &Observed,
    context: &Context,
) -> Result<(), Error> {
    for unit in &observed.released {
        let kind = if unit.is_group {
            resource::<PodSet>()
        } else {
            resource::<Pod>()
        };
        if unmark(unit, context).await? {
            continue; // Changed by that, it is let go at the next look.
        }
        let uid = &target.uid;
        context.writer.disown(&kind, &unit.meta, uid).await?;
        let (_, name) = names_of(&unit.meta);
        let note = format!(
            "released {name}: it no longer has the label {}",
            keys::ROLE_NAME
        );
        context
            .tell::<RoleSet>(&set.metadata, EventType::Normal, "Released", note)
            .await;
    }
    Ok(())
}

/// What of a PodSet can change while its pods live: how it recovers, and the numbers of its gang.
async fn update_groups(
    target: &Target,
    set: &RoleSet,
    observed: &Observed,
    context: &Context,
) -> Result<(), Error> {
    let mut changed = Vec::new();
    for group in &observed.pod_sets {
        let name = label(&group.metadata, keys::ROLE_NAME);
        let role = set
            .spec
            .roles
            .iter()
            .find(|role| role.name == name && is_group(role));
        let hash = label(&group.metadata, keys::ROLE_TEMPLATE_HASH);
        let current = observed
            .roles
            .get(name)
            .is_some_and(|units| units.hash == hash);
        let (Some(role), true, false) = (role, current, context.is_going(&group.metadata)) else {
            continue;
        };
        let wanted_policy = policy_of(role, context);
        let has_policy = group.spec.recovery_policy.unwrap_or_default();
        let same_policy = wanted_policy.recreates_all() == has_policy.recreates_all();
        if !same_policy || role.scheduling_strategy != group.spec.scheduling_strategy {
            let mut group = group.clone();
            group.spec.recovery_policy = Some(wanted_policy);
            group.spec.scheduling_strategy = role.scheduling_strategy.clone();
            changed.push(group);
        }
    }
    context
        .writer
        .replace_all(&target.namespace, changed)
        .await?;
    Ok(())
}

/// How a PodSet of a role recovers, as the installed CRDs spell it.
fn policy_of(role: &RoleSpec, context: &Context) -> RecoveryPolicy {
    let policy = role.recovery_policy.unwrap_or_default();
    if policy.recreates_all() && context.crd_gap.gap().full_recreate {
        RecoveryPolicy::Recreate
    } else {
        policy
    }
}

async fn create(
    target: &Target,
    set: &RoleSet,
    role: &RoleSpec,
    observed: &Observed,
    plan: &RolePlan,
    gang: &Ganging,
    context: &Context,
) -> Result<(), Error> {
    let Some(units) = observed
        .roles
        .get(&role.name)
        .filter(|_| !plan.create.is_empty())
    else {
        return Ok(());
    };
    let (namespace, name) = target.names();
    let (uid, owner) = (&target.uid, &target.owner_ref);
    let gang = gang.gang(name, context);
    let place = |index: Option<i32>| Place {
        service: label(&set.metadata, keys::STORM_SERVICE_NAME),
        role_set: name,
        role_set_index: annotation(&set.metadata, keys::ROLE_SET_INDEX),
        role: &role.name,
        hash: &units.hash,
        index,
        gang: gang.clone(),
    };
    let labels = set.metadata.labels.iter().flatten();
    let inherited = Marks {
        labels: labels
            .filter(|(key, _)| INHERITED_LABELS.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        ..Marks::default()
    };
    let taken: BTreeSet<&str> = units
        .units
        .iter()
        .filter_map(|unit| unit.meta.name.as_deref())
        .collect();
    // The caches may still say that these are the RoleSet's.
    let released = observed.released.iter();
    let released: BTreeSet<&str> = released
        .filter_map(|unit| unit.meta.name.as_deref())
        .collect();
    let foreign = TakenNames::to(&set.metadata, context);
    let is_foreign_pod = |name: &str| released.contains(name) || foreign.has_pod(name);
    let (role_name, hash) = (&role.name, &units.hash);
    let mut plain = (0..NAMES_MAX)
        .map(|nth| names::plain_pod(name, uid, role_name, hash, nth))
        .filter(|candidate| !taken.contains(candidate.as_str()) && !is_foreign_pod(candidate));
    let size = role.pod_group_size.unwrap_or(1);
    let free = |index: i32| {
        let candidates = 0..NAMES_MAX;
        if is_group(role) {
            let mut names = candidates.map(|nth| names::pod_set(name, role_name, hash, index, nth));
            names.find(|candidate| {
                !released.contains(candidate.as_str()) && !foreign.has_group(candidate, size)
            })
        } else {
            let mut names =
                candidates.map(|nth| names::indexed_pod(name, role_name, hash, index, nth));
            names.find(|candidate| !is_foreign_pod(candidate))
        }
    };
    let mut objects = Vec::with_capacity(plan.create.len());
    for &index in &plan.create {
        let replica = match index {
            Some(index) => free(index),
            None => plain.next(),
        };
        let replica = replica.unwrap_or_default();
        let place = place(index);
        objects.push(if is_group(role) {
            pod_set::build(&replica, role, policy_of(role, context), &place, owner).map_err(
                |source| Error::Build {
                    kind: "PodSet",
                    source,
                },
            )?
        } else {
            place.pod(&replica, &role.template, owner, &inherited)
        });
    }
    let (kind, resource) = if is_group(role) {
        ("PodSet", resource::<PodSet>())
    } else {
        ("Pod", resource::<Pod>())
    };
    context
        .writer
        .create_all(uid, kind, &resource, namespace, objects)
        .await
}
