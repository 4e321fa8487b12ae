//! The webhook, asked by the API server over TLS with the certificate that the controller made, or with
//! one that is mounted from a Secret.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::cluster::free_port;
use crate::cluster_or_skip;
use crate::world::{World, role, role_with, service};

/// As in control/deploy, but reached on loopback and asked about this namespace alone.
fn configuration(world: &World, name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [{
            "name": "validate.orchestration.aibrix.ai",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "rules": [{
                "apiGroups": ["orchestration.aibrix.ai"], "apiVersions": ["v1alpha1"],
                "operations": ["CREATE", "UPDATE"], "resources": ["stormservices", "rolesets"],
            }],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
            "clientConfig": {"url": format!("https://127.0.0.1:{port}/validate")},
        }],
    })
}

fn cyclic() -> Value {
    json!([
        role_with("a", 1, "i", json!({"dependencies": ["b"]})),
        role_with("b", 1, "i", json!({"dependencies": ["a"]})),
    ])
}

fn write(world: &World, name: &str, object: &Value) -> String {
    let file = world
        .cluster
        .home()
        .join(format!("{}-{name}.json", world.namespace));
    std::fs::write(&file, object.to_string()).unwrap();
    file.display().to_string()
}

/// What `kubectl apply` says to an object once the API server trusts the webhook.
async fn denied(world: &World, object: &Value) -> String {
    let file = write(world, "bad", object);
    world
        .until("the API server trusts the webhook", || async {
            // Not stored: before it asks the webhook, the API server takes anything.
            let arguments = [
                "-n",
                &world.namespace,
                "apply",
                "--dry-run=server",
                "-f",
                &file,
            ];
            let said = world.cluster.kubectl_refused(&arguments)?;
            said.contains("denied the request").then_some(said)
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_webhook_refuses_cycles_that_no_rule_can_see() {
    let world = World::new(cluster_or_skip!(), "webhook").await;
    let port = free_port();
    let file = write(
        &world,
        "webhook",
        &configuration(&world, "kvtide-control", port),
    );
    world.kubectl(&["apply", "-f", &file]);
    let _controller = world.controller_with(&[
        "--leader-elect=false",
        &format!("--webhook-listen=127.0.0.1:{port}"),
        "--webhook-names=127.0.0.1",
    ]);
    let said = denied(&world, &service("bad", 1, cyclic())).await;
    assert!(
        said.contains("spec.template.spec.roles: dependencies form a cycle"),
        "{said}"
    );
    let set = json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "RoleSet",
        "metadata": {"name": "bad"}, "spec": {"roles": cyclic()}});
    let said = denied(&world, &set).await;
    assert!(
        said.contains("spec.roles: dependencies form a cycle"),
        "{said}"
    );
    let good = service("llm", 1, json!([role("a", 1, "i")]));
    world.kubectl(&["apply", "-f", &write(&world, "good", &good)]);
    world.until_ready("llm").await;
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    world.kubectl(&["delete", "validatingwebhookconfiguration", "kvtide-control"]);
}

/// A certificate for loopback in the form in which a Secret of type `kubernetes.io/tls` is mounted; its
/// CA.
fn mount(directory: &Path) -> String {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join("tls.crt"), leaf.pem()).unwrap();
    std::fs::write(directory.join("tls.key"), key.serialize_pem()).unwrap();
    authority_pem
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_webhook_serves_the_certificate_of_a_mounted_secret() {
    let world = World::new(cluster_or_skip!(), "mounted").await;
    let (port, directory) = (free_port(), world.cluster.home().join("mounted-secret"));
    let authority = mount(&directory);
    let mut configuration = configuration(&world, "mounted-secret", port);
    configuration["webhooks"][0]["clientConfig"]["caBundle"] = json!(STANDARD.encode(authority));
    world.kubectl(&["apply", "-f", &write(&world, "webhook", &configuration)]);
    let _controller = world.controller_with(&[
        "--leader-elect=false",
        &format!("--webhook-listen=127.0.0.1:{port}"),
        &format!("--webhook-cert-dir={}", directory.display()),
        "--webhook-configuration=mounted-secret",
    ]);
    let said = denied(&world, &service("bad", 1, cyclic())).await;
    assert!(said.contains("dependencies form a cycle"), "{said}");
    world.kubectl(&["delete", "validatingwebhookconfiguration", "mounted-secret"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_pod_or_service_can_be_made_from_is_refused_and_the_rest_warned_of() {
    let world = World::alone(cluster_or_skip!(), "tried").await;
    let port = free_port();
    let configuration = configuration(&world, "kvtide-control", port);
    world.kubectl(&["apply", "-f", &write(&world, "webhook", &configuration)]);
    let _controller = world.controller_with(&[
        "--leader-elect=false",
        &format!("--webhook-listen=127.0.0.1:{port}"),
        "--webhook-names=127.0.0.1",
    ]);
    // The CRD takes any name of a container, and a request above the limit.
    let mut no_pod = role("b", 1, "i");
    no_pod["template"]["spec"]["containers"][0]["name"] = json!("Not_A_Label");
    let mut too_much = role("c", 1, "i");
    too_much["template"]["spec"]["containers"][0]["resources"] =
        json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}});
    let roles = json!([role("a", 1, "i"), no_pod, too_much]);
    let said = denied(&world, &service("bad", 1, roles.clone())).await;
    for text in [
        "spec.template.spec.roles[1].template: no pod can be made from it",
        "Not_A_Label",
        "spec.template.spec.roles[2].template: no pod can be made from it",
    ] {
        assert!(said.contains(text), "{text}: {said}");
    }
    assert!(!said.contains("roles[0]"), "{said}");
    let set = json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "RoleSet",
        "metadata": {"name": "bad"}, "spec": {"roles": roles}});
    let said = denied(&world, &set).await;
    assert!(said.contains("spec.roles[1].template: no pod"), "{said}");
    let said = denied(&world, &service("7b-llm", 1, json!([role("a", 1, "i")]))).await;
    assert!(
        said.contains("metadata.name: the Service of this name"),
        "{said}"
    );
    let task = json!({"volcanoSchedulingStrategy": {"minTaskMember": {"x": 1}}});
    let mut ganged = service("bad", 1, json!([role("a", 1, "i")]));
    ganged["spec"]["template"]["spec"]["schedulingStrategy"] = task;
    let said = denied(&world, &ganged).await;
    assert!(
        said.contains("minTaskMember: \"x\" is not a role"),
        "{said}"
    );
    assert_eq!(
        world.all(&world.pods()).await.len(),
        0,
        "nothing was stored"
    );

    // What may be otherwise tomorrow, and what is ignored.
    let warnings = |object: &Value| {
        let file = write(&world, "warned", object);
        let arguments = ["-n", &world.namespace, "apply", "-f", &file];
        world.cluster.kubectl_warnings(&arguments)
    };
    let mut good = service("llm", 1, json!([role("a", 1, "i")]));
    assert_eq!(warnings(&good), "");
    world.until_ready("llm").await;
    world.forbid_pods().await;
    good["metadata"]["annotations"] = json!({"model.aibrix.ai/sidecar-injection": "true"});
    good["spec"]["template"]["spec"]["roles"][0] = role("a", 1, "j");
    let warned = warnings(&good);
    assert!(
        warned.contains("roles[0].template: would be refused now"),
        "{warned}"
    );
    assert!(warned.contains("sidecar-injection] is ignored"), "{warned}");
    world.kubectl(&["delete", "validatingwebhookconfiguration", "kvtide-control"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_is_put_back_when_the_configuration_is_made_anew() {
    let world = World::alone(cluster_or_skip!(), "putback").await;
    let port = free_port();
    let file = write(
        &world,
        "webhook",
        &configuration(&world, "kvtide-control", port),
    );
    let _controller = world.controller_with(&[
        "--leader-elect=false",
        &format!("--webhook-listen=127.0.0.1:{port}"),
        "--webhook-names=127.0.0.1",
    ]);
    let webhook = ["validatingwebhookconfiguration", "kvtide-control"];
    let bundle = || {
        let path = "jsonpath={.webhooks[0].clientConfig.caBundle}";
        world.kubectl(&["get", webhook[0], webhook[1], "-o", path])
    };
    // Installed after the controller, deleted and installed again, replaced without it.
    for nth in 0..3 {
        match nth {
            0 => {}
            1 => drop(world.kubectl(&["delete", webhook[0], webhook[1]])),
            _ => drop(world.kubectl(&["replace", "-f", &file])),
        }
        world.kubectl(&["apply", "-f", &file]);
        world
            .until("the CA is there", || async {
                (!bundle().is_empty()).then_some(())
            })
            .await;
        let said = denied(&world, &service("bad", 1, cyclic())).await;
        assert!(said.contains("dependencies form a cycle"), "{said}");
    }
    world.kubectl(&["delete", webhook[0], webhook[1]]);
}
