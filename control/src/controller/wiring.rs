//! Watches, caches and controllers, put together.
//!
//! ```text
//!  watch ──> Informer<K> ──route──> Trigger ──coalesced──> Controller<kind> ──> reconcile
//! ```
//! An event of a RoleSet asks for itself and for its StormService; of a PodSet, for itself and for
//! its RoleSet; of a pod, for the PodSet or RoleSet that made it.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use kube::api::Api;
use kube::core::{DeserializeGuard, NamespaceResourceScope};
use kube::runtime::WatchStreamExt;
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::{Args, Health, schema};
use crate::api::{PodSet, RoleSet, Scheduler, StormService, keys};
use crate::reconcile::apply::{FIELD_MANAGER, Writer};
use crate::reconcile::gangs::Gangs;
use crate::reconcile::informer::{Informer, Route, key_of, route_owner, route_self};
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observed::{ObservedNode, ObservedPod, ObservedRevision, ObservedService};
use crate::reconcile::schema::Schema;
use crate::reconcile::{Context, Error, Key, Trigger, podset, roleset, stormservice};

/// Bursts of events for one object are looked at once in this time. A StormService is told of each
/// of its RoleSets, so it waits longest.
const SERVICE_WINDOW: Duration = Duration::from_millis(200);
const ROLE_SET_WINDOW: Duration = Duration::from_millis(100);
const POD_SET_WINDOW: Duration = Duration::from_millis(50);
/// Objects of one kind reconciled at once. Writes are bounded on their own.
const AT_ONCE: u16 = 16;
/// After the first failure of an object; doubles up to [`RETRY_LONGEST`].
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// Longest pause after failures.
const RETRY_LONGEST: Duration = Duration::from_secs(60);
/// A lost race is tried again soon: only the cache has to catch up.
const RETRY_CONFLICT: Duration = Duration::from_millis(100);

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

struct Triggers {
    services: Trigger,
    role_sets: Trigger,
    pod_sets: Trigger,
}

/// The caches and what feeds them.
struct Caches {
    services: Informer<DeserializeGuard<StormService>>,
    role_sets: Informer<DeserializeGuard<RoleSet>>,
    pod_sets: Informer<DeserializeGuard<PodSet>>,
    pods: Informer<ObservedPod>,
    lone_pods: Informer<ObservedPod>,
    nodes: Informer<ObservedNode>,
    headless: Informer<ObservedService>,
    revisions: Informer<ObservedRevision>,
    feeds: Vec<Feed>,
}

