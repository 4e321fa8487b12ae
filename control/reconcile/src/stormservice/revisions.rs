//! The revisions of a StormService: which one its template is, and which are kept.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::ControllerRevision;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::{annotation, names_of};
use kvtide_control_api::observed::ObservedRevision;
use kvtide_control_api::target::Target;
use kvtide_control_api::{RoleSetTemplate, StormService, keys};
use kvtide_control_core::role_set::{ReplicaCounts, replica_counts, still_waiting};
use kvtide_control_core::{names, revision};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::{Doomed, resource};
use serde_json::{Value, json};

use super::observe::Observed;
use crate::context::Context;

/// Names tried when a revision's is taken by other data.
const COLLISIONS_MAX: i32 = 5;

/// Label of a ControllerRevision with its hash, as Kubernetes' own controllers use it.
const REVISION_HASH: &str = "controller.kubernetes.io/hash";

/// The revisions that matter, by name, and their templates.
pub(super) struct Revisions {
    pub(super) update: String,
    pub(super) current: String,
    /// The template of `current`, with the present replica counts.
    pub(super) current_template: RoleSetTemplate,
    /// The numbers of replicas that roles had when `update` became the present one, of those that were
    /// not scaled since.
    pub(super) arrived: ReplicaCounts,
    pub(super) collisions: i32,
}

pub(super) async fn sync_revisions(
    service: &StormService,
    target: &Target,
    observed: &Observed,
    context: &Context,
) -> Result<Revisions, Error> {
    let status = service.status.clone().unwrap_or_default();
    let wanted = revision::data(&service.spec.template);
    let identity = revision::identity(&wanted);
    let newest = observed.revisions.last();
    let mut collisions = status.collision_count.unwrap_or(0);
    let same = observed
        .revisions
        .iter()
        .rev()
        .find(|stored| revision::identity(&stored.data) == identity);
    let next = newest.map_or(1, |newest| newest.revision.saturating_add(1));
    let mut arrived = replica_counts(&service.spec.template);
    let update = match same {
        Some(same) => {
            let name = same.metadata.name.clone().unwrap_or_default();
            if newest.is_some_and(|newest| newest.metadata.name != same.metadata.name) {
                // Going back: the old revision becomes the newest.
                let kind = resource::<ControllerRevision>();
                let mut patch = note_of(&arrived);
                patch["revision"] = json!(next);
                context
                    .writer
                    .merge(&kind, &target.namespace, &name, &patch)
                    .await?;
                let meta = &service.metadata;
                let generation = meta.generation.unwrap_or(0);
                let note = format!("went back to revision {name} (generation {generation})");
                context
                    .tell::<StormService>(meta, EventType::Normal, "Rollout", note)
                    .await;
            } else {
                arrived = note_scaling(service, same, context).await?;
            }
            name
        }
        None => create_revision(target, &wanted, next, &mut collisions, context).await?,
    };
    let current = observed
        .revisions
        .iter()
        .find(|stored| stored.metadata.name.as_deref() == Some(status.current_revision.as_str()));
    let (current, current_template) = match current {
        Some(stored) if status.current_revision != update => {
            let template = revision::template(&stored.data).map_err(|source| Error::Revision {
                name: status.current_revision.clone(),
                source,
            })?;
            (status.current_revision.clone(), template)
        }
        _ => (update.clone(), service.spec.template.clone()),
    };
    Ok(Revisions {
        update,
        current,
        current_template,
        arrived,
        collisions,
    })
}

/// The counts that still wait with the present revision. It is noted which ones do not any more: scaled
/// back, they would look as if they did.
async fn note_scaling(
    service: &StormService,
    stored: &ObservedRevision,
    context: &Context,
) -> Result<ReplicaCounts, Error> {
    let noted = counts_of(stored);
    let waiting = still_waiting(noted.clone(), &service.spec.template);
    if waiting != noted {
        let (kind, (namespace, name)) =
            (resource::<ControllerRevision>(), names_of(&stored.metadata));
        let patch = note_of(&waiting);
        context.writer.merge(&kind, namespace, name, &patch).await?;
    }
    Ok(waiting)
}

/// A patch of a ControllerRevision, of which the data cannot be changed any more.
fn note_of(counts: &ReplicaCounts) -> Value {
    json!({"metadata": {"annotations": {keys::ROLE_REPLICAS: json!(counts).to_string()}}})
}

/// The numbers of replicas that roles had when a revision became the present one, as noted last.
fn counts_of(stored: &ObservedRevision) -> ReplicaCounts {
    let noted = annotation(&stored.metadata, keys::ROLE_REPLICAS);
    let noted = noted.and_then(|text| serde_json::from_str(text).ok());
    let recorded = || revision::template(&stored.data).ok();
    noted
        .or_else(|| recorded().as_ref().map(replica_counts))
        .unwrap_or_default()
}

async fn create_revision(
    target: &Target,
    data: &Value,
    number: i64,
    collisions: &mut i32,
    context: &Context,
) -> Result<String, Error> {
    let ((namespace, name), uid) = (target.names(), &target.uid);
    let kind = resource::<ControllerRevision>();
    let first = *collisions;
    loop {
        let hash = revision::hash(data, *collisions);
        let revision_name = names::revision(name, &hash);
        if context
            .ledger
            .unseen(uid, "ControllerRevision", |_| false)
            .iter()
            .any(|meta| meta.name.as_ref() == Some(&revision_name))
        {
            return Ok(revision_name);
        }
        let object = json!({
            "apiVersion": "apps/v1",
            "kind": "ControllerRevision",
            "metadata": {
                "name": revision_name,
                "labels": {"name": name, REVISION_HASH: hash},
                "ownerReferences": [target.owner_ref],
            },
            "data": data,
            "revision": number,
        });
        let made = context
            .writer
            .create(uid, "ControllerRevision", &kind, namespace, object)
            .await;
        match made {
            Ok(_) => return Ok(revision_name),
            Err(Error::NameTaken { .. }) if *collisions - first < COLLISIONS_MAX => {
                *collisions += 1
            }
            Err(error) => return Err(error),
        }
    }
}

pub(super) async fn trim_history(
    service: &StormService,
    target: &Target,
    observed: &Observed,
    revisions: &Revisions,
    context: &Context,
) -> Result<(), Error> {
    let limit = service
        .spec
        .revision_history_limit
        .unwrap_or(revision::HISTORY_LIMIT_DEFAULT);
    let mut used: BTreeSet<&str> = observed
        .sets
        .iter()
        .map(|owned| owned.revision.as_str())
        .collect();
    used.extend([revisions.update.as_str(), revisions.current.as_str()]);
    let known: Vec<(String, i64)> = observed
        .revisions
        .iter()
        .filter(|stored| !context.is_going(&stored.metadata))
        .map(|stored| {
            (
                stored.metadata.name.clone().unwrap_or_default(),
                stored.revision,
            )
        })
        .collect();
    let surplus = revision::surplus(&known, &used, limit);
    let doomed = observed
        .revisions
        .iter()
        .filter(|stored| {
            surplus
                .iter()
                .any(|name| stored.metadata.name.as_ref() == Some(name))
        })
        .map(|stored| Doomed::of(&stored.metadata))
        .collect();
    let kind = resource::<ControllerRevision>();
    context
        .writer
        .delete_all(&kind, &target.namespace, doomed)
        .await
}
