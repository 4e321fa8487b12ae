//! RoleSet: roles made of pods or of PodSets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use serde_json::{Value, json};

use super::apply::{Doomed, owner_reference, resource};
use super::conditions;
use super::context::{Context, seconds};
use super::error::{self, Error};
use super::farewell::Farewell;
use super::ganging::Ganging;
use super::gangs::Wanted;
use super::observed::ObservedPod;
use super::schema::note_generation;
use crate::api::{
    PodSet, PodSetPhase, PodSetSpec, RoleSet, RoleSetStatus, RoleSpec, RoleStatus,
    SchedulingStrategy, keys, set_condition,
};
use crate::core::adoption::{self, Adopted, AdoptedHashes};
use crate::core::budget::{Budget, CREATIONS_MAX};
use crate::core::pod::{Marks, Place};
use crate::core::restarts::Baseline;
use crate::core::role_plan::{Replica, ReplicaState, RolePlan, RoleView};
use crate::core::rollout::{self, RoleEntry};
use crate::core::validate::{self, Violation};
use crate::core::{names, pod_group, revision};

/// Labels of a RoleSet that its pods inherit, as in AIBrix.
const INHERITED_LABELS: [&str; 2] = ["name", "previous-owner"];

/// Reconciles one RoleSet.
///
/// # Errors
///
/// When the API server refuses something; the object is tried again.
pub async fn reconcile(
    object: Arc<DeserializeGuard<RoleSet>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let set = match &object.0 {
        Ok(set) => set,
        Err(invalid) if invalid.metadata.deletion_timestamp.is_some() => {
            return finalize(&invalid.metadata, None, &context).await;
        }
        Err(invalid) => {
            return super::stormservice::undecodable::<RoleSet>(&context, invalid).await;
        }
    };
    let set = context.ledger.with_newest_status(set);
    let set = set.as_ref();
    if set.metadata.deletion_timestamp.is_some() {
        let strategy = set.spec.scheduling_strategy.as_ref();
        return finalize(&set.metadata, strategy, &context).await;
    }
    let violations = validate::role_set(&set.spec);
    if !violations.is_empty() {
        return invalid(set, &violations, &context).await;
    }
    let mut observed = dereference(set, &context);
    if prepare(set, &observed, &context).await? {
        // The watch shows the object again, with its marks.
        return Ok(Action::await_change());
    }
    let gang = gang(set, &observed, &context).await?;
    let entries = build(set, &mut observed);
    let plans = rollout::plan(set.spec.update_strategy.unwrap_or_default(), &entries);
    let applied = apply(set, &observed, &plans, &gang, &context).await;
    let changed = plans.iter().any(|plan| !plan.is_empty()) || !observed.orphans.is_empty();
    // What was just created or deleted is told of when the watch shows it.
    let failure = error::failure(&applied);
    if !changed || failure.is_some() {
        let status = status_of(set, &entries, &gang, failure, &context);
        let kind = resource::<RoleSet>();
        context
            .writer
            .status(&kind, &set.metadata, set.status.as_ref(), &status)
            .await?;
    }
    applied?;
    let full = |plan: &RolePlan| i32::try_from(plan.create.len()) == Ok(CREATIONS_MAX);
    let more = plans.iter().any(full).then_some(super::NEXT_CREATIONS);
    let again = observed.look_again.into_iter();
    let again = again.chain(more).chain(gang.look_again()).min();
    Ok(again.map_or_else(Action::await_change, Action::requeue))
}

/// One replica that is there.
struct Unit {
    meta: ObjectMeta,
    is_group: bool,
    hash: String,
    replica: Replica,
}

struct RoleUnits {
    hash: String,
    units: Vec<Unit>,
}

struct Observed {
    roles: BTreeMap<String, RoleUnits>,
    /// Replicas of roles that the spec no longer has.
    orphans: Vec<Unit>,
    pod_sets: Vec<PodSet>,
    started: BTreeSet<String>,
    look_again: Option<Duration>,
}

