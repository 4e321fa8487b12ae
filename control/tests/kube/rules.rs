//! What the API server refuses by the CRDs' own rules, and what the printed columns show.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, PostParams};
use kvtide_control_api::PodSet;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{World, condition, role, role_with, service, with_definitions};

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
            service("llm.v1", 1, json!([role("a", 1, "i")])),
            "metadata.name",
            "should match",
        ),
        (
            with(json!({"schedulingStrategy": {"volcanoSchedulingStrategy": {"minMember": 0}}})),
            "minMember",
            "greater than or equal to 1",
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
async fn wrong_role_sets_and_pod_sets_are_refused_at_the_field() {
    let world = World::new(cluster_or_skip!(), "rulesbelow").await;
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": kind,
            "metadata": {"name": name}, "spec": spec})
    };
    let set = |roles: Value| object("RoleSet", "r", json!({"roles": roles}));
    let with = |fields: Value| set(json!([role_with("a", 1, "i", fields)]));
    let group = |fields: Value| {
        let mut spec = json!({"podGroupSize": 2, "template": {"spec": {"containers": []}}});
        for (key, value) in fields.as_object().unwrap() {
            spec[key] = value.clone();
        }
        object("PodSet", "p", spec)
    };
    let two = json!({"volcanoSchedulingStrategy": {}, "godelSchedulingStrategy": {}});
    let gang = json!({"volcanoSchedulingStrategy": {}});
    let mut ganged = set(json!([
        role("a", 1, "i"),
        role_with("b", 1, "i", json!({"dependencies": ["a"]})),
    ]));
    ganged["spec"]["schedulingStrategy"] = gang;
    let many = |count: usize| -> Vec<Value> {
        (0..count)
            .map(|nth| role(&format!("r{nth}"), 0, "i"))
            .collect()
    };
    let names: Vec<String> = (0..17).map(|nth| format!("r{nth}")).collect();
    let mut depending = many(18);
    depending[17]["dependencies"] = json!(names);
    let table = [
        (
            with(json!({"dependencies": ["x"]})),
            "spec.roles",
            "must name roles",
        ),
        (
            with(json!({"podGroupSize": 101})),
            "spec.roles[0].podGroupSize",
            "100",
        ),
        (with(json!({"replicas": -1})), "spec.roles[0].replicas", "0"),
        (
            with(json!({"upgradeOrder": 0})),
            "spec.roles[0].upgradeOrder",
            "1",
        ),
        (with(json!({"name": "A_b"})), "spec.roles[0].name", "match"),
        (
            with(json!({"schedulingStrategy": two})),
            "schedulingStrategy",
            "at most 1",
        ),
        (ganged, "spec.roles", "exclude"),
        (set(json!(many(33))), "spec.roles", "at most 32"),
        (
            set(json!(depending)),
            "spec.roles[17].dependencies",
            "at most 16",
        ),
        (
            set(json!([role("a", 1, "i"), role("a", 1, "i")])),
            "spec.roles[1]",
            "Duplicate",
        ),
        (
            object("RoleSet", &"a".repeat(64), json!({"roles": []})),
            "metadata.name",
            "Too long",
        ),
        (group(json!({"podGroupSize": 1})), "spec.podGroupSize", "2"),
        (
            group(json!({"podGroupSize": 101})),
            "spec.podGroupSize",
            "100",
        ),
        (
            group(json!({"recoveryPolicy": "No"})),
            "spec.recoveryPolicy",
            "Recreate",
        ),
        (
            group(json!({"schedulingStrategy": two})),
            "spec.schedulingStrategy",
            "at most 1",
        ),
        (
            object("PodSet", "p", json!({"podGroupSize": 2})),
            "spec.template",
            "Required",
        ),
    ];
    for (object, path, why) in table {
        let said = refused(&world, &object);
        assert!(
            said.contains(path) && said.contains(why),
            "{path}, {why}: {said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_aibrix_takes_is_taken() {
    let world = World::new(cluster_or_skip!(), "lenient").await;
    let _controller = world.controller();
    let pods = json!({"spec": {"terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": "i", "env": [{"name": "A", "value": "$(ROLE_NAME)"}]}]}});
    let roles = json!([
        {"name": "a", "template": pods, "updateStrategy": {}, "disruptionTolerance": {}},
        {"name": "b", "replicas": 0, "upgradeOrder": 7, "template": pods, "podGroupSize": 1,
            "updateStrategy": {"maxSurge": "25%", "maxUnavailable": 0},
            "disruptionTolerance": {"maxUnavailable": "50%"},
            "schedulingStrategy": {"volcanoSchedulingStrategy": {"minMember": 3}}},
        {"name": "c", "replicas": 1, "stateful": true, "template": pods, "schedulingStrategy": {}},
    ]);
    let mut lenient = service("llm", 1, roles);
    let spec = &mut lenient["spec"];
    spec["disruptionTolerance"] = json!({"maxUnavailable": 1});
    spec["revisionHistoryLimit"] = json!(0);
    spec["selector"] = json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]});
    spec["updateStrategy"] = json!({"maxSurge": "30%"});
    spec["template"]["spec"]["updateStrategy"] = json!("Interleave");
    spec["template"]["spec"]["schedulingStrategy"] = json!({});
    world.apply(lenient).await;
    world.until_ready("llm").await;
    assert_eq!(world.all(&world.pods()).await.len(), 2);
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

