//! The status of a StormService: counts, no writes.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kvtide_control_api::meta::{annotation, names_of};
use kvtide_control_api::{
    Condition, RoleSet, RoleStatus, StormService, StormServiceStatus, conditions, keys,
    set_condition,
};
use kvtide_control_core::validate;
use kvtide_control_kube::error::Error;

use super::headless::Headless;
use super::observe::{Observed, Owned};
use super::revisions::Revisions;
use crate::context::Context;
use crate::status::{failure_below, note_failure};

pub(super) fn status_of(
    service: &StormService,
    observed: &Observed,
    revisions: &Revisions,
    headless: &Result<Headless, Error>,
    failure: Option<String>,
    now: &Time,
    context: &Context,
) -> StormServiceStatus {
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
    let complete = arrived && status.replicas == wanted && status.ready_replicas >= wanted;
    let message = format!("{} of {wanted} RoleSets are ready", status.ready_replicas);
    let (ready, reason, message) = match (unnamed(name, headless), complete) {
        (Some(why), _) => (false, "NoHeadlessService", why),
        (None, true) => (true, "Ready", message),
        (None, false) => (false, "NotReady", message),
    };
    let all = &mut status.conditions;
    all.retain(|condition| condition.kind != conditions::INVALID);
    set_condition(all, conditions::READY, ready, reason, message, now);
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
        now,
    );
    note_failure(all, failure, now);
    note_sidecar(service, all, now);
    note_schema(all, context, now);
    status
}

/// Why pods have no names in DNS, if they have none.
fn unnamed(name: &str, headless: &Result<Headless, Error>) -> Option<String> {
    let why = match headless {
        Ok(Headless::Serves) => return None,
        Ok(Headless::Waits) => {
            format!("the Service {name} is being deleted and will be made again")
        }
        Err(error) => error.to_string(),
    };
    Some(format!("pods have no names in DNS: {why}"))
}

/// What a status says of CRDs that drop fields.
fn note_schema(all: &mut Vec<Condition>, context: &Context, now: &Time) {
    let kind = conditions::SCHEMA_OUTDATED;
    match context.crd_gap.gap().lost {
        Some(gap) => set_condition(all, kind, true, "FieldsDropped", gap, now),
        None => all.retain(|condition| condition.kind != kind),
    }
}

/// What a status says of an annotation that asks for AIBrix's sidecar.
fn note_sidecar(service: &StormService, all: &mut Vec<Condition>, now: &Time) {
    let kind = conditions::SIDECAR_NOT_INJECTED;
    if annotation(&service.metadata, keys::SIDECAR_INJECTION).is_some() {
        let message = validate::SIDECAR_NOT_INJECTED;
        set_condition(all, kind, true, "NotSupported", message, now);
    } else {
        all.retain(|condition| condition.kind != kind);
    }
}

/// The status of one that waits for what a predecessor left behind.
pub(super) fn unsettled(service: &StormService, role_set: &str, now: &Time) -> StormServiceStatus {
    let mut status = service.status.clone().unwrap_or_default();
    status.observed_generation = service.metadata.generation;
    let message = format!(
        "RoleSet {role_set} still names a StormService of this name that was deleted as its owner; \
         garbage collection settles whose it is"
    );
    let (all, kind) = (&mut status.conditions, conditions::READY);
    set_condition(all, kind, false, "Unsettled", message, now);
    status
}

/// What a RoleSet, or something below it, is refused.
pub(super) fn failure_of_sets(observed: &Observed) -> Option<String> {
    let sets = observed.sets.iter().map(|owned| {
        let status = owned.set.status.as_ref();
        let conditions = status.map_or(&[][..], |status| &status.conditions);
        (names_of(&owned.set.metadata).1, conditions)
    });
    failure_below("RoleSet", sets)
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
