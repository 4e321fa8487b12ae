//! StormService: RoleSets, the headless Service and revisions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use serde_json::{Value, json};

use super::apply::{Doomed, owner_reference, resource};
use super::context::Context;
use super::error::{self, Error};
use super::farewell::Farewell;
use super::informer::owner_uid;
use super::observed::ObservedRevision;
use super::schema::is_observed;
use super::{Key, conditions};
use crate::api::{
    RoleSet, RoleSetSpec, RoleSetTemplate, RoleStatus, RolloutBudget, StormService,
    StormServiceStatus, UpdateType, find_condition, keys, set_condition,
};
use crate::core::budget::{Budget, CREATIONS_MAX};
use crate::core::canonical::canonical;
use crate::core::service_plan::{Revision, ServicePlan, ServiceView, SetView};
use crate::core::validate::{self, Violation};
use crate::core::{adoption, names, revision};

/// Names tried when a revision's is taken by other data.
const COLLISIONS_MAX: i32 = 5;
/// Label of a ControllerRevision with its hash, as Kubernetes' own controllers use it.
const REVISION_HASH: &str = "controller.kubernetes.io/hash";

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
    let service = context.ledger.with_newest_status(service);
    let service = service.as_ref();
    if service.metadata.deletion_timestamp.is_some() {
        return finalize(&service.metadata, &context).await;
    }
    let (namespace, name) = names_of(&service.metadata);
    let finalizers = service.metadata.finalizers.as_deref().unwrap_or_default();
    let violations = validate::stormservice(name, &service.spec);
    let Some(template_spec) = service
        .spec
        .template
        .spec
        .as_ref()
        .filter(|_| violations.is_empty())
    else {
        return invalid(service, &violations, &context).await;
    };
    if !finalizers
        .iter()
        .any(|held| held == keys::STORM_SERVICE_FINALIZER)
    {
        let mut finalizers = finalizers.to_vec();
        finalizers.push(keys::STORM_SERVICE_FINALIZER.to_owned());
        let patch = json!({"metadata": {
            "finalizers": finalizers, "resourceVersion": service.metadata.resource_version,
        }});
        context
            .writer
            .merge(&resource::<StormService>(), namespace, name, &patch)
            .await?;
        return Ok(Action::await_change());
    }
    let mut observed = dereference(service, &context);
    let revisions = sync_revisions(service, &observed, &context).await?;
    let headless = sync_headless(service, &context).await;
    mark(&mut observed, template_spec, &revisions, &context);
    let view = view_of(service, &observed);
    let plan = view.plan();
    let applied = apply(service, &observed, &plan, &revisions, &context).await;
    let failure = error::failure(&headless).or(error::failure(&applied));
    let rewritten = applied.as_ref().is_ok_and(|rewritten| *rewritten);
    let changed = !plan.create.is_empty() || !plan.delete.is_empty() || rewritten;
    // What was just written is told of when the watch shows it.
    if !changed || failure.is_some() {
        let status = status_of(service, &observed, &revisions, failure, &context);
        let kind = resource::<StormService>();
        context
            .writer
            .status(&kind, &service.metadata, service.status.as_ref(), &status)
            .await?;
    }
    headless?;
    applied?;
    trim_history(service, &observed, &revisions, &context).await?;
    let more = i32::try_from(plan.create.len()) == Ok(CREATIONS_MAX);
    Ok(if more {
        Action::requeue(super::NEXT_CREATIONS)
    } else {
        Action::await_change()
    })
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

