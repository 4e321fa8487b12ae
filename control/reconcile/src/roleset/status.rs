//! The status of a RoleSet: counts, no writes.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kvtide_control_api::meta::names_of;
use kvtide_control_api::{
    RoleSet, RoleSetStatus, RoleStatus, RoleUpdateOrder, conditions, set_condition,
};
use kvtide_control_core::role_units::{Built, Observed};
use kvtide_control_core::rollout::{self, RoleEntry};
use kvtide_control_kube::error::Error;

use crate::context::Context;
use crate::frame::Kind;
use crate::gangs::Ganging;
use crate::status::{failure_below, note_failure};

pub(super) fn status_of(
    set: &RoleSet,
    built: &Built,
    gang: &Ganging,
    failure: Option<&Error>,
    now: &Time,
    context: &Context,
) -> RoleSetStatus {
    let (observed, entries) = (&built.observed, built.entries.as_slice());
    let mut status = set.status.clone().unwrap_or_default();
    set.note_generation(&mut status, now, context);
    status.roles = set
        .spec
        .roles
        .iter()
        .zip(entries)
        .map(|(role, entry)| RoleStatus {
            name: role.name.clone(),
            ..entry.view.status()
        })
        .collect();
    let waiting: Vec<&str> = set
        .spec
        .roles
        .iter()
        .zip(entries)
        .filter(|(_, entry)| entry.view.ready() < entry.view.replicas)
        .map(|(role, _)| role.name.as_str())
        .collect();
    let is_ready = waiting.is_empty();
    let done = entries.iter().all(|entry| entry.view.is_done());
    let all = &mut status.conditions;
    all.retain(|condition| condition.kind != conditions::INVALID);
    let (reason, message) = if is_ready {
        ("AllRolesReady", String::new())
    } else {
        (
            "RolesNotReady",
            format!("not ready: {}", waiting.join(", ")),
        )
    };
    set_condition(all, conditions::READY, is_ready, reason, message, now);
    let outdated = |role: &RoleStatus| role.updated_replicas < role.replicas;
    let (progressing, reason) = if done {
        (false, "Complete")
    } else if observed.paused && status.roles.iter().any(outdated) {
        (false, "Paused")
    } else {
        (true, "RolesChanging")
    };
    let message = held_up(set, observed, entries);
    set_condition(
        all,
        conditions::PROGRESSING,
        progressing,
        reason,
        message,
        now,
    );
    if built.held.is_empty() {
        all.retain(|condition| condition.kind != conditions::RECOVERING);
    } else {
        let (kind, message) = (conditions::RECOVERING, held(built));
        set_condition(all, kind, true, "PodsEndEarly", message, now);
    }
    gang.set_condition(all, now);
    let failure = failure.map(ToString::to_string);
    note_failure(all, failure.or_else(|| failure_of_groups(observed)), now);
    status
}

fn failure_of_groups(observed: &Observed) -> Option<String> {
    let groups = observed.pod_sets.iter().map(|group| {
        let conditions = group
            .status
            .as_ref()
            .map(|status| status.conditions.as_slice());
        (names_of(&group.metadata).1, conditions.unwrap_or_default())
    });
    failure_below("PodSet", groups)
}

/// Which roles wait for which, where they roll one after the other.
fn held_up(set: &RoleSet, observed: &Observed, entries: &[RoleEntry]) -> String {
    let roles = &set.spec.roles;
    let name = |at: usize| roles.get(at).map_or("", |role| role.name.as_str());
    let sequential = set.spec.update_strategy.unwrap_or_default() == RoleUpdateOrder::Sequential;
    let rolls = sequential && !observed.paused;
    match rollout::held_up(entries).filter(|_| rolls) {
        None => String::new(),
        Some((blocker, held)) => {
            let held: Vec<&str> = held.into_iter().map(name).collect();
            let blocker = name(blocker);
            format!(
                "until {blocker} is completely updated and ready, these roles wait: {}",
                held.join(", ")
            )
        }
    }
}

/// Which roles wait before their pods are replaced.
fn held(built: &Built) -> String {
    format!(
        "pods ended soon after they were made, and are replaced later each time: {}",
        built.held.join(", ")
    )
}
