//! Watches and the caches that they feed, and whom each event asks for.

use std::fmt::Debug;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream};
use kube::api::Api;
use kube::core::{DeserializeGuard, NamespaceResourceScope};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Resource, ResourceExt};
use kvtide_control_api::meta::{Key, is_paused, key_of, owner_key, owner_uid, scaling_role};
use kvtide_control_api::observed::{ObservedNode, ObservedPod, ObservedRevision, ObservedService};
use kvtide_control_api::{PodSet, RoleSet, StormService, keys};
use kvtide_control_kube::informer::{Informer, Route, route_owner, route_self};
use kvtide_control_kube::ledger::Ledger;
use kvtide_control_kube::trigger::Trigger;
use serde::de::DeserializeOwned;

use super::Args;

/// Feeds a cache for as long as it is polled.
type Feed = BoxFuture<'static, ()>;

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// A watch that starts again by itself, less what no controller reads.
fn events<K>(
    api: Api<K>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    watcher(api, config).default_backoff().modify(|object| {
        object.managed_fields_mut().clear();
        object
            .annotations_mut()
            .remove("kubectl.kubernetes.io/last-applied-configuration");
    })
}

/// Who asks for an object of each kind to be looked at.
pub(super) struct Triggers {
    pub(super) services: Trigger,
    pub(super) role_sets: Trigger,
    pub(super) pod_sets: Trigger,
}

/// The caches and what feeds them.
pub(super) struct Caches {
    pub(super) services: Informer<DeserializeGuard<StormService>>,
    pub(super) role_sets: Informer<DeserializeGuard<RoleSet>>,
    pub(super) pod_sets: Informer<DeserializeGuard<PodSet>>,
    pub(super) pods: Informer<ObservedPod>,
    pub(super) lone_pods: Informer<ObservedPod>,
    pub(super) nodes: Informer<ObservedNode>,
    pub(super) headless: Informer<ObservedService>,
    pub(super) revisions: Informer<ObservedRevision>,
    pub(super) feeds: Vec<Feed>,
}

/// All of them, still empty.
pub(super) fn caches(
    args: &Args,
    client: &Client,
    triggers: &Triggers,
    ledger: &Arc<Ledger>,
) -> Caches {
    let namespace = args.namespace.as_deref();
    let mut feeds: Vec<Feed> = Vec::new();
    let everything = watcher::Config::default();
    let role_sets = start(
        events(api(client, namespace), everything.clone()),
        vec![
            (route_self(), triggers.role_sets.clone()),
            (route_owner("StormService"), triggers.services.clone()),
            (route_orphan(), triggers.services.clone()),
        ],
        ledger,
        &mut feeds,
    );
    let services = start(
        events(api(client, namespace), everything.clone()),
        vec![
            (route_self(), triggers.services.clone()),
            route_wishes(role_sets.clone(), triggers.role_sets.clone()),
        ],
        ledger,
        &mut feeds,
    );
    let pod_sets = start(
        events(api(client, namespace), everything.clone()),
        vec![
            (route_self(), triggers.pod_sets.clone()),
            (route_owner("RoleSet"), triggers.role_sets.clone()),
        ],
        ledger,
        &mut feeds,
    );
    let pod_routes = || {
        vec![
            (route_owner("PodSet"), triggers.pod_sets.clone()),
            (route_owner("RoleSet"), triggers.role_sets.clone()),
        ]
    };
    let of_role_sets = everything.clone().labels(keys::ROLE_SET_NAME);
    let mut routes = pod_routes();
    routes.push((route_mark(), triggers.role_sets.clone()));
    let pods = start(
        events(api(client, namespace), of_role_sets),
        routes,
        ledger,
        &mut feeds,
    );
    let alone = format!("{},!{}", keys::POD_SET_NAME, keys::ROLE_SET_NAME);
    let lone_pods = start(
        events(api(client, namespace), everything.clone().labels(&alone)),
        pod_routes(),
        ledger,
        &mut feeds,
    );
    let nodes = start(
        events(Api::<ObservedNode>::all(client.clone()), everything.clone()),
        node_routes([pods.clone(), lone_pods.clone()], triggers.pod_sets.clone()),
        ledger,
        &mut feeds,
    );
    let headless = start(
        events(api(client, namespace), everything.clone()),
        vec![route_name(services.clone(), triggers.services.clone())],
        ledger,
        &mut feeds,
    );
    let revisions = start(
        events(api(client, namespace), everything).modify(ObservedRevision::forget_foreign_data),
        vec![(route_owner("StormService"), triggers.services.clone())],
        ledger,
        &mut feeds,
    );
    Caches {
        services,
        role_sets,
        pod_sets,
        pods,
        lone_pods,
        nodes,
        headless,
        revisions,
        feeds,
    }
}