fn names_of(meta: &ObjectMeta) -> (&str, &str) {
    (
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

fn uid_of(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> &'a str {
    meta.labels
        .as_ref()
        .and_then(|labels| labels.get(key))
        .map_or("", String::as_str)
}

fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    let annotations = meta.annotations.as_ref()?;
    annotations.get(key).map(String::as_str)
}

fn is_group(role: &RoleSpec) -> bool {
    role.pod_group_size.unwrap_or(1) > 1
}

fn is_indexed(role: &RoleSpec) -> bool {
    is_group(role) || role.stateful
}

fn dereference(set: &RoleSet, context: &Context) -> Observed {
    let uid = uid_of(&set.metadata);
    let now = context.now();
    let mut look_again: Option<Duration> = None;
    let mut units = Vec::new();
    let pods = context.pods_of(uid);
    for pod in &pods {
        let unit = pod_unit(pod, &now, context);
        if let ReplicaState::Going { overdue: false } = unit.replica.state {
            let left = seconds(pod.metadata.deletion_timestamp.as_ref()) - now.0.as_second();
            let left = Duration::from_secs(left.max(0).unsigned_abs() + 1);
            look_again = Some(look_again.map_or(left, |at| at.min(left)));
        }
        units.push(unit);
    }
    let groups: Vec<_> = context.pod_sets.owned_by(uid);
    let mut pod_sets = Vec::new();
    for group in &groups {
        match &group.0 {
            Ok(group) => {
                units.push(group_unit(&group.metadata, is_ready(group), context));
                pod_sets.push(group.clone());
            }
            // It says so itself. It holds its place: a second one would be one too many.
            Err(broken) => units.push(group_unit(&broken.metadata, false, context)),
        }
    }
    let cached = |uid: &str| {
        pods.iter()
            .any(|pod| pod.metadata.uid.as_deref() == Some(uid))
            || groups
                .iter()
                .any(|group| kube::Resource::meta(group.as_ref()).uid.as_deref() == Some(uid))
    };
    for (kind, is_group) in [("Pod", false), ("PodSet", true)] {
        let unseen = context.ledger.unseen(uid, kind, cached);
        units.extend(
            unseen
                .iter()
                .map(|meta| unit(meta, is_group, ReplicaState::Waiting)),
        );
    }
    let known = |name: &str| set.spec.roles.iter().any(|role| role.name == name);
    let (mine, orphans) = units
        .into_iter()
        .partition::<Vec<Unit>, _>(|unit| known(label(&unit.meta, keys::ROLE_NAME)));
    let mut roles: BTreeMap<String, RoleUnits> = BTreeMap::new();
    for role in &set.spec.roles {
        let entry = RoleUnits {
            hash: revision::role_hash(role),
            units: Vec::new(),
        };
        roles.insert(role.name.clone(), entry);
    }
    for unit in mine {
        if let Some(role) = roles.get_mut(label(&unit.meta, keys::ROLE_NAME)) {
            role.units.push(unit);
        }
    }
    let adopted = adoption::read(annotation(&set.metadata, keys::ADOPTED_HASHES));
    let adopted = adopted.unwrap_or_default();
    for (name, role) in &mut roles {
        role.hash = adoption::effective_hash(&adopted, name, &role.hash);
    }
    let started = annotation(&set.metadata, keys::STARTED_ROLES).unwrap_or_default();
    let mut started: BTreeSet<String> = started
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    started.extend(
        roles
            .iter()
            .filter(|(_, role)| !role.units.is_empty())
            .map(|(name, _)| name.clone()),
    );
    let orphans = orphans
        .into_iter()
        .filter(|unit| !context.is_going(&unit.meta))
        .collect();
    Observed {
        roles,
        orphans,
        pod_sets,
        started,
        look_again,
    }
}

/// Candidates for names of plain pods; far more than a role's replicas.
const PLAIN_NAMES_MAX: u32 = 1 << 20;

fn replica_name(set: &str, role: &RoleSpec, hash: &str, index: i32) -> String {
    if is_group(role) {
        names::pod_set(set, &role.name, hash, index)
    } else {
        names::indexed_pod(set, &role.name, hash, index)
    }
}

fn index_of(meta: &ObjectMeta) -> Option<i32> {
    let index = annotation(meta, keys::ROLE_REPLICA_INDEX)
        .or_else(|| Some(label(meta, keys::ROLE_REPLICA_INDEX)));
    index.and_then(|index| index.parse().ok())
}

fn pod_unit(pod: &ObservedPod, now: &Time, context: &Context) -> Unit {
    let state = if context.is_going(&pod.metadata) {
        let end = pod.metadata.deletion_timestamp.as_ref();
        ReplicaState::Going {
            overdue: end.is_some_and(|end| end.0 < now.0),
        }
    } else if pod.is_finished() {
        ReplicaState::Finished
    } else if pod.is_ready() {
        ReplicaState::Ready
    } else {
        ReplicaState::Waiting
    };
    unit(&pod.metadata, false, state)
}

fn is_ready(group: &PodSet) -> bool {
    let status = group.status.as_ref();
    status.is_some_and(|status| {
        status.phase == Some(PodSetPhase::Ready) && status.ready_pods >= group.spec.pod_group_size
    })
}

fn group_unit(meta: &ObjectMeta, is_ready: bool, context: &Context) -> Unit {
    let state = if context.is_going(meta) {
        ReplicaState::Going { overdue: false }
    } else if is_ready {
        ReplicaState::Ready
    } else {
        ReplicaState::Waiting
    };
    unit(meta, true, state)
}

fn unit(meta: &ObjectMeta, is_group: bool, state: ReplicaState) -> Unit {
    Unit {
        meta: meta.clone(),
        is_group,
        hash: label(meta, keys::ROLE_TEMPLATE_HASH).to_owned(),
        replica: Replica {
            index: index_of(meta),
            updated: false,
            state,
            created_s: seconds(meta.creation_timestamp.as_ref()),
        },
    }
}

/// Puts finalizer and marks on a RoleSet that lacks them: one that a user or AIBrix made. Returns
/// whether anything was written.
async fn prepare(set: &RoleSet, observed: &Observed, context: &Context) -> Result<bool, Error> {
    let meta = &set.metadata;
    let (namespace, name) = names_of(meta);
    let finalizers = meta.finalizers.clone().unwrap_or_default();
    let mut patch = json!({"metadata": {}});
    if !finalizers
        .iter()
        .any(|held| held == keys::ROLE_SET_FINALIZER)
    {
        let mut finalizers = finalizers;
        finalizers.push(keys::ROLE_SET_FINALIZER.to_owned());
        patch["metadata"]["finalizers"] = json!(finalizers);
        patch["metadata"]["resourceVersion"] = json!(meta.resource_version);
    }
    if annotation(meta, keys::ADOPTED_HASHES).is_none() {
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

fn note_observed(set: &RoleSet, status: &mut RoleSetStatus, context: &Context) {
    note_generation(
        &mut status.observed_generation,
        &mut status.conditions,
        set.metadata.generation,
        context.schema.gap().role_set_generation,
        &context.now(),
    );
}

async fn invalid(
    set: &RoleSet,
    violations: &[Violation],
    context: &Context,
) -> Result<Action, Error> {
    let mut status = set.status.clone().unwrap_or_default();
    let now = context.now();
    let message = validate::describe(violations);
    note_observed(set, &mut status, context);
    let all = &mut status.conditions;
    set_condition(
        all,
        conditions::INVALID,
        true,
        "Invalid",
        message.clone(),
        &now,
    );
    context
        .tell::<RoleSet>(&set.metadata, EventType::Warning, "Invalid", message)
        .await;
    let kind = resource::<RoleSet>();
    context
        .writer
        .status(&kind, &set.metadata, set.status.as_ref(), &status)
        .await?;
    Ok(Action::await_change())
}

/// How all pods of the RoleSet are scheduled together.
async fn gang(set: &RoleSet, observed: &Observed, context: &Context) -> Result<Ganging, Error> {
    let strategy = set.spec.scheduling_strategy.as_ref();
    let stays = |unit: &&Unit| {
        matches!(
            unit.replica.state,
            ReplicaState::Waiting | ReplicaState::Ready
        )
    };
    let units = observed.roles.values().flat_map(|role| &role.units);
    let siblings = units.filter(stays).map(|unit| &unit.meta);
    Ganging::of::<RoleSet>(&set.metadata, strategy, siblings, context).await
}

/// The roles as the pure planner takes them. Marks which replicas are up to date.
fn build(set: &RoleSet, observed: &mut Observed) -> Vec<RoleEntry> {
    let sizes: BTreeMap<String, i32> = observed
        .pod_sets
        .iter()
        .map(|group| {
            (
                group.metadata.name.clone().unwrap_or_default(),
                group.spec.pod_group_size,
            )
        })
        .collect();
    let mut entries = Vec::with_capacity(set.spec.roles.len());
    for role in &set.spec.roles {
        let Some(units) = observed.roles.get_mut(&role.name) else {
            continue;
        };
        let replicas = role.replicas.unwrap_or(1).max(0);
        let written = role.update_strategy.clone().unwrap_or_default();
        let budget = Budget::resolve(&written, replicas).unwrap_or(Budget {
            surge: 0,
            unavailable: 1,
        }); // Validated above.
        for unit in &mut units.units {
            let right_kind = unit.is_group == is_group(role);
            let name = unit.meta.name.as_deref().unwrap_or_default();
            let size = sizes.get(name).copied();
            let right_size = size.is_none_or(|size| Some(size) == role.pod_group_size);
            unit.replica.updated = right_kind && right_size && unit.hash == units.hash;
            if !right_kind {
                // It has no slot among those of the other kind.
                unit.replica.index = None;
            }
        }
        let view = RoleView {
            replicas,
            budget,
            indexed: is_indexed(role),
            units: units
                .units
                .iter()
                .map(|unit| unit.replica.clone())
                .collect(),
        };
        entries.push(RoleEntry {
            upgrade_order: role.upgrade_order,
            may_start: true,
            view,
        });
    }
    let ready: BTreeSet<&str> = set
        .spec
        .roles
        .iter()
        .zip(&entries)
        .filter(|(_, entry)| entry.view.ready() >= entry.view.replicas)
        .map(|(role, _)| role.name.as_str())
        .collect();
    for (role, entry) in set.spec.roles.iter().zip(&mut entries) {
        entry.may_start = observed.started.contains(&role.name)
            || role
                .dependencies
                .iter()
                .all(|name| ready.contains(name.as_str()));
    }
    entries
}

async fn apply(
    set: &RoleSet,
    observed: &Observed,
    plans: &[RolePlan],
    gang: &Ganging,
    context: &Context,
) -> Result<(), Error> {
    let (namespace, name) = names_of(&set.metadata);
    let owner = owner_reference::<RoleSet>(&set.metadata);
    // The PodGroup first: a pod that is seen before its group is scheduled alone.
    if let (Ganging::Of(_), Some(strategy)) = (gang, &set.spec.scheduling_strategy) {
        let wanted = Wanted {
            parent: uid_of(&set.metadata),
            namespace,
            name,
            label: (keys::ROLE_SET_NAME, name),
            owner: &owner,
            strategy,
            members: pod_group::role_set_members(&set.spec),
        };
        if context
            .gangs
            .ensure(&context.writer, &context.ledger, wanted)
            .await?
        {
            tracing::debug!(%namespace, %name, "applied the PodGroup");
        }
    }
    // Deletions before creations: what is created may need the room.
    let mut doomed_pods = Vec::new();
    let mut doomed_groups = Vec::new();
    let planned = set.spec.roles.iter().zip(plans).flat_map(|(role, plan)| {
        let units = observed.roles.get(&role.name);
        plan.delete
            .iter()
            .filter_map(move |&at| units.and_then(|units| units.units.get(at)))
    });
    for unit in planned
        .chain(&observed.orphans)
        .filter(|unit| unit.meta.uid.is_some())
    {
        let doomed = if unit.is_group {
            &mut doomed_groups
        } else {
            &mut doomed_pods
        };
        doomed.push(Doomed::of(&unit.meta));
    }
    context
        .writer
        .delete_all(&resource::<Pod>(), namespace, doomed_pods)
        .await?;
    context
        .writer
        .delete_all(&resource::<PodSet>(), namespace, doomed_groups)
        .await?;
    update_groups(set, observed, context).await?;
    for (role, plan) in set.spec.roles.iter().zip(plans) {
        create(set, role, observed, plan, gang, &owner, context).await?;
    }
    Ok(())
}

/// What of a PodSet can change while its pods live: how it recovers, and the numbers of its gang.
async fn update_groups(set: &RoleSet, observed: &Observed, context: &Context) -> Result<(), Error> {
    let (namespace, _) = names_of(&set.metadata);
    let mut changed = Vec::new();
    for group in &observed.pod_sets {
        let name = label(&group.metadata, keys::ROLE_NAME);
        let role = set
            .spec
            .roles
            .iter()
            .find(|role| role.name == name && is_group(role));
        let hash = label(&group.metadata, keys::ROLE_TEMPLATE_HASH);
        let current = observed
            .roles
            .get(name)
            .is_some_and(|units| units.hash == hash);
        let (Some(role), true, false) = (role, current, context.is_going(&group.metadata)) else {
            continue;
        };
        let wanted_policy = role.recovery_policy.unwrap_or_default();
        let has_policy = group.spec.recovery_policy.unwrap_or_default();
        let same_policy = wanted_policy.recreates_all() == has_policy.recreates_all();
        if !same_policy || role.scheduling_strategy != group.spec.scheduling_strategy {
            let mut group = group.clone();
            group.spec.recovery_policy = Some(wanted_policy);
            group.spec.scheduling_strategy = role.scheduling_strategy.clone();
            changed.push(group);
        }
    }
    context.writer.replace_all(namespace, changed).await
}

async fn create(
    set: &RoleSet,
    role: &RoleSpec,
    observed: &Observed,
    plan: &RolePlan,
    gang: &Ganging,
    owner: &Value,
    context: &Context,
) -> Result<(), Error> {
    let Some(units) = observed
        .roles
        .get(&role.name)
        .filter(|_| !plan.create.is_empty())
    else {
        return Ok(());
    };
    let (namespace, name) = names_of(&set.metadata);
    let uid = uid_of(&set.metadata);
    let gang = gang.gang(name, context);
    let place = |index: Option<i32>| Place {
        service: label(&set.metadata, keys::STORM_SERVICE_NAME),
        role_set: name,
        role_set_index: annotation(&set.metadata, keys::ROLE_SET_INDEX),
        role: &role.name,
        hash: &units.hash,
        index,
        gang: gang.clone(),
    };
    let labels = set.metadata.labels.iter().flatten();
    let inherited = Marks {
        labels: labels
            .filter(|(key, _)| INHERITED_LABELS.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        ..Marks::default()
    };
    let taken: BTreeSet<&str> = units
        .units
        .iter()
        .filter_map(|unit| unit.meta.name.as_deref())
        .collect();
    let mut plain = (0..PLAIN_NAMES_MAX)
        .map(|nth| names::plain_pod(name, uid, &role.name, &units.hash, nth))
        .filter(|candidate| !taken.contains(candidate.as_str()));
    let mut objects = Vec::with_capacity(plan.create.len());
    for &index in &plan.create {
        let replica = match index {
            Some(index) => replica_name(name, role, &units.hash, index),
            None => plain.next().unwrap_or_default(),
        };
        let place = place(index);
        objects.push(if is_group(role) {
            build_group(&replica, role, &place, owner)?
        } else {
            place.pod(&replica, &role.template, owner, &inherited)
        });
    }
    let (kind, resource) = if is_group(role) {
        ("PodSet", resource::<PodSet>())
    } else {
        ("Pod", resource::<Pod>())
    };
    context
        .writer
        .create_all(uid, kind, &resource, namespace, objects)
        .await
}

/// A PodSet. Its pods inherit its labels and annotations.
fn build_group(
    name: &str,
    role: &RoleSpec,
    place: &Place<'_>,
    owner: &Value,
) -> Result<Value, Error> {
    let mut template = role.template.clone();
    template
        .0
        .insert("spec".into(), Value::Object(place.pod_spec(&role.template)));
    let policy = role.recovery_policy.unwrap_or_default();
    let mut marks = place.marks(Marks::default());
    if policy.recreates_all() {
        let none = Baseline::default().write();
        marks.annotations.insert(keys::RESTARTS_BEFORE.into(), none);
    }
    let spec = PodSetSpec {
        pod_group_size: role.pod_group_size.unwrap_or(1),
        template,
        stateful: role.stateful,
        recovery_policy: Some(policy),
        scheduling_strategy: role.scheduling_strategy.clone(),
    };
    let spec = serde_json::to_value(spec).map_err(|source| Error::Build {
        kind: "PodSet",
        source,
    })?;
    Ok(json!({
        "apiVersion": format!("{}/{}", crate::api::GROUP, crate::api::VERSION),
        "kind": "PodSet",
        "metadata": {
            "name": name,
            "labels": marks.labels,
            "annotations": marks.annotations,
            "ownerReferences": [owner],
            "finalizers": [keys::POD_SET_FINALIZER],
        },
        "spec": spec,
    }))
}

fn status_of(
    set: &RoleSet,
    entries: &[RoleEntry],
    gang: &Ganging,
    failure: Option<&Error>,
    context: &Context,
) -> RoleSetStatus {
    let now = context.now();
    let mut status = set.status.clone().unwrap_or_default();
    note_observed(set, &mut status, context);
    status.roles = set
        .spec
        .roles
        .iter()
        .zip(entries)
        .map(|(role, entry)| RoleStatus {
            name: role.name.clone(),
            ..entry.view.status()
        })
        .collect();
    let waiting: Vec<&str> = set
        .spec
        .roles
        .iter()
        .zip(entries)
        .filter(|(_, entry)| entry.view.ready() < entry.view.replicas)
        .map(|(role, _)| role.name.as_str())
        .collect();
    let is_ready = waiting.is_empty();
    let done = entries.iter().all(|entry| entry.view.is_done());
    let all = &mut status.conditions;
    all.retain(|condition| condition.kind != conditions::INVALID);
    let (reason, message) = if is_ready {
        ("AllRolesReady", String::new())
    } else {
        (
            "RolesNotReady",
            format!("not ready: {}", waiting.join(", ")),
        )
    };
    set_condition(all, conditions::READY, is_ready, reason, message, &now);
    let reason = if done { "Complete" } else { "RolesChanging" };
    set_condition(all, conditions::PROGRESSING, !done, reason, "", &now);
    gang.set_condition(all, &now);
    match failure {
        Some(error) => set_condition(
            all,
            conditions::REPLICA_FAILURE,
            true,
            "Failure",
            error.to_string(),
            &now,
        ),
        None => all.retain(|condition| condition.kind != conditions::REPLICA_FAILURE),
    }
    status
}

/// Lets a deleted RoleSet go once its pods and PodSets are gone. Of one that cannot be decoded no
/// `strategy` is known: its PodGroup follows by its owner reference.
async fn finalize(
    meta: &ObjectMeta,
    strategy: Option<&SchedulingStrategy>,
    context: &Context,
) -> Result<Action, Error> {
    let kind = resource::<RoleSet>();
    match Farewell::of(meta, keys::ROLE_SET_FINALIZER) {
        Farewell::Over => return Ok(Action::await_change()),
        Farewell::LeaveChildren => {
            context
                .writer
                .release(&kind, meta, keys::ROLE_SET_FINALIZER)
                .await?;
            return Ok(Action::await_change());
        }
        Farewell::TakeChildren => {}
    }
    let (namespace, name) = names_of(meta);
    let uid = uid_of(meta);
    let pods = context.pods_of(uid);
    let groups = context.pod_sets.owned_by(uid);
    let doomed = |metas: Vec<&ObjectMeta>| -> Vec<Doomed> {
        metas
            .into_iter()
            .filter(|meta| !context.is_going(meta))
            .map(Doomed::of)
            .collect()
    };
    let pod_metas = pods.iter().map(|pod| &pod.metadata).collect();
    let group_metas = groups
        .iter()
        .map(|group| kube::Resource::meta(group.as_ref()))
        .collect();
    context
        .writer
        .delete_all(&resource::<PodSet>(), namespace, doomed(group_metas))
        .await?;
    context
        .writer
        .delete_all(&resource::<Pod>(), namespace, doomed(pod_metas))
        .await?;
    let unseen = ["Pod", "PodSet"]
        .into_iter()
        .any(|kind| !context.ledger.unseen(uid, kind, |_| false).is_empty());
    if !pods.is_empty() || !groups.is_empty() || unseen {
        return Ok(Action::requeue(Duration::from_secs(30)));
    }
    if let Some(scheduler) = strategy.and_then(|strategy| strategy.scheduler()) {
        let group = (namespace, name);
        context
            .gangs
            .remove(&context.client, &context.writer, group, uid, scheduler)
            .await?;
    }
    context
        .writer
        .release(&kind, meta, keys::ROLE_SET_FINALIZER)
        .await?;
    Ok(Action::await_change())
}
