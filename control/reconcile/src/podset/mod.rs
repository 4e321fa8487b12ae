//! PodSet: pods that live and die together.

mod apply;
mod finalize;
mod observe;
mod prepare;
mod status;

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kvtide_control_api::target::Target;
use kvtide_control_api::{Condition, PodSet, PodSetSpec, PodSetStatus};
use kvtide_control_core::recovery;
use kvtide_control_core::validate::Violation;
use kvtide_control_kube::error::{self, Error};

use crate::context::Context;
use crate::frame::{self, Kind};
use crate::gangs::Ganging;
use apply::apply;
use finalize::finalize;
use observe::{Observed, dereference};
use prepare::prepare;
use status::write_status;

/// Reconciles one PodSet.
///
/// # Errors
///
/// When the API server refuses something; the object is tried again.
pub async fn reconcile(
    object: Arc<DeserializeGuard<PodSet>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    frame::reconcile(object, context).await
}

impl Kind for PodSet {
    fn violations(&self) -> Vec<Violation> {
        Vec::new()
    }

    fn conditions(status: &mut PodSetStatus) -> &mut Vec<Condition> {
        &mut status.conditions
    }

    /// Nobody waits for it, so there is no other place for it where the field would be dropped.
    fn note_generation(&self, status: &mut PodSetStatus, _now: &Time, context: &Context) {
        let is_kept = !context.crd_gap.gap().pod_set_generation;
        status.observed_generation = self.metadata.generation.filter(|_| is_kept);
    }

    async fn finalize(
        target: &Target,
        meta: &ObjectMeta,
        spec: Option<&PodSetSpec>,
        context: &Context,
    ) -> Result<Action, Error> {
        finalize(target, meta, spec, context).await
    }

    async fn bring_about(
        &self,
        target: &Target,
        now: &Time,
        context: &Context,
    ) -> Result<Action, Error> {
        let backoff = context.settings.backoff;
        let observed = dereference(self, target, now, context);
        let plan = observed.view.plan(backoff);
        if prepare(self, target, context).await? {
            // The watch shows the object again, with its marks.
            return Ok(Action::await_change());
        }
        let gang = gang(self, &observed, context).await?;
        if plan.attempt {
            // Counted before it is made: one that is cut short was made none the less.
            write_status(self, &observed, &plan, &gang, None, now, context).await?;
        }
        let applied = apply(self, target, &observed, &plan, &gang, context).await;
        let again = plan.again_in.or(observed.look_again).into_iter();
        let mut again = again.chain(gang.look_again()).min();
        let changed = !plan.create.is_empty() || !plan.delete.is_empty();
        // What was just created or deleted is told of when the watch shows it.
        let failure = error::failure(&applied);
        if !changed || failure.is_some() {
            let status = write_status(self, &observed, &plan, &gang, failure, now, context).await?;
            let forget = recovery::forget_in(&status, backoff, now);
            again = again.into_iter().chain(forget).min();
        }
        applied?;
        Ok(again.map_or_else(Action::await_change, Action::requeue))
    }
}

/// How the pods of the PodSet are scheduled together.
async fn gang(set: &PodSet, observed: &Observed, context: &Context) -> Result<Ganging, Error> {
    let strategy = set.spec.scheduling_strategy.as_ref();
    let siblings = observed.pods.iter().map(|pod| &pod.metadata);
    let siblings = siblings.filter(|meta| !context.is_going(meta));
    Ganging::of::<PodSet>(&set.metadata, strategy, siblings, context).await
}
