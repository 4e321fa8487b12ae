//! RoleSet: roles made of pods or of PodSets.

mod apply;
mod finalize;
mod observe;
mod prepare;
mod scaling_target;
mod status;

use std::sync::Arc;

use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::names_of;
use kvtide_control_api::{RoleSet, conditions, set_condition};
use kvtide_control_core::budget::CREATIONS_MAX;
use kvtide_control_core::role_plan::{ReplicaState, RolePlan};
use kvtide_control_core::rollout;
use kvtide_control_core::validate::{self, Violation};
use kvtide_control_kube::error::{self, Error};
use kvtide_control_kube::writer::resource;

use crate::context::Context;
use crate::gangs::Ganging;
use crate::status::tell_failure;
use crate::undecodable::{readable, undecodable};
use apply::apply;
use finalize::finalize;
use observe::{Observed, Unit, build, dereference};
use prepare::{note_early_ends, note_rolling, prepare};
use scaling_target::mark_scaling_target;
use status::{note_observed, status_of};

/// Reconciles one RoleSet.
///
/// # Errors
///
/// When the API server refuses something; the object is tried again.
pub async fn reconcile(
    object: Arc<DeserializeGuard<RoleSet>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let set = match &object.0 {
        Ok(set) => set,
        Err(invalid) if invalid.metadata.deletion_timestamp.is_some() => {
            return finalize(&invalid.metadata, None, &context).await;
        }
        Err(invalid) => {
            return undecodable::<RoleSet>(&context, invalid).await;
        }
    };
    readable(&context, &set.metadata);
    let outcome = look_at(set, &context).await;
    tell_failure(set, &outcome, |status| &mut status.conditions, &context).await;
    outcome
}

async fn look_at(set: &RoleSet, context: &Context) -> Result<Action, Error> {
    let set = context.ledger.with_newest_status(set);
    let set = set.as_ref();
    if set.metadata.deletion_timestamp.is_some() {
        let strategy = set.spec.scheduling_strategy.as_ref();
        return finalize(&set.metadata, strategy, context).await;
    }
    let (_, name) = names_of(&set.metadata);
    let violations = validate::role_set(name, &set.spec);
    if !violations.is_empty() {
        return invalid(set, &violations, context).await;
    }
    let mut observed = dereference(set, context);
    if prepare(set, &observed, context).await? {
        // The watch shows the object again, with its marks.
        return Ok(Action::await_change());
    }
    let entries = build(set, &mut observed, context);
    if note_rolling(set, &entries, context).await? {
        return Ok(Action::await_change());
    }
    let gang = gang(set, &observed, context).await?;
    let plans = rollout::plan(set.spec.update_strategy.unwrap_or_default(), &entries);
    note_early_ends(set, &observed, context).await?;
    let applied = apply(set, &observed, &plans, &gang, context).await;
    let applied = applied.and(mark_scaling_target(set, &observed, context).await);
    let changed = plans.iter().any(|plan| !plan.is_empty()) || !observed.orphans.is_empty();
    // What was just created or deleted is told of when the watch shows it.
    let failure = error::failure(&applied);
    if !changed || failure.is_some() {
        let status = status_of(set, &observed, &entries, &gang, failure, context);
        let kind = resource::<RoleSet>();
        context
            .writer
            .status(&kind, &set.metadata, set.status.as_ref(), &status)
            .await?;
    }
    applied?;
    let full = |plan: &RolePlan| i32::try_from(plan.create.len()) == Ok(CREATIONS_MAX);
    let more = plans.iter().any(full).then_some(super::NEXT_CREATIONS);
    let again = observed.look_again.into_iter();
    let again = again.chain(more).chain(gang.look_again()).min();
    Ok(again.map_or_else(Action::await_change, Action::requeue))
}

async fn invalid(
    set: &RoleSet,
    violations: &[Violation],
    context: &Context,
) -> Result<Action, Error> {
    let mut status = set.status.clone().unwrap_or_default();
    let now = context.now();
    let message = validate::describe(violations);
    note_observed(set, &mut status, context);
    let all = &mut status.conditions;
    // Whoever waits for it to be ready must not take it for ready.
    for (kind, holds) in [(conditions::INVALID, true), (conditions::READY, false)] {
        set_condition(all, kind, holds, "Invalid", message.clone(), &now);
    }
    context
        .tell::<RoleSet>(&set.metadata, EventType::Warning, "Invalid", message)
        .await;
    let kind = resource::<RoleSet>();
    context
        .writer
        .status(&kind, &set.metadata, set.status.as_ref(), &status)
        .await?;
    Ok(Action::await_change())
}

/// How all pods of the RoleSet are scheduled together.
async fn gang(set: &RoleSet, observed: &Observed, context: &Context) -> Result<Ganging, Error> {
    let strategy = set.spec.scheduling_strategy.as_ref();
    let stays = |unit: &&Unit| {
        matches!(
            unit.replica.state,
            ReplicaState::Waiting | ReplicaState::Ready
        )
    };
    let units = observed.roles.values().flat_map(|role| &role.units);
    let siblings = units.filter(stays).map(|unit| &unit.meta);
    Ganging::of::<RoleSet>(&set.metadata, strategy, siblings, context).await
}
