//! The replicas of a RoleSet, and its roles as the planner takes them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kvtide_control_api::meta::{annotation, label, seconds};
use kvtide_control_api::observed::ObservedPod;
use kvtide_control_api::{
    PodSet, PodSetPhase, RoleSet, RoleSpec, conditions, find_condition, keys,
};

use super::budget::Budget;
use super::early_ends::EarlyEnds;
use super::recovery::Backoff;
use super::role_plan::{Replica, ReplicaState, RoleView};
use super::rollout::RoleEntry;
use super::seen::Seen;
use super::{adoption, revision};

/// What the caches show of a RoleSet.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Its pods.
    pub pods: Vec<Seen<Arc<ObservedPod>>>,
    /// Its PodSets; of one that cannot be decoded, the metadata.
    pub groups: Vec<Seen<Result<PodSet, ObjectMeta>>>,
    /// Pods that were created and are not in the cache yet.
    pub unseen_pods: Vec<Seen<ObjectMeta>>,
    /// The same of PodSets.
    pub unseen_groups: Vec<Seen<ObjectMeta>>,
    /// Whether its StormService is paused.
    pub paused: bool,
    /// The role that its StormService is scaled by, where it names one.
    pub scaling_role: Option<String>,
}

/// One replica that is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Its metadata.
    pub meta: ObjectMeta,
    /// Whether it is a PodSet.
    pub is_group: bool,
    /// Hash of the template that it is made from.
    pub hash: String,
    /// As the planner takes it.
    pub replica: Replica,
    /// Whether it is a pod that ended soon after it was made.
    pub ended_early: bool,
    going: bool,
}

impl Unit {
    /// Whether it stays: it is there and neither ended nor goes.
    #[must_use]
    pub fn stays(&self) -> bool {
        matches!(
            self.replica.state,
            ReplicaState::Waiting | ReplicaState::Ready
        )
    }
}

/// The replicas of a role.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoleUnits {
    /// Hash of the role's present template.
    pub hash: String,
    /// The replicas.
    pub units: Vec<Unit>,
}

/// What there is of a RoleSet.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Its roles, by name.
    pub roles: BTreeMap<String, RoleUnits>,
    /// Replicas of roles that the spec no longer has.
    pub orphans: Vec<Unit>,
    /// Replicas that no longer say of which role they are: somebody took the label off.
    pub released: Vec<Unit>,
    /// Its PodSets, as far as they can be decoded.
    pub pod_sets: Vec<PodSet>,
    /// Roles that started.
    pub started: BTreeSet<String>,
    /// Roles that began to roll, as far as it was noted.
    pub rolling: BTreeSet<String>,
    /// Whether its StormService is paused.
    pub paused: bool,
    /// The role that its StormService is scaled by, where it names one.
    pub scaling_role: Option<String>,
    /// Pods that ended early, as far as it was noted.
    pub early_ends: EarlyEnds,
    /// When time alone changes it.
    pub look_again: Option<Duration>,
}

/// What follows from it.
#[derive(Clone, Debug)]
pub struct Built {
    /// What there is, with marks: which replicas are up to date, and which of those that ended are not
    /// replaced yet.
    pub observed: Observed,
    /// The roles as the planner takes them, in the order of the spec.
    pub entries: Vec<RoleEntry>,
    /// Roles with pods that ended early whose pods are replaced now.
    pub replaced: Vec<String>,
    /// The same, of those that wait.
    pub held: Vec<String>,
}

/// Whether the replicas of a role are PodSets.
#[must_use]
pub fn is_group(role: &RoleSpec) -> bool {
    role.pod_group_size.unwrap_or(1) > 1
}

fn is_indexed(role: &RoleSpec) -> bool {
    is_group(role) || role.stateful
}

