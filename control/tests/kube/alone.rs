//! RoleSets and PodSets that a user makes without a StormService.

use kube::ResourceExt;
use kvtide_control_api::PodSetPhase;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::kubelet::{LOST_NODE, set_status, status};
use crate::world::{World, condition, images, role, role_with, uids};

fn role_set(roles: Value) -> Value {
    json!({
        "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "RoleSet",
        "metadata": {"name": "set"}, "spec": {"roles": roles},
    })
}

fn pod_set(policy: &str, image: &str, annotations: Value) -> Value {
    json!({
        "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "PodSet",
        "metadata": {"name": "group"},
        "spec": {"podGroupSize": 2, "recoveryPolicy": policy, "template": {
            "metadata": {"annotations": annotations},
            "spec": {"terminationGracePeriodSeconds": 1,
                "containers": [{"name": "c", "image": image}]},
        }},
    })
}

async fn until_set_is_ready(world: &World) {
    world
        .until("the RoleSet is ready", || async {
            let set = world.role_sets().get("set").await.ok()?;
            let status = set.status?;
            let observed = status.observed_generation == set.metadata.generation;
            let holds = |kind: &str| condition(&status.conditions, kind);
            let settled = holds("Ready") == Some(true) && holds("Progressing") == Some(false);
            (observed && settled).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_set_alone_lives_as_one_of_a_service() {
    let world = World::new(cluster_or_skip!(), "loneset").await;
    let _controller = world.controller();
    let roles = |image: &str, replicas: i32| {
        json!([
            role("a", replicas, image),
            role_with(
                "p",
                1,
                "a",
                json!({"podGroupSize": 2, "dependencies": ["a"]})
            ),
        ])
    };
    world.apply(role_set(roles("a", 1))).await;
    until_set_is_ready(&world).await;
    let groups = uids(&world.all(&world.pod_sets()).await);
    assert_eq!(world.all(&world.pods()).await.len(), 3);
    let pod = world.pods_of("a").await.remove(0);
    assert_eq!(pod.labels().get("storm-service-name"), None);
    assert_eq!(pod.spec.unwrap().subdomain, None);
    world.apply(role_set(roles("b", 2))).await;
    until_set_is_ready(&world).await;
    assert_eq!(images(&world.pods_of("a").await), ["b", "b"]);
    assert_eq!(uids(&world.all(&world.pod_sets()).await), groups);

    // What no rule of the API server can see is told, and nothing is done.
    let pods = uids(&world.all(&world.pods()).await);
    let cycle = json!([
        role_with("a", 2, "c", json!({"dependencies": ["p"]})),
        role_with(
            "p",
            1,
            "a",
            json!({"podGroupSize": 2, "dependencies": ["a"]})
        ),
    ]);
    world.apply(role_set(cycle)).await;
    world
        .until("it is called invalid", || async {
            let status = world.role_sets().get("set").await.ok()?.status?;
            let holds = |kind: &str| condition(&status.conditions, kind);
            (holds("Invalid") == Some(true) && holds("Ready") == Some(false)).then_some(())
        })
        .await;
    world.until_quiet().await;
    assert_eq!(uids(&world.all(&world.pods()).await), pods);
    world.kubectl(&["delete", "roleset", "set", "--timeout=80s"]);
    assert_eq!(world.all(&world.pods()).await.len(), 0);
    assert_eq!(world.all(&world.pod_sets()).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_set_alone_recovers_and_may_spell_its_policy_as_aibrix_does() {
    let world = World::new(cluster_or_skip!(), "lonegroup").await;
    let _controller = world.controller();
    let ready = async || {
        world
            .until("the PodSet is ready", || async {
                let status = world.pod_sets().get("group").await.ok()?.status?;
                (status.phase == Some(PodSetPhase::Ready)).then_some(())
            })
            .await;
    };
    world.apply(pod_set("Recreate", "a", json!({}))).await;
    ready().await;
    let first = world.all(&world.pods()).await;
    let restarted = status(true, &json!({"running": {}}), 1);
    set_status(
        &world.client,
        &world.namespace,
        &first[1].name_any(),
        &restarted,
    )
    .await
    .unwrap();
    world
        .until("both were made anew", || async {
            let now = uids(&world.all(&world.pods()).await);
            let none = uids(&first).iter().all(|uid| !now.contains(uid));
            (now.len() == 2 && none).then_some(())
        })
        .await;
    ready().await;
    let set = world.pod_sets().get("group").await.unwrap();
    assert_eq!(
        serde_json::to_value(set.spec.recovery_policy).unwrap(),
        "Recreate",
        "it is left as it was written"
    );
    world.kubectl(&["delete", "podset", "group", "--timeout=80s"]);
    assert_eq!(world.all(&world.pods()).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_may_let_its_stuck_pods_be_forced() {
    let world = World::new(cluster_or_skip!(), "optin").await;
    let _controller = world.controller();
    let forced = json!({"control.kvtide.io/force-delete-stuck-pods": "true"});
    // Nobody confirms that its pods ended.
    world
        .apply(pod_set("ReplaceUnhealthy", "on-lost-node", forced))
        .await;
    world
        .until("both run", || async {
            let pods = world.all(&world.pods()).await;
            let there = |pod: &&k8s_openapi::api::core::v1::Pod| {
                let spec = pod.spec.as_ref();
                spec.and_then(|spec| spec.node_name.as_deref()) == Some(LOST_NODE)
            };
            (pods.iter().filter(there).count() == 2).then_some(())
        })
        .await;
    let stuck = world.all(&world.pods()).await.remove(0);
    world.kubectl(&["delete", "pod", &stuck.name_any(), "--wait=false"]);
    world
        .until("it is replaced", || async {
            let now = world.pods().get_opt(&stuck.name_any()).await.ok()??;
            (now.uid() != stuck.uid()).then_some(())
        })
        .await;
    let events = world.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
    assert!(events.contains("ForcedDeletion"), "{events}");
    world.kubectl(&["delete", "podset", "group", "--timeout=80s"]);
}
