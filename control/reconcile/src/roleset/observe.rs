//! What there is of a RoleSet, and the roles as the planner takes them: reads the caches.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use kube::core::DeserializeGuard;
use kvtide_control_api::meta::{
    annotation, is_paused, label, owner_key, owner_uid, scaling_role, seconds,
};
use kvtide_control_api::observed::ObservedPod;
use kvtide_control_api::target::Target;
use kvtide_control_api::{
    PodSet, PodSetPhase, RoleSet, RoleSpec, StormService, conditions, find_condition, keys,
};
use kvtide_control_core::budget::Budget;
use kvtide_control_core::early_ends::EarlyEnds;
use kvtide_control_core::role_plan::{Replica, ReplicaState, RoleView};
use kvtide_control_core::rollout::RoleEntry;
use kvtide_control_core::{adoption, revision};

use crate::context::Context;

/// One replica that is there.
pub(super) struct Unit {
    pub(super) meta: ObjectMeta,
    pub(super) is_group: bool,
    pub(super) hash: String,
    pub(super) replica: Replica,
    /// Whether it is a pod that ended soon after it was made.
    pub(super) ended_early: bool,
}

pub(super) struct RoleUnits {
    pub(super) hash: String,
    pub(super) units: Vec<Unit>,
}

pub(super) struct Observed {
    pub(super) roles: BTreeMap<String, RoleUnits>,
    /// Replicas of roles that the spec no longer has.
    pub(super) orphans: Vec<Unit>,
    /// Replicas that no longer say of which role they are: somebody took the label off.
    pub(super) released: Vec<Unit>,
    pub(super) pod_sets: Vec<PodSet>,
    pub(super) started: BTreeSet<String>,
    /// Roles that began to roll, as far as it was noted.
    pub(super) rolling: BTreeSet<String>,
    /// Whether its StormService is paused.
    pub(super) paused: bool,
    /// The role that its StormService is scaled by, where it names one.
    pub(super) scaling_role: Option<String>,
    pub(super) early_ends: EarlyEnds,
    /// Roles with pods that ended early: those whose pods are replaced now, and those that wait.
    pub(super) replaced: Vec<String>,
    pub(super) held: Vec<String>,
    pub(super) look_again: Option<Duration>,
}

pub(super) fn is_group(role: &RoleSpec) -> bool {
    role.pod_group_size.unwrap_or(1) > 1
}

fn is_indexed(role: &RoleSpec) -> bool {
    is_group(role) || role.stateful
}

pub(super) fn dereference(
    set: &RoleSet,
    target: &Target,
    now: &Time,
    context: &Context,
) -> Observed {
    let uid = &target.uid;
    let mut look_again: Option<Duration> = None;
    let mut units = Vec::new();
    let pods = context.pods_of(uid);
    for pod in &pods {
        let unit = pod_unit(pod, now, context);
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
                let mut unit = group_unit(&group.metadata, is_ready(group), context);
                unit.replica.waiting_since_s = group_waiting_since(group);
                units.push(unit);
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
    let (mine, others) = units
        .into_iter()
        .partition::<Vec<Unit>, _>(|unit| known(label(&unit.meta, keys::ROLE_NAME)));
    let (released, orphans) = others
        .into_iter()
        .filter(|unit| !context.is_going(&unit.meta))
        .partition(|unit| label(&unit.meta, keys::ROLE_NAME).is_empty());
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
    let mut started = noted_roles(&set.metadata, keys::STARTED_ROLES);
    started.extend(
        roles
            .iter()
            .filter(|(_, role)| !role.units.is_empty())
            .map(|(name, _)| name.clone()),
    );
    let owner = owner(&set.metadata, context);
    Observed {
        roles,
        orphans,
        released,
        pod_sets,
        started,
        rolling: noted_roles(&set.metadata, keys::ROLLING_ROLES),
        paused: owner.as_deref().is_some_and(is_paused),
        scaling_role: owner.and_then(|owner| scaling_role(owner.meta()).map(str::to_owned)),
        early_ends: EarlyEnds::read(annotation(&set.metadata, keys::EARLY_ENDS)),
        replaced: Vec::new(),
        held: Vec::new(),
        look_again,
    }
}

/// The roles that an annotation names.
fn noted_roles(meta: &ObjectMeta, key: &str) -> BTreeSet<String> {
    let names = annotation(meta, key).unwrap_or_default().split(',');
    let names = names.filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

/// The StormService of a RoleSet with this metadata. It is asked itself, so that what it says holds at
/// once, and no RoleSet is written for it.
fn owner(meta: &ObjectMeta, context: &Context) -> Option<Arc<DeserializeGuard<StormService>>> {
    let owner = context.services.get(&owner_key(meta, "StormService")?)?;
    (owner.meta().uid.as_deref() == owner_uid(meta)).then_some(owner)
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
    let mut unit = unit(&pod.metadata, false, state);
    unit.ended_early =
        state == ReplicaState::Finished && pod.lifetime() < context.settings.backoff.longest;
    unit.replica.waiting_since_s = seconds(pod.waiting_since());
    unit
}

/// Since when a group waits to be ready, in seconds: since it ceased to be, or since it was made.
fn group_waiting_since(group: &PodSet) -> i64 {
    let status = group.status.as_ref();
    let ready = status.and_then(|status| find_condition(&status.conditions, conditions::READY));
    let turned = ready.and_then(|ready| ready.last_transition_time.as_ref());
    seconds(turned.or(group.metadata.creation_timestamp.as_ref()))
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
            waiting_since_s: seconds(meta.creation_timestamp.as_ref()),
        },
        ended_early: false,
    }
}

