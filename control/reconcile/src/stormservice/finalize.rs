//! The end of a StormService: its RoleSets first.

use std::time::Duration;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::runtime::controller::Action;
use kvtide_control_api::meta::owner_uid;
use kvtide_control_api::target::Target;
use kvtide_control_api::{RoleSet, StormService, keys};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, resource};

use crate::cascade::takes_children;
use crate::context::Context;

/// Lets a deleted StormService go once its RoleSets are gone. Metadata is enough, so one that cannot
/// be decoded goes as well.
pub(super) async fn finalize(
    target: &Target,
    meta: &ObjectMeta,
    context: &Context,
) -> Result<Action, Error> {
    let kind = resource::<StormService>();
    if !takes_children::<StormService>(meta, keys::STORM_SERVICE_FINALIZER, context).await? {
        return Ok(Action::await_change());
    }
    let (namespace, uid) = (&target.namespace, target.uid.as_str());
    let sets = context.role_sets.owned_by(uid);
    let doomed = sets
        .iter()
        .map(|set| set.as_ref().meta())
        .filter(|meta| !context.is_going(meta))
        .map(Doomed::of)
        .collect();
    context
        .writer
        .delete_all(&resource::<RoleSet>(), namespace, doomed)
        .await?;
    let unseen = context.ledger.unseen(uid, "RoleSet", |_| false);
    if !sets.is_empty() || !unseen.is_empty() {
        return Ok(Action::requeue(Duration::from_secs(30)));
    }
    let headless = context.headless.get(&target.key());
    if let Some(headless) = headless.filter(|found| owner_uid(&found.metadata) == Some(uid)) {
        let doomed = Doomed::of(&headless.metadata);
        context
            .writer
            .delete(&resource::<Service>(), namespace, &doomed, false)
            .await?;
    }
    let revisions = context.revisions.owned_by(uid);
    let doomed = revisions
        .iter()
        .map(|stored| Doomed::of(&stored.metadata))
        .collect();
    context
        .writer
        .delete_all(&resource::<ControllerRevision>(), namespace, doomed)
        .await?;
    context
        .writer
        .release(&kind, meta, keys::STORM_SERVICE_FINALIZER)
        .await?;
    Ok(Action::await_change())
}