/// A stored object that the types cannot hold: it is told so, and left alone until it is deleted.
///
/// # Errors
///
/// When the API server refuses.
pub(super) async fn undecodable<K: Resource<DynamicType = ()>>(
    context: &Context,
    invalid: &InvalidObject,
) -> Result<Action, Error> {
    let meta = &invalid.metadata;
    let message = format!("the stored object cannot be read: {}", invalid.error);
    let uid = uid_of(meta);
    if context.ledger.tell(uid, conditions::INVALID, &message) {
        let (namespace, name) = names_of(meta);
        tracing::warn!(kind = %K::kind(&()), %namespace, %name, error = %invalid.error, "not readable");
        let now = context.now();
        let status = json!({"status": {"conditions": [{
            "type": conditions::INVALID, "status": "True", "reason": "Unreadable",
            "message": message, "lastTransitionTime": now, "lastUpdateTime": now,
        }]}});
        context
            .writer
            .merge_status(&resource::<K>(), namespace, name, &status)
            .await?;
    }
    Ok(Action::await_change())
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
    set_condition(
        all,
        conditions::INVALID,
        true,
        "Invalid",
        message.clone(),
        &now,
    );
    context
        .tell::<StormService>(&service.metadata, EventType::Warning, "Invalid", message)
        .await;
    let kind = resource::<StormService>();
    context
        .writer
        .status(&kind, &service.metadata, service.status.as_ref(), &status)
        .await?;
    Ok(Action::await_change())
}

/// A RoleSet that is there.
struct Owned {
    set: RoleSet,
    view: SetView,
    revision: String,
    /// Whether its spec is known. One that cannot be decoded counts, and is not written.
    readable: bool,
}

struct Observed {
    /// Also those that were created and not seen yet.
    sets: Vec<Owned>,
    revisions: Vec<Arc<ObservedRevision>>,
}

fn dereference(service: &StormService, context: &Context) -> Observed {
    let uid = uid_of(&service.metadata);
    let mut sets = Vec::new();
    let guarded = context.role_sets.owned_by(uid);
    for set in &guarded {
        match &set.0 {
            Ok(set) => sets.push(observe_set(set, context)),
            Err(broken) => sets.push(observe_unreadable(&broken.metadata, context)),
        }
    }
    let cached = |uid: &str| {
        guarded
            .iter()
            .any(|set| set.as_ref().meta().uid.as_deref() == Some(uid))
    };
    let unseen = context.ledger.unseen(uid, "RoleSet", cached);
    // Of what was created only the metadata is at hand, so it is not written.
    sets.extend(unseen.iter().map(|meta| observe_unreadable(meta, context)));
    let mut revisions = context.revisions.owned_by(uid);
    revisions.sort_by_key(|revision| (revision.revision, revision.metadata.name.clone()));
    Observed { sets, revisions }
}

fn observe_set(set: &RoleSet, context: &Context) -> Owned {
    let meta = &set.metadata;
    let annotation = |key: &str| meta.annotations.as_ref().and_then(|all| all.get(key));
    let status = set.status.clone().unwrap_or_default();
    let cached = meta.generation.unwrap_or(0);
    let generation = context.ledger.generation(uid_of(meta), cached);
    let observed = is_observed(status.observed_generation, &status.conditions, generation);
    let ready = find_condition(&status.conditions, conditions::READY)
        .is_some_and(|ready| ready.status == crate::api::ConditionStatus::True);
    let rolled = set.spec.roles.iter().all(|role| {
        let wanted = role.replicas.unwrap_or(1);
        status.roles.iter().any(|counted| {
            counted.name == role.name
                && counted.updated_ready_replicas >= wanted
                && counted.replicas == wanted
        })
    });
    let revision = meta
        .labels
        .as_ref()
        .and_then(|all| all.get(keys::STORM_SERVICE_REVISION));
    Owned {
        view: SetView {
            index: annotation(keys::ROLE_SET_INDEX).and_then(|index| index.parse().ok()),
            updated: false,
            ready,
            settled: observed && ready && rolled,
            going: context.is_going(meta),
            replace: false,
        },
        revision: revision.cloned().unwrap_or_default(),
        set: set.clone(),
        readable: true,
    }
}

/// A RoleSet of which only the metadata is known, because it cannot be decoded or was just created: it
/// holds its place, or a second one would be made, and is not ready.
fn observe_unreadable(meta: &ObjectMeta, context: &Context) -> Owned {
    let mut set = RoleSet::new("", RoleSetSpec::default());
    set.metadata = meta.clone();
    Owned {
        readable: false,
        ..observe_set(&set, context)
    }
}

/// The revisions that matter, by name, and their templates.
struct Revisions {
    update: String,
    current: String,
    /// The template of `current`, with the present replica counts.
    current_template: RoleSetTemplate,
    collisions: i32,
}