/// What there is of a RoleSet. A pod that ended within `early` of being made ended early.
#[must_use]
pub fn observe(set: &RoleSet, found: Found, now: &Time, early: Duration) -> Observed {
    let mut look_again: Option<Duration> = None;
    let mut units = Vec::new();
    for pod in &found.pods {
        let unit = pod_unit(pod, now, early);
        if let ReplicaState::Going { overdue: false } = unit.replica.state {
            let end = pod.object.metadata.deletion_timestamp.as_ref();
            let left = seconds(end) - now.0.as_second();
            let left = Duration::from_secs(left.max(0).unsigned_abs() + 1);
            look_again = Some(look_again.map_or(left, |at| at.min(left)));
        }
        units.push(unit);
    }
    let mut pod_sets = Vec::new();
    for Seen { object, going } in found.groups {
        match object {
            Ok(group) => {
                let mut unit = group_unit(&group.metadata, is_ready(&group), going);
                unit.replica.waiting_since_s = group_waiting_since(&group);
                units.push(unit);
                pod_sets.push(group);
            }
            // It says so itself. It holds its place: a second one would be one too many.
            Err(meta) => units.push(group_unit(&meta, false, going)),
        }
    }
    for (unseen, is_group) in [(found.unseen_pods, false), (found.unseen_groups, true)] {
        let unseen = unseen.iter();
        units.extend(unseen.map(|seen| Unit {
            going: seen.going,
            ..unit(&seen.object, is_group, ReplicaState::Waiting)
        }));
    }
    let known = |name: &str| set.spec.roles.iter().any(|role| role.name == name);
    let (mine, others) = units
        .into_iter()
        .partition::<Vec<Unit>, _>(|unit| known(label(&unit.meta, keys::ROLE_NAME)));
    let (released, orphans) = others
        .into_iter()
        .filter(|unit| !unit.going)
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
    Observed {
        roles,
        orphans,
        released,
        pod_sets,
        started,
        rolling: noted_roles(&set.metadata, keys::ROLLING_ROLES),
        paused: found.paused,
        scaling_role: found.scaling_role,
        early_ends: EarlyEnds::read(annotation(&set.metadata, keys::EARLY_ENDS)),
        look_again,
    }
}

/// The roles that an annotation names.
fn noted_roles(meta: &ObjectMeta, key: &str) -> BTreeSet<String> {
    let names = annotation(meta, key).unwrap_or_default().split(',');
    let names = names.filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

fn index_of(meta: &ObjectMeta) -> Option<i32> {
    let index = annotation(meta, keys::ROLE_REPLICA_INDEX)
        .or_else(|| Some(label(meta, keys::ROLE_REPLICA_INDEX)));
    index.and_then(|index| index.parse().ok())
}

fn pod_unit(seen: &Seen<Arc<ObservedPod>>, now: &Time, early: Duration) -> Unit {
    let pod = &seen.object;
    let state = if seen.going {
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
    unit.going = seen.going;
    unit.ended_early = state == ReplicaState::Finished && pod.lifetime() < early;
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

fn group_unit(meta: &ObjectMeta, is_ready: bool, going: bool) -> Unit {
    let state = if going {
        ReplicaState::Going { overdue: false }
    } else if is_ready {
        ReplicaState::Ready
    } else {
        ReplicaState::Waiting
    };
    Unit {
        going,
        ..unit(meta, true, state)
    }
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
        going: false,
    }
}

/// The roles of a RoleSet whose spec is valid, as the planner takes them.
#[must_use]
pub fn build(set: &RoleSet, mut observed: Observed, now: &Time, backoff: Backoff) -> Built {
    let now_s = now.0.as_second();
    let (mut replaced, mut held) = (Vec::new(), Vec::new());
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
            let ends = &mut observed.early_ends;
            let (name, hash) = (&role.name, &units.hash);
            if let Some(wait) = ends.wait(name, hash, now_s, backoff) {
                early.for_each(|unit| unit.replica.state = ReplicaState::Held);
                held.push(role.name.clone());
                let again = observed.look_again.map_or(wait, |at| at.min(wait));
                observed.look_again = Some(again);
            } else {
                ends.note(name, hash, now_s, backoff);
                replaced.push(role.name.clone());
            }
        }
        let replicas_there = units.units.iter().map(|unit| unit.replica.clone());
        let view = RoleView {
            replicas,
            budget,
            indexed: is_indexed(role),
            paused: observed.paused,
            units: replicas_there.collect(),
        };
        let noted = observed.rolling.contains(&role.name);
        entries.push(RoleEntry {
            upgrade_order: role.upgrade_order,
            may_start: true,
            rolling: view.has_outdated() || noted && !view.is_done(),
            view,
        });
    }
    gate(set, &observed, &mut entries);
    Built {
        observed,
        entries,
        replaced,
        held,
    }
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

#[cfg(test)]
mod tests;
