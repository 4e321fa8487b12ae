//! RoleSet: roles made of pods or of PodSets.

mod apply;
mod finalize;
mod observe;
mod prepare;
mod scaling_target;
mod status;

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kvtide_control_api::crd_gap::note_generation;
use kvtide_control_api::meta::names_of;
use kvtide_control_api::target::Target;
use kvtide_control_api::{Condition, RoleSet, RoleSetSpec, RoleSetStatus};
use kvtide_control_core::budget::CREATIONS_MAX;
use kvtide_control_core::role_plan::RolePlan;
use kvtide_control_core::role_units::{Observed, build, observe};
use kvtide_control_core::rollout;
use kvtide_control_core::validate::{self, Violation};
use kvtide_control_kube::error::{self, Error};
use kvtide_control_kube::writer::resource;

use crate::context::Context;
use crate::frame::{self, Kind};
use crate::gangs::Ganging;
use apply::apply;
use finalize::finalize;
use observe::dereference;
use prepare::{note_early_ends, note_rolling, prepare};
use scaling_target::mark_scaling_target;
use status::status_of;

/// Reconciles one RoleSet.
///
/// # Errors
///
/// When the API server refuses something; the object is tried again.
pub async fn reconcile(
    object: Arc<DeserializeGuard<RoleSet>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    frame::reconcile(object, context).await
}

impl Kind for RoleSet {
    fn violations(&self) -> Vec<Violation> {
        validate::role_set(names_of(&self.metadata).1, &self.spec)
    }

    fn conditions(status: &mut RoleSetStatus) -> &mut Vec<Condition> {
        &mut status.conditions
    }

    fn note_generation(&self, status: &mut RoleSetStatus, now: &Time, context: &Context) {
        note_generation(
            &mut status.observed_generation,
            &mut status.conditions,
            self.metadata.generation,
            context.crd_gap.gap().role_set_generation,
            now,
        );
    }

    async fn finalize(
        target: &Target,
        meta: &ObjectMeta,
        spec: Option<&RoleSetSpec>,
        context: &Context,
    ) -> Result<Action, Error> {
        let strategy = spec.and_then(|spec| spec.scheduling_strategy.as_ref());
        finalize(target, meta, strategy, context).await
    }

    async fn bring_about(
        &self,
        target: &Target,
        now: &Time,
        context: &Context,
    ) -> Result<Action, Error> {
        let backoff = context.settings.backoff;
        let found = dereference(self, target, context);
        let observed = observe(self, found, now, backoff.longest);
        let built = build(self, observed, now, backoff);
        let (observed, entries) = (&built.observed, &built.entries);
        let plans = rollout::plan(self.spec.update_strategy.unwrap_or_default(), entries);
        // What is noted here is read back by the next look: the watch shows the object again.
        if prepare(self, target, observed, context).await?
            || note_rolling(self, target, entries, context).await?
        {
            return Ok(Action::await_change());
        }
        let gang = gang(self, observed, context).await?;
        note_early_ends(self, target, &built, context).await?;
        let applied = apply(self, target, observed, &plans, &gang, context).await;
        let applied = applied.and(mark_scaling_target(self, observed, context).await);
        let changed = plans.iter().any(|plan| !plan.is_empty()) || !observed.orphans.is_empty();
        // What was just created or deleted is told of when the watch shows it.
        let failure = error::failure(&applied);
        if !changed || failure.is_some() {
            let status = status_of(self, &built, &gang, failure, now, context);
            let (kind, before) = (resource::<RoleSet>(), self.status.as_ref());
            context
                .writer
                .status(&kind, &self.metadata, before, &status)
                .await?;
        }
        applied?;
        let full = |plan: &RolePlan| i32::try_from(plan.create.len()) == Ok(CREATIONS_MAX);
        let more = plans.iter().any(full).then_some(super::NEXT_CREATIONS);
        let again = observed.look_again.into_iter();
        let again = again.chain(more).chain(gang.look_again()).min();
        Ok(again.map_or_else(Action::await_change, Action::requeue))
    }
}

/// How all pods of the RoleSet are scheduled together.
async fn gang(set: &RoleSet, observed: &Observed, context: &Context) -> Result<Ganging, Error> {
    let strategy = set.spec.scheduling_strategy.as_ref();
    let units = observed.roles.values().flat_map(|role| &role.units);
    let siblings = units.filter(|unit| unit.stays()).map(|unit| &unit.meta);
    Ganging::of::<RoleSet>(&set.metadata, strategy, siblings, context).await
}
