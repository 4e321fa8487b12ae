//! Taking over what AIBrix v0.5.0 made. Its objects are rebuilt here after its source: names,
//! labels, finalizers and the JSON of its Go types; its hashes stand for themselves, for nobody else
//! can compute them.

use kube::ResourceExt;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{World, role, role_with, service, uids};

async fn create(world: &World, object: Value) -> DynamicObject {
    let api_version = object["apiVersion"].as_str().unwrap().to_owned();
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    let kind = object["kind"].as_str().unwrap();
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    let api: Api<DynamicObject> =
        Api::namespaced_with(world.client.clone(), &world.namespace, &resource);
    let status = object.get("status").cloned();
    let object: DynamicObject = serde_json::from_value(object).unwrap();
    let made = api.create(&PostParams::default(), &object).await.unwrap();
    if let Some(status) = status {
        let patch = json!({"status": status});
        let params = PatchParams::default();
        api.patch_status(&made.name_any(), &params, &Patch::Merge(&patch))
            .await
            .unwrap();
    }
    made
}

fn owner(object: &DynamicObject) -> Value {
    let types = object.types.clone().unwrap();
    json!([{
        "apiVersion": types.api_version, "kind": types.kind, "name": object.name_any(),
        "uid": object.uid(), "controller": true, "blockOwnerDeletion": true,
    }])
}

/// The roles as Go writes them: null timestamps, empty objects, canonical quantities.
fn go_roles(image: &str) -> Value {
    let template = json!({"metadata": {"creationTimestamp": null}, "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": image, "resources": {}}],
    }});
    json!([
        {"name": "decode", "replicas": 2, "template": template, "updateStrategy": {},
            "disruptionTolerance": {}},
        {"name": "prefill", "replicas": 1, "podGroupSize": 2, "stateful": true,
            "template": template, "updateStrategy": {}, "disruptionTolerance": {}},
    ])
}

fn our_roles(image: &str) -> Value {
    json!([
        role("decode", 2, image),
        role_with(
            "prefill",
            1,
            image,
            json!({"podGroupSize": 2, "stateful": true})
        ),
    ])
}

const SET: &str = "llm-roleset-x7k2p";
const DECODE_HASH: &str = "5d8f9c6b47";
const PREFILL_HASH: &str = "7c4d8bbf9f";
const REVISION: &str = "llm-69df6b87d8";