/// The definitions without what bounds names, as AIBrix's are.
fn without_bounds(definition: &mut CustomResourceDefinition) {
    let schema = definition.spec.versions[0].schema.as_mut().unwrap();
    let schema = schema.open_api_v3_schema.as_mut().unwrap();
    schema.x_kubernetes_validations = None;
    schema.properties.as_mut().unwrap().remove("metadata");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_stored_before_a_rule_is_served_and_deleted() {
    let world = World::alone(cluster_or_skip!(), "ratchet").await;
    let group = role_with("prefill", 1, "i", json!({"podGroupSize": 2}));
    let long = "a".repeat(24);
    let finalizer = json!(["orchestration.aibrix.ai/stormservice-finalizer"]);
    let mut too_long = service(&"b".repeat(64), 1, json!([role("a", 1, "i")]));
    too_long["metadata"]["finalizers"] = finalizer;
    too_long["spec"]["selector"] = json!({"matchLabels": {"app": "b"}});
    too_long["spec"]["template"]["metadata"]["labels"] = json!({"app": "b"});
    let set_name = "c".repeat(70);
    with_definitions(&world, without_bounds, async || {
        world
            .apply(service(&long, 1, json!([group.clone()])))
            .await;
        world.apply(too_long.clone()).await;
        let set = json!({
            "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "PodSet",
            "metadata": {"name": set_name, "finalizers": ["orchestration.aibrix.ai/podset-finalizer"]},
            "spec": {"podGroupSize": 2, "template": {"spec": {"containers": []}}},
        });
        let set: PodSet = serde_json::from_value(set).unwrap();
        let sets: Api<PodSet> = Api::namespaced(world.client.clone(), &world.namespace);
        sets.create(&PostParams::default(), &set).await.unwrap();
    })
    .await;
    let fresh = service(&"d".repeat(24), 1, json!([group.clone()]));
    let said = refused(&world, &fresh);
    assert!(said.contains("27 characters together"), "{said}");

    let _controller = world.controller();
    world.until_ready(&long).await;
    let image = role_with("prefill", 1, "j", json!({"podGroupSize": 2}));
    world.apply(service(&long, 1, json!([image]))).await;
    world.until_ready(&long).await;

    world
        .until("the other is called invalid", || async {
            let status = world.services().get(&"b".repeat(64)).await.ok()?.status?;
            (condition(&status.conditions, "Invalid") == Some(true)).then_some(())
        })
        .await;
    world.kubectl(&["delete", "podset", &set_name, "--timeout=80s"]);
    world.kubectl(&["delete", "stormservice", "--all", "--timeout=80s"]);
    assert_eq!(world.all(&world.pods()).await.len(), 0);
}
