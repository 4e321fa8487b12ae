//! A StormService's life: made, scaled, rolled, paused, rolled back, deleted.

use std::sync::{Arc, Mutex};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{World, condition, role, role_with, service, uids};

/// The roles of the announcement.
fn announced(image: &str) -> Value {
    let prefill =
        json!({"podGroupSize": 2, "stateful": true, "recoveryPolicy": "ReplaceUnhealthy"});
    json!([
        role_with("prefill", 3, image, prefill),
        role_with("decode", 1, image, json!({"upgradeOrder": 3})),
    ])
}

fn images(pods: &[Pod]) -> Vec<String> {
    let mut images: Vec<String> = pods
        .iter()
        .map(|pod| {
            pod.spec.as_ref().unwrap().containers[0]
                .image
                .clone()
                .unwrap()
        })
        .collect();
    images.sort();
    images
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_announced_roles_become_ready_and_scale_by_kubectl() {
    let world = World::new(cluster_or_skip!(), "announced").await;
    let _controller = world.controller();
    world.apply(service("llm", 1, announced("a"))).await;
    let ready = world.until_ready("llm").await;
    assert_eq!(world.all(&world.role_sets()).await.len(), 1);
    assert_eq!(world.all(&world.pod_sets()).await.len(), 3);
    assert_eq!(world.pods_of("prefill").await.len(), 6);
    assert_eq!(world.pods_of("decode").await.len(), 1);
    let roles = ready.status.unwrap().role_statuses;
    assert_eq!(
        (roles[0].name.as_str(), roles[0].ready_replicas),
        ("prefill", 3)
    );
    let pod = &world.pods_of("decode").await[0];
    let spec = pod.spec.as_ref().unwrap();
    assert_eq!(spec.hostname.as_deref(), Some(pod.name_any().as_str()));
    assert_eq!(spec.subdomain.as_deref(), Some("llm"));

    let before = uids(&world.pods_of("prefill").await);
    world.kubectl(&["scale", "stormservice/llm", "--replicas=2"]);
    world.until_ready("llm").await;
    assert_eq!(world.all(&world.role_sets()).await.len(), 2);
    let after = uids(&world.pods_of("prefill").await);
    assert!(
        before.iter().all(|uid| after.contains(uid)),
        "scaling out replaced pods"
    );
    let columns = world.kubectl(&["get", "stsvc", "llm"]);
    assert!(
        columns.contains("REPLICAS") && columns.contains("True"),
        "{columns}"
    );

    world.kubectl(&["scale", "stormservice/llm", "--replicas=1"]);
    world.until_ready("llm").await;
    assert_eq!(world.pods_of("prefill").await.len(), 6);
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    assert_eq!(world.all(&world.role_sets()).await.len(), 0);
    assert_eq!(world.all(&world.pods()).await.len(), 0);
    let left = world.kubectl(&["get", "services,controllerrevisions", "-o", "name"]);
    assert_eq!(left.trim(), "", "nothing is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_one_role_touches_that_role_alone() {
    let world = World::new(cluster_or_skip!(), "onerole").await;
    let _controller = world.controller();
    let roles = |decode: &str| json!([role("prefill", 2, "a"), role("decode", 2, decode)]);
    world.apply(service("llm", 2, roles("a"))).await;
    world.until_ready("llm").await;
    let (sets, prefill) = (
        uids(&world.all(&world.role_sets()).await),
        uids(&world.pods_of("prefill").await),
    );
    world.apply(service("llm", 2, roles("b"))).await;
    world.until_ready("llm").await;
    assert_eq!(images(&world.pods_of("decode").await), ["b", "b", "b", "b"]);
    assert_eq!(
        uids(&world.all(&world.role_sets()).await),
        sets,
        "RoleSets stay"
    );
    assert_eq!(
        uids(&world.pods_of("prefill").await),
        prefill,
        "the other role stays"
    );
}

/// Roles in the order in which pods of the new image appear.
fn watch_order(world: &World, image: &'static str) -> Arc<Mutex<Vec<String>>> {
    let order: Arc<Mutex<Vec<String>>> = Arc::default();
    let (pods, seen) = (world.pods(), order.clone());
    tokio::spawn(async move {
        let events = watcher(pods, watcher::Config::default())
            .default_backoff()
            .applied_objects();
        let mut events = Box::pin(events);
        while let Some(Ok(pod)) = events.next().await {
            let new = images(std::slice::from_ref(&pod)) == [image];
            let role = pod.labels().get("role-name").cloned().unwrap_or_default();
            let mut seen = seen.lock().unwrap();
            if new && !seen.contains(&role) {
                seen.push(role);
            }
        }
    });
    order
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_roll_in_their_order() {
    let world = World::new(cluster_or_skip!(), "order").await;
    let _controller = world.controller();
    let roles = |image: &str| {
        json!([
            role_with("decode", 2, image, json!({"upgradeOrder": 3})),
            role_with(
                "prefill",
                1,
                image,
                json!({"upgradeOrder": 2, "podGroupSize": 2})
            ),
            role_with("router", 1, image, json!({"upgradeOrder": 1})),
        ])
    };
    world.apply(service("llm", 1, roles("a"))).await;
    world.until_ready("llm").await;
    let order = watch_order(&world, "b");
    world.apply(service("llm", 1, roles("b"))).await;
    world.until_ready("llm").await;
    assert_eq!(*order.lock().unwrap(), ["router", "prefill", "decode"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_holds_rollouts_and_not_scaling_and_going_back_keeps_the_scale() {
    let world = World::new(cluster_or_skip!(), "pause").await;
    let _controller = world.controller();
    world
        .apply(service("llm", 2, json!([role("a", 1, "a")])))
        .await;
    world.until_ready("llm").await;
    world.change("llm", json!({"spec": {"paused": true}})).await;
    let mut changed = service("llm", 2, json!([role("a", 1, "b")]));
    changed["spec"]["paused"] = json!(true);
    world.apply(changed).await;
    world.until_quiet().await;
    assert_eq!(images(&world.pods_of("a").await), ["a", "a"], "paused");
    world.kubectl(&["scale", "stormservice/llm", "--replicas=3"]);
    world
        .until("three pods are there", || async {
            (world.pods_of("a").await.len() == 3).then_some(())
        })
        .await;
    world
        .change("llm", json!({"spec": {"paused": false}}))
        .await;
    world.until_ready("llm").await;
    assert_eq!(images(&world.pods_of("a").await), ["b", "b", "b"]);

    // Going back is writing the old template again; the scale stays what it is.
    world
        .apply(service("llm", 3, json!([role("a", 1, "a")])))
        .await;
    world.until_ready("llm").await;
    assert_eq!(images(&world.pods_of("a").await), ["a", "a", "a"]);
    let revisions = world.kubectl(&[
        "get",
        "controllerrevisions",
        "-o",
        "jsonpath={.items[*].revision}",
        "--sort-by=.revision",
    ]);
    assert_eq!(
        revisions, "2 3",
        "the old revision became the newest; none was minted"
    );
    let status = world.services().get("llm").await.unwrap().status.unwrap();
    assert_eq!(status.current_revision, status.update_revision);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooled_service_scales_and_rolls_its_roles_in_place() {
    let world = World::new(cluster_or_skip!(), "pooled").await;
    let _controller = world.controller();
    let pool = |prefill: i32, decode: i32, image: &str| {
        let roles = json!([
            role_with(
                "prefill",
                prefill,
                image,
                json!({"updateStrategy": {"maxSurge": 1}})
            ),
            role("decode", decode, "a"),
        ]);
        let mut pool = service("pool", 1, roles);
        pool["spec"]["updateStrategy"] = json!({"type": "InPlaceUpdate"});
        pool
    };
    world.apply(pool(1, 2, "a")).await;
    world.until_ready("pool").await;
    let (sets, decode) = (
        uids(&world.all(&world.role_sets()).await),
        uids(&world.pods_of("decode").await),
    );
    world.apply(pool(4, 2, "a")).await;
    world.until_ready("pool").await;
    assert_eq!(world.pods_of("prefill").await.len(), 4);
    world.apply(pool(4, 2, "b")).await;
    world.until_ready("pool").await;
    assert_eq!(
        images(&world.pods_of("prefill").await),
        ["b", "b", "b", "b"]
    );
    world.apply(pool(1, 2, "b")).await;
    world.until_ready("pool").await;
    assert_eq!(world.pods_of("prefill").await.len(), 1);
    assert_eq!(uids(&world.all(&world.role_sets()).await), sets);
    assert_eq!(uids(&world.pods_of("decode").await), decode);
    let revisions = world.kubectl(&["get", "controllerrevisions", "-o", "name"]);
    assert_eq!(
        revisions.lines().count(),
        2,
        "scaling mints no revision: {revisions}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removed_roles_and_changed_group_sizes_leave_nothing_behind() {
    let world = World::new(cluster_or_skip!(), "reshape").await;
    let _controller = world.controller();
    let sized = |size: i32| role_with("p", 2, "a", json!({"podGroupSize": size}));
    world
        .apply(service("llm", 1, json!([sized(1), role("old", 1, "a")])))
        .await;
    world.until_ready("llm").await;
    for (size, pods, groups) in [(3, 6, 2), (2, 4, 2), (1, 2, 0)] {
        world.apply(service("llm", 1, json!([sized(size)]))).await;
        world
            .until(&format!("groups of {size}"), || async {
                let here = world.all(&world.pods()).await.len();
                let sets = world.all(&world.pod_sets()).await.len();
                (here == pods && sets == groups).then_some(())
            })
            .await;
        world.until_ready("llm").await;
        assert_eq!(world.pods_of("old").await.len(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dependencies_gate_the_first_creation_alone() {
    let world = World::new(cluster_or_skip!(), "depends").await;
    let _controller = world.controller();
    let roles = |image: &str| {
        json!([
            role("router", 1, image),
            role_with("prefill", 1, "a", json!({"dependencies": ["router"]})),
        ])
    };
    world.apply(service("llm", 1, roles("never-ready"))).await;
    world
        .until("the router is there", || async {
            (world.pods_of("router").await.len() == 1).then_some(())
        })
        .await;
    world.until_quiet().await;
    assert_eq!(
        world.pods_of("prefill").await.len(),
        0,
        "the router is not ready"
    );
    world.apply(service("llm", 1, roles("a"))).await;
    world.until_ready("llm").await;
    // Later the dependency may fail: what was started is kept at its number.
    world.apply(service("llm", 1, roles("never-ready"))).await;
    world
        .until("the router is not ready", || async {
            let router = world.pods_of("router").await;
            (images(&router) == ["never-ready"]).then_some(())
        })
        .await;
    world.kubectl(&["delete", "pods", "-l", "role-name=prefill", "--wait=false"]);
    world
        .until("prefill is there again", || async {
            let prefill = world.pods_of("prefill").await;
            (prefill.len() == 1).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_object_gets_a_condition_and_no_writes() {
    let world = World::new(cluster_or_skip!(), "invalid").await;
    let controller = world.controller();
    let cycle = json!([
        role_with("a", 1, "i", json!({"dependencies": ["b"]})),
        role_with("b", 1, "i", json!({"dependencies": ["a"]})),
    ]);
    world.apply(service("llm", 1, cycle)).await;
    world
        .until("it is called invalid", || async {
            let status = world.services().get("llm").await.ok()?.status?;
            (condition(&status.conditions, "Invalid") == Some(true)).then_some(())
        })
        .await;
    world.until_quiet().await;
    assert_eq!(world.all(&world.role_sets()).await.len(), 0);
    let events = world.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]);
    assert!(
        events.contains("cycle: a, b wait for each other"),
        "{events}"
    );
    world
        .apply(service("llm", 1, json!([role("a", 1, "i")])))
        .await;
    let ready = world.until_ready("llm").await;
    assert_eq!(
        condition(&ready.status.unwrap().conditions, "Invalid"),
        None
    );
    assert!(!controller.log().contains("panicked"));
}
