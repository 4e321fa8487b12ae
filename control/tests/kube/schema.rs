//! Other CRDs of the same names, and stored objects that cannot be decoded.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::film::{Film, Scene};
use crate::world::{World, condition, role, role_with, service, with_definitions};

/// The definitions less the fields that AIBrix v0.5.0's lack.
fn like_aibrix(definition: &mut CustomResourceDefinition) {
    let mut value = serde_json::to_value(&*definition).unwrap();
    let schema = &mut value["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    if definition.spec.names.kind == "PodSet" {
        let policy = &mut schema["properties"]["spec"]["properties"]["recoveryPolicy"];
        policy["enum"] = json!(["ReplaceUnhealthy", "Recreate"]);
    }
    let role_set = "/properties/spec";
    let of_service = "/properties/spec/properties/template/properties/spec";
    let mut remove = |path: &str, field: &str| {
        if let Some(Value::Object(fields)) = schema.pointer_mut(path) {
            fields.remove(field);
        }
    };
    if definition.spec.names.kind != "StormService" {
        remove("/properties/status/properties", "observedGeneration");
    }
    for spec in [role_set, of_service] {
        remove(spec, "x-kubernetes-validations");
        remove(
            &format!("{spec}/properties/roles/items"),
            "x-kubernetes-validations",
        );
        for field in ["recoveryPolicy", "dependencies"] {
            remove(&format!("{spec}/properties/roles/items/properties"), field);
        }
    }
    *definition = serde_json::from_value(value).unwrap();
}

/// The definitions less the rule that a gang has a member.
fn with_gangs_of_nobody(definition: &mut CustomResourceDefinition) {
    fn lift(schema: &mut Value) {
        match schema {
            Value::Object(fields) => {
                if let Some(Value::Object(members)) = fields.get_mut("minMember") {
                    members.remove("minimum");
                }
                fields.values_mut().for_each(lift);
            }
            Value::Array(items) => items.iter_mut().for_each(lift),
            _ => {}
        }
    }
    let mut value = serde_json::to_value(&*definition).unwrap();
    lift(&mut value);
    *definition = serde_json::from_value(value).unwrap();
}