async fn sync_revisions(
    service: &StormService,
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
    let update = match same {
        Some(same) => {
            let name = same.metadata.name.clone().unwrap_or_default();
            if newest.is_some_and(|newest| newest.metadata.name != same.metadata.name) {
                // Going back: the old revision becomes the newest.
                let (namespace, _) = names_of(&service.metadata);
                let kind = resource::<ControllerRevision>();
                let patch = json!({"revision": next});
                context
                    .writer
                    .merge(&kind, namespace, &name, &patch)
                    .await?;
                let note = format!("went back to revision {name}");
                let meta = &service.metadata;
                context
                    .tell::<StormService>(meta, EventType::Normal, "Rollout", note)
                    .await;
            }
            name
        }
        None => create_revision(service, &wanted, next, &mut collisions, context).await?,
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
        collisions,
    })
}

async fn create_revision(
    service: &StormService,
    data: &Value,
    number: i64,
    collisions: &mut i32,
    context: &Context,
) -> Result<String, Error> {
    let (namespace, name) = names_of(&service.metadata);
    let uid = uid_of(&service.metadata);
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
                "ownerReferences": [owner_reference::<StormService>(&service.metadata)],
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

/// The headless Service that gives pods names in DNS. It belongs to the StormService or it is not
/// touched.
async fn sync_headless(service: &StormService, context: &Context) -> Result<(), Error> {
    let (namespace, name) = names_of(&service.metadata);
    let uid = uid_of(&service.metadata);
    let key = Key {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    let kind = resource::<Service>();
    let found = context.headless.get(&key);
    if let Some(found) = &found {
        if owner_uid(&found.metadata) != Some(uid) {
            return Err(Error::NameTaken {
                kind: "Service".into(),
                name: name.to_owned(),
            });
        }
        let selected = BTreeMap::from([(keys::STORM_SERVICE_NAME.to_owned(), name.to_owned())]);
        let as_wanted = found.spec.cluster_ip.as_deref() == Some("None")
            && found.spec.selector == selected
            && found.spec.publish_not_ready_addresses;
        if as_wanted || context.is_going(&found.metadata) {
            return Ok(());
        }
    }
    let labels: BTreeMap<&String, &String> = service.metadata.labels.iter().flatten().collect();
    let wanted = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "labels": labels,
            "ownerReferences": [owner_reference::<StormService>(&service.metadata)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": {keys::STORM_SERVICE_NAME: name},
            "publishNotReadyAddresses": true,
        },
    });
    if found.is_none() {
        if !context.ledger.unseen(uid, "Service", |_| false).is_empty() {
            return Ok(());
        }
        // A POST first: applying would take over a Service of somebody else's.
        context
            .writer
            .create(uid, "Service", &kind, namespace, wanted)
            .await?;
        return Ok(());
    }
    context.writer.apply(&kind, namespace, name, &wanted).await
}

/// Marks which RoleSets are of the present revision, and which must be replaced to become so.
fn mark(observed: &mut Observed, wanted: &RoleSetSpec, revisions: &Revisions, context: &Context) {
    for owned in &mut observed.sets {
        owned.view.updated = owned.revision == revisions.update;
        owned.view.replace = owned.readable
            && revision::needs_replacement(
                owned.set.spec.scheduling_strategy.as_ref(),
                wanted.scheduling_strategy.as_ref(),
            );
        // Its pods are looked at first: which of their hashes stands for what it says now.
        let adopted = owned.set.metadata.annotations.as_ref().is_some_and(|all| {
            all.get(keys::ADOPTED_HASHES)
                .is_some_and(|text| adoption::read(Some(text)).is_some())
        });
        if !adopted && !context.is_going(&owned.set.metadata) {
            owned.view.settled = false;
        }
    }
}

