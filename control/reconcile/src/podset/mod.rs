//! PodSet: pods that live and die together.

mod apply;
mod finalize;
mod observe;
mod prepare;
mod status;

use std::sync::Arc;

use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kvtide_control_api::PodSet;
use kvtide_control_kube::error::{self, Error};

use crate::context::Context;
use crate::gangs::Ganging;
use crate::status::tell_failure;
use crate::undecodable::{readable, undecodable};
use apply::apply;
use finalize::finalize;
use observe::{Observed, dereference};
use prepare::prepare;
use status::{forget_in, write_status};

/// Reconciles one PodSet.
///
/// # Errors
///
/// When the API server refuses something; the object is tried again.
pub async fn reconcile(
    object: Arc<DeserializeGuard<PodSet>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let set = match &object.0 {
        Ok(set) => set,
        Err(invalid) if invalid.metadata.deletion_timestamp.is_some() => {
            return finalize(&invalid.metadata, None, &context).await;
        }
        Err(invalid) => return undecodable::<PodSet>(&context, invalid).await,
    };
    readable(&context, &set.metadata);
    let outcome = look_at(set, &context).await;
    tell_failure(set, &outcome, |status| &mut status.conditions, &context).await;
    outcome
}

async fn look_at(set: &PodSet, context: &Context) -> Result<Action, Error> {
    let set = context.ledger.with_newest_status(set);
    let set = set.as_ref();
    if set.metadata.deletion_timestamp.is_some() {
        return finalize(&set.metadata, Some(&set.spec), context).await;
    }
    if prepare(set, context).await? {
        // The watch shows the object again, with its marks.
        return Ok(Action::await_change());
    }
    let observed = dereference(set, context);
    let plan = observed.view.plan(context.settings.backoff);
    let gang = gang(set, &observed, context).await?;
    if plan.attempt {
        // Counted before it is made: one that is cut short was made none the less.
        write_status(set, &observed, &plan, &gang, None, context).await?;
    }
    let applied = apply(set, &observed, &plan, &gang, context).await;
    let again = plan.again_in.or(observed.look_again).into_iter();
    let mut again = again.chain(gang.look_again()).min();
    let changed = !plan.create.is_empty() || !plan.delete.is_empty();
    // What was just created or deleted is told of when the watch shows it.
    let failure = error::failure(&applied);
    if !changed || failure.is_some() {
        let status = write_status(set, &observed, &plan, &gang, failure, context).await?;
        let forget = forget_in(&status, context.settings.backoff, &context.now());
        again = again.into_iter().chain(forget).min();
    }
    applied?;
    Ok(again.map_or_else(Action::await_change, Action::requeue))
}

/// How the pods of the PodSet are scheduled together.
async fn gang(set: &PodSet, observed: &Observed, context: &Context) -> Result<Ganging, Error> {
    let strategy = set.spec.scheduling_strategy.as_ref();
    let siblings = observed.pods.iter().map(|pod| &pod.metadata);
    let siblings = siblings.filter(|meta| !context.is_going(meta));
    Ganging::of::<PodSet>(&set.metadata, strategy, siblings, context).await
}
