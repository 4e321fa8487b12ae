//! Pods that fail, vanish or lose their node, and what becomes of their groups.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kvtide_control_api::PodSetPhase;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::kubelet::{LOST_NODE, set_status, status};
use crate::world::{World, role, role_with, service, uids};

fn group(policy: &str) -> Value {
    json!([role_with(
        "p",
        1,
        "a",
        json!({"podGroupSize": 3, "recoveryPolicy": policy})
    )])
}

/// Waits until the role has three ready pods of which none has these uids, or only `kept` of them.
async fn until_recovered(world: &World, before: &[String], kept: usize) {
    world
        .until("the group recovered", || async {
            let pods = world.pods_of("p").await;
            let now = uids(&pods);
            let same = now.iter().filter(|uid| before.contains(uid)).count();
            let set = world.all(&world.pod_sets()).await.pop()?;
            let ready = set.status?.phase == Some(PodSetPhase::Ready);
            (now.len() == 3 && same == kept && ready).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_pod_is_replaced_alone() {
    let world = World::new(cluster_or_skip!(), "kill").await;
    let _controller = world.controller();
    world
        .apply(service("llm", 1, json!([role("a", 3, "i")])))
        .await;
    world.until_ready("llm").await;
    let before = world.pods_of("a").await;
    world.kubectl(&["delete", "pod", &before[0].name_any(), "--wait=false"]);
    world
        .until("it is replaced", || async {
            let now = uids(&world.pods_of("a").await);
            let same = uids(&before[1..]).iter().all(|uid| now.contains(uid));
            (now.len() == 3 && same && !now.contains(&before[0].uid().unwrap())).then_some(())
        })
        .await;
    world.until_ready("llm").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_ends_at_once_is_not_made_again_and_again() {
    let world = World::new(cluster_or_skip!(), "ends").await;
    // Long pauses: what is to stand for one stands also on a slow machine.
    let flags = [
        "--leader-elect=false",
        "--recovery-backoff-seconds=100",
        "--recovery-backoff-max-seconds=200",
    ];
    let mut controller = world.controller_with(&flags);
    let stateful = |image: &str| role_with("b", 1, image, json!({"stateful": true}));
    let roles = json!([role("a", 2, "ends"), stateful("ends")]);
    world.apply(service("llm", 1, roles)).await;
    let recovering = async || {
        let status = world.all(&world.role_sets()).await.pop()?.status?;
        let found = status.conditions.into_iter();
        found
            .filter(|condition| condition.kind == "Recovering")
            .find(|condition| condition.message.contains("a, b"))
    };
    world
        .until("it is told that they wait", async || {
            recovering().await.map(|_| ())
        })
        .await;
    world.until_quiet().await;
    let pods = uids(&world.all(&world.pods()).await);
    assert_eq!(pods.len(), 3);
    controller.kill();
    let again = world.controller_with(&flags);
    world.until_looked_at_by(&again).await;
    assert_eq!(
        uids(&world.all(&world.pods()).await),
        pods,
        "a new controller knows of it"
    );
    // A template that works is not waited with.
    world
        .apply(service("llm", 1, json!([role("a", 2, "i"), stateful("i")])))
        .await;
    world.until_ready("llm").await;
    assert!(recovering().await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_pod_of_a_group_is_replaced_alone() {
    let world = World::new(cluster_or_skip!(), "replace").await;
    let _controller = world.controller();
    world
        .apply(service("llm", 1, group("ReplaceUnhealthy")))
        .await;
    world.until_ready("llm").await;
    let before = world.pods_of("p").await;
    let failed = json!({"phase": "Failed"});
    set_status(
        &world.client,
        &world.namespace,
        &before[1].name_any(),
        &failed,
    )
    .await
    .unwrap();
    until_recovered(&world, &uids(&before), 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_recreate_takes_the_whole_group_and_never_mixes_two() {
    let world = World::new(cluster_or_skip!(), "recreate").await;
    let mut controller = world.controller();
    world.apply(service("llm", 1, group("FullRecreate"))).await;
    world.until_ready("llm").await;
    let mixtures = watch_mixtures(&world).await;
    // A restarted container is enough.
    let first = uids(&world.pods_of("p").await);
    let restarted = status(true, &json!({"running": {}}), 1);
    let name = world.pods_of("p").await[2].name_any();
    set_status(&world.client, &world.namespace, &name, &restarted)
        .await
        .unwrap();
    until_recovered(&world, &first, 0).await;
    // So is a pod that somebody deleted, also when the controller dies in the middle.
    let second = uids(&world.pods_of("p").await);
    let name = world.pods_of("p").await[0].name_any();
    world.kubectl(&["delete", "pod", &name, "--wait=false"]);
    controller.kill();
    let _again = world.controller();
    until_recovered(&world, &second, 0).await;
    let mixtures = mixtures.lock().unwrap();
    assert!(mixtures.generations >= 3, "the watch saw both recoveries");
    assert_eq!(mixtures.found, Vec::<String>::new(), "half old, half new");
}

/// What a watch saw of a group of three pods.
#[derive(Debug, Default)]
struct Mixtures {
    /// Groups of three that were complete one after the other.
    generations: usize,
    /// Pods that were made while one of the group before was there.
    found: Vec<String>,
}

async fn watch_mixtures(world: &World) -> Arc<Mutex<Mixtures>> {
    let mixtures: Arc<Mutex<Mixtures>> = Arc::default();
    let (pods, seen) = (world.pods(), mixtures.clone());
    let (begun, beginning) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut begun = Some(begun);
        let mut here: BTreeSet<String> = BTreeSet::new();
        // Whether the pods that are there are a group that was complete.
        let mut complete = false;
        let events = watcher(pods, watcher::Config::default()).default_backoff();
        let mut events = events.boxed();
        while let Some(event) = events.next().await {
            let mut seen = seen.lock().unwrap();
            match event {
                Ok(Event::Apply(pod) | Event::InitApply(pod)) => {
                    if here.insert(pod.uid().unwrap()) && complete {
                        seen.found.push(pod.name_any());
                    }
                    if here.len() == 3 && !complete {
                        complete = true;
                        seen.generations += 1;
                    }
                }
                Ok(Event::Delete(pod)) => {
                    here.remove(&pod.uid().unwrap());
                    complete &= !here.is_empty();
                }
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
    mixtures
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_from_before_full_recreate_was_set_take_nothing() {
    let world = World::new(cluster_or_skip!(), "baseline").await;
    let mut controller = world.controller();
    world
        .apply(service("llm", 1, group("ReplaceUnhealthy")))
        .await;
    world.until_ready("llm").await;
    let pods = world.pods_of("p").await;
    let restart = async |nth: usize, restarts: i32| {
        let restarted = status(true, &json!({"running": {}}), restarts);
        let name = pods[nth].name_any();
        set_status(&world.client, &world.namespace, &name, &restarted)
            .await
            .unwrap();
    };
    restart(1, 2).await;
    world.apply(service("llm", 1, group("FullRecreate"))).await;
    world
        .until("the PodSet takes the policy", || async {
            let set = world.all(&world.pod_sets()).await.pop()?;
            let noted = set
                .annotations()
                .contains_key("control.kvtide.io/restarts-before");
            (set.spec.recovery_policy?.recreates_all() && noted).then_some(())
        })
        .await;
    world.until_quiet().await;
    assert_eq!(uids(&world.pods_of("p").await), uids(&pods));
    controller.kill();
    let _again = world.controller();
    world.until_ready("llm").await;
    world.until_quiet().await;
    assert_eq!(
        uids(&world.pods_of("p").await),
        uids(&pods),
        "it was noted where it lasts"
    );
    restart(1, 3).await;
    until_recovered(&world, &uids(&pods), 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovery_is_given_up_when_it_does_not_help() {
    let world = World::new(cluster_or_skip!(), "giveup").await;
    let _controller = world.controller_with(&[
        "--leader-elect=false",
        "--recovery-backoff-seconds=1",
        "--recovery-backoff-max-seconds=2",
    ]);
    let crashing = json!([role_with("p", 1, "crash", json!({"podGroupSize": 2}))]);
    world.apply(service("llm", 1, crashing)).await;
    world
        .until("the PodSet has failed", || async {
            let set = world.all(&world.pod_sets()).await.pop()?;
            (set.status?.phase == Some(PodSetPhase::Failed)).then_some(())
        })
        .await;
    world.until_quiet().await;
    let events = world.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
    assert!(events.contains("RecoveryGivenUp"), "{events}");
    // A template that works is all it takes.
    world
        .apply(service(
            "llm",
            1,
            json!([role_with("p", 1, "a", json!({"podGroupSize": 2}))]),
        ))
        .await;
    world.until_ready("llm").await;
}

fn node(ready: bool, out_of_service: bool) -> Value {
    let taint = json!({"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"});
    let taints = if out_of_service {
        vec![taint]
    } else {
        Vec::new()
    };
    let ready = if ready { "True" } else { "False" };
    json!({"spec": {"taints": taints}, "status": {"conditions": [{
        "type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_a_lost_node_are_forced_only_when_it_is_out_of_service() {
    let world = World::new(cluster_or_skip!(), "node").await;
    let nodes: Api<Node> = Api::all(world.client.clone());
    let metadata = ObjectMeta {
        name: Some(LOST_NODE.into()),
        ..ObjectMeta::default()
    };
    let object = Node {
        metadata,
        ..Node::default()
    };
    nodes.create(&PostParams::default(), &object).await.unwrap();
    let set = async |ready: bool, out_of_service: bool| {
        let (patch, params) = (node(ready, out_of_service), PatchParams::default());
        nodes
            .patch(LOST_NODE, &params, &Patch::Merge(&patch))
            .await
            .unwrap();
        nodes
            .patch_status(LOST_NODE, &params, &Patch::Merge(&patch))
            .await
            .unwrap();
    };
    set(true, false).await;
    let _controller = world.controller();
    let fields = json!({"podGroupSize": 3, "recoveryPolicy": "ReplaceUnhealthy"});
    world
        .apply(service(
            "llm",
            1,
            json!([role_with("p", 1, "on-lost-node", fields)]),
        ))
        .await;
    world.until_ready("llm").await;
    let before = world.pods_of("p").await;
    set(false, false).await;
    world
        .until("they are asked to go", || async {
            world.pods_of("p").await.is_empty().then_some(())
        })
        .await;
    world.until_quiet().await;
    let stuck = uids(&world.all(&world.pods()).await);
    assert_eq!(
        stuck,
        uids(&before),
        "nobody confirmed their end, so they are not replaced"
    );
    set(true, true).await;
    until_recovered(&world, &stuck, 0).await;
    nodes
        .delete(LOST_NODE, &DeleteParams::default())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_init_container_that_is_tried_again_takes_no_group_with_it() {
    let world = World::new(cluster_or_skip!(), "initretry").await;
    let _controller = world.controller();
    let mut roles = group("FullRecreate");
    roles[0]["template"]["spec"]["initContainers"] = json!([{"name": "first", "image": "i"}]);
    world.apply(service("llm", 1, roles)).await;
    world.until_ready("llm").await;
    let before = world.pods_of("p").await;
    let name = before[0].name_any();
    let mut retried = status(true, &json!({"running": {}}), 0);
    retried["initContainerStatuses"] = json!([{
        "name": "first", "image": "i", "imageID": "i", "ready": true, "restartCount": 2,
        "state": {"terminated": {"exitCode": 0}},
    }]);
    set_status(&world.client, &world.namespace, &name, &retried)
        .await
        .unwrap();
    world.until_quiet().await;
    assert_eq!(uids(&world.pods_of("p").await), uids(&before));
    // A container that restarts does.
    let restarted = status(true, &json!({"running": {}}), 1);
    set_status(&world.client, &world.namespace, &name, &restarted)
        .await
        .unwrap();
    until_recovered(&world, &uids(&before), 0).await;
}