/// RoleSets with a pod that serves.
fn serving(scene: &Scene) -> usize {
    let pods = scene.all().filter(|pod| pod.ready && !pod.going);
    let sets: BTreeSet<&str> = pods.map(|pod| pod.role_set.as_str()).collect();
    sets.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_definitions_of_aibrix_rollouts_wait_and_nothing_is_written_in_vain() {
    let world = World::alone(cluster_or_skip!(), "foreign").await;
    let roles = |image: &str| json!([role("a", 1, image)]);
    let ours = with_definitions(&world, like_aibrix, async || {
        let controller = world.controller();
        world.apply(service("llm", 3, roles("a"))).await;
        let ready = world.until_ready("llm").await;
        let conditions = ready.status.unwrap().conditions;
        assert_eq!(condition(&conditions, "SchemaOutdated"), Some(true));
        let film = Film::start(&world).await;
        world.apply(service("llm", 3, roles("b"))).await;
        world.until_ready("llm").await;
        let fewest = film.scenes().iter().map(serving).min();
        assert_eq!(fewest, Some(2), "one RoleSet at a time");
        world.until_quiet().await;
        // Only looks at objects that changed were seen so far: a new controller looks at all.
        let before = world.writes();
        let _again = world.controller();
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(world.writes(), before);
        controller
    })
    .await;
    // The right ones are installed while the controller runs.
    world
        .until("the condition goes", || async {
            let status = world.services().get("llm").await.ok()?.status?;
            (condition(&status.conditions, "SchemaOutdated").is_none()).then_some(())
        })
        .await;
    world
        .until("the field is used", || async {
            let sets = world.all(&world.role_sets()).await;
            let observed = |set: &kvtide_control_api::RoleSet| {
                let status = set.status.as_ref();
                status.is_some_and(|status| status.observed_generation == set.metadata.generation)
            };
            sets.iter().all(observed).then_some(())
        })
        .await;
    drop(ours);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_was_stored_with_a_gang_of_nobody_is_scaled_out() {
    let world = World::alone(cluster_or_skip!(), "nobody").await;
    let gang = json!({"volcanoSchedulingStrategy": {"minMember": 0}});
    let fields = json!({"podGroupSize": 2, "schedulingStrategy": gang});
    let roles = json!([role_with("p", 1, "i", fields)]);
    with_definitions(&world, with_gangs_of_nobody, async || {
        world.apply(service("llm", 1, roles)).await;
    })
    .await;
    let _controller = world.controller();
    world.until_ready("llm").await;
    world.kubectl(&["scale", "stormservice/llm", "--replicas=2"]);
    world.until_ready("llm").await;
    assert_eq!(world.all(&world.pods()).await.len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_only_some_definitions_are_foreign_nothing_is_written_in_vain_either() {
    let world = World::alone(cluster_or_skip!(), "mixed").await;
    let object = |image: &str| {
        let fields = json!({
            "dependencies": ["a"], "podGroupSize": 2, "recoveryPolicy": "FullRecreate",
        });
        let roles = json!([role("a", 1, image), role_with("p", 1, image, fields)]);
        service("llm", 2, roles)
    };
    let updates = || {
        let writes = world.writes().into_iter();
        writes.filter(|write| write.starts_with("update ")).count()
    };
    for foreign in ["RoleSet", "PodSet"] {
        let some = |definition: &mut CustomResourceDefinition| {
            if definition.spec.names.kind == foreign {
                like_aibrix(definition);
            }
        };
        with_definitions(&world, some, async || {
            let _controller = world.controller();
            world.apply(object("a")).await;
            world.until_ready("llm").await;
            world.apply(object("b")).await;
            let ready = world.until_ready("llm").await;
            let conditions = ready.status.unwrap().conditions;
            assert_eq!(condition(&conditions, "SchemaOutdated"), Some(true));
            world.until_quiet().await;
            // Looks that somebody else's change asks for.
            let before = updates();
            world.kubectl(&["annotate", "stormservice", "llm", "look=again"]);
            world.until_quiet().await;
            assert_eq!(updates(), before, "{foreign}");
            world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_cannot_be_decoded_stops_nothing() {
    let world = World::alone(cluster_or_skip!(), "decode").await;
    // Kinds in a looser form than the types have.
    let loose = |definition: &mut CustomResourceDefinition| {
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let version = &mut definition.spec.versions[0];
        let schema = json!({"openAPIV3Schema": schema});
        version.schema = serde_json::from_value(schema).unwrap();
    };
    // And in one that takes no conditions, so that telling an object so fails at first.
    let deaf = |definition: &mut CustomResourceDefinition| {
        loose(definition);
        let version = &mut definition.spec.versions[0];
        let mut schema = serde_json::to_value(&version.schema).unwrap();
        let anything = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let mut status = anything.clone();
        status["properties"]["conditions"] =
            json!({"type": "array", "maxItems": 0, "items": anything});
        schema["openAPIV3Schema"]["properties"]["status"] = status;
        version.schema = serde_json::from_value(schema).unwrap();
    };
    let kinds = ["StormService", "RoleSet", "PodSet"];
    let controller = with_definitions(&world, deaf, async || {
        for kind in kinds {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(
                "orchestration.aibrix.ai",
                "v1alpha1",
                kind,
            ));
            let api: Api<DynamicObject> =
                Api::namespaced_with(world.client.clone(), &world.namespace, &resource);
            let finalizer = format!("orchestration.aibrix.ai/{}-finalizer", kind.to_lowercase());
            let object = json!({
                "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": kind,
                "metadata": {"name": "broken", "finalizers": [finalizer]},
                "spec": {"roles": 7, "podGroupSize": "many", "selector": 3, "template": "none"},
            });
            let object = serde_json::from_value(object).unwrap();
            api.create(&PostParams::default(), &object).await.unwrap();
        }
        let controller = world.controller();
        world
            .until("telling them failed", || async {
                let log = controller.log();
                let failed = |kind: &&str| {
                    let mut lines = log.lines();
                    let kind = format!("kind=\"{kind}\"");
                    lines.any(|line| line.contains("could not reconcile") && line.contains(&kind))
                };
                kinds.iter().all(failed).then_some(())
            })
            .await;
        controller
    })
    .await;
    with_definitions(&world, loose, async || {
        world
            .apply(service("llm", 1, json!([role("a", 1, "a")])))
            .await;
        world.until_ready("llm").await;
        world
            .apply(service("llm", 2, json!([role("a", 2, "b")])))
            .await;
        world.until_ready("llm").await;
        for kind in kinds {
            let stored = world
                .until("it is told", || async {
                    let stored = world.kubectl(&["get", kind, "broken", "-o", "json"]);
                    let stored: Value = serde_json::from_str(&stored).unwrap();
                    let told = stored["status"]["conditions"][0]["type"] == "Invalid";
                    told.then_some(stored)
                })
                .await;
            assert_eq!(stored["spec"]["selector"], 3, "it is left as it is");
            world.kubectl(&["delete", kind, "broken", "--timeout=60s"]);
        }
        world.kubectl(&["delete", "stormservice", "llm", "--timeout=60s"]);
        assert!(!controller.log().contains("panicked"));
    })
    .await;
}
