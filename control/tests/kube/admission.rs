//! The webhook, asked by the API server over TLS with the certificate that the controller made.

use serde_json::json;

use crate::cluster::free_port;
use crate::cluster_or_skip;
use crate::world::{World, role, role_with, service};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_webhook_refuses_cycles_that_no_rule_can_see() {
    let world = World::new(cluster_or_skip!(), "webhook").await;
    let port = free_port();
    // As in control/deploy, but reached on loopback and asked about this namespace alone.
    let configuration = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "kvtide-control"},
        "webhooks": [{
            "name": "validate.orchestration.aibrix.ai",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "rules": [{
                "apiGroups": ["orchestration.aibrix.ai"], "apiVersions": ["v1alpha1"],
                "operations": ["CREATE", "UPDATE"], "resources": ["stormservices"],
            }],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
            "clientConfig": {"url": format!("https://127.0.0.1:{port}/validate")},
        }],
    });
    let file = world.cluster.home().join("webhook.json");
    std::fs::write(&file, configuration.to_string()).unwrap();
    world.kubectl(&["apply", "-f", file.to_str().unwrap()]);
    let _controller = world.controller_with(&[
        "--leader-elect=false",
        &format!("--webhook-listen=127.0.0.1:{port}"),
        "--webhook-names=127.0.0.1",
    ]);
    let good = service("llm", 1, json!([role("a", 1, "i")]));
    let cycle = json!([
        role_with("a", 1, "i", json!({"dependencies": ["b"]})),
        role_with("b", 1, "i", json!({"dependencies": ["a"]})),
    ]);
    let good_file = world.cluster.home().join("webhook-good.json");
    std::fs::write(&good_file, good.to_string()).unwrap();
    let bad_file = world.cluster.home().join("webhook-bad.json");
    std::fs::write(&bad_file, service("bad", 1, cycle).to_string()).unwrap();
    let said = world
        .until("the API server trusts the webhook", || async {
            let arguments = ["-n", &world.namespace, "apply", "-f", bad_file.to_str()?];
            let said = world.cluster.kubectl_fails(&arguments);
            said.contains("denied the request").then_some(said)
        })
        .await;
    assert!(
        said.contains("spec.template.spec.roles: dependencies form a cycle"),
        "{said}"
    );
    world.kubectl(&["apply", "-f", good_file.to_str().unwrap()]);
    world.until_ready("llm").await;
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    world.kubectl(&["delete", "validatingwebhookconfiguration", "kvtide-control"]);
}
