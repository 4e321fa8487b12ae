//! A StormService's life: made, scaled, rolled, paused, rolled back, deleted.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::film::{Film, Scene, Shot};
use crate::world::{World, condition, images, role, role_with, service, uids};

/// The roles of the announcement.
fn announced(image: &str) -> Value {
    let prefill =
        json!({"podGroupSize": 2, "stateful": true, "recoveryPolicy": "ReplaceUnhealthy"});
    json!([
        role_with("prefill", 3, image, prefill),
        role_with("decode", 1, image, json!({"upgradeOrder": 3})),
    ])
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
            role_with("router", 2, image, json!({"upgradeOrder": 1})),
        ])
    };
    world.apply(service("llm", 1, roles("a"))).await;
    world.until_ready("llm").await;
    let film = Film::start(&world).await;
    world.apply(service("llm", 1, roles("b"))).await;
    world.until_ready("llm").await;
    // A role is begun only when the one before it is completely new and ready.
    let begun = |scene: &Scene, role: &str| scene.of(role).any(|pod| pod.image == "b");
    let over = |scene: &Scene, role: &str| {
        let mut pods = scene.of(role).filter(|pod| !pod.going).peekable();
        pods.peek().is_some() && pods.all(|pod| pod.image == "b" && pod.ready)
    };
    let scenes = film.scenes();
    for scene in &scenes {
        assert!(
            !begun(scene, "prefill") || over(scene, "router"),
            "{scene:?}"
        );
        assert!(
            !begun(scene, "decode") || over(scene, "prefill"),
            "{scene:?}"
        );
    }
    assert!(scenes.iter().any(|scene| over(scene, "decode")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parallel_roles_roll_at_once_and_interleaved_ones_step_by_step() {
    let world = World::new(cluster_or_skip!(), "orders").await;
    let _controller = world.controller();
    for order in ["Parallel", "Interleave"] {
        let ordered = |image: &str| {
            let roles = json!([role("a", 3, image), role("b", 3, image)]);
            let mut service = service("llm", 1, roles);
            service["spec"]["template"]["spec"]["updateStrategy"] = json!(order);
            service
        };
        world.apply(ordered("a")).await;
        world.until_ready("llm").await;
        let film = Film::start(&world).await;
        world.apply(ordered("b")).await;
        world.until_ready("llm").await;
        let scenes = film.scenes();
        let ready = |scene: &Scene, role: &str| {
            let new = |pod: &&Shot| pod.image == "b" && pod.ready && !pod.going;
            scene.of(role).filter(new).count()
        };
        let begun =
            |scene: &Scene, role: &str| scene.of(role).filter(|pod| pod.image == "b").count();
        for scene in &scenes {
            for role in ["a", "b"] {
                let serving = scene.of(role).filter(|pod| pod.ready && !pod.going);
                assert!(serving.count() >= 2, "{order}, one at a time: {scene:?}");
            }
            if order == "Interleave" {
                let level = ready(scene, "a").min(ready(scene, "b"));
                let ahead = begun(scene, "a").max(begun(scene, "b"));
                assert!(ahead <= level + 1, "a step ahead: {scene:?}");
            }
        }
        let amid = |scene: &Scene, role: &str| (1..3).contains(&begun(scene, role));
        let both = |scene: &Scene| amid(scene, "a") && amid(scene, "b");
        assert!(scenes.iter().any(both), "{order}: both roll at once");
        world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn role_sets_are_changed_in_place_no_more_at_once_than_may_be_unavailable() {
    let world = World::new(cluster_or_skip!(), "several").await;
    let _controller = world.controller();
    let budgeted = |image: &str| {
        let mut service = service("llm", 5, json!([role("a", 1, image)]));
        service["spec"]["updateStrategy"] = json!({"maxUnavailable": 2});
        service
    };
    // Also where none of them is ready.
    for (from, to) in [("a", "never-ready"), ("never-ready", "b")] {
        world.apply(budgeted(from)).await;
        world
            .until(&format!("it runs {from}"), || async {
                let new = |pod: &&Pod| images(std::slice::from_ref(*pod)) == [from];
                let pods = world.pods_of("a").await;
                // What is never ready keeps the rest waiting: two of five.
                let wanted = if from == "a" { 5 } else { 2 };
                (pods.iter().filter(new).count() == wanted).then_some(())
            })
            .await;
        world.until_quiet().await;
        let film = Film::start(&world).await;
        world.apply(budgeted(to)).await;
        if to == "b" {
            world.until_ready("llm").await;
        } else {
            world
                .until("two are taken", || async {
                    let new = |pod: &&Pod| images(std::slice::from_ref(*pod)) == [to];
                    let pods = world.pods_of("a").await;
                    (pods.iter().filter(new).count() == 2).then_some(())
                })
                .await;
            world.until_quiet().await;
        }
        for scene in film.scenes() {
            let serving = scene.of("a").filter(|pod| pod.ready && !pod.going);
            assert!(serving.count() >= 3, "{from} to {to}: {scene:?}");
            let under_way = scene.of("a").filter(|pod| pod.image == to && !pod.ready);
            assert!(under_way.count() <= 2, "{from} to {to}: {scene:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_surge_alone_takes_no_capacity() {
    let world = World::new(cluster_or_skip!(), "surge").await;
    let _controller = world.controller();
    let surging = |image: &str| {
        let mut service = service("llm", 2, json!([role("a", 2, image)]));
        service["spec"]["updateStrategy"] = json!({"maxSurge": 1});
        service
    };
    world.apply(surging("a")).await;
    world.until_ready("llm").await;
    let sets = uids(&world.all(&world.role_sets()).await);
    let film = Film::start(&world).await;
    world.apply(surging("b")).await;
    world.until_ready("llm").await;
    assert_eq!(images(&world.pods_of("a").await), ["b", "b", "b", "b"]);
    assert_eq!(uids(&world.all(&world.role_sets()).await), sets);
    let scenes = film.scenes();
    for scene in &scenes {
        let serving = scene.of("a").filter(|pod| pod.ready && !pod.going);
        assert!(serving.count() >= 4, "{scene:?}");
    }
    assert!(scenes.iter().any(|scene| scene.of("a").count() > 4));
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_orphaned_stays() {
    let world = World::new(cluster_or_skip!(), "orphan").await;
    let _controller = world.controller();
    world.apply(service("llm", 1, announced("a"))).await;
    world.until_ready("llm").await;
    let (pods, groups) = (
        uids(&world.all(&world.pods()).await),
        uids(&world.all(&world.pod_sets()).await),
    );
    let doomed = ["stormservice", "roleset", "podset"];
    for kind in doomed {
        world.kubectl(&["delete", kind, "--all", "--cascade=orphan", "--timeout=80s"]);
        world.until_quiet().await;
        assert_eq!(
            uids(&world.all(&world.pods()).await),
            pods,
            "after each {kind} went"
        );
        if kind != "podset" {
            assert_eq!(uids(&world.all(&world.pod_sets()).await), groups);
        }
    }
    for pod in world.all(&world.pods()).await {
        assert_eq!(pod.metadata.owner_references, None, "nobody's any more");
    }
}
