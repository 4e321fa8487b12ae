//! The manifests under `control/deploy/examples`.

use serde::Deserialize;
use serde_json::Value;

use crate::cluster_or_skip;
use crate::world::World;

fn example(name: &str) -> (String, Vec<Value>) {
    let path = format!("{}/deploy/examples/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap();
    let documents = serde_norway::Deserializer::from_str(&text);
    let objects = documents.map(|document| Value::deserialize(document).unwrap());
    (path.clone(), objects.collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_with_vllm_becomes_ready_and_its_pods_have_room_for_the_pool() {
    let world = World::new(cluster_or_skip!(), "vllm").await;
    let _controller = world.controller();
    let (path, objects) = example("stormservice-vllm.yaml");
    world.kubectl(&["apply", "-f", &path]);
    world.until_ready("llm").await;
    let pods = world.kubectl(&["get", "pods", "-l", "storm-service-name=llm", "-o", "json"]);
    let pods: Value = serde_json::from_str(&pods).unwrap();
    let spec = &pods["items"][0]["spec"];
    let container = &spec["containers"][0];
    let gib = |quantity: &Value| -> u32 {
        let text = quantity.as_str().unwrap();
        text.strip_suffix("Gi").unwrap().parse().unwrap()
    };
    let command = container["args"].as_array().unwrap();
    let transfer = command.iter().filter_map(Value::as_str);
    let mut transfer = transfer.filter_map(|text| serde_json::from_str::<Value>(text).ok());
    let transfer = transfer
        .find(|parsed| parsed["kv_connector"].is_string())
        .unwrap();
    assert_eq!(transfer["kv_connector_module_path"], "kvtide.vllm");
    let pool = transfer["kv_connector_extra_config"]["host_capacity_gb"]
        .as_u64()
        .unwrap();
    let volumes = spec["volumes"].as_array().unwrap();
    let shared = volumes
        .iter()
        .find(|volume| volume["emptyDir"]["medium"] == "Memory")
        .unwrap();
    let mounts = container["volumeMounts"].as_array().unwrap();
    let mount = mounts
        .iter()
        .find(|mount| mount["mountPath"] == "/dev/shm")
        .unwrap();
    assert_eq!(mount["name"], shared["name"]);
    let size = gib(&shared["emptyDir"]["sizeLimit"]);
    assert!(u64::from(size) > pool, "vLLM uses /dev/shm as well");
    assert!(
        gib(&container["resources"]["limits"]["memory"]) > size,
        "it counts for the pod"
    );
    // Clients find the engines by the Service beside it.
    let service = objects
        .iter()
        .find(|object| object["kind"] == "Service")
        .unwrap();
    let labels = &pods["items"][0]["metadata"]["labels"];
    for (label, value) in service["spec"]["selector"].as_object().unwrap() {
        assert_eq!(&labels[label], value, "{label}");
    }
    world.kubectl(&["delete", "-f", &path, "--timeout=80s"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manifest_of_the_batch_server_is_taken_and_names_flags_that_there_are() {
    let world = World::new(cluster_or_skip!(), "batch").await;
    let (path, objects) = example("batch.yaml");
    world.kubectl(&["apply", "--dry-run=server", "-f", &path]);
    let server = objects
        .iter()
        .find(|object| object["kind"] == "StatefulSet")
        .unwrap();
    let container = &server["spec"]["template"]["spec"]["containers"][0];
    let arguments = container["args"].as_array().unwrap().iter();
    let arguments: Vec<&str> = arguments.filter_map(Value::as_str).collect();
    assert_eq!(arguments[0], "batch");
    let (_, help) = world.cluster.kvtide_control(&["batch", "--help"]);
    for argument in &arguments[1..] {
        let flag = argument.split('=').next().unwrap();
        assert!(help.contains(flag), "{flag}");
    }
    let value = |flag: &str| {
        let mut all = arguments.iter();
        all.find_map(|argument| argument.strip_prefix(&format!("--{flag}=")))
            .unwrap()
    };
    let mounts = container["volumeMounts"].as_array().unwrap();
    let is_mounted = |path: &str| {
        let mut mounts = mounts
            .iter()
            .filter_map(|mount| mount["mountPath"].as_str());
        mounts.any(|mount| path.starts_with(mount))
    };
    assert!(is_mounted(value("data")) && is_mounted(value("keys")));
    // The upstream is the Service of the other example.
    let (_, others) = example("stormservice-vllm.yaml");
    let engines = others
        .iter()
        .find(|object| object["kind"] == "Service")
        .unwrap();
    let (name, port) = (
        &engines["metadata"]["name"],
        &engines["spec"]["ports"][0]["port"],
    );
    let expected = format!("http://{}:{port}", name.as_str().unwrap());
    assert_eq!(value("upstream"), expected);
}