/// What AIBrix leaves behind: everything is complete and ready.
async fn leave_behind(world: &World) {
    let mut written = service("llm", 1, our_roles("a"));
    written["metadata"]["finalizers"] = json!(["orchestration.aibrix.ai/stormservice-finalizer"]);
    written["status"] = json!({
        "replicas": 1, "readyReplicas": 1, "currentReplicas": 1, "updatedReplicas": 1,
        "updatedReadyReplicas": 1, "currentRevision": REVISION, "updateRevision": REVISION,
        "collisionCount": 0, "scalingTargetSelector": "storm-service-name=llm",
        "conditions": [{"type": "Ready", "status": "True", "reason": "Ready"}],
    });
    let llm = create(world, written).await;
    let template = json!({
        "$patch": "replace",
        "metadata": {"creationTimestamp": null, "labels": {"app": "llm"}},
        "spec": {"roles": go_roles("a"), "updateStrategy": "Sequential"},
    });
    create(
        world,
        json!({
            "apiVersion": "apps/v1", "kind": "ControllerRevision",
            "metadata": {"name": REVISION, "ownerReferences": owner(&llm), "labels":
                {"name": "llm", "controller.kubernetes.io/hash": "69df6b87d8"}},
            "data": {"spec": {"template": template}}, "revision": 1,
        }),
    )
    .await;
    create(
        world,
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "llm", "ownerReferences": owner(&llm)},
            "spec": {"type": "ClusterIP", "clusterIP": "None", "publishNotReadyAddresses": true,
                "selector": {"storm-service-name": "llm"}},
        }),
    )
    .await;
    let ready = |name: &str, count: i32| {
        json!({"name": name, "replicas": count, "readyReplicas": count, "updatedReplicas": count,
            "updatedReadyReplicas": count})
    };
    let set = create(world, json!({
        "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "RoleSet",
        "metadata": {"name": SET, "ownerReferences": owner(&llm),
            "finalizers": ["orchestration.aibrix.ai/roleset-finalizer"],
            "labels": {"app": "llm", "storm-service-name": "llm", "storm-service-revision": REVISION},
            "annotations": {"stormservice.orchestration.aibrix.ai/revision": REVISION}},
        "spec": {"roles": go_roles("a"), "updateStrategy": "Sequential"},
        "status": {"roles": [ready("decode", 2), ready("prefill", 1)],
            "conditions": [{"type": "Ready", "status": "True", "reason": "roleset is ready"}]},
    }))
    .await;
    let index = "stormservice.orchestration.aibrix.ai/role-replica-index";
    for suffix in ["4qz8w", "n7xkd"] {
        pod(
            world,
            &format!("{SET}-decode-{suffix}"),
            &set,
            json!({
                "roleset-name": SET, "role-name": "decode", "role-template-hash": DECODE_HASH,
                "storm-service-name": "llm",
            }),
        )
        .await;
    }
    let name = format!("{SET}-prefill-{PREFILL_HASH}-0");
    let labels = json!({
        "roleset-name": SET, "role-name": "prefill", "role-template-hash": PREFILL_HASH,
        "storm-service-name": "llm", index: "0",
    });
    let group = create(world, json!({
        "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "PodSet",
        "metadata": {"name": name, "ownerReferences": owner(&set), "labels": labels,
            "finalizers": ["orchestration.aibrix.ai/podset-finalizer"], "annotations": {index: "0"}},
        "spec": {"podGroupSize": 2, "stateful": true, "recoveryPolicy": "ReplaceUnhealthy",
            "template": go_roles("a")[1]["template"]},
        "status": {"readyPods": 2, "totalPods": 2, "phase": "Ready"},
    }))
    .await;
    for at in ["0", "1"] {
        let mut labels = labels.clone();
        labels["stormservice.orchestration.aibrix.ai/podset-name"] = json!(name);
        labels["stormservice.orchestration.aibrix.ai/pod-group-index"] = json!(at);
        pod(world, &format!("{name}-{at}"), &group, labels).await;
    }
}

async fn pod(world: &World, name: &str, of: &DynamicObject, labels: Value) {
    create(world, json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": labels, "ownerReferences": owner(of)},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "a"}]},
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_aibrix_made_is_taken_over_without_touching_a_pod() {
    let world = World::new(cluster_or_skip!(), "adopt").await;
    leave_behind(&world).await;
    world
        .until("AIBrix's pods run", || async {
            let pods = world.all(&world.pods()).await;
            let running = pods.iter().filter(|pod| {
                pod.status
                    .as_ref()
                    .and_then(|status| status.phase.as_deref())
                    == Some("Running")
            });
            (running.count() == 4).then_some(())
        })
        .await;
    let pods = uids(&world.all(&world.pods()).await);
    let _controller = world.controller();
    world.until_ready("llm").await;
    world.until_quiet().await;
    assert_eq!(
        uids(&world.all(&world.pods()).await),
        pods,
        "no pod was touched"
    );
    let status = world.services().get("llm").await.unwrap().status.unwrap();
    assert_eq!(
        status.update_revision, REVISION,
        "its revision is recognised"
    );

    // What is replaced or added later looks like the rest.
    let doomed = world.pods_of("decode").await[0].name_any();
    world.kubectl(&["delete", "pod", &doomed, "--wait=false"]);
    world.kubectl(&["scale", "stormservice/llm", "--replicas=2"]);
    world
        .until("eight pods are there", || async {
            let pods = world.all(&world.pods()).await;
            (pods.len() == 8 && !pods.iter().any(|pod| pod.name_any() == doomed)).then_some(())
        })
        .await;
    world.until_ready("llm").await;
    let hashes: Vec<String> = world
        .pods_of("decode")
        .await
        .iter()
        .filter(|pod| pod.labels()["roleset-name"] == SET)
        .map(|pod| pod.labels()["role-template-hash"].clone())
        .collect();
    assert_eq!(hashes, [DECODE_HASH, DECODE_HASH]);

    // And a change reaches all of it.
    world.apply(service("llm", 2, our_roles("b"))).await;
    world.until_ready("llm").await;
    for pod in world.all(&world.pods()).await {
        assert_eq!(pod.spec.unwrap().containers[0].image.as_deref(), Some("b"));
    }
}
