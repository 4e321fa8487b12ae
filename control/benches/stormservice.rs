//! One StormService of 500 RoleSets with two pods each, on a real API server with a fake kubelet
//! without latency: how long until all are ready, how long until none is left, how many requests
//! that took (counted in the API server's audit log, events included), and what the controller costs.
//!
//! `make bench-kube` runs it, prints the figures and writes them as JSON where
//! `KVTIDE_BENCH_OUTPUT` says.

#![expect(clippy::unwrap_used, reason = "a failed step ends the benchmark")]
#![expect(clippy::print_stdout, reason = "the figures are the output")]
#![expect(dead_code, reason = "the tests use more of these modules")]

#[path = "../tests/kube/cluster.rs"]
mod cluster;
#[path = "../tests/kube/kubelet.rs"]
mod kubelet;
#[path = "../tests/kube/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use world::{Controller, World, role, role_with, service};

const ROLE_SETS: i32 = 500;
const PODS: f64 = 1000.0;
/// How long nothing is changed while writes and CPU time are counted.
const IDLE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() {
    // `cargo test --benches` only asks whether it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let Some(cluster) = cluster::cluster() else {
        return;
    };
    let plain = json!([role("worker", 2, "i")]);
    let mut gang = role_with("worker", 1, "i", json!({"podGroupSize": 2}));
    gang["schedulingStrategy"] = json!({"coschedulingSchedulingStrategy": {}});
    cluster.kubectl(&["apply", "-f", &pod_group_crd(cluster)]);
    let crd = "crd/podgroups.scheduling.x-k8s.io";
    cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", crd]);
    let mut results = BTreeMap::new();
    results.insert("plain", measure(cluster, "plain", plain).await);
    results.insert("groups", measure(cluster, "groups", json!([gang])).await);
    let results = json!(results);
    println!("{}", serde_json::to_string_pretty(&results).unwrap());
    if let Some(path) = std::env::var_os("KVTIDE_BENCH_OUTPUT") {
        std::fs::write(path, serde_json::to_string_pretty(&results).unwrap()).unwrap();
    }
}

/// A kind PodGroup that takes anything: the scheduler behind it is not measured.
fn pod_group_crd(cluster: &cluster::Cluster) -> String {
    let path = cluster.home().join("podgroup.json");
    std::fs::write(
        &path,
        world::pod_group_crd("scheduling.x-k8s.io", "v1alpha1").to_string(),
    )
    .unwrap();
    path.display().to_string()
}

async fn measure(cluster: &'static cluster::Cluster, name: &str, roles: Value) -> Value {
    let world = World::new(cluster, name).await;
    let controller = Controller::start(
        cluster,
        Some(&world.namespace),
        &["--leader-elect=false", "--log=info"],
    );
    world
        .until("the controller is ready", || async {
            controller
                .page("/readyz")
                .await?
                .contains("200 OK")
                .then_some(())
        })
        .await;
    let before = requests(&world);
    let began = Instant::now();
    world.apply(service("llm", ROLE_SETS, roles)).await;
    until_replicas(&world, ROLE_SETS).await;
    let ready = began.elapsed();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let create_requests = requests(&world) - before;

    let (cpu, writes) = (cpu_seconds(controller.pid()), self::writes(&world));
    tokio::time::sleep(IDLE).await;
    let idle_cpu = (cpu_seconds(controller.pid()) - cpu) / IDLE.as_secs_f64();
    let idle_writes = self::writes(&world) - writes;
    let rss_mib = peak_rss_mib(controller.pid());

    let before = requests(&world);
    let began = Instant::now();
    world.kubectl(&["delete", "stormservice", "llm", "--wait=false"]);
    world
        .until("all is gone", || async {
            world
                .services()
                .get_opt("llm")
                .await
                .ok()?
                .is_none()
                .then_some(())
        })
        .await;
    let deleted = began.elapsed();
    assert_eq!(world.all(&world.pods()).await.len(), 0);
    assert_eq!(world.all(&world.role_sets()).await.len(), 0);
    let delete_requests = requests(&world) - before;
    let per_pod = |requests: usize| f64::from(u32::try_from(requests).unwrap()) / PODS;
    json!({
        "all_ready_s": ready.as_secs_f64(),
        "all_deleted_s": deleted.as_secs_f64(),
        "create_requests_per_pod": per_pod(create_requests),
        "delete_requests_per_pod": per_pod(delete_requests),
        "idle_writes_per_minute": idle_writes,
        "idle_cpu_of_a_core": idle_cpu,
        "peak_rss_mib": rss_mib,
    })
}

async fn until_replicas(world: &World, wanted: i32) {
    world
        .until("all RoleSets are ready", || async {
            let status = world.services().get("llm").await.ok()?.status?;
            let ready = world::condition(&status.conditions, "Ready") == Some(true);
            (ready && status.ready_replicas == wanted).then_some(())
        })
        .await;
}

/// Requests of the controller in a namespace, by the API server's own account.
fn audited(world: &World, counts: impl Fn(&str) -> bool) -> usize {
    let audit = std::fs::read_to_string(world.cluster.home().join("audit.log")).unwrap();
    let here = format!("\"namespace\":\"{}\"", world.namespace);
    audit
        .lines()
        .filter(|line| line.contains(&here) && line.contains("kvtide-system:kvtide-control"))
        .filter(|line| counts(line))
        .count()
}

fn requests(world: &World) -> usize {
    audited(world, |_| true)
}

fn writes(world: &World) -> usize {
    let reads = [
        "\"verb\":\"get\"",
        "\"verb\":\"list\"",
        "\"verb\":\"watch\"",
    ];
    audited(world, |line| !reads.iter().any(|read| line.contains(read)))
}

/// User and system time of a process.
fn cpu_seconds(pid: u32) -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / TICKS_PER_SECOND
}

fn peak_rss_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}
