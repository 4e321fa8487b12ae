//! What must not shake the controllers: restarts in the middle, a second one, conflicts, haste.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kube::ResourceExt;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{Controller, World, role, role_with, service, uids};

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
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.containers[0].image.as_deref(), Some(image));
    }
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
            let pods = world.all(&world.pods()).await;
            pods.iter()
                .any(|pod| pod.metadata.deletion_timestamp.is_some())
                .then_some(())
        })
        .await;
    controller.kill();
    controller = world.controller();
    expect_complete(&world, 3, "b").await;

    world.kubectl(&["delete", "stormservice", "llm", "--wait=false"]);
    world
        .until("the deletion has begun", || async {
            (world.all(&world.role_sets()).await.iter())
                .any(|set| set.metadata.deletion_timestamp.is_some())
                .then_some(())
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
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_only_cost_another_try() {
    let world = World::new(cluster_or_skip!(), "conflict").await;
    let _controller = world.controller();
    world.apply(service("llm", 2, roles("a"))).await;
    world.until_ready("llm").await;
    let stop = Arc::new(AtomicBool::new(false));
    let (sets, stopped) = (world.role_sets(), stop.clone());
    let meddler = tokio::spawn(async move {
        let mut turn = 0;
        while !stopped.load(Ordering::Relaxed) {
            turn += 1;
            for set in sets.list(&Default::default()).await.unwrap().items {
                let patch = json!({"metadata": {"annotations": {"meddler": turn.to_string()}}});
                let patch = Patch::Merge(&patch);
                sets.patch(&set.name_any(), &PatchParams::default(), &patch)
                    .await
                    .unwrap();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    world.apply(service("llm", 2, roles("b"))).await;
    expect_complete(&world, 2, "b").await;
    stop.store(true, Ordering::Relaxed);
    meddler.await.unwrap();
    let set = world.all(&world.role_sets()).await.pop().unwrap();
    assert!(
        set.annotations().contains_key("meddler"),
        "others' annotations stay"
    );
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
async fn nothing_is_written_when_nothing_changes() {
    let world = World::new(cluster_or_skip!(), "quiet").await;
    let _controller = world.controller();
    world.apply(service("llm", 2, roles("a"))).await;
    world.until_ready("llm").await;
    world.until_quiet().await;
    let writes = || {
        let audit = std::fs::read_to_string(world.cluster.home().join("audit.log")).unwrap();
        let here = format!("\"namespace\":\"{}\"", world.namespace);
        let by_us =
            |line: &&str| line.contains(&here) && line.contains("kvtide-system:kvtide-control");
        let reads = [
            "\"verb\":\"get\"",
            "\"verb\":\"list\"",
            "\"verb\":\"watch\"",
        ];
        audit
            .lines()
            .filter(by_us)
            .filter(|line| !reads.iter().any(|read| line.contains(read)))
            .count()
    };
    let before = writes();
    assert!(before > 0, "the audit log counts");
    // Restarting looks at everything once more, and still there is nothing to do.
    let _again = world.controller();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(writes(), before);
}
