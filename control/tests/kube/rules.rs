//! What the API server refuses by the CRDs' own rules, and what the printed columns show.

use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{World, role, role_with, service};

/// What `kubectl apply` says to an object.
fn refused(world: &World, object: &Value) -> String {
    let file = world
        .cluster
        .home()
        .join(format!("{}-refused.json", world.namespace));
    std::fs::write(&file, object.to_string()).unwrap();
    world.cluster.kubectl_fails(&[
        "-n",
        &world.namespace,
        "apply",
        "-f",
        file.to_str().unwrap(),
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_specs_are_refused_at_the_field() {
    let world = World::new(cluster_or_skip!(), "rules").await;
    let gang = json!({"volcanoSchedulingStrategy": {}});
    let two = json!({"volcanoSchedulingStrategy": {}, "godelSchedulingStrategy": {}});
    let with = |fields: Value| service("llm", 1, json!([role_with("a", 1, "i", fields)]));
    let mut ganged = service(
        "llm",
        1,
        json!([
            role("a", 1, "i"),
            role_with("b", 1, "i", json!({"dependencies": ["a"]}))
        ]),
    );
    ganged["spec"]["template"]["spec"]["schedulingStrategy"] = gang;
    let mut unmatched = service("llm", 1, json!([role("a", 1, "i")]));
    unmatched["spec"]["selector"] = json!({"matchLabels": {"app": "other"}});
    let table = [
        (
            with(json!({"dependencies": ["x"]})),
            "spec.template.spec.roles: Invalid value",
            "must name roles",
        ),
        (
            with(json!({"dependencies": ["a"]})),
            "dependencies",
            "cannot depend on itself",
        ),
        (
            with(json!({"schedulingStrategy": two})),
            "schedulingStrategy",
            "must have at most 1",
        ),
        (
            with(json!({"podGroupSize": 101})),
            "podGroupSize",
            "less than or equal to 100",
        ),
        (
            with(json!({"recoveryPolicy": "Sometimes"})),
            "recoveryPolicy",
            "FullRecreate",
        ),
        (ganged, "spec.template.spec.roles", "exclude"),
        (
            unmatched,
            "spec.selector",
            "must be among template.metadata.labels",
        ),
        (
            service("llm", 1, json!([role("a", 1, "i"), role("a", 1, "i")])),
            "roles[1]",
            "Duplicate",
        ),
        (
            service(&"a".repeat(64), 1, json!([role("a", 1, "i")])),
            "metadata.name",
            "Too long",
        ),
        (
            service(
                &"a".repeat(27),
                1,
                json!([role_with("a", 1, "i", json!({"podGroupSize": 2}))]),
            ),
            "spec.template.spec.roles",
            "27 characters together",
        ),
    ];
    for (object, path, why) in table {
        let said = refused(&world, &object);
        assert!(
            said.contains(path) && said.contains(why),
            "{path}, {why}: {said}"
        );
    }
    // Names that only look too long are shortened instead.
    world
        .apply(service(&"a".repeat(63), 0, json!([role("a", 1, "i")])))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn defaults_do_not_change_what_was_written() {
    let world = World::new(cluster_or_skip!(), "defaults").await;
    world
        .apply(service("llm", 1, json!([role("a", 1, "i")])))
        .await;
    let stored = world.services().get("llm").await.unwrap();
    let stored = serde_json::to_value(stored.spec).unwrap();
    assert_eq!(stored.pointer("/updateStrategy"), None);
    let role = stored.pointer("/template/spec/roles/0").unwrap();
    for field in [
        "upgradeOrder",
        "podGroupSize",
        "updateStrategy",
        "recoveryPolicy",
    ] {
        assert_eq!(role.get(field), None, "{field}");
    }
    assert_eq!(
        role["template"]["spec"]["containers"][0],
        json!({"name": "c", "image": "i"})
    );
}