fn view_of(service: &StormService, observed: &Observed) -> ServiceView {
    let spec = &service.spec;
    let strategy = spec.update_strategy.clone().unwrap_or_default();
    let replicas = spec.replicas.unwrap_or(1).max(0);
    let budget = Budget::resolve(&strategy.budget, replicas).unwrap_or(Budget {
        surge: 0,
        unavailable: 1,
    }); // Validated above.
    let sets = observed.sets.iter().map(|owned| owned.view.clone());
    ServiceView {
        replicas,
        budget,
        update: strategy.kind.unwrap_or_default(),
        paused: spec.paused,
        stateful: spec.stateful,
        sets: sets.collect(),
    }
}

/// The spec of a RoleSet of this StormService: the template's, with the present replica counts, and
/// where RoleSets may not be missing, roles that surge.
fn set_spec(service: &StormService, template: &RoleSetTemplate) -> RoleSetSpec {
    let mut spec = template.spec.clone().unwrap_or_default();
    let present = service.spec.template.spec.as_ref();
    let strategy = service.spec.update_strategy.clone().unwrap_or_default();
    let replicas = service.spec.replicas.unwrap_or(1);
    let budget = Budget::resolve(&strategy.budget, replicas).ok();
    let rolling = strategy.kind.unwrap_or_default() == UpdateType::RollingUpdate;
    let surges = rolling && budget.is_some_and(|budget| budget.unavailable == 0 && replicas > 0);
    for role in &mut spec.roles {
        let same = present.and_then(|spec| spec.roles.iter().find(|other| other.name == role.name));
        if let Some(same) = same {
            role.replicas = same.replicas;
        }
        let unset = role
            .update_strategy
            .as_ref()
            .is_none_or(|budget| budget.max_surge.is_none() && budget.max_unavailable.is_none());
        if let (true, true, Some(budget)) = (surges, unset, budget) {
            use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int;
            role.update_strategy = Some(RolloutBudget {
                max_surge: Some(Int(budget.surge)),
                max_unavailable: Some(Int(0)),
            });
        }
    }
    spec
}

fn build_set(
    service: &StormService,
    index: i32,
    template: &RoleSetTemplate,
    revision: &str,
) -> Result<Value, Error> {
    let (_, name) = names_of(&service.metadata);
    let (labels, mut annotations) = set_marks(service, template, revision);
    annotations.insert(keys::ROLE_SET_INDEX.into(), index.to_string());
    annotations.insert(keys::ADOPTED_HASHES.into(), "{}".into());
    let spec =
        serde_json::to_value(set_spec(service, template)).map_err(|source| Error::Build {
            kind: "RoleSet",
            source,
        })?;
    Ok(json!({
        "apiVersion": format!("{}/{}", crate::api::GROUP, crate::api::VERSION),
        "kind": "RoleSet",
        "metadata": {
            "name": names::role_set(name, uid_of(&service.metadata), index),
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [owner_reference::<StormService>(&service.metadata)],
            "finalizers": [keys::ROLE_SET_FINALIZER],
        },
        "spec": spec,
    }))
}

type Map = BTreeMap<String, String>;

fn set_marks(service: &StormService, template: &RoleSetTemplate, revision: &str) -> (Map, Map) {
    let (_, name) = names_of(&service.metadata);
    let metadata = template.metadata.clone().unwrap_or_default();
    let mut labels = metadata.labels.unwrap_or_default();
    labels.insert(keys::STORM_SERVICE_NAME.into(), name.to_owned());
    labels.insert(keys::STORM_SERVICE_REVISION.into(), revision.to_owned());
    let mut annotations = metadata.annotations.unwrap_or_default();
    annotations.insert(keys::ROLE_SET_REVISION.into(), revision.to_owned());
    (labels, annotations)
}

/// Returns whether RoleSets were rewritten.
async fn apply(
    service: &StormService,
    observed: &Observed,
    plan: &ServicePlan,
    revisions: &Revisions,
    context: &Context,
) -> Result<bool, Error> {
    let (namespace, _) = names_of(&service.metadata);
    let uid = uid_of(&service.metadata);
    let kind = resource::<RoleSet>();
    tell_of_scaling(service, observed, plan, context).await;
    // Deletions before creations: what is created may need the room.
    let doomed = plan
        .delete
        .iter()
        .filter_map(|&at| observed.sets.get(at))
        .map(|owned| Doomed::of(&owned.set.metadata))
        .collect();
    context.writer.delete_all(&kind, namespace, doomed).await?;
    let changed = changed_sets(service, observed, plan, revisions);
    let rewritten = !changed.is_empty();
    context.writer.replace_all(namespace, changed).await?;
    let mut objects = Vec::with_capacity(plan.create.len());
    for &(index, revision) in &plan.create {
        let (template, revision) = match revision {
            Revision::Update => (&service.spec.template, &revisions.update),
            Revision::Current => (&revisions.current_template, &revisions.current),
        };
        objects.push(build_set(service, index, template, revision)?);
    }
    context
        .writer
        .create_all(uid, "RoleSet", &kind, namespace, objects)
        .await?;
    Ok(rewritten)
}

