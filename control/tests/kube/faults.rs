//! What must not shake the controllers: restarts in the middle, a second one, conflicts, haste.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Resource, ResourceExt};
use kvtide_control_api::RoleSet;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{Controller, World, condition, pod_group_crd, role, role_with, service, uids};

fn roles(image: &str) -> Value {
    json!([
        role_with("prefill", 2, image, json!({"podGroupSize": 2})),
        role("decode", 2, image),
    ])
}

async fn expect_complete(world: &World, sets: usize, image: &str) {
    world.until_ready("llm").await;
    let pods = world.all(&world.pods()).await;
    let here: Vec<_> = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .collect();
    assert_eq!(here.len(), sets * 6);
    for pod in here {
        assert_eq!(image_of(pod), Some(image));
    }
}

fn image_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.containers.first()?.image.as_deref()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_killed_in_the_middle_of_anything_is_no_loss() {
    let world = World::new(cluster_or_skip!(), "restart").await;
    let mut controller = world.controller();
    world.apply(service("llm", 3, roles("a"))).await;
    let some_pods = |at_least: usize| {
        let world = &world;
        async move {
            world
                .until("some pods are there", || async {
                    (world.all(&world.pods()).await.len() >= at_least).then_some(())
                })
                .await;
        }
    };
    some_pods(3).await;
    controller.kill();
    controller = world.controller();
    expect_complete(&world, 3, "a").await;

    world.apply(service("llm", 3, roles("b"))).await;
    world
        .until("the rollout has begun", || async {
            // One that is going is seen for moments only, one that has come stays.
            let pods = world.all(&world.pods()).await;
            pods.iter()
                .any(|pod| pod.metadata.deletion_timestamp.is_some() || image_of(pod) == Some("b"))
                .then_some(())
        })
        .await;
    controller.kill();
    controller = world.controller();
    expect_complete(&world, 3, "b").await;

    world.kubectl(&["delete", "stormservice", "llm", "--wait=false"]);
    world
        .until("the deletion has begun", || async {
            let sets = world.all(&world.role_sets()).await;
            let going = |set: &RoleSet| set.metadata.deletion_timestamp.is_some();
            (sets.len() < 3 || sets.iter().any(going)).then_some(())
        })
        .await;
    controller.kill();
    let mut controller = world.controller();
    world
        .until("all is gone", || async {
            let left = world.all(&world.pods()).await.len()
                + world.all(&world.role_sets()).await.len()
                + world.all(&world.services()).await.len();
            (left == 0).then_some(())
        })
        .await;
    assert!(
        controller.terminate().success(),
        "a controller that is asked to stop stops well"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_controllers_one_leads_and_namespaces_do_not_mix() {
    let here = World::alone(cluster_or_skip!(), "leader").await;
    let there = here.beside().await;
    let flags = ["--lease-seconds=3"];
    let mut first = Controller::start(here.cluster, None, &flags);
    here.until("the first leads", || async {
        first
            .page("/readyz")
            .await?
            .contains("leading")
            .then_some(())
    })
    .await;
    let leads = async |controller: &Controller| {
        let page = controller.page("/metrics").await.unwrap_or_default();
        let mut lines = page.lines();
        let line = lines.find(|line| line.starts_with("kvtide_control_leader "));
        line.map(|line| line.trim_start_matches("kvtide_control_leader ").to_owned())
    };
    assert_eq!(leads(&first).await.as_deref(), Some("1"));
    let second = Controller::start(here.cluster, None, &flags);
    here.apply(service("llm", 2, roles("a"))).await;
    there.apply(service("llm", 2, roles("a"))).await;
    expect_complete(&here, 2, "a").await;
    expect_complete(&there, 2, "a").await;
    let waiting = second.page("/readyz").await.unwrap();
    assert!(
        waiting.contains("200 OK") && waiting.contains("waiting"),
        "{waiting}"
    );
    assert!(
        first
            .page("/metrics")
            .await
            .unwrap()
            .contains("kvtide_control_writes_total")
    );

    assert_eq!(
        leads(&second).await.as_deref(),
        Some("0"),
        "there, and no leader"
    );

    let untouched = uids(&there.all(&there.pods()).await);
    here.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    first.kill();
    here.until("the second leads", || async {
        second
            .page("/readyz")
            .await?
            .contains("leading")
            .then_some(())
    })
    .await;
    there.until_quiet().await;
    assert_eq!(
        uids(&there.all(&there.pods()).await),
        untouched,
        "the other namespace stays"
    );
    there.apply(service("llm", 2, roles("b"))).await;
    expect_complete(&there, 2, "b").await;
    there.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_restarts_is_waited_for() {
    let world = World::alone(cluster_or_skip!(), "outage").await;
    let _controller = world.controller();
    world.apply(service("llm", 1, roles("a"))).await;
    expect_complete(&world, 1, "a").await;
    let before = uids(&world.all(&world.pods()).await);
    let cluster = world.cluster;
    tokio::task::spawn_blocking(|| cluster.restart_api_server())
        .await
        .unwrap();
    world.until_quiet().await;
    assert_eq!(
        uids(&world.all(&world.pods()).await),
        before,
        "nothing was replaced"
    );
    world.kubectl(&["scale", "stormservice/llm", "--replicas=2"]);
    expect_complete(&world, 2, "a").await;
    let after = uids(&world.all(&world.pods()).await);
    assert!(
        before.iter().all(|uid| after.contains(uid)),
        "what was there stays"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_only_cost_another_try() {
    let world = World::new(cluster_or_skip!(), "conflict").await;
    let _controller = world.controller();
    world.apply(service("llm", 2, roles("a"))).await;
    world.until_ready("llm").await;
    let stop = Arc::new(AtomicBool::new(false));
    let meddlers = [
        tokio::spawn(meddle(world.services(), stop.clone())),
        tokio::spawn(meddle(world.role_sets(), stop.clone())),
        tokio::spawn(meddle(world.pod_sets(), stop.clone())),
    ];
    world.apply(service("llm", 2, roles("b"))).await;
    expect_complete(&world, 2, "b").await;
    // Also what changes groups in place.
    let mut recreated = roles("b");
    recreated[0]["recoveryPolicy"] = json!("FullRecreate");
    world.apply(service("llm", 2, recreated)).await;
    world
        .until("the groups take the policy", || async {
            let sets = world.all(&world.pod_sets()).await;
            let policies = sets.iter().filter_map(|set| set.spec.recovery_policy);
            let taken = policies.filter(|policy| policy.recreates_all());
            (taken.count() == 4).then_some(())
        })
        .await;
    stop.store(true, Ordering::Relaxed);
    for meddler in meddlers {
        meddler.await.unwrap();
    }
    world.until_ready("llm").await;
    let set = world.all(&world.role_sets()).await.pop().unwrap();
    assert!(
        set.annotations().contains_key("meddler"),
        "others' annotations stay"
    );
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
}

/// Writes all objects of a kind again and again, so that whoever looked before is late.
async fn meddle<K>(api: Api<K>, stopped: Arc<AtomicBool>)
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let mut turn = 0;
    while !stopped.load(Ordering::Relaxed) {
        turn += 1;
        for object in api.list(&ListParams::default()).await.unwrap().items {
            let patch = json!({"metadata": {"annotations": {"meddler": turn.to_string()}}});
            let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
            match api.patch(&object.name_any(), &params, &patch).await {
                Ok(_) => {}
                // It went in between.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => panic!("{error}"),
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_before_anything_is_made_is_told_too() {
    let world = World::new(cluster_or_skip!(), "told").await;
    let _controller = world.controller();
    let object = service("llm", 1, json!([role("a", 1, "i")]));
    // All names that its first revision could have are somebody else's.
    let template = serde_json::from_value(object["spec"]["template"].clone()).unwrap();
    let data = kvtide_control_core::revision::data(&template);
    for collisions in 0..8 {
        let hash = kvtide_control_core::revision::hash(&data, collisions);
        let name = kvtide_control_core::names::revision("llm", &hash);
        let taken = json!({"apiVersion": "apps/v1", "kind": "ControllerRevision",
            "metadata": {"name": name}, "data": {}, "revision": 1});
        world.apply(taken).await;
    }
    world.apply(object).await;
    world
        .until("it says so", || async {
            let status = world.services().get("llm").await.ok()?.status?;
            let mut conditions = status.conditions.iter();
            let failure = conditions.find(|condition| condition.kind == "ReplicaFailure")?;
            failure.message.contains("ControllerRevision").then_some(())
        })
        .await;
    assert_eq!(world.all(&world.role_sets()).await.len(), 0);
    world.kubectl(&["delete", "controllerrevisions", "--all"]);
    let status = world.until_ready("llm").await.status.unwrap();
    assert_eq!(condition(&status.conditions, "ReplicaFailure"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_rapid_changes_of_scale_delete_nothing_that_is_wanted() {
    let world = World::new(cluster_or_skip!(), "haste").await;
    let _controller = world.controller();
    world
        .apply(service("llm", 3, json!([role("a", 2, "i")])))
        .await;
    world.until_ready("llm").await;
    let before = uids(&world.all(&world.pods()).await);
    // As fast as they can be written: some meet each other in the controller.
    for turn in 0..20 {
        let replicas = 3 + (turn * 7) % 5;
        world
            .change("llm", json!({"spec": {"replicas": replicas}}))
            .await;
    }
    world.change("llm", json!({"spec": {"replicas": 3}})).await;
    world.until_ready("llm").await;
    world.until_quiet().await;
    let after = uids(&world.all(&world.pods()).await);
    assert_eq!(
        after, before,
        "the first three RoleSets were wanted all the time"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_twenty_changes_of_scale_deletes_only_what_it_has_to() {
    let world = World::new(cluster_or_skip!(), "steps").await;
    let _controller = world.controller();
    let sized = |sets: i32, pods: i32| service("llm", sets, json!([role("a", pods, "i")]));
    world.apply(sized(2, 2)).await;
    world.until_ready("llm").await;
    let deaths = watch_deaths(&world).await;
    let (mut sets, mut pods, mut expected) = (2, 2, 0);
    for turn in 0..20 {
        // The next one is written as soon as the controller has acted on this one, ready or not.
        let (next_sets, next_pods) = if turn % 2 == 0 {
            (2 + (turn * 7) % 3, pods)
        } else {
            (sets, 1 + (turn * 5) % 3)
        };
        let stay = sets.min(next_sets);
        expected += (sets - stay) * pods + stay * (pods - next_pods).max(0);
        (sets, pods) = (next_sets, next_pods);
        world.apply(sized(sets, pods)).await;
        world
            .until(&format!("turn {turn}: {sets} times {pods}"), || async {
                let here = world.pods_of("a").await.len();
                (i32::try_from(here) == Ok(sets * pods)).then_some(())
            })
            .await;
    }
    world.until_ready("llm").await;
    world.until_quiet().await;
    let deaths = deaths.lock().unwrap();
    assert_eq!(
        i32::try_from(deaths.len()),
        Ok(expected),
        "by uid: {deaths:?}"
    );
}

/// Uids of the world's pods that were asked to go, as a watch saw it.
async fn watch_deaths(world: &World) -> Arc<Mutex<BTreeSet<String>>> {
    let deaths: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let (pods, seen) = (world.pods(), deaths.clone());
    let (begun, beginning) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut begun = Some(begun);
        let events = watcher(pods, watcher::Config::default()).default_backoff();
        let mut events = events.boxed();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(pod)) if pod.metadata.deletion_timestamp.is_some() => {
                    seen.lock().unwrap().extend(pod.uid());
                }
                Ok(Event::Delete(pod)) => seen.lock().unwrap().extend(pod.uid()),
                Ok(Event::InitDone) => {
                    if let Some(begun) = begun.take() {
                        begun.send(()).unwrap();
                    }
                }
                _ => {}
            }
        }
    });
    beginning.await.unwrap();
    deaths
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_killed_while_it_scales_pauses_or_rolls_back_is_no_loss() {
    let world = World::new(cluster_or_skip!(), "midway").await;
    let mut controller = world.controller();
    let sized = |sets: i32, image: &str| service("llm", sets, json!([role("a", 2, image)]));
    world.apply(sized(2, "a")).await;
    world.until_ready("llm").await;
    let first = uids(&world.all(&world.pods()).await);
    let until_more_than = async |pods: usize| {
        world
            .until("some of it is done", || async {
                (world.all(&world.pods()).await.len() > pods).then_some(())
            })
            .await;
    };
    // Scaling out.
    world.kubectl(&["scale", "stormservice/llm", "--replicas=8"]);
    until_more_than(4).await;
    controller.kill();
    controller = world.controller();
    world.until_ready("llm").await;
    let pods = uids(&world.all(&world.pods()).await);
    assert_eq!(pods.len(), 16);
    assert!(first.iter().all(|uid| pods.contains(uid)));
    // Scaling in.
    world.kubectl(&["scale", "stormservice/llm", "--replicas=2"]);
    world
        .until("some of it is done", || async {
            let sets = world.all(&world.role_sets()).await;
            let going = |set: &RoleSet| set.metadata.deletion_timestamp.is_some();
            (sets.len() < 8 || sets.iter().any(going)).then_some(())
        })
        .await;
    controller.kill();
    controller = world.controller();
    world
        .until("four pods are left", || async {
            (world.all(&world.pods()).await.len() == 4).then_some(())
        })
        .await;
    assert_eq!(uids(&world.all(&world.pods()).await), first);

    // A pause in the middle of a rollout, unknown to the process that began it.
    world.apply(sized(2, "b")).await;
    world
        .until("the rollout has begun", || async {
            let here = uids(&world.all(&world.pods()).await);
            first.iter().any(|uid| !here.contains(uid)).then_some(())
        })
        .await;
    controller.kill();
    let mut paused = sized(2, "b");
    paused["spec"]["paused"] = json!(true);
    world.apply(paused).await;
    controller = world.controller();
    world
        .until("the pause is seen", || async {
            let service = world.services().get("llm").await.ok()?;
            let status = service.status?;
            let observed = status.observed_generation == service.metadata.generation;
            observed.then_some(())
        })
        .await;
    world.until_quiet().await;
    let kept = uids(&world.all(&world.pods()).await);
    assert!(
        first.iter().any(|uid| kept.contains(uid)),
        "the second RoleSet waits"
    );
    // Going back, and killed in the middle of that.
    world.apply(sized(2, "a")).await;
    world
        .until("going back has begun", || async {
            let here = uids(&world.all(&world.pods()).await);
            kept.iter().any(|uid| !here.contains(uid)).then_some(())
        })
        .await;
    controller.kill();
    let _again = world.controller();
    world.until_ready("llm").await;
    for pod in world.all(&world.pods()).await {
        assert_eq!(pod.spec.unwrap().containers[0].image.as_deref(), Some("a"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_written_when_nothing_changes() {
    let world = World::alone(cluster_or_skip!(), "quiet").await;
    let group = world.cluster.home().join("quiet-group.json");
    let definition = pod_group_crd("scheduling.x-k8s.io", "v1alpha1");
    std::fs::write(&group, definition.to_string()).unwrap();
    world.kubectl(&["apply", "-f", group.to_str().unwrap()]);
    let crd = "crd/podgroups.scheduling.x-k8s.io";
    world.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", crd]);
    let _controller = world.controller();
    world.apply(service("llm", 2, roles("a"))).await;
    let strategy = json!({"coschedulingSchedulingStrategy": {}});
    let fields = json!({"podGroupSize": 2, "schedulingStrategy": strategy});
    let gang = json!([role_with("p", 2, "a", fields)]);
    world.apply(service("gang", 2, gang)).await;
    world.until_ready("gang").await;
    world.until_ready("llm").await;
    world.until_quiet().await;
    let before = world.writes();
    assert!(!before.is_empty(), "the audit log counts");
    // Restarting looks at everything once more, and still there is nothing to do.
    let _again = world.controller();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(world.writes(), before);
}
