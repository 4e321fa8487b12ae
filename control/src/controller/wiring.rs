//! Caches and controllers, put together.
//!
//! ```text
//!  watch ──> Informer<K> ──route──> Trigger ──coalesced──> Controller<kind> ──> reconcile
//! ```
//! An event of a RoleSet asks for itself and for its StormService; of a PodSet, for itself and for
//! its RoleSet; of a pod, for the PodSet or RoleSet that made it, and of the one that stands for its
//! RoleSet before an autoscaler, for that as well.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use kube::core::DeserializeGuard;
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Client, Resource};
use kvtide_control_api::Scheduler;
use kvtide_control_api::meta::{Key, key_of};
use kvtide_control_base::health::Health;
use kvtide_control_kube::crd_gap::{KnownGap, installed_gap};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::ledger::Ledger;
use kvtide_control_kube::trigger::Trigger;
use kvtide_control_kube::writer::{FIELD_MANAGER, Writer};
use kvtide_control_reconcile::gangs::Gangs;
use kvtide_control_reconcile::{Context, podset, roleset, stormservice};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::caches::{Triggers, caches};
use super::{Args, crd_gap};

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

/// Runs the controllers until `stopped`.
pub(super) async fn run(
    args: &Args,
    client: Client,
    health: Arc<Health>,
    stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let gap = installed_gap(&client).await?;
    if let Some(lost) = &gap.lost {
        tracing::warn!("{lost}");
    }
    let known_gap = KnownGap::default();
    known_gap.note(gap);
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
    let instance = std::env::var("HOSTNAME").unwrap_or_else(|_| FIELD_MANAGER.into());
    let context = Arc::new(Context {
        client: client.clone(),
        settings: args.settings(),
        writer: Writer::new(client.clone(), ledger.clone()),
        ledger,
        gangs,
        instance,
        crd_gap: known_gap,
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
    let definitions = crd_gap::follow(&context, &triggers.services, &triggers.role_sets);
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
