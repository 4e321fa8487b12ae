//! The manifests of `kvtide serve` (`control/deploy/serve`): the API server takes them as they are
//! written, and Pod Security says what their pods need.

use std::fs;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::cluster_or_skip;
use crate::world::World;

const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/serve/daemonset.yaml");

fn objects() -> Vec<Value> {
    let text = fs::read_to_string(MANIFEST).unwrap();
    let documents = serde_norway::Deserializer::from_str(&text);
    documents
        .map(|document| Value::deserialize(document).unwrap())
        .collect()
}

fn daemon_set() -> Value {
    let mut objects = objects().into_iter();
    objects
        .find(|object| object["kind"] == "DaemonSet")
        .unwrap()
}

/// Whether `found` has everything that `written` says; the API server adds defaults.
fn says(found: &Value, written: &Value) -> bool {
    match (found, written) {
        (Value::Object(found), Value::Object(written)) => written
            .iter()
            .all(|(key, value)| found.get(key).is_some_and(|found| says(found, value))),
        (Value::Array(found), Value::Array(written)) => {
            found.len() == written.len()
                && found
                    .iter()
                    .zip(written)
                    .all(|(found, value)| says(found, value))
        }
        _ => found == written,
    }
}

/// The pod that the controller of DaemonSets makes of a template.
fn pod(template: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "kvtide-node-1", "labels": template["metadata"]["labels"]},
        "spec": template["spec"],
    })
}

/// Asks for a pod in a namespace with this level of the Pod Security Standards; why it is refused.
fn refused(cluster: &Cluster, level: &str, pod: &Value) -> Option<String> {
    let namespace = format!("kvtide-serve-{level}");
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("object.json");
    let labels = json!({"pod-security.kubernetes.io/enforce": level});
    let metadata = json!({"name": namespace, "labels": labels});
    let made = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
    let file = path.display().to_string();
    fs::write(&path, made.to_string()).unwrap();
    cluster.kubectl(&["apply", "-f", &file]);
    fs::write(&path, pod.to_string()).unwrap();
    cluster.kubectl_refused(&["-n", &namespace, "create", "--dry-run=server", "-f", &file])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_server_takes_the_daemon_as_it_is_written() {
    let world = World::new(cluster_or_skip!(), "serve").await;
    let cluster = world.cluster;
    let said = cluster.kubectl_warnings(&["apply", "-f", MANIFEST]);
    assert_eq!(said, "", "the API server warns of something");
    for written in objects() {
        let (kind, name) = (&written["kind"], &written["metadata"]["name"]);
        let object = format!("{}/{}", kind.as_str().unwrap(), name.as_str().unwrap());
        let found = cluster.kubectl(&["-n", "kvtide-serve", "get", &object, "-o", "json"]);
        let found: Value = serde_json::from_str(&found).unwrap();
        assert!(says(&found, &written), "{object}: {found:#}");
    }
    let again = cluster.kubectl(&["apply", "-f", MANIFEST]);
    let unchanged = again.lines().all(|line| line.ends_with(" unchanged"));
    assert!(unchanged, "{again}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_daemons_pods_need_beyond_restricted_is_their_directory_on_the_node_alone() {
    let world = World::new(cluster_or_skip!(), "serve-security").await;
    let cluster = world.cluster;
    let template = daemon_set()["spec"]["template"].clone();
    assert_eq!(refused(cluster, "privileged", &pod(&template)), None);
    let why = refused(cluster, "baseline", &pod(&template)).unwrap();
    assert!(
        why.contains("hostPath volumes (volume \"socket\")"),
        "{why}"
    );
    let reasons = why.split("violates PodSecurity").nth(1).unwrap();
    assert_eq!(
        reasons.matches(" volumes ").count(),
        1,
        "nothing else: {why}"
    );
    assert!(
        !reasons.contains("privileged") && !reasons.contains("host namespaces"),
        "{why}"
    );

    // Without it, and without the container that gives it to the daemon's user, it is as restricted as a
    // pod can be.
    let mut restricted = template;
    let spec = &mut restricted["spec"];
    spec["initContainers"] = json!([]);
    for volume in spec["volumes"].as_array_mut().unwrap() {
        if volume["name"] == "socket" {
            *volume = json!({"name": "socket", "emptyDir": {}});
        }
    }
    assert_eq!(refused(cluster, "restricted", &pod(&restricted)), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engines_pod_needs_the_same_for_the_daemons_socket() {
    let world = World::new(cluster_or_skip!(), "serve-engine").await;
    // As the manifest's comment says.
    let text = fs::read_to_string(MANIFEST).unwrap();
    let lines = text.lines().map_while(|line| line.strip_prefix('#'));
    let example = lines.skip_while(|line| !line.contains("spec:"));
    let example: Vec<&str> = example.take_while(|line| !line.trim().is_empty()).collect();
    let mut engine: Value = serde_norway::from_str(&example.join("\n")).unwrap();
    let container = &mut engine["spec"]["containers"][0];
    container["name"] = json!("vllm");
    container["image"] = json!("vllm/vllm-openai");
    let pod = pod(&engine);
    assert_eq!(refused(world.cluster, "privileged", &pod), None);
    let why = refused(world.cluster, "baseline", &pod).unwrap();
    assert!(
        why.contains("hostPath volumes (volume \"kvtide\")"),
        "{why}"
    );
}
