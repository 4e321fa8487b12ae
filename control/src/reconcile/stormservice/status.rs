//! The status of a StormService: counts, no writes.

use super::observe::{Observed, Owned};
use super::revisions::Revisions;
use crate::api::{RoleSet, RoleStatus, StormService, StormServiceStatus, keys, set_condition};
use crate::reconcile::conditions;
use crate::reconcile::context::Context;
use crate::reconcile::error::Error;
use crate::reconcile::meta::names_of;
use crate::reconcile::status::note_failure;

pub(super) fn status_of(
    service: &StormService,
    observed: &Observed,
    revisions: &Revisions,
    failure: Option<&Error>,
    context: &Context,
) -> StormServiceStatus {
    let now = context.now();
    let (_, name) = names_of(&service.metadata);
    let wanted = service.spec.replicas.unwrap_or(1);
    let count = |holds: &dyn Fn(&Owned) -> bool| {
        let found = observed.sets.iter().filter(|owned| holds(owned)).count();
        i32::try_from(found).unwrap_or(i32::MAX)
    };
    let mut status = service.status.clone().unwrap_or_default();
    status.observed_generation = service.metadata.generation;
    status.replicas = count(&|_| true);
    status.ready_replicas = count(&|owned| owned.view.ready && !owned.view.going);
    status.not_ready_replicas = status.replicas - status.ready_replicas;
    status.updated_ready_replicas =
        count(&|owned| owned.view.updated && owned.view.settled && !owned.view.going);
    status.updated_replicas = count(&|owned| {
        owned.view.updated && !owned.view.going && owned.readable && all_rolled(&owned.set)
    });
    status.update_revision.clone_from(&revisions.update);
    let outdated = count(&|owned| !owned.view.updated && !owned.view.going);
    let arrived = outdated == 0 && status.updated_ready_replicas >= wanted;
    status.current_revision = if arrived {
        revisions.update.clone()
    } else {
        revisions.current.clone()
    };
    status.current_replicas = count(&|owned| owned.revision == status.current_revision);
    status.collision_count = Some(revisions.collisions);
    // One pod of each RoleSet: what is scaled are those.
    status.scaling_target_selector = format!(
        "{}={name},{}=true",
        keys::STORM_SERVICE_NAME,
        keys::SCALING_TARGET
    );
    status.role_statuses = sum_roles(service, observed);
    let ready = arrived && status.replicas == wanted && status.ready_replicas >= wanted;
    let all = &mut status.conditions;
    all.retain(|condition| condition.kind != conditions::INVALID);
    let message = format!("{} of {wanted} RoleSets are ready", status.ready_replicas);
    let reason = if ready { "Ready" } else { "NotReady" };
    set_condition(all, conditions::READY, ready, reason, message, &now);
    let halfway = count(&|owned| has_outdated(&owned.set) && !owned.view.going);
    let waits = service.spec.paused && outdated.saturating_add(halfway) > 0;
    let reason = match (ready, waits) {
        (_, true) => "Paused",
        (true, false) => "Complete",
        (false, false) => "Processing",
    };
    set_condition(
        all,
        conditions::PROGRESSING,
        !ready && reason != "Paused",
        reason,
        "",
        &now,
    );
    note_failure(all, failure, &now);
    match context.schema.gap().lost {
        Some(gap) => {
            set_condition(
                all,
                conditions::SCHEMA_OUTDATED,
                true,
                "FieldsDropped",
                gap,
                &now,
            );
        }
        None => all.retain(|condition| condition.kind != conditions::SCHEMA_OUTDATED),
    }
    status
}

/// Whether a role of a RoleSet has replicas that are not of its present template.
fn has_outdated(set: &RoleSet) -> bool {
    let roles = set.status.iter().flat_map(|status| &status.roles);
    roles
        .into_iter()
        .any(|role| role.updated_replicas < role.replicas)
}

fn all_rolled(set: &RoleSet) -> bool {
    let status = set.status.clone().unwrap_or_default();
    set.spec.roles.iter().all(|role| {
        status.roles.iter().any(|counted| {
            counted.name == role.name && counted.updated_replicas == role.replicas.unwrap_or(1)
        })
    })
}

/// Each role over all RoleSets, in the order of the template.
fn sum_roles(service: &StormService, observed: &Observed) -> Vec<RoleStatus> {
    let roles = service
        .spec
        .template
        .spec
        .as_ref()
        .map_or(&[][..], |spec| &spec.roles);
    let mut sums: Vec<RoleStatus> = roles
        .iter()
        .map(|role| RoleStatus {
            name: role.name.clone(),
            ..RoleStatus::default()
        })
        .collect();
    let add = |sum: &mut i32, more: i32| *sum = sum.saturating_add(more);
    for owned in observed.sets.iter().filter(|owned| !owned.view.going) {
        let status = owned.set.status.iter().flat_map(|status| &status.roles);
        for counted in status {
            if let Some(sum) = sums.iter_mut().find(|sum| sum.name == counted.name) {
                add(&mut sum.replicas, counted.replicas);
                add(&mut sum.ready_replicas, counted.ready_replicas);
                add(&mut sum.not_ready_replicas, counted.not_ready_replicas);
                add(&mut sum.updated_replicas, counted.updated_replicas);
                add(
                    &mut sum.updated_ready_replicas,
                    counted.updated_ready_replicas,
                );
            }
        }
    }
    sums
}
