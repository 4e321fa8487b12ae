//! `kvtide-control check` and `kvtide-control uninstall`, and what `kubectl delete -k` does in its stead.

use std::panic::AssertUnwindSafe;
use std::path::Path;

use futures::FutureExt;
use serde_json::json;

use crate::cluster::{CRDS, Cluster, free_port};
use crate::cluster_or_skip;
use crate::world::{Controller, World, role, role_with, service, uids};

/// A world alone with a controller that leads, and a StormService that is ready: the only one. Other
/// tests leave theirs, with nobody who confirms that their pods ended.
async fn installed(cluster: &'static Cluster, name: &str) -> (World, Controller) {
    let world = World::alone(cluster, name).await;
    let controller = Controller::start(cluster, None, &["--lease-seconds=10"]);
    let kinds = "stormservices,rolesets,podsets";
    let everything = ["delete", kinds, "--all", "--all-namespaces", "--wait=false"];
    cluster.kubectl(&everything);
    let pods = [
        "delete",
        "pods",
        "--all",
        "--all-namespaces",
        "--wait=false",
    ];
    let by_force = ["--grace-period=0", "--force"];
    world
        .until("what others left is gone", || async {
            cluster.kubectl(&[&pods[..], &by_force[..]].concat());
            let left = cluster.kubectl(&["get", kinds, "--all-namespaces", "-o", "name"]);
            left.trim().is_empty().then_some(())
        })
        .await;
    let group = role_with("p", 1, "i", json!({"podGroupSize": 2}));
    let roles = json!([role("a", 2, "i"), group]);
    world.apply(service("llm", 2, roles)).await;
    world.until_ready("llm").await;
    (world, controller)
}

/// Deletes the CRDs as in an installation from before there was the policy: they hang for as long as no
/// controller takes the finalizers off.
async fn delete_definitions(world: &World) {
    let policy = "validatingadmissionpolicybinding";
    world
        .cluster
        .kubectl(&["delete", policy, "kvtide-control-crds"]);
    for crd in CRDS {
        world
            .until("the API server takes the deletion", || async {
                let refused = world
                    .cluster
                    .kubectl_refused(&["delete", crd, "--wait=false"]);
                refused.is_none().then_some(())
            })
            .await;
    }
}