fn caches(args: &Args, client: &Client, triggers: &Triggers, ledger: &Arc<Ledger>) -> Caches {
    let namespace = args.namespace.as_deref();
    let mut feeds: Vec<Feed> = Vec::new();
    let everything = watcher::Config::default();
    let role_sets = start(
        events(api(client, namespace), everything.clone()),
        vec![
            (route_self(), triggers.role_sets.clone()),
            (route_owner("StormService"), triggers.services.clone()),
        ],
        ledger,
        &mut feeds,
    );
    let services = start(
        events(api(client, namespace), everything.clone()),
        vec![
            (route_self(), triggers.services.clone()),
            route_pause(role_sets.clone(), triggers.role_sets.clone()),
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
    let pods = start(
        events(api(client, namespace), of_role_sets),
        pod_routes(),
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
        vec![(route_owner("StormService"), triggers.services.clone())],
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

/// A StormService that is paused, or is so no more, asks for all its RoleSets.
fn route_pause(
    role_sets: Informer<DeserializeGuard<RoleSet>>,
    trigger: Trigger,
) -> (Route<DeserializeGuard<StormService>>, Trigger) {
    let paused = |service: &DeserializeGuard<StormService>| {
        let service = service.0.as_ref();
        service.is_ok_and(|service| service.spec.paused)
    };
    let fired = trigger.clone();
    let route: Route<DeserializeGuard<StormService>> = Box::new(move |old, new| {
        if old.is_none_or(|old| paused(old) != paused(new)) {
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
                if let Some(key) = crate::reconcile::informer::owner_key(&pod.metadata, "PodSet") {
                    trigger.fire(key);
                }
            }
        }
        None
    });
    vec![(route, pod_sets)]
}

/// Runs the controllers until `stopped`.
pub(super) async fn run(
    args: &Args,
    client: Client,
    health: Arc<Health>,
    stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let gap = schema::gap(&client).await?;
    if let Some(lost) = &gap.lost {
        tracing::warn!("{lost}");
    }
    let schema = Schema::default();
    schema.note(gap);
    let ledger = Arc::new(Ledger::default());
    let (services, service_requests) = Trigger::new(SERVICE_WINDOW);
    let (role_sets, role_set_requests) = Trigger::new(ROLE_SET_WINDOW);
    let (pod_sets, pod_set_requests) = Trigger::new(POD_SET_WINDOW);
    let triggers = Triggers {
        services,
        role_sets,
        pod_sets,
    };
    let mut caches = caches(args, &client, &triggers, &ledger);
    let gangs = Gangs::default();
    for scheduler in [
        Scheduler::Coscheduling,
        Scheduler::Godel,
        Scheduler::Volcano,
    ] {
        let owners = [triggers.role_sets.clone(), triggers.pod_sets.clone()];
        let (namespace, groups) = (args.namespace.clone(), gangs.groups.clone());
        let feed = groups.follow(scheduler, client.clone(), namespace, ledger.clone(), owners);
        caches.feeds.push(feed.boxed());
    }
    let reporter = Reporter {
        controller: FIELD_MANAGER.into(),
        instance: std::env::var("HOSTNAME").ok(),
    };
    let context = Arc::new(Context {
        client: client.clone(),
        settings: args.settings(),
        writer: Writer::new(client.clone(), ledger.clone()),
        ledger,
        gangs,
        recorder: Recorder::new(client, reporter),
        schema,
        services: caches.services,
        role_sets: caches.role_sets,
        pod_sets: caches.pod_sets,
        pods: caches.pods,
        lone_pods: caches.lone_pods,
        nodes: caches.nodes,
        headless: caches.headless,
        revisions: caches.revisions,
    });
    let feeds = futures::future::join_all(caches.feeds);
    tokio::pin!(feeds);
    let filled = async {
        context.services.ready().await;
        context.role_sets.ready().await;
        context.pod_sets.ready().await;
        context.pods.ready().await;
        context.lone_pods.ready().await;
        context.nodes.ready().await;
        context.headless.ready().await;
        context.revisions.ready().await;
    };
    let mut stop_early = stopped.clone();
    tokio::select! {
        () = filled => {}
        _ = &mut feeds => anyhow::bail!("the watches ended"),
        _ = stop_early.wait_for(|stopped| *stopped) => return Ok(()),
    }
    health.ready.store(true, Ordering::Relaxed);
    tracing::info!("caches are full");
    let controllers = futures::future::join3(
        control(
            "StormService",
            context.services.store(),
            service_requests,
            &context,
            &stopped,
            |object, context| stormservice::reconcile(object, context).boxed(),
        ),
        control(
            "RoleSet",
            context.role_sets.store(),
            role_set_requests,
            &context,
            &stopped,
            |object, context| roleset::reconcile(object, context).boxed(),
        ),
        control(
            "PodSet",
            context.pod_sets.store(),
            pod_set_requests,
            &context,
            &stopped,
            |object, context| podset::reconcile(object, context).boxed(),
        ),
    );
    let definitions = schema::follow(&context, &triggers.services, &triggers.role_sets);
    tokio::select! {
        _ = controllers => Ok(()),
        _ = feeds => anyhow::bail!("the watches ended"),
        () = definitions => Ok(()),
    }
}

/// Failures in a row, by object; an object that succeeds is forgotten.
#[derive(Debug, Default)]
struct Failures(Mutex<HashMap<Key, u32>>);

impl Failures {
    fn succeeded(&self, key: &Key) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(key);
    }

    fn failed(&self, key: Key) -> Duration {
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key).or_insert(0);
        *count = count.saturating_add(1);
        RETRY_FIRST
            .saturating_mul(1 << (*count - 1).min(16))
            .min(RETRY_LONGEST)
    }
}

async fn control<K>(
    kind: &'static str,
    store: Store<DeserializeGuard<K>>,
    requests: impl Stream<Item = Key> + Send + 'static,
    context: &Arc<Context>,
    stopped: &watch::Receiver<bool>,
    reconcile: impl Fn(
        Arc<DeserializeGuard<K>>,
        Arc<Context>,
    ) -> BoxFuture<'static, Result<Action, Error>>
    + Clone
    + Send
    + Sync
    + 'static,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let failures = Arc::new(Failures::default());
    let forgiving = failures.clone();
    let mut stopped = stopped.clone();
    let requests =
        requests.map(|key| ObjectRef::<DeserializeGuard<K>>::new(&key.name).within(&key.namespace));
    // Everything comes through the triggers; the controller's own stream stays silent.
    let silent = futures::stream::pending::<watcher::Result<DeserializeGuard<K>>>();
    Controller::for_stream(silent, store)
        .reconcile_on(requests)
        .with_config(Config::default().concurrency(AT_ONCE))
        .graceful_shutdown_on(async move {
            if stopped.wait_for(|stopped| *stopped).await.is_err() {
                tracing::debug!("stopping with the process");
            }
        })
        .run(
            move |object, context: Arc<Context>| {
                let (key, failures) = (key_of(object.as_ref()), forgiving.clone());
                let work = reconcile(object, context);
                async move {
                    let began = Instant::now();
                    let outcome = work.await;
                    let result = outcome.as_ref().map_or_else(Error::category, |_| "success");
                    metrics::counter!(
                        "kvtide_control_reconciles_total", "kind" => kind, "result" => result
                    )
                    .increment(1);
                    metrics::histogram!("kvtide_control_reconcile_seconds", "kind" => kind)
                        .record(began.elapsed().as_secs_f64());
                    if outcome.is_ok() {
                        failures.succeeded(&key);
                    }
                    outcome
                }
            },
            move |object, error, _| {
                let key = key_of(object.as_ref());
                if error.is_conflict() {
                    tracing::debug!(kind, namespace = key.namespace, name = key.name, %error, "lost a race");
                    return Action::requeue(RETRY_CONFLICT);
                }
                let (namespace, name) = (key.namespace.clone(), key.name.clone());
                let pause = failures.failed(key);
                tracing::warn!(kind, namespace, name, %error, ?pause, "could not reconcile");
                Action::requeue(pause)
            },
            context.clone(),
        )
        // Outcomes are counted and logged above.
        .for_each(|_| std::future::ready(()))
        .await;
}
