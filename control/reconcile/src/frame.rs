//! What every reconciler does around its own steps.
//!
//! An object that cannot be decoded is told so and left alone. One that is deleted lets its children go
//! first. One whose spec is wrong is told what. All others are brought about, and what is refused on the
//! way is told of in the status.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use kube::core::DeserializeGuard;
use kube::core::object::{HasSpec, HasStatus};
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kvtide_control_api::target::Target;
use kvtide_control_api::{Condition, conditions, set_condition};
use kvtide_control_core::validate::{self, Violation};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::status::tell_failure;
use crate::undecodable::{readable, undecodable};

/// A kind that is reconciled.
pub(crate) trait Kind:
    Resource<DynamicType = ()>
    + HasSpec
    + HasStatus<Status: Clone + Default + Serialize + DeserializeOwned>
    + Clone
{
    /// What is wrong with the spec, where the API server cannot see it.
    fn violations(&self) -> Vec<Violation>;

    /// The conditions in a status.
    fn conditions(status: &mut Self::Status) -> &mut Vec<Condition>;

    /// Notes in a status which generation it is about.
    fn note_generation(&self, status: &mut Self::Status, now: &Time, context: &Context);

    /// Lets a deleted object go once its children are gone. Of one that cannot be decoded there is no
    /// `spec`: what that would name besides follows by its owner references.
    async fn finalize(
        target: &Target,
        meta: &ObjectMeta,
        spec: Option<&Self::Spec>,
        context: &Context,
    ) -> Result<Action, Error>;

    /// Brings what is below the object to what the spec says.
    async fn bring_about(
        &self,
        target: &Target,
        now: &Time,
        context: &Context,
    ) -> Result<Action, Error>;
}

/// Reconciles one object.
pub(crate) async fn reconcile<K: Kind>(
    object: Arc<DeserializeGuard<K>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let object = match &object.0 {
        Ok(object) => object,
        Err(invalid) if invalid.metadata.deletion_timestamp.is_some() => {
            let target = Target::of::<K>(&invalid.metadata);
            return K::finalize(&target, &invalid.metadata, None, &context).await;
        }
        Err(invalid) => return undecodable::<K>(&context, invalid).await,
    };
    readable(&context, object.meta());
    let outcome = look_at(object, &context).await;
    tell_failure(object, &outcome, &context).await;
    outcome
}

async fn look_at<K: Kind>(object: &K, context: &Context) -> Result<Action, Error> {
    let object = context.ledger.with_newest_status(object);
    let object = object.as_ref();
    let target = Target::of::<K>(object.meta());
    if object.meta().deletion_timestamp.is_some() {
        return K::finalize(&target, object.meta(), Some(object.spec()), context).await;
    }
    let (now, violations) = (context.now(), object.violations());
    if violations.is_empty() {
        object.bring_about(&target, &now, context).await
    } else {
        invalid(object, &violations, &now, context).await
    }
}

async fn invalid<K: Kind>(
    object: &K,
    violations: &[Violation],
    now: &Time,
    context: &Context,
) -> Result<Action, Error> {
    let message = validate::describe(violations);
    let mut status = object.status().cloned().unwrap_or_default();
    object.note_generation(&mut status, now, context);
    let all = K::conditions(&mut status);
    // Whoever waits for it to be ready must not take it for ready.
    for (kind, holds) in [(conditions::INVALID, true), (conditions::READY, false)] {
        set_condition(all, kind, holds, "Invalid", message.clone(), now);
    }
    let meta = object.meta();
    context
        .tell::<K>(meta, EventType::Warning, "Invalid", message)
        .await;
    let kind = resource::<K>();
    context
        .writer
        .status(&kind, meta, object.status(), &status)
        .await?;
    Ok(Action::await_change())
}