fn expect_nothing(world: &World) {
    let cluster = world.cluster;
    let others = [
        "clusterrole/kvtide-control",
        "clusterrolebinding/kvtide-control",
        "validatingadmissionpolicy/kvtide-control-crds",
        "validatingwebhookconfiguration/kvtide-control",
    ];
    for object in CRDS.into_iter().chain(others) {
        let said = cluster.kubectl_fails(&["get", object]);
        assert!(said.contains("NotFound"), "{said}");
    }
    let system = "deployments,services,secrets,leases,roles,rolebindings";
    let left = cluster.kubectl(&["-n", "kvtide-system", "get", system, "-o", "name"]);
    assert_eq!(left.trim(), "");
    // Nothing of the StormService is left either.
    let kinds = "pods,services,controllerrevisions";
    assert_eq!(world.kubectl(&["get", kinds, "-o", "name"]).trim(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uninstall_refuses_while_services_exist_and_then_leaves_nothing() {
    let (world, controller) = installed(cluster_or_skip!(), "uninstall").await;
    let before = uids(&world.all(&world.pods()).await);
    let (done, said) = world.cluster.kvtide_control(&["uninstall"]);
    assert!(!done, "{said}");
    let named = format!("StormService {}/llm", world.namespace);
    assert!(
        said.contains(&named) && said.contains("--delete-services"),
        "{said}"
    );
    world.until_quiet().await;
    assert_eq!(uids(&world.all(&world.pods()).await), before);
    world
        .cluster
        .kubectl(&["get", "validatingadmissionpolicy", "kvtide-control-crds"]);

    // Twice: what is gone is no fault.
    for _ in 0..2 {
        let (done, said) = world
            .cluster
            .kvtide_control(&["uninstall", "--delete-services"]);
        assert!(done, "{said}");
    }
    expect_nothing(&world);
    drop(controller);
    world.cluster.install_again();
    let _controller = Controller::start(world.cluster, None, &["--lease-seconds=10"]);
    world
        .apply(service("llm", 1, json!([role("a", 1, "i")])))
        .await;
    world.until_ready("llm").await;
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_the_manifests_first_loses_nothing() {
    let (world, mut controller) = installed(cluster_or_skip!(), "manifests").await;
    let before = uids(&world.all(&world.pods()).await);
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let deploy = deploy.display().to_string();
    // All CRDs together, in one request that names none. The API server looks for changes of policies
    // once a second: ask while the policy is there, and only go on once it is in force.
    let all = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions?dryRun=All";
    let said = world
        .until("the policy is in force", || async {
            world.cluster.kubectl_refused(&["delete", "--raw", all])
        })
        .await;
    assert!(said.contains("removes it safely"), "{said}");
    let arguments = [
        "delete",
        "-k",
        &deploy,
        "--ignore-not-found",
        "--timeout=80s",
    ];
    let said = world.cluster.kubectl_fails(&arguments);
    assert!(
        said.contains("`kvtide-control uninstall` removes it safely"),
        "{said}"
    );
    // Its pods went with the Deployment.
    controller.kill();
    for crd in CRDS {
        let going = ["get", crd, "-o", "jsonpath={.metadata.deletionTimestamp}"];
        assert_eq!(world.cluster.kubectl(&going), "", "{crd}");
    }
    let service_now = world.services().get("llm").await.unwrap();
    assert_eq!(service_now.metadata.deletion_timestamp, None);
    // Once the namespace is gone.
    world.cluster.install_again();
    let _controller = Controller::start(world.cluster, None, &["--lease-seconds=10"]);
    world.kubectl(&["scale", "stormservice/llm", "--replicas=3"]);
    world
        .until("the third is there", || async {
            (world.all(&world.pods()).await.len() == 12).then_some(())
        })
        .await;
    let after = uids(&world.all(&world.pods()).await);
    assert!(
        before.iter().all(|uid| after.contains(uid)),
        "no pod was replaced"
    );
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uninstall_finishes_a_deletion_that_hangs_for_want_of_a_controller() {
    let (world, mut controller) = installed(cluster_or_skip!(), "hangs").await;
    controller.kill();
    delete_definitions(&world).await;
    let (done, said) = world.cluster.kvtide_control(&["uninstall"]);
    assert!(!done && said.contains("--delete-services"), "{said}");
    let finished = ["uninstall", "--delete-services", "--timeout-seconds=120"];
    let (done, said) = world.cluster.kvtide_control(&finished);
    assert!(done, "{said}");
    expect_nothing(&world);
    world.cluster.install_again();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_alone_is_uninstalled_without_touching_a_service() {
    let (world, mut controller) = installed(cluster_or_skip!(), "keepcrds").await;
    let before = uids(&world.all(&world.pods()).await);
    let (done, said) = world.cluster.kvtide_control(&["uninstall", "--keep-crds"]);
    assert!(done, "{said}");
    controller.kill();
    assert!(said.contains("the policy that keeps them"), "{said}");
    for kind in [
        "validatingadmissionpolicy",
        "validatingadmissionpolicybinding",
    ] {
        world.cluster.kubectl(&["get", kind, "kvtide-control-crds"]);
    }
    let role = ["get", "clusterrole", "kvtide-control"];
    let said = world.cluster.kubectl_fails(&role);
    assert!(said.contains("NotFound"), "{said}");
    assert_eq!(uids(&world.all(&world.pods()).await), before);
    world.cluster.install();
    let _controller = Controller::start(world.cluster, None, &["--lease-seconds=10"]);
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_tells_what_works_and_what_to_do_about_the_rest() {
    let world = World::alone(cluster_or_skip!(), "check").await;
    let at_once = ["check", "--wait-seconds=0"];
    let (works, said) = world.cluster.kvtide_control(&at_once);
    assert!(!works, "{said}");
    for line in [
        "ok    API server",
        "ok    CRDs",
        "ok    rights",
        "FAIL  leader",
        "FAIL  webhook",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert!(said.contains("2 of 5 checks failed"), "{said}");

    let port = free_port();
    let webhook = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "kvtide-control"},
        "webhooks": [{
            "name": "validate.orchestration.aibrix.ai", "admissionReviewVersions": ["v1"],
            "sideEffects": "None", "failurePolicy": "Ignore",
            "rules": [{
                "apiGroups": ["orchestration.aibrix.ai"], "apiVersions": ["v1alpha1"],
                "operations": ["CREATE", "UPDATE"], "resources": ["stormservices", "rolesets"],
            }],
            "clientConfig": {"url": format!("https://127.0.0.1:{port}/validate")},
        }],
    });
    let file = world.cluster.home().join("check-webhook.json");
    std::fs::write(&file, webhook.to_string()).unwrap();
    world
        .cluster
        .kubectl(&["apply", "-f", &file.display().to_string()]);
    let listen = format!("--webhook-listen=127.0.0.1:{port}");
    let flags = ["--lease-seconds=10", &listen, "--webhook-names=127.0.0.1"];
    let _controller = Controller::start(world.cluster, None, &flags);
    let (works, said) = world.cluster.kvtide_control(&["check"]);
    assert!(works, "{said}");
    assert_eq!(
        said.lines().filter(|line| line.starts_with("ok ")).count(),
        5,
        "{said}"
    );
    assert!(said.contains("StormServices are ready"), "{said}");

    world
        .cluster
        .kubectl(&["delete", "clusterrolebinding", "kvtide-control"]);
    let said = world
        .until("the API server knows that the rights are gone", || async {
            let (works, said) = world.cluster.kvtide_control(&at_once);
            (!works).then_some(said)
        })
        .await;
    assert!(said.contains("FAIL  rights"), "{said}");
    assert!(
        said.contains("kvtide-control may not get stormservices"),
        "{said}"
    );
    world.cluster.install();
}

/// Of what `World` does for the others where a test fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_test_took_away_is_there_for_the_next() {
    const FAILURE: &str = "as a test that fails halfway";
    let cluster = cluster_or_skip!();
    let fails = async {
        let (world, mut controller) = installed(cluster, "fails").await;
        controller.kill();
        delete_definitions(&world).await;
        let rights = "clusterrole,clusterrolebinding";
        cluster.kubectl(&["delete", rights, "kvtide-control"]);
        cluster.kubectl(&["delete", "namespace", "kvtide-system", "--wait=false"]);
        std::panic::panic_any(FAILURE);
    };
    let failed: Result<(), _> = AssertUnwindSafe(fails).catch_unwind().await;
    let said = failed.unwrap_err();
    assert_eq!(said.downcast_ref(), Some(&FAILURE), "it failed before that");

    let world = World::alone(cluster, "next").await;
    let _controller = Controller::start(cluster, None, &["--lease-seconds=10"]);
    let roles = json!([role("a", 1, "i")]);
    world.apply(service("llm", 1, roles)).await;
    world.until_ready("llm").await;
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
}