/// The roles as the pure planner takes them. Marks which replicas are up to date, and which of those
/// that ended are not replaced yet.
pub(super) fn build(
    set: &RoleSet,
    observed: &mut Observed,
    now: &Time,
    context: &Context,
) -> Vec<RoleEntry> {
    let now_s = now.0.as_second();
    let backoff = context.settings.backoff;
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
        mark_updated(units, role, &sizes);
        let early = |unit: &&mut Unit| unit.ended_early && unit.replica.updated;
        let mut early = units.units.iter_mut().filter(early).peekable();
        if early.peek().is_some() {
            let wait = observed
                .early_ends
                .wait(&role.name, &units.hash, now_s, backoff);
            if let Some(wait) = wait {
                early.for_each(|unit| unit.replica.state = ReplicaState::Held);
                observed.held.push(role.name.clone());
                let again = observed.look_again.map_or(wait, |at| at.min(wait));
                observed.look_again = Some(again);
            } else {
                let (name, hash) = (&role.name, &units.hash);
                observed.early_ends.note(name, hash, now_s, backoff);
                observed.replaced.push(role.name.clone());
            }
        }
        let view = RoleView {
            replicas,
            budget,
            indexed: is_indexed(role),
            paused: observed.paused,
            units: units
                .units
                .iter()
                .map(|unit| unit.replica.clone())
                .collect(),
        };
        let noted = observed.rolling.contains(&role.name);
        entries.push(RoleEntry {
            upgrade_order: role.upgrade_order,
            may_start: true,
            rolling: view.has_outdated() || noted && !view.is_done(),
            view,
        });
    }
    gate(set, observed, &mut entries);
    entries
}

/// Marks which replicas of a role are made from what it asks for now. `sizes` are those of PodSets.
fn mark_updated(units: &mut RoleUnits, role: &RoleSpec, sizes: &BTreeMap<String, i32>) {
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
}

/// Lets only those roles start whose dependencies are ready, or that started before.
fn gate(set: &RoleSet, observed: &Observed, entries: &mut [RoleEntry]) {
    let ready: BTreeSet<&str> = set
        .spec
        .roles
        .iter()
        .zip(entries.iter())
        .filter(|(_, entry)| entry.view.ready() >= entry.view.replicas)
        .map(|(role, _)| role.name.as_str())
        .collect();
    for (role, entry) in set.spec.roles.iter().zip(entries) {
        entry.may_start = observed.started.contains(&role.name)
            || role
                .dependencies
                .iter()
                .all(|name| ready.contains(name.as_str()));
    }
}
