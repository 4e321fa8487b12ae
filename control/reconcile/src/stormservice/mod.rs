//! StormService: RoleSets, the headless Service and revisions.

mod adopt;
mod apply;
mod events;
mod finalize;
mod headless;
mod observe;
mod revisions;
mod status;

use std::sync::Arc;
use std::time::Duration;

use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::{finalizer_patch, names_of, scaling_role};
use kvtide_control_api::{
    RoleSetSpec, StormService, StormServiceStatus, conditions, keys, set_condition,
};
use kvtide_control_core::budget::CREATIONS_MAX;
use kvtide_control_core::validate::{self, Violation};
use kvtide_control_kube::error::{self, Error};
use kvtide_control_kube::writer::resource;

use crate::context::Context;
use crate::status::tell_failure;
use crate::undecodable::{readable, undecodable};
use adopt::{Left, adopt};
use apply::apply;
use events::tell_of_arrival;
use finalize::finalize;
use headless::{Headless, sync_headless};
use observe::{Observed, dereference, mark, view_of};
use revisions::{Revisions, sync_revisions, trim_history};
use status::{failure_of_sets, status_of, unsettled};

/// When to look again whose RoleSets a predecessor's are, if no event comes before.
const SETTLED_AFTER: Duration = Duration::from_secs(5);

/// Reconciles one StormService.
///
/// # Errors
///
/// When the API server refuses something; the object is tried again.
pub async fn reconcile(
    object: Arc<DeserializeGuard<StormService>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let service = match &object.0 {
        Ok(service) => service,
        Err(invalid) if invalid.metadata.deletion_timestamp.is_some() => {
            return finalize(&invalid.metadata, &context).await;
        }
        Err(invalid) => return undecodable::<StormService>(&context, invalid).await,
    };
    readable(&context, &service.metadata);
    let outcome = look_at(service, &context).await;
    tell_failure(service, &outcome, |status| &mut status.conditions, &context).await;
    outcome
}

async fn look_at(service: &StormService, context: &Context) -> Result<Action, Error> {
    let service = context.ledger.with_newest_status(service);
    let service = service.as_ref();
    if service.metadata.deletion_timestamp.is_some() {
        return finalize(&service.metadata, context).await;
    }
    let (namespace, name) = names_of(&service.metadata);
    let violations = validate::stormservice(name, &service.spec);
    let Some(template_spec) = service
        .spec
        .template
        .spec
        .as_ref()
        .filter(|_| violations.is_empty())
    else {
        return invalid(service, &violations, context).await;
    };
    let patch = finalizer_patch(&service.metadata, keys::STORM_SERVICE_FINALIZER);
    if patch["metadata"]
        .as_object()
        .is_some_and(|fields| !fields.is_empty())
    {
        let kind = resource::<StormService>();
        context.writer.merge(&kind, namespace, name, &patch).await?;
        return Ok(Action::await_change());
    }
    match adopt(service, context).await? {
        Left::Nothing => bring_about(service, template_spec, context).await,
        Left::Adopted | Left::Going => Ok(Action::await_change()),
        Left::Unsettled(role_set) => {
            let status = unsettled(service, &role_set, context);
            write(service, &status, context).await?;
            Ok(Action::requeue(SETTLED_AFTER))
        }
    }
}

/// Brings RoleSets, Service and revisions to what the spec says.
async fn bring_about(
    service: &StormService,
    template_spec: &RoleSetSpec,
    context: &Context,
) -> Result<Action, Error> {
    warn_of_unknown_scaling_role(service, template_spec, context).await;
    let mut observed = dereference(service, context);
    let revisions = sync_revisions(service, &observed, context).await?;
    let headless = sync_headless(service, context).await;
    mark(&mut observed, template_spec, &revisions, context);
    let view = view_of(service, &observed);
    let plan = view.plan();
    let applied = apply(service, &observed, &plan, &revisions, context).await;
    let trimmed = trim_history(service, &observed, &revisions, context).await;
    let failure = error::failure(&headless).or(error::failure(&applied));
    let failure = failure
        .or(error::failure(&trimmed))
        .map(ToString::to_string);
    let rewritten = applied.as_ref().is_ok_and(|rewritten| *rewritten);
    let changed = !plan.create.is_empty() || !plan.delete.is_empty() || rewritten;
    // What was just written is told of when the watch shows it.
    if !changed || failure.is_some() {
        write_status(service, &observed, &revisions, &headless, failure, context).await?;
    }
    headless?;
    applied?;
    trimmed?;
    let more = i32::try_from(plan.create.len()) == Ok(CREATIONS_MAX);
    Ok(if more {
        Action::requeue(super::NEXT_CREATIONS)
    } else {
        Action::await_change()
    })
}

/// Writes what was observed into the status, with what was refused here or below.
async fn write_status(
    service: &StormService,
    observed: &Observed,
    revisions: &Revisions,
    headless: &Result<Headless, Error>,
    failure: Option<String>,
    context: &Context,
) -> Result<(), Error> {
    let mut told = failure;
    if told.is_none()
        && let Some(below) = failure_of_sets(observed)
    {
        let meta = &service.metadata;
        context
            .tell::<StormService>(meta, EventType::Warning, "Failed", below.clone())
            .await;
        told = Some(below);
    }
    let status = status_of(service, observed, revisions, headless, told, context);
    write(service, &status, context).await?;
    tell_of_arrival(service, &status, context).await;
    Ok(())
}

async fn write(
    service: &StormService,
    status: &StormServiceStatus,
    context: &Context,
) -> Result<(), Error> {
    let (kind, meta) = (resource::<StormService>(), &service.metadata);
    let before = service.status.as_ref();
    context.writer.status(&kind, meta, before, status).await
}

/// Tells that the role by which the StormService is to be scaled is none of its roles.
async fn warn_of_unknown_scaling_role(
    service: &StormService,
    spec: &RoleSetSpec,
    context: &Context,
) {
    let Some(name) = scaling_role(&service.metadata) else {
        return;
    };
    if spec.roles.iter().any(|role| role.name == name) {
        return;
    }
    let note = format!(
        "the annotation {} is {name:?}, which is none of the roles; name one of them. A pod of the \
        first role stands for each RoleSet meanwhile",
        keys::SCALING_ROLE
    );
    let meta = &service.metadata;
    context
        .tell::<StormService>(meta, EventType::Warning, "UnknownScalingRole", note)
        .await;
}

async fn invalid(
    service: &StormService,
    violations: &[Violation],
    context: &Context,
) -> Result<Action, Error> {
    let now = context.now();
    let message = validate::describe(violations);
    let mut status = service.status.clone().unwrap_or_default();
    status.observed_generation = service.metadata.generation;
    let all = &mut status.conditions;
    // Whoever waits for it to be ready must not take it for ready.
    for (kind, holds) in [(conditions::INVALID, true), (conditions::READY, false)] {
        set_condition(all, kind, holds, "Invalid", message.clone(), &now);
    }
    context
        .tell::<StormService>(&service.metadata, EventType::Warning, "Invalid", message)
        .await;
    write(service, &status, context).await?;
    Ok(Action::await_change())
}
