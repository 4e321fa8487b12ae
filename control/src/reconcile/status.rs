//! What all kinds say in their status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource;
use kube::core::object::HasStatus;
use kube::runtime::controller::Action;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::apply::resource;
use super::conditions::REPLICA_FAILURE;
use super::context::Context;
use super::error::{self, Error};
use crate::api::{Condition, set_condition};

/// Tells of the last write that was refused, or that none was.
pub(super) fn note_failure(all: &mut Vec<Condition>, failure: Option<&Error>, now: &Time) {
    match failure {
        Some(error) => {
            set_condition(
                all,
                REPLICA_FAILURE,
                true,
                "Failure",
                error.to_string(),
                now,
            );
        }
        None => all.retain(|condition| condition.kind != REPLICA_FAILURE),
    }
}

/// Tells of a failure wherever a look at an object ended, so that nobody has to read the log to see
/// why nothing happens. `conditions` finds them in a status.
pub(super) async fn tell_failure<K>(
    object: &K,
    outcome: &Result<Action, Error>,
    conditions: impl FnOnce(&mut K::Status) -> &mut Vec<Condition>,
    context: &Context,
) where
    K: Resource<DynamicType = ()> + HasStatus + Clone,
    K::Status: Clone + Default + Serialize + DeserializeOwned,
{
    let Some(failure) = error::failure(outcome) else {
        return;
    };
    let newest = context.ledger.with_newest_status(object);
    let mut status = newest.status().cloned().unwrap_or_default();
    note_failure(conditions(&mut status), Some(failure), &context.now());
    let (kind, meta) = (resource::<K>(), object.meta());
    let written = context
        .writer
        .status(&kind, meta, newest.status(), &status)
        .await;
    if let Err(error) = written {
        // What failed first is what counts, and it is tried again with it.
        tracing::debug!(%error, "a failure could not be told of");
    }
}