fn start<K>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    routes: Vec<(Route<K>, Trigger)>,
    ledger: &Arc<Ledger>,
    feeds: &mut Vec<Feed>,
) -> Informer<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
{
    let (informer, feed) = Informer::new(events, routes, ledger.clone());
    feeds.push(feed.boxed());
    informer
}

/// A RoleSet that is nobody's asks for the StormService whose label it carries.
fn route_orphan() -> Route<DeserializeGuard<RoleSet>> {
    Box::new(|_, new| {
        let (meta, key) = (new.meta(), key_of(new));
        let name = meta.labels.as_ref()?.get(keys::STORM_SERVICE_NAME)?;
        owner_uid(meta).is_none().then(|| Key {
            namespace: key.namespace,
            name: name.clone(),
        })
    })
}

/// A pod that stands for its RoleSet asks for that, also where a PodSet made it: its group may be whole
/// again before its status ever said that it was not.
fn route_mark() -> Route<ObservedPod> {
    Box::new(|old, new| {
        let marked = |pod: &ObservedPod| pod.labels().contains_key(keys::SCALING_TARGET);
        let concerned = marked(new) || old.is_some_and(marked);
        let name = new
            .labels()
            .get(keys::ROLE_SET_NAME)
            .filter(|_| concerned)?;
        Some(Key {
            namespace: new.namespace().unwrap_or_default(),
            name: name.clone(),
        })
    })
}

/// A Service asks for the StormService of its name, whosever it is: it may be in its way, or get out of
/// it.
fn route_name(
    services: Informer<DeserializeGuard<StormService>>,
    trigger: Trigger,
) -> (Route<ObservedService>, Trigger) {
    let route: Route<ObservedService> = Box::new(move |_, new| {
        let key = key_of(new);
        services.get(&key).is_some().then_some(key)
    });
    (route, trigger)
}

/// A StormService asks for all its RoleSets when that changes which they read of it: whether it is paused,
/// and by which role it is scaled.
fn route_wishes(
    role_sets: Informer<DeserializeGuard<RoleSet>>,
    trigger: Trigger,
) -> (Route<DeserializeGuard<StormService>>, Trigger) {
    let fired = trigger.clone();
    let route: Route<DeserializeGuard<StormService>> = Box::new(move |old, new| {
        let same = old.is_some_and(|old| {
            is_paused(old) == is_paused(new) && scaling_role(old.meta()) == scaling_role(new.meta())
        });
        if !same {
            let uid = new.meta().uid.as_deref().unwrap_or_default();
            let sets = role_sets.owned_by(uid);
            sets.iter().for_each(|set| fired.fire(key_of(set.as_ref())));
        }
        None
    });
    (route, trigger)
}

/// A node that changed its mind asks for every PodSet with a pod on it.
fn node_routes(
    pods: [Informer<ObservedPod>; 2],
    pod_sets: Trigger,
) -> Vec<(Route<ObservedNode>, Trigger)> {
    let trigger = pod_sets.clone();
    let route: Route<ObservedNode> = Box::new(move |old, new| {
        let same = old.is_some_and(|old| {
            old.not_ready_since() == new.not_ready_since()
                && old.is_out_of_service() == new.is_out_of_service()
        });
        if !same {
            let name = new.name_any();
            let here = |pod: &Arc<ObservedPod>| pod.spec.node_name.as_deref() == Some(&name);
            for pod in pods.iter().flat_map(Informer::all).filter(&here) {
                if let Some(key) = owner_key(&pod.metadata, "PodSet") {
                    trigger.fire(key);
                }
            }
        }
        None
    });
    vec![(route, pod_sets)]
}