async fn tell_of_scaling(
    service: &StormService,
    observed: &Observed,
    plan: &ServicePlan,
    context: &Context,
) {
    if plan.create.is_empty() && plan.delete.is_empty() {
        return;
    }
    let wanted = service.spec.replicas.unwrap_or(1);
    let there = observed
        .sets
        .iter()
        .filter(|owned| !owned.view.going)
        .count();
    if i32::try_from(there) != Ok(wanted) {
        let note = format!("scaling from {there} to {wanted} RoleSets");
        let meta = &service.metadata;
        context
            .tell::<StormService>(meta, EventType::Normal, "Scaling", note)
            .await;
    }
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
            set.metadata.labels.get_or_insert_default().extend(labels);
            set.metadata
                .annotations
                .get_or_insert_default()
                .extend(annotations);
        } else {
            let template = RoleSetTemplate {
                metadata: None,
                spec: Some(set.spec.clone()),
            };
            set.spec = with_present_replicas(service, &template);
        }
        if differs(&set, &owned.set) {
            changed.push(set);
        }
    }
    changed
}

/// A RoleSet of an older revision keeps all but the replica counts.
fn with_present_replicas(service: &StormService, template: &RoleSetTemplate) -> RoleSetSpec {
    let mut spec = template.spec.clone().unwrap_or_default();
    let present = service.spec.template.spec.as_ref();
    for role in &mut spec.roles {
        let same = present.and_then(|spec| spec.roles.iter().find(|other| other.name == role.name));
        if let Some(same) = same {
            role.replicas = same.replicas;
        }
    }
    spec
}

fn differs(left: &RoleSet, right: &RoleSet) -> bool {
    let form = |set: &RoleSet| {
        let mut spec = serde_json::to_value(&set.spec).unwrap_or_default();
        // The API server fills it in.
        if spec.get("updateStrategy").is_none() {
            spec["updateStrategy"] = json!("Sequential");
        }
        for role in spec
            .pointer_mut("/roles")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if role.get("replicas").is_none() {
                role["replicas"] = json!(1);
            }
        }
        canonical(&spec)
    };
    left.metadata.labels != right.metadata.labels
        || left.metadata.annotations != right.metadata.annotations
        || left.spec != right.spec && form(left) != form(right)
}

