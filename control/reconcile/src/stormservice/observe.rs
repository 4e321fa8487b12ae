//! What there is of a StormService: reads the caches.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kvtide_control_api::crd_gap::is_observed;
use kvtide_control_api::meta::uid_of;
use kvtide_control_api::observed::ObservedRevision;
use kvtide_control_api::target::Target;
use kvtide_control_api::{
    RoleSet, RoleSetSpec, StormService, TemplateMeta, conditions, find_condition, keys,
};
use kvtide_control_core::budget::Budget;
use kvtide_control_core::service_plan::{ServiceView, SetView};
use kvtide_control_core::{adoption, revision};

use super::revisions::Revisions;
use crate::context::Context;

/// A RoleSet that is there.
pub(super) struct Owned {
    pub(super) set: RoleSet,
    pub(super) view: SetView,
    pub(super) revision: String,
    /// Whether its spec is known. One that cannot be decoded counts, and is not written.
    pub(super) readable: bool,
}

pub(super) struct Observed {
    /// Also those that were created and not seen yet.
    pub(super) sets: Vec<Owned>,
    pub(super) revisions: Vec<Arc<ObservedRevision>>,
}

impl Observed {
    /// Labels and annotations of the template that a revision recorded.
    pub(super) fn template_meta(&self, revision: &str) -> Option<TemplateMeta> {
        let mut stored = self.revisions.iter();
        let stored = stored.find(|stored| stored.metadata.name.as_deref() == Some(revision))?;
        revision::template(&stored.data).ok()?.metadata
    }
}

pub(super) fn dereference(target: &Target, context: &Context) -> Observed {
    let uid = &target.uid;
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
        .is_some_and(|ready| ready.status == kvtide_control_api::ConditionStatus::True);
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

/// Marks which RoleSets are of the present revision, and which must be replaced to become so.
pub(super) fn mark(
    observed: &mut Observed,
    wanted: &RoleSetSpec,
    revisions: &Revisions,
    context: &Context,
) {
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

pub(super) fn view_of(service: &StormService, observed: &Observed) -> ServiceView {
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
