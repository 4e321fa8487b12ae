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

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::{finalizer_patch, names_of, scaling_role};
use kvtide_control_api::target::Target;
use kvtide_control_api::{
    Condition, RoleSetSpec, StormService, StormServiceSpec, StormServiceStatus, keys,
};
use kvtide_control_core::budget::CREATIONS_MAX;
use kvtide_control_core::validate::{self, Violation};
use kvtide_control_kube::error::{self, Error};
use kvtide_control_kube::writer::resource;

use crate::context::Context;
use crate::frame::{self, Kind};
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
    frame::reconcile(object, context).await
}

impl Kind for StormService {
    fn violations(&self) -> Vec<Violation> {
        validate::stormservice(names_of(&self.metadata).1, &self.spec)
    }

    fn conditions(status: &mut StormServiceStatus) -> &mut Vec<Condition> {
        &mut status.conditions
    }

    fn note_generation(&self, status: &mut StormServiceStatus, _now: &Time, _context: &Context) {
        status.observed_generation = self.metadata.generation;
    }

    async fn finalize(
        target: &Target,
        meta: &ObjectMeta,
        _spec: Option<&StormServiceSpec>,
        context: &Context,
    ) -> Result<Action, Error> {
        finalize(target, meta, context).await
    }

    async fn bring_about(
        &self,
        target: &Target,
        now: &Time,
        context: &Context,
    ) -> Result<Action, Error> {
        let patch = finalizer_patch(&self.metadata, keys::STORM_SERVICE_FINALIZER);
        if patch["metadata"]
            .as_object()
            .is_some_and(|fields| !fields.is_empty())
        {
            let (kind, (namespace, name)) = (resource::<StormService>(), target.names());
            context.writer.merge(&kind, namespace, name, &patch).await?;
            return Ok(Action::await_change());
        }
        match adopt(self, target, context).await? {
            Left::Nothing => settle(self, target, now, context).await,
            Left::Adopted | Left::Going => Ok(Action::await_change()),
            Left::Unsettled(role_set) => {
                let status = unsettled(self, &role_set, now);
                write(self, &status, context).await?;
                Ok(Action::requeue(SETTLED_AFTER))
            }
        }
    }
}

/// Brings RoleSets, Service and revisions to what the spec says.
async fn settle(
    service: &StormService,
    target: &Target,
    now: &Time,
    context: &Context,
) -> Result<Action, Error> {
    // Validated before.
    let template_spec = service.spec.template.spec.clone().unwrap_or_default();
    warn_of_unknown_scaling_role(service, &template_spec, context).await;
    let mut observed = dereference(target, context);
    let revisions = sync_revisions(service, target, &observed, context).await?;
    let headless = sync_headless(service, target, context).await;
    mark(&mut observed, &template_spec, &revisions, context);
    let view = view_of(service, &observed);
    let plan = view.plan();
    let applied = apply(service, target, &observed, &plan, &revisions, context).await;
    let trimmed = trim_history(service, target, &observed, &revisions, context).await;
    let failure = error::failure(&headless).or(error::failure(&applied));
    let failure = failure
        .or(error::failure(&trimmed))
        .map(ToString::to_string);
    let rewritten = applied.as_ref().is_ok_and(|rewritten| *rewritten);
    let changed = !plan.create.is_empty() || !plan.delete.is_empty() || rewritten;
    // What was just written is told of when the watch shows it.
    if !changed || failure.is_some() {
        let told = Told {
            headless: &headless,
            failure,
        };
        write_status(service, &observed, &revisions, told, now, context).await?;
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

/// What came of the writes, as far as the status tells of it.
struct Told<'a> {
    headless: &'a Result<Headless, Error>,
    failure: Option<String>,
}

/// Writes what was observed into the status, with what was refused here or below.
async fn write_status(
    service: &StormService,
    observed: &Observed,
    revisions: &Revisions,
    told: Told<'_>,
    now: &Time,
    context: &Context,
) -> Result<(), Error> {
    let Told {
        headless,
        mut failure,
    } = told;
    if failure.is_none()
        && let Some(below) = failure_of_sets(observed)
    {
        let meta = &service.metadata;
        context
            .tell::<StormService>(meta, EventType::Warning, "Failed", below.clone())
            .await;
        failure = Some(below);
    }
    let status = status_of(
        service, observed, revisions, headless, failure, now, context,
    );
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
