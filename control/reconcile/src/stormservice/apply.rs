//! Brings the RoleSets of a StormService to the plan: deletes, changes and creates them.

use std::collections::HashSet;

use kvtide_control_api::target::Target;
use kvtide_control_api::{RoleSet, StormService, keys};
use kvtide_control_core::role_set::{
    build, differs, renew, set_marks, set_spec, with_scaled_replicas,
};
use kvtide_control_core::service_plan::{Revision, ServicePlan};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, resource};

use super::events::tell_of_plan;
use super::observe::Observed;
use super::revisions::Revisions;
use crate::context::Context;
use crate::taken_names::left_behind;

/// Returns whether RoleSets were rewritten.
pub(super) async fn apply(
    service: &StormService,
    target: &Target,
    observed: &Observed,
    plan: &ServicePlan,
    revisions: &Revisions,
    context: &Context,
) -> Result<bool, Error> {
    let (namespace, uid) = (&target.namespace, &target.uid);
    let kind = resource::<RoleSet>();
    tell_of_plan(service, observed, plan, revisions, context).await;
    // Deletions before creations: what is created may need the room.
    let doomed = plan
        .delete
        .iter()
        .filter_map(|&at| observed.sets.get(at))
        .map(|owned| Doomed::of(&owned.set.metadata))
        .collect();
    context.writer.delete_all(&kind, namespace, doomed).await?;
    let changed = changed_sets(service, observed, plan, revisions);
    let rewritten = context.writer.replace_all(namespace, changed).await?;
    let mut objects = Vec::with_capacity(plan.create.len());
    let left = if plan.create.is_empty() {
        HashSet::new()
    } else {
        left_behind(namespace, context)
    };
    for &(index, revision) in &plan.create {
        let (template, revision) = match revision {
            Revision::Update => (&service.spec.template, &revisions.update),
            Revision::Current => (&revisions.current_template, &revisions.current),
        };
        let set = build(service, target, index, &left, template, revision);
        objects.push(set.map_err(|source| Error::Build {
            kind: "RoleSet",
            source,
        })?);
    }
    context
        .writer
        .create_all(uid, "RoleSet", &kind, namespace, objects)
        .await?;
    Ok(rewritten)
}

/// RoleSets to write: those that take the present revision now, and those whose replica counts (or
/// anything else that follows from the StormService) are not what they should be.
fn changed_sets(
    service: &StormService,
    observed: &Observed,
    plan: &ServicePlan,
    revisions: &Revisions,
) -> Vec<RoleSet> {
    let mut changed = Vec::new();
    for (at, owned) in observed.sets.iter().enumerate() {
        if owned.view.going || !owned.readable || plan.delete.contains(&at) {
            continue;
        }
        let mut set = owned.set.clone();
        let adopted = set.metadata.annotations.as_ref();
        if adopted.is_none_or(|all| !all.contains_key(keys::ADOPTED_HASHES)) {
            continue; // The RoleSet's own controller looks at it first.
        }
        if owned.view.updated || plan.update.contains(&at) {
            set.spec = set_spec(service, &service.spec.template);
            let (labels, annotations) =
                set_marks(service, &service.spec.template, &revisions.update);
            let former = observed.template_meta(&owned.revision);
            let former = former.filter(|_| !owned.view.updated).unwrap_or_default();
            renew(&mut set.metadata.labels, former.labels.as_ref(), labels);
            let former = former.annotations.as_ref();
            renew(&mut set.metadata.annotations, former, annotations);
        } else {
            set.spec = with_scaled_replicas(service, &revisions.arrived, set.spec);
        }
        if differs(&set, &owned.set) {
            changed.push(set);
        }
    }
    changed
}
