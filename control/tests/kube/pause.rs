//! Pauses: nothing is replaced anywhere, and numbers are kept.

use kube::ResourceExt;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::kubelet::{set_status, status};
use crate::world::{World, condition, images, role, role_with, service, uids};

fn pooled(roles: Value) -> Value {
    let mut pool = service("pool", 1, roles);
    pool["spec"]["updateStrategy"] = json!({"type": "InPlaceUpdate"});
    pool
}

/// Makes every pod of a role that runs `never-ready` ready: what the rollout waited for.
async fn make_ready(world: &World) {
    for pod in world.pods_of("a").await {
        if images(std::slice::from_ref(&pod)) == ["never-ready"] {
            let running = status(true, &json!({"running": {}}), 0);
            set_status(&world.client, &world.namespace, &pod.name_any(), &running)
                .await
                .unwrap();
        }
    }
}

async fn until_paused(world: &World, name: &str) {
    world
        .until("the pause is told of", || async {
            let told = |conditions: &[kvtide_control_api::Condition]| {
                conditions
                    .iter()
                    .any(|found| found.kind == "Progressing" && found.reason == "Paused")
            };
            let service = world.services().get(name).await.ok()?.status?;
            let set = world.all(&world.role_sets()).await.pop()?.status?;
            (told(&service.conditions) && told(&set.conditions)).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_reaches_into_a_pool_that_is_rolling() {
    let world = World::new(cluster_or_skip!(), "poolpause").await;
    let mut controller = world.controller();
    let pool = |image: &str| {
        let group = json!({"podGroupSize": 2, "updateStrategy": {"maxUnavailable": 2}});
        pooled(json!([
            role("a", 3, image),
            role_with("b", 2, image, group)
        ]))
    };
    world.apply(pool("a")).await;
    world.until_ready("pool").await;
    world.apply(pool("never-ready")).await;
    world
        .until("the first pod was replaced", || async {
            let now = images(&world.pods_of("a").await);
            (now == ["a", "a", "never-ready"]).then_some(())
        })
        .await;
    world
        .change("pool", json!({"spec": {"paused": true}}))
        .await;
    until_paused(&world, "pool").await;
    // Without a pause this is what makes the rollout go on.
    make_ready(&world).await;
    world.until_quiet().await;
    let pods = uids(&world.all(&world.pods()).await);
    assert_eq!(images(&world.pods_of("a").await), ["a", "a", "never-ready"]);
    assert_eq!(images(&world.pods_of("b").await), ["a"; 4]);
    // Nor does a controller that was not told of the pause when it came.
    controller.kill();
    let again = world.controller();
    world.until_looked_at_by(&again).await;
    assert_eq!(uids(&world.all(&world.pods()).await), pods);

    // What fails is replaced, and scaling goes on.
    let failed = world.pods_of("a").await.remove(0);
    set_status(
        &world.client,
        &world.namespace,
        &failed.name_any(),
        &json!({"phase": "Failed"}),
    )
    .await
    .unwrap();
    let scale =
        json!([{"op": "replace", "path": "/spec/template/spec/roles/0/replicas", "value": 4}]);
    let scale = scale.to_string();
    world.kubectl(&["patch", "stormservice", "pool", "--type=json", "-p", &scale]);
    world
        .until("four others are there", || async {
            let pods = world.pods_of("a").await;
            // Its name may be given again.
            let gone = !uids(&pods).contains(&failed.uid().unwrap());
            (pods.len() == 4 && gone).then_some(())
        })
        .await;
    make_ready(&world).await;
    world.until_quiet().await;
    let left = images(&world.pods_of("a").await);
    assert!(left.contains(&"a".to_owned()), "{left:?}");

    world
        .change("pool", json!({"spec": {"paused": false}}))
        .await;
    world.apply(pool("b")).await;
    world.until_ready("pool").await;
    assert_eq!(images(&world.pods_of("a").await), ["b"; 3]);
    assert_eq!(images(&world.pods_of("b").await), ["b"; 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_keeps_a_surge_and_what_it_was_to_replace() {
    let world = World::new(cluster_or_skip!(), "surgepause").await;
    let _controller = world.controller();
    let surging = |image: &str| {
        let mut service = service("llm", 1, json!([role("a", 2, image)]));
        service["spec"]["updateStrategy"] = json!({"maxSurge": 1});
        service
    };
    world.apply(surging("a")).await;
    world.until_ready("llm").await;
    world.apply(surging("never-ready")).await;
    world
        .until("there is one more", || async {
            let now = images(&world.pods_of("a").await);
            (now == ["a", "a", "never-ready"]).then_some(())
        })
        .await;
    world.change("llm", json!({"spec": {"paused": true}})).await;
    until_paused(&world, "llm").await;
    make_ready(&world).await;
    world.until_quiet().await;
    assert_eq!(images(&world.pods_of("a").await), ["a", "a", "never-ready"]);
    let status = world.services().get("llm").await.unwrap().status.unwrap();
    assert_eq!(condition(&status.conditions, "Progressing"), Some(false));
    // Going on needs no change of anything else.
    world
        .change("llm", json!({"spec": {"paused": false}}))
        .await;
    world
        .until("the next is there", || async {
            let now = images(&world.pods_of("a").await);
            (now == ["a", "never-ready", "never-ready"]).then_some(())
        })
        .await;
}
