//! Taking over what AIBrix v0.5.0 made: `recorded/README.md` says how the objects were recorded.

use kube::ResourceExt;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{World, uids};

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

/// The manifest with another image and number of RoleSets.
fn manifest(image: &str, replicas: i32) -> Value {
    let text =
        include_str!("recorded/manifest.yaml").replace("image: a", &format!("image: {image}"));
    let mut manifest: Value = serde_norway::from_str(&text).unwrap();
    manifest["spec"]["replicas"] = json!(replicas);
    manifest
}

fn recorded() -> Vec<Value> {
    serde_json::from_str(include_str!("recorded/aibrix-v0.5.0.json")).unwrap()
}

/// An object under another name, with all that names it.
fn renamed(object: &Value, changes: &[(&str, &str)]) -> Value {
    let mut text = object.to_string();
    for (from, to) in changes {
        text = text.replace(from, to);
    }
    serde_json::from_str(&text).unwrap()
}

/// What was recorded, as two RoleSets with two replicas of each role. In the second, AIBrix was stopped
/// before it had made all pods of decode and counted any.
fn two_sets() -> Vec<Value> {
    const FIRST: &str = "llm-roleset-x7k2p";
    const SECOND: &str = "llm-roleset-b4n8q";
    let mut all = recorded();
    let kind = |object: &Value| object["kind"].as_str().unwrap().to_owned();
    all[0]["spec"]["replicas"] = json!(2);
    for object in &mut all {
        for roles in [
            "/spec/template/spec/roles/1",
            "/spec/roles/1",
            "/status/roles/1",
        ] {
            if let Some(role) = object.pointer_mut(roles) {
                for (field, count) in role.as_object_mut().unwrap() {
                    if field.to_lowercase().ends_with("replicas") {
                        *count = json!(2);
                    }
                }
            }
        }
    }
    let index = r#""name":"ROLE_REPLICA_INDEX","value":"#;
    let group = all.iter().find(|object| kind(object) == "PodSet").unwrap();
    let group = group["metadata"]["name"].as_str().unwrap().to_owned();
    let next = format!("{}1", group.strip_suffix('0').unwrap());
    let changes = [
        (group.as_str(), next.as_str()),
        (&format!(r#"{index}"0""#), &format!(r#"{index}"1""#)),
    ];
    let second: Vec<Value> = all
        .iter()
        .filter(|object| {
            object["metadata"]["name"]
                .as_str()
                .unwrap()
                .starts_with(&group)
        })
        .map(|object| renamed(object, &changes))
        .map(|mut object| {
            let key = "stormservice.orchestration.aibrix.ai/role-replica-index";
            object["metadata"]["labels"][key] = json!("1");
            object["metadata"]["annotations"][key] = json!("1");
            object
        })
        .collect();
    all.extend(second);
    let of_set = |object: &&Value| {
        let name = object["metadata"]["name"].as_str().unwrap();
        name.starts_with(FIRST)
    };
    let mut other: Vec<Value> = all.iter().filter(of_set).cloned().collect();
    let missing = other.iter().position(|object| {
        object["metadata"]["labels"]["role-name"] == "decode" && kind(object) == "Pod"
    });
    other.remove(missing.unwrap());
    other[0]["status"] = json!({"roles": [{"name": "decode", "replicas": 0},
        {"name": "prefill", "replicas": 0}]});
    all.extend(
        other
            .iter()
            .map(|object| renamed(object, &[(FIRST, SECOND)])),
    );
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_role_sets_of_aibrix_are_taken_over_and_completed() {
    let world = World::new(cluster_or_skip!(), "adoptmore").await;
    let made = leave_behind(&world, two_sets()).await;
    let pods = uids(&world.all(&world.pods()).await);
    assert_eq!((pods.len(), named(&made, "RoleSet").len()), (11, 2));
    let _controller = world.controller();
    world.until_ready("llm").await;
    world.until_quiet().await;
    let now = uids(&world.all(&world.pods()).await);
    assert_eq!(now.len(), 12, "what was missing is made");
    assert!(pods.iter().all(|uid| now.contains(uid)), "nothing else is");
    let hash = &named(&made, "Pod")[0].labels()["role-template-hash"];
    for pod in world.pods_of("decode").await {
        assert_eq!(&pod.labels()["role-template-hash"], hash);
    }
    for group in world.all(&world.pod_sets()).await {
        let made = named(&made, "PodSet");
        assert!(made.iter().any(|other| other.uid() == group.uid()));
    }
}

/// What AIBrix leaves behind: everything is complete and ready. Owners get the uids that they have
/// here.
async fn leave_behind(world: &World, recorded: Vec<Value>) -> Vec<DynamicObject> {
    let mut made: Vec<DynamicObject> = Vec::new();
    for mut object in recorded {
        if let Some(owner) = object.pointer_mut("/metadata/ownerReferences/0") {
            let is_owner = |made: &&DynamicObject| {
                let kind = made.types.as_ref().map(|types| types.kind.as_str());
                owner["name"] == made.name_any() && owner["kind"].as_str() == kind
            };
            owner["uid"] = json!(made.iter().find(is_owner).unwrap().uid());
        }
        made.push(create(world, object).await);
    }
    made
}

fn named<'a>(made: &'a [DynamicObject], kind: &str) -> Vec<&'a DynamicObject> {
    let of_kind = |object: &&DynamicObject| {
        let types = object.types.as_ref();
        types.is_some_and(|types| types.kind == kind)
    };
    made.iter().filter(of_kind).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_aibrix_made_is_taken_over_without_touching_a_pod() {
    let world = World::new(cluster_or_skip!(), "adopt").await;
    let made = leave_behind(&world, recorded()).await;
    let revision = named(&made, "ControllerRevision")[0].name_any();
    let set = named(&made, "RoleSet")[0].name_any();
    let decode_hash = named(&made, "Pod")[0].labels()["role-template-hash"].clone();
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
        status.update_revision, revision,
        "its revision is recognised"
    );

    // The same manifest once more brings back what Go left out, and still means the same.
    world.apply(manifest("a", 1)).await;
    let stored = world.services().get("llm").await.unwrap();
    let stored = serde_json::to_value(stored.spec).unwrap();
    let container = "/template/spec/roles/0/template/spec/containers/0";
    assert_eq!(
        stored.pointer(&format!("{container}/tty")),
        Some(&json!(false))
    );
    world.until_ready("llm").await;
    world.until_quiet().await;
    assert_eq!(
        uids(&world.all(&world.pods()).await),
        pods,
        "no pod was touched"
    );
    let status = world.services().get("llm").await.unwrap().status.unwrap();
    assert_eq!(status.update_revision, revision, "no revision was minted");

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
        .filter(|pod| pod.labels()["roleset-name"] == set)
        .map(|pod| pod.labels()["role-template-hash"].clone())
        .collect();
    assert_eq!(hashes, [decode_hash.clone(), decode_hash]);

    // And a change reaches all of it.
    world.apply(manifest("b", 2)).await;
    world.until_ready("llm").await;
    for pod in world.all(&world.pods()).await {
        assert_eq!(pod.spec.unwrap().containers[0].image.as_deref(), Some("b"));
    }
}
