//! What all reconcilers share: caches, the writer, settings.

use std::sync::Arc;

use k8s_openapi::api::events::v1::Event as K8sEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::core::DeserializeGuard;
use kube::runtime::events::EventType;
use kube::{Client, Resource};
use kvtide_control_api::observed::{ObservedNode, ObservedPod, ObservedRevision, ObservedService};
use kvtide_control_api::{PodSet, RoleSet, StormService};
use kvtide_control_core::recovery::Backoff;
use kvtide_control_core::seen::Seen;
use kvtide_control_kube::crd_gap::KnownGap;
use kvtide_control_kube::error::said;
use kvtide_control_kube::event::{Told, shortened};
use kvtide_control_kube::informer::Informer;
use kvtide_control_kube::ledger::Ledger;
use kvtide_control_kube::writer::Writer;

use super::gangs::Gangs;

/// What can be set from the command line.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The scheduler that runs the coscheduling plugin, named in pods that name none.
    pub coscheduling_scheduler_name: Option<String>,
    /// How PodSets recover.
    pub backoff: Backoff,
    /// How long a node may be not ready before its pods count as lost.
    pub node_lost_after: std::time::Duration,
}

/// What all reconcilers share.
pub struct Context {
    /// For reads that no cache serves.
    pub client: Client,
    /// From the command line.
    pub settings: Settings,
    /// What was written and is not in the caches yet.
    pub ledger: Arc<Ledger>,
    /// The only way to write.
    pub writer: Writer,
    /// PodGroup kinds and what was applied of them.
    pub gangs: Gangs,
    /// Which process this is, for events.
    pub instance: String,
    /// What the installed CRDs keep.
    pub crd_gap: KnownGap,
    /// StormServices.
    pub services: Informer<DeserializeGuard<StormService>>,
    /// RoleSets.
    pub role_sets: Informer<DeserializeGuard<RoleSet>>,
    /// PodSets.
    pub pod_sets: Informer<DeserializeGuard<PodSet>>,
    /// Pods of RoleSets and of their PodSets.
    pub pods: Informer<ObservedPod>,
    /// Pods of PodSets that no RoleSet made.
    pub lone_pods: Informer<ObservedPod>,
    /// Nodes.
    pub nodes: Informer<ObservedNode>,
    /// Kubernetes Services of StormServices.
    pub headless: Informer<ObservedService>,
    /// Revisions of StormServices.
    pub revisions: Informer<ObservedRevision>,
}

impl Context {
    /// The present time, in whole seconds: what is stored has no finer ones.
    #[must_use]
    pub fn now(&self) -> Time {
        let now = Timestamp::now();
        Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
    }

    /// Pods whose controller has this uid.
    #[must_use]
    pub fn pods_of(&self, uid: &str) -> Vec<Arc<ObservedPod>> {
        let mut pods = self.pods.owned_by(uid);
        pods.extend(self.lone_pods.owned_by(uid));
        pods
    }

    /// Whether an object is going, as far as this process knows.
    #[must_use]
    pub fn is_going(&self, meta: &ObjectMeta) -> bool {
        meta.deletion_timestamp.is_some()
            || meta
                .uid
                .as_deref()
                .is_some_and(|uid| self.ledger.is_deleted(uid))
    }

    /// A pod, and whether it is going.
    #[must_use]
    pub fn seen_pod(&self, pod: Arc<ObservedPod>) -> Seen<Arc<ObservedPod>> {
        Seen {
            going: self.is_going(&pod.metadata),
            object: pod,
        }
    }

    /// An object of which the metadata is known, and whether it is going.
    #[must_use]
    pub fn seen_meta(&self, meta: ObjectMeta) -> Seen<ObjectMeta> {
        Seen {
            going: self.is_going(&meta),
            object: meta,
        }
    }

    /// Tells an event about an object, unless the same was told a short while ago. An event that
    /// cannot be told is only logged: it never holds up the work that it is about.
    pub async fn tell<K: Resource<DynamicType = ()>>(
        &self,
        meta: &ObjectMeta,
        type_: EventType,
        reason: &str,
        note: String,
    ) {
        let told = Told {
            type_,
            reason,
            note: shortened(note),
        };
        let uid = meta.uid.as_deref().unwrap_or_default();
        if !self.ledger.tell(uid, reason, &told.note) {
            return;
        }
        let event = told.about::<K>(meta, &self.instance);
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let api: Api<K8sEvent> = Api::namespaced(self.client.clone(), &namespace);
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            tracing::warn!(error = said(&error), reason, "an event could not be told");
        }
    }
}