fn status_of(
    service: &StormService,
    observed: &Observed,
    revisions: &Revisions,
    failure: Option<&Error>,
    context: &Context,
) -> StormServiceStatus {
    let now = context.now();
    let (_, name) = names_of(&service.metadata);
    let wanted = service.spec.replicas.unwrap_or(1);
    let count = |holds: &dyn Fn(&Owned) -> bool| {
        let found = observed.sets.iter().filter(|owned| holds(owned)).count();
        i32::try_from(found).unwrap_or(i32::MAX)
    };
    let mut status = service.status.clone().unwrap_or_default();
    status.observed_generation = service.metadata.generation;
    status.replicas = count(&|_| true);
    status.ready_replicas = count(&|owned| owned.view.ready && !owned.view.going);
    status.not_ready_replicas = status.replicas - status.ready_replicas;
    status.updated_ready_replicas =
        count(&|owned| owned.view.updated && owned.view.settled && !owned.view.going);
    status.updated_replicas = count(&|owned| {
        owned.view.updated && !owned.view.going && owned.readable && all_rolled(&owned.set)
    });
    status.update_revision.clone_from(&revisions.update);
    let outdated = count(&|owned| !owned.view.updated && !owned.view.going);
    let arrived = outdated == 0 && status.updated_ready_replicas >= wanted;
    status.current_revision = if arrived {
        revisions.update.clone()
    } else {
        revisions.current.clone()
    };
    status.current_replicas = count(&|owned| owned.revision == status.current_revision);
    status.collision_count = Some(revisions.collisions);
    status.scaling_target_selector = format!("{}={name}", keys::STORM_SERVICE_NAME);
    status.role_statuses = sum_roles(service, observed);
    let ready = arrived && status.replicas == wanted && status.ready_replicas >= wanted;
    let all = &mut status.conditions;
    all.retain(|condition| condition.kind != conditions::INVALID);
    let message = format!("{} of {wanted} RoleSets are ready", status.ready_replicas);
    let reason = if ready { "Ready" } else { "NotReady" };
    set_condition(all, conditions::READY, ready, reason, message, &now);
    let reason = match (ready, service.spec.paused && outdated > 0) {
        (_, true) => "Paused",
        (true, false) => "Complete",
        (false, false) => "Processing",
    };
    set_condition(
        all,
        conditions::PROGRESSING,
        !ready && reason != "Paused",
        reason,
        "",
        &now,
    );
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
    match context.schema.gap().lost {
        Some(gap) => {
            set_condition(
                all,
                conditions::SCHEMA_OUTDATED,
                true,
                "FieldsDropped",
                gap,
                &now,
            );
        }
        None => all.retain(|condition| condition.kind != conditions::SCHEMA_OUTDATED),
    }
    status
}

fn all_rolled(set: &RoleSet) -> bool {
    let status = set.status.clone().unwrap_or_default();
    set.spec.roles.iter().all(|role| {
        status.roles.iter().any(|counted| {
            counted.name == role.name && counted.updated_replicas == role.replicas.unwrap_or(1)
        })
    })
}

/// Each role over all RoleSets, in the order of the template.
fn sum_roles(service: &StormService, observed: &Observed) -> Vec<RoleStatus> {
    let roles = service
        .spec
        .template
        .spec
        .as_ref()
        .map_or(&[][..], |spec| &spec.roles);
    let mut sums: Vec<RoleStatus> = roles
        .iter()
        .map(|role| RoleStatus {
            name: role.name.clone(),
            ..RoleStatus::default()
        })
        .collect();
    let add = |sum: &mut i32, more: i32| *sum = sum.saturating_add(more);
    for owned in observed.sets.iter().filter(|owned| !owned.view.going) {
        let status = owned.set.status.iter().flat_map(|status| &status.roles);
        for counted in status {
            if let Some(sum) = sums.iter_mut().find(|sum| sum.name == counted.name) {
                add(&mut sum.replicas, counted.replicas);
                add(&mut sum.ready_replicas, counted.ready_replicas);
                add(&mut sum.not_ready_replicas, counted.not_ready_replicas);
                add(&mut sum.updated_replicas, counted.updated_replicas);
                add(
                    &mut sum.updated_ready_replicas,
                    counted.updated_ready_replicas,
                );
            }
        }
    }
    sums
}

async fn trim_history(
    service: &StormService,
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
    let (namespace, _) = names_of(&service.metadata);
    context
        .writer
        .delete_all(&resource::<ControllerRevision>(), namespace, doomed)
        .await
}

/// Lets a deleted StormService go once its RoleSets are gone. Metadata is enough, so one that cannot
/// be decoded goes as well.
async fn finalize(meta: &ObjectMeta, context: &Context) -> Result<Action, Error> {
    let kind = resource::<StormService>();
    match Farewell::of(meta, keys::STORM_SERVICE_FINALIZER) {
        Farewell::Over => return Ok(Action::await_change()),
        Farewell::LeaveChildren => {
            context
                .writer
                .release(&kind, meta, keys::STORM_SERVICE_FINALIZER)
                .await?;
            return Ok(Action::await_change());
        }
        Farewell::TakeChildren => {}
    }
    let (namespace, name) = names_of(meta);
    let uid = uid_of(meta);
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
    let key = Key {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    let headless = context.headless.get(&key);
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
