//! Pods that are not ready for a while amid a rollout: they come back, and nothing is lost for it.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::film::Film;
use crate::kubelet::{set_status, status};
use crate::world::{World, images, role_with, service, uids};

/// The image of a pod.
fn image(pod: &Pod) -> String {
    images(std::slice::from_ref(pod)).remove(0)
}

/// Pods of the role `a` with this image.
async fn pods_with(world: &World, wanted: &str) -> Vec<Pod> {
    let mut pods = world.pods_of("a").await;
    pods.retain(|pod| image(pod) == wanted);
    pods
}

async fn set_ready(world: &World, pod: &Pod, ready: bool) {
    let mut status = status(ready, &json!({"running": {}}), 0);
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    status["conditions"][0]["lastTransitionTime"] = json!(now);
    set_status(&world.client, &world.namespace, &pod.name_any(), &status)
        .await
        .unwrap();
}

/// Waits until the controller counts so many ready replicas of the role.
async fn until_counted(world: &World, ready: i32) {
    world
        .until(&format!("{ready} are counted as ready"), || async {
            let status = world.all(&world.role_sets()).await.pop()?.status?;
            (status.roles[0].ready_replicas == ready).then_some(())
        })
        .await;
}

/// Brings a service of one RoleSet from the image `old` to one that never comes up, and waits until that
/// stands.
async fn stall(world: &World, old: &str, replicas: i32, fields: &Value, begun: usize) {
    let with = |image: &str| {
        let roles = json!([role_with("a", replicas, image, fields.clone())]);
        service("llm", 1, roles)
    };
    world.apply(with(old)).await;
    world.until_ready("llm").await;
    world.apply(with("never-ready")).await;
    world
        .until("the rollout began", || async {
            (pods_with(world, "never-ready").await.len() == begun).then_some(())
        })
        .await;
    world.until_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_unreadiness_amid_a_stalled_rollout_costs_no_replica() {
    let surge = json!({"updateStrategy": {"maxSurge": 1, "maxUnavailable": 0}});
    let stateful_surge = json!({"stateful": true, "updateStrategy": surge["updateStrategy"]});
    // Replicas, and what is left of them while the rollout stands.
    let table = [
        ("plain", 4, json!({}), 3),
        ("surge", 3, surge, 3),
        ("stateful", 3, json!({"stateful": true}), 2),
        ("statefulsurge", 2, stateful_surge, 2),
        ("groups", 3, json!({"podGroupSize": 2}), 2),
    ];
    for (name, replicas, fields, left) in table {
        let world = World::new(cluster_or_skip!(), &format!("short{name}")).await;
        let _controller = world.controller();
        let size = usize::try_from(fields["podGroupSize"].as_i64().unwrap_or(1)).unwrap();
        stall(&world, "a", replicas, &fields, size).await;
        let old = pods_with(&world, "a").await;
        assert_eq!(old.len(), size * usize::try_from(left).unwrap(), "{name}");
        for pod in &old {
            set_ready(&world, pod, false).await;
            until_counted(&world, left - 1).await;
            world.until_quiet().await;
            assert_eq!(uids(&pods_with(&world, "a").await), uids(&old), "{name}");
            set_ready(&world, pod, true).await;
            until_counted(&world, left).await;
        }
        world.until_quiet().await;
        assert_eq!(uids(&pods_with(&world, "a").await), uids(&old), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_of_what_is_not_ready_at_all_keeps_to_the_budget_and_so_does_the_next() {
    let world = World::new(cluster_or_skip!(), "allunready").await;
    let _controller = world.controller();
    let with = |image: &str| service("llm", 1, json!([role_with("a", 4, image, json!({}))]));
    world.apply(with("a")).await;
    world.until_ready("llm").await;
    let old = pods_with(&world, "a").await;
    for pod in &old {
        set_ready(&world, pod, false).await;
    }
    until_counted(&world, 0).await;
    world.apply(with("never-ready")).await;
    world
        .until("the rollout began", || async {
            (!pods_with(&world, "never-ready").await.is_empty()).then_some(())
        })
        .await;
    world.until_quiet().await;
    let kept = pods_with(&world, "a").await;
    assert_eq!(kept.len(), 3, "one of four may be missing");
    // They come back, and the next template replaces the broken one first.
    for pod in &kept {
        set_ready(&world, pod, true).await;
    }
    until_counted(&world, 3).await;
    let film = Film::start(&world).await;
    world.apply(with("b")).await;
    world.until_ready("llm").await;
    assert_eq!(images(&world.pods_of("a").await), ["b"; 4]);
    for scene in film.scenes() {
        let serving = scene.of("a").filter(|pod| pod.ready && !pod.going);
        assert!(serving.count() >= 3, "{scene:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_group_that_loses_a_pod_amid_a_stalled_rollout_is_mended_from_its_own_template() {
    let world = World::new(cluster_or_skip!(), "oldgroup").await;
    let _controller = world.controller();
    for policy in ["ReplaceUnhealthy", "FullRecreate"] {
        let fields = json!({"podGroupSize": 2, "recoveryPolicy": policy});
        // The new pod takes a moment, and with it the group.
        let image = "after-1000";
        stall(&world, image, 3, &fields, 2).await;
        let (old, sets) = (
            pods_with(&world, image).await,
            world.all(&world.pod_sets()).await,
        );
        world.kubectl(&["delete", "pod", &old[0].name_any(), "--wait=false"]);
        world
            .until("the group is whole again", || async {
                let now = pods_with(&world, image).await;
                let lost = uids(&now).contains(&old[0].uid().unwrap());
                (now.len() == 4 && !lost).then_some(())
            })
            .await;
        until_counted(&world, 2).await;
        world.until_quiet().await;
        assert_eq!(
            uids(&world.all(&world.pod_sets()).await),
            uids(&sets),
            "{policy}"
        );
        assert_eq!(pods_with(&world, image).await.len(), 4, "{policy}");
        world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    }
}
