//! Events of a StormService: how it scales and rolls out, one for each step.
//!
//! A step is told when it is decided. The generation in its note keeps a second rollout between the
//! same revisions from being taken for the first one told again.

use kube::runtime::events::EventType;
use kvtide_control_api::{StormService, StormServiceStatus};
use kvtide_control_core::service_plan::ServicePlan;

use super::observe::Observed;
use super::revisions::Revisions;
use crate::context::Context;

/// Names in one event; of more, only the number is told.
const NAMES_MAX: usize = 5;

/// Tells what a plan does: to the number of RoleSets, and to which of them the revision goes now.
pub(super) async fn tell_of_plan(
    service: &StormService,
    observed: &Observed,
    plan: &ServicePlan,
    revisions: &Revisions,
    context: &Context,
) {
    if let Some(note) = scaling(service, observed, plan) {
        tell(service, "Scaling", note, context).await;
    }
    if let Some(step) = step(observed, plan) {
        let note = format!("{}: {step}", rollout(service, &revisions.update));
        tell(service, "Rollout", note, context).await;
    }
}

/// Tells that all RoleSets are of the present revision now, if `status` is the first to say so.
pub(super) async fn tell_of_arrival(
    service: &StormService,
    status: &StormServiceStatus,
    context: &Context,
) {
    let before = service.status.as_ref();
    let before = before.map_or("", |status| status.current_revision.as_str());
    if !before.is_empty() && before != status.current_revision {
        let note = format!("{}: complete", rollout(service, &status.current_revision));
        tell(service, "Rollout", note, context).await;
    }
}

async fn tell(service: &StormService, reason: &str, note: String, context: &Context) {
    let meta = &service.metadata;
    context
        .tell::<StormService>(meta, EventType::Normal, reason, note)
        .await;
}

fn rollout(service: &StormService, revision: &str) -> String {
    let generation = service.metadata.generation.unwrap_or(0);
    format!("revision {revision} (generation {generation})")
}

fn scaling(service: &StormService, observed: &Observed, plan: &ServicePlan) -> Option<String> {
    if plan.create.is_empty() && plan.delete.is_empty() {
        return None;
    }
    let wanted = service.spec.replicas.unwrap_or(1);
    let sets = observed.sets.iter();
    let there = sets.filter(|owned| !owned.view.going).count();
    let differs = i32::try_from(there) != Ok(wanted);
    differs.then(|| format!("scaling from {there} to {wanted} RoleSets"))
}

/// Which RoleSets take the revision in their place, and which make room for one that has it.
fn step(observed: &Observed, plan: &ServicePlan) -> Option<String> {
    let updated = plan.update.iter();
    let replaced = plan.delete.iter();
    let replaced = replaced.filter(|&&at| {
        let owned = observed.sets.get(at);
        owned.is_some_and(|owned| owned.view.replace && !owned.view.updated)
    });
    let parts = [
        ("updating", named(observed, updated.copied())),
        ("replacing", named(observed, replaced.copied())),
    ];
    let parts = parts.into_iter();
    let parts = parts.filter_map(|(verb, names)| Some(format!("{verb} {}", names?)));
    let step = parts.collect::<Vec<_>>().join(", ");
    (!step.is_empty()).then_some(step)
}

fn named(observed: &Observed, positions: impl Iterator<Item = usize>) -> Option<String> {
    let names: Vec<&str> = positions
        .filter_map(|at| observed.sets.get(at)?.set.metadata.name.as_deref())
        .collect();
    match names.len() {
        0 => None,
        1..=NAMES_MAX => Some(names.join(", ")),
        many => Some(format!("{many} RoleSets")),
    }
}
