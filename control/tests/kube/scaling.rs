//! What autoscalers see and write: the scale subresource, and replicas of roles.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::ListParams;
use serde_json::json;

use crate::cluster_or_skip;
use crate::kubelet::{set_status, status};
use crate::world::{World, images, role, role_with, service, uids};

/// What a `HorizontalPodAutoscaler` multiplies with: the pods that the selector of the scale subresource
/// finds, going ones aside.
async fn selected(world: &World) -> Vec<Pod> {
    let scale = world.services().get_scale("llm").await.unwrap();
    let selector = scale.status.unwrap().selector.unwrap();
    let wanted = ListParams::default().labels(&selector);
    let mut found = world.pods().list(&wanted).await.unwrap().items;
    found.retain(|pod| pod.metadata.deletion_timestamp.is_none());
    found
}

/// Waits until it finds one of each RoleSet.
async fn until_one_each(world: &World, sets: usize) -> Vec<Pod> {
    world
        .until("one pod of each RoleSet is selected", || async {
            let pods = selected(world).await;
            let label = |pod: &Pod| pod.labels()["roleset-name"].clone();
            let of: std::collections::BTreeSet<String> = pods.iter().map(label).collect();
            (pods.len() == sets && of.len() == sets).then_some(pods)
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scale_subresource_selects_one_pod_of_each_role_set() {
    let world = World::new(cluster_or_skip!(), "selector").await;
    let _controller = world.controller();
    let with = |replicas: i32, image: &str| {
        let roles = json!([
            role_with("p", 2, image, json!({"podGroupSize": 2})),
            role("d", 2, image),
        ]);
        service("llm", replicas, roles)
    };
    world.apply(with(2, "a")).await;
    world.until_ready("llm").await;
    world.until_quiet().await;
    let first = until_one_each(&world, 2).await;
    assert!(first.iter().all(|pod| pod.labels()["role-name"] == "p"));
    let all = uids(&world.all(&world.pods()).await);

    // It moves when its pod goes, and when it is not ready and another is; no pod is replaced for it.
    world.kubectl(&["delete", "pod", &first[0].name_any(), "--wait=false"]);
    let waiting = status(false, &json!({"running": {}}), 0);
    set_status(
        &world.client,
        &world.namespace,
        &first[1].name_any(),
        &waiting,
    )
    .await
    .unwrap();
    let name = |pod: &Pod| pod.name_any();
    world
        .until("both marks moved", || async {
            let now = selected(&world).await;
            let moved = now
                .iter()
                .all(|pod| !uids(&first).contains(&pod.uid().unwrap()));
            (now.len() == 2 && moved).then_some(())
        })
        .await;
    let running = status(true, &json!({"running": {}}), 0);
    set_status(
        &world.client,
        &world.namespace,
        &first[1].name_any(),
        &running,
    )
    .await
    .unwrap();
    world.until_ready("llm").await;
    let second: Vec<String> = until_one_each(&world, 2).await.iter().map(name).collect();
    world.until_quiet().await;
    let stays: Vec<String> = until_one_each(&world, 2).await.iter().map(name).collect();
    assert_eq!(stays, second, "it stays where it is");
    let now = uids(&world.all(&world.pods()).await);
    assert_eq!(
        all.iter().filter(|uid| now.contains(uid)).count(),
        all.len() - 1
    );

    // The role can be chosen.
    let chosen = json!({"metadata": {"annotations": {"control.kvtide.io/scaling-role": "d"}}});
    world.change("llm", chosen).await;
    world
        .until("pods of the other role are selected", || async {
            let pods = selected(&world).await;
            let of_role = pods.iter().all(|pod| pod.labels()["role-name"] == "d");
            (pods.len() == 2 && of_role).then_some(())
        })
        .await;

    let unknown = json!({"metadata": {"annotations": {"control.kvtide.io/scaling-role": "x"}}});
    world.change("llm", unknown).await;
    world
        .until("it is told that there is no such role", || async {
            let events = world.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]);
            events.contains("none of the roles").then_some(())
        })
        .await;

    // Through scaling and a rollout.
    world.kubectl(&["scale", "stormservice/llm", "--replicas=3"]);
    world.until_ready("llm").await;
    until_one_each(&world, 3).await;
    world.apply(with(3, "b")).await;
    world.until_ready("llm").await;
    until_one_each(&world, 3).await;
    let scale = world.services().get_scale("llm").await.unwrap();
    assert_eq!(scale.status.unwrap().replicas, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_replicas_in_its_manifest_keeps_its_scale_when_applied_by_the_server() {
    let world = World::new(cluster_or_skip!(), "keepscale").await;
    let _controller = world.controller();
    let applied = |image: &str| {
        let mut role = role("a", 1, image);
        role.as_object_mut().unwrap().remove("replicas");
        let mut pool = service("pool", 1, json!([role]));
        pool["spec"]["updateStrategy"] = json!({"type": "InPlaceUpdate"});
        let file = world
            .cluster
            .home()
            .join(format!("{}-pool.json", world.namespace));
        std::fs::write(&file, pool.to_string()).unwrap();
        world.kubectl(&["apply", "--server-side", "-f", file.to_str().unwrap()]);
    };
    applied("a");
    world.until_ready("pool").await;
    let scaled =
        r#"[{"op": "replace", "path": "/spec/template/spec/roles/0/replicas", "value": 3}]"#;
    world.kubectl(&["patch", "stormservice", "pool", "--type=json", "-p", scaled]);
    world
        .until("it is scaled", || async {
            (world.pods_of("a").await.len() == 3).then_some(())
        })
        .await;
    applied("b");
    world.until_ready("pool").await;
    assert_eq!(images(&world.pods_of("a").await), ["b", "b", "b"]);
}
