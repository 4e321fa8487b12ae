//! The PodGroups that are there, as metadata, so that one that somebody deletes is made again and an
//! unchanged one costs no request. A kind is watched from when an object first asks for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DynamicObject, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use kvtide_control_api::meta::{Key, owner_key, owner_uid};
use kvtide_control_api::{Scheduler, keys};
use kvtide_control_kube::error::said;
use kvtide_control_kube::ledger::Ledger;
use kvtide_control_kube::trigger::Trigger;
use tokio::sync::watch;

use super::kind::{PURPOSE, resource};

/// A first list takes well below a second; without it PodGroups are asked for one by one.
const FIRST_LIST_MAX: Duration = Duration::from_secs(5);

/// A PodGroup.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// Its uid.
    pub(super) uid: String,
    /// Uid of its controller.
    pub(super) owner: Option<String>,
    /// What was last applied to it, as a hash.
    pub(super) applied: Option<String>,
    parents: [Option<Key>; 2],
}

impl Known {
    pub(super) fn of(meta: &ObjectMeta) -> Self {
        let annotations = meta.annotations.as_ref();
        Self {
            uid: meta.uid.clone().unwrap_or_default(),
            owner: owner_uid(meta).map(str::to_owned),
            applied: annotations.and_then(|all| all.get(keys::APPLIED_HASH).cloned()),
            parents: ["RoleSet", "PodSet"].map(|kind| owner_key(meta, kind)),
        }
    }
}

/// How far a kind's watch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
enum Stage {
    #[default]
    Unused,
    Wanted,
    Listed,
}

#[derive(Debug, Default)]
struct Kind {
    stage: watch::Sender<Stage>,
    known: Mutex<HashMap<Key, Known>>,
}

impl Kind {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct PodGroups {
    coscheduling: Kind,
    godel: Kind,
    volcano: Kind,
}

impl PodGroups {
    fn kind(&self, scheduler: Scheduler) -> &Kind {
        match scheduler {
            Scheduler::Coscheduling => &self.coscheduling,
            Scheduler::Godel => &self.godel,
            Scheduler::Volcano => &self.volcano,
        }
    }

    /// A PodGroup, once the first list is there; none also where there is no list.
    pub(super) async fn get(&self, scheduler: Scheduler, key: &Key) -> Option<Known> {
        let kind = self.kind(scheduler);
        kind.stage.send_if_modified(|stage| {
            let first = *stage == Stage::Unused;
            if first {
                *stage = Stage::Wanted;
            }
            first
        });
        let mut stage = kind.stage.subscribe();
        let listed = stage.wait_for(|stage| *stage == Stage::Listed);
        if tokio::time::timeout(FIRST_LIST_MAX, listed).await.is_err() {
            tracing::debug!(?scheduler, "PodGroups are not listed yet");
        }
        kind.lock().get(key).cloned()
    }

    /// Watches a scheduler's PodGroups for as long as it is polled, from when they are wanted.
    pub async fn follow(
        self: Arc<Self>,
        scheduler: Scheduler,
        client: Client,
        namespace: Option<String>,
        ledger: Arc<Ledger>,
        triggers: [Trigger; 2],
    ) {
        let kind = self.kind(scheduler);
        let mut stage = kind.stage.subscribe();
        if stage
            .wait_for(|stage| *stage >= Stage::Wanted)
            .await
            .is_err()
        {
            return;
        }
        let resource = resource(scheduler);
        let api: Api<PartialObjectMeta<DynamicObject>> = match &namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &resource),
            None => Api::all_with(client, &resource),
        };
        let gone = |known: &Known| {
            if let Some(owner) = &known.owner {
                ledger.forget_applied(owner, PURPOSE);
            }
            for (parent, trigger) in known.parents.iter().zip(&triggers) {
                if let Some(parent) = parent {
                    trigger.fire(parent.clone());
                }
            }
        };
        let events = watcher(api, watcher::Config::default()).default_backoff();
        let mut events = Box::pin(events);
        let mut listing = HashMap::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(group)) => {
                    kind.lock()
                        .insert(key_of(&group), Known::of(&group.metadata));
                }
                Ok(Event::Delete(group)) => {
                    kind.lock().remove(&key_of(&group));
                    gone(&Known::of(&group.metadata));
                }
                Ok(Event::Init) => listing.clear(),
                Ok(Event::InitApply(group)) => {
                    listing.insert(key_of(&group), Known::of(&group.metadata));
                }
                Ok(Event::InitDone) => {
                    let listed = std::mem::take(&mut listing);
                    let before = std::mem::replace(&mut *kind.lock(), listed.clone());
                    let lost = before.iter().filter(|(key, _)| !listed.contains_key(key));
                    lost.for_each(|(_, known)| gone(known));
                    kind.stage.send_replace(Stage::Listed);
                }
                // The watcher starts again by itself, after a pause.
                Err(error) => {
                    let error = said(&error);
                    tracing::warn!(?scheduler, error, "watch of PodGroups interrupted");
                }
            }
        }
    }
}

fn key_of(group: &PartialObjectMeta<DynamicObject>) -> Key {
    Key {
        namespace: group.namespace().unwrap_or_default(),
        name: group.name_any(),
    }
}
