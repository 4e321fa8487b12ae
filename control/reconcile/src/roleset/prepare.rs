//! Finalizer and marks of a RoleSet: one that a user or AIBrix made lacks them.

use kube::runtime::events::EventType;
use kvtide_control_api::meta::{annotation, finalizer_patch};
use kvtide_control_api::target::Target;
use kvtide_control_api::{RoleSet, RoleUpdateOrder, keys};
use kvtide_control_core::adoption::{self, Adopted, AdoptedHashes};
use kvtide_control_core::revision;
use kvtide_control_core::role_units::{Built, Observed, is_group};
use kvtide_control_core::rollout::RoleEntry;
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;
use serde_json::json;

use crate::context::Context;

/// Puts finalizer and marks on a RoleSet that lacks them: one that a user or AIBrix made. Returns
/// whether anything was written.
pub(super) async fn prepare(
    set: &RoleSet,
    target: &Target,
    observed: &Observed,
    context: &Context,
) -> Result<bool, Error> {
    let meta = &set.metadata;
    let (namespace, name) = target.names();
    let mut patch = finalizer_patch(meta, keys::ROLE_SET_FINALIZER);
    if adoption::read(annotation(meta, keys::ADOPTED_HASHES)).is_none() {
        let adopted = adopt(set, observed);
        patch["metadata"]["annotations"][keys::ADOPTED_HASHES] = json!(adoption::write(&adopted));
        if !adopted.is_empty() {
            let note = "took over the pods of this RoleSet as they are".to_owned();
            context
                .tell::<RoleSet>(meta, EventType::Normal, "Adopted", note)
                .await;
        }
    }
    let depends = set
        .spec
        .roles
        .iter()
        .any(|role| !role.dependencies.is_empty());
    if depends && !observed.started.is_empty() {
        let started: Vec<&str> = observed.started.iter().map(String::as_str).collect();
        let started = started.join(",");
        if annotation(meta, keys::STARTED_ROLES) != Some(&started) {
            patch["metadata"]["annotations"][keys::STARTED_ROLES] = json!(started);
        }
    }
    if patch["metadata"]
        .as_object()
        .is_some_and(serde_json::Map::is_empty)
    {
        return Ok(false);
    }
    context
        .writer
        .merge(&resource::<RoleSet>(), namespace, name, &patch)
        .await?;
    Ok(true)
}

/// Notes which roles are rolling, before they roll: a role whose replicas are all new and not ready yet
/// looks like one that has nothing to roll. Returns whether anything was written.
pub(super) async fn note_rolling(
    set: &RoleSet,
    target: &Target,
    entries: &[RoleEntry],
    context: &Context,
) -> Result<bool, Error> {
    let order = set.spec.update_strategy.unwrap_or_default();
    let waits = order != RoleUpdateOrder::Parallel && entries.len() > 1;
    let rolling = set.spec.roles.iter().zip(entries);
    let rolling: Vec<&str> = rolling
        .filter(|(_, entry)| waits && entry.rolling)
        .map(|(role, _)| role.name.as_str())
        .collect();
    let rolling = (!rolling.is_empty()).then(|| rolling.join(","));
    if annotation(&set.metadata, keys::ROLLING_ROLES) == rolling.as_deref() {
        return Ok(false);
    }
    let patch = json!({"metadata": {"annotations": {keys::ROLLING_ROLES: rolling}}});
    let (namespace, name) = target.names();
    let kind = resource::<RoleSet>();
    context.writer.merge(&kind, namespace, name, &patch).await?;
    Ok(true)
}

/// Notes that pods that ended early are replaced now. Before they are: a replacement that was cut short
/// was made none the less.
pub(super) async fn note_early_ends(
    set: &RoleSet,
    target: &Target,
    built: &Built,
    context: &Context,
) -> Result<(), Error> {
    if built.replaced.is_empty() {
        return Ok(());
    }
    let mut ends = built.observed.early_ends.clone();
    ends.retain(|name| set.spec.roles.iter().any(|role| role.name == name));
    let patch = json!({"metadata": {"annotations": {keys::EARLY_ENDS: ends.write()}}});
    let (namespace, name) = target.names();
    let kind = resource::<RoleSet>();
    context.writer.merge(&kind, namespace, name, &patch).await?;
    let roles = built.replaced.join(", ");
    let note = format!("replacing pods that ended soon after they were made: {roles}");
    context
        .tell::<RoleSet>(&set.metadata, EventType::Warning, "Recovering", note)
        .await;
    Ok(())
}

fn adopt(set: &RoleSet, observed: &Observed) -> AdoptedHashes {
    let status = set.status.clone().unwrap_or_default();
    let mut adopted = AdoptedHashes::new();
    for role in &set.spec.roles {
        let Some(units) = observed.roles.get(&role.name) else {
            continue;
        };
        let replicas: Vec<(String, i64)> = units
            .units
            .iter()
            .filter(|unit| !unit.hash.is_empty() && unit.is_group == is_group(role))
            .map(|unit| (unit.hash.clone(), unit.replica.created_s))
            .collect();
        let counted = status
            .roles
            .iter()
            .find(|counted| counted.name == role.name);
        let chosen = adoption::choose(&replicas, counted);
        let of = revision::role_hash(role);
        if let Some(hash) = chosen.filter(|hash| *hash != of) {
            adopted.insert(role.name.clone(), Adopted { hash, of });
        }
    }
    adopted
}
