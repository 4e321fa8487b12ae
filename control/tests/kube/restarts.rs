//! Controllers killed in the middle of what takes several steps.

use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::film::Film;
use crate::world::{World, images, role, role_with, service, uids};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_killed_while_a_pool_rolls_keeps_to_the_budget() {
    let world = World::new(cluster_or_skip!(), "poolrestart").await;
    let mut controller = world.controller();
    // Each pod takes a moment, so that the rollout has a middle.
    let pool = |image: &str| {
        let roles = json!([
            role_with("a", 4, image, json!({"upgradeOrder": 1})),
            role_with("b", 2, image, json!({"upgradeOrder": 2, "podGroupSize": 2})),
        ]);
        let mut pool = service("pool", 1, roles);
        pool["spec"]["updateStrategy"] = json!({"type": "InPlaceUpdate"});
        pool
    };
    world.apply(pool("a")).await;
    world.until_ready("pool").await;
    let sets = uids(&world.all(&world.role_sets()).await);
    let film = Film::start(&world).await;
    world.apply(pool("after-300")).await;
    for (role, begun) in [("a", 1), ("a", 3), ("b", 1)] {
        world
            .until("more of it has rolled", || async {
                let images = images(&world.pods_of(role).await);
                let new = images.iter().filter(|image| *image == "after-300");
                (new.count() >= begun).then_some(())
            })
            .await;
        controller.kill();
        controller = world.controller();
    }
    world.until_ready("pool").await;
    assert_eq!(images(&world.pods_of("a").await), ["after-300"; 4]);
    assert_eq!(images(&world.pods_of("b").await), ["after-300"; 4]);
    assert_eq!(uids(&world.all(&world.role_sets()).await), sets);
    for scene in film.scenes() {
        for (role, least) in [("a", 3), ("b", 2)] {
            let serving = scene.of(role).filter(|pod| pod.ready && !pod.going);
            assert!(serving.count() >= least, "{role}: {scene:?}");
        }
        let begun = scene.of("b").any(|pod| pod.image != "a");
        let over = |pod: &crate::film::Shot| pod.image != "a" && pod.ready;
        let mut before = scene.of("a").filter(|pod| !pod.going);
        assert!(!begun || before.all(over), "a comes first: {scene:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_killed_between_dependencies_knows_what_was_started() {
    let world = World::new(cluster_or_skip!(), "deprestart").await;
    let mut controller = world.controller();
    let roles = |first: &str| -> Value {
        json!([
            role("a", 1, first),
            role_with("b", 1, "after-300", json!({"dependencies": ["a"]})),
            role_with(
                "c",
                1,
                "a",
                json!({"dependencies": ["b"], "podGroupSize": 2})
            ),
        ])
    };
    world.apply(service("llm", 1, roles("after-300"))).await;
    let film = Film::start(&world).await;
    for role in ["a", "b"] {
        world
            .until("one more role is begun", || async {
                (!world.pods_of(role).await.is_empty()).then_some(())
            })
            .await;
        controller.kill();
        controller = world.controller();
    }
    world.until_ready("llm").await;
    for scene in film.scenes() {
        let ready = |role: &str| scene.of(role).any(|pod| pod.ready);
        assert!(scene.of("b").count() == 0 || ready("a"), "{scene:?}");
        assert!(scene.of("c").count() == 0 || ready("b"), "{scene:?}");
    }
    // What was started once is not gated again, also by a controller that did not see it start.
    world.apply(service("llm", 1, roles("never-ready"))).await;
    world
        .until("the first is not ready", || async {
            let first = images(&world.pods_of("a").await);
            (first == ["never-ready"]).then_some(())
        })
        .await;
    controller.kill();
    world.kubectl(&["delete", "pods", "-l", "role-name=b", "--wait=false"]);
    world
        .until("the second is gone", || async {
            let labelled = "role-name=b";
            let left = world.kubectl(&["get", "pods", "-l", labelled, "-o", "name"]);
            left.is_empty().then_some(())
        })
        .await;
    let _again = world.controller();
    world
        .until("the second is there again", || async {
            (world.pods_of("b").await.len() == 1).then_some(())
        })
        .await;
}
