//! What the API server refuses, and what is ignored: told where a user looks, in one sentence.

use kube::ResourceExt;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{World, condition, role, role_with, service};

/// Whether a text holds what only a Rust structure would.
fn is_dump(text: &str) -> bool {
    text.contains("Status {") || text.contains("Some(") || text.contains("ApiError")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_below_is_told_at_the_top_in_one_sentence() {
    let world = World::new(cluster_or_skip!(), "refused").await;
    let controller = world.controller();
    world.forbid_pods().await;
    for (name, fields, below) in [
        ("single", json!({}), "RoleSet "),
        ("group", json!({"podGroupSize": 2}), "PodSet "),
    ] {
        let role = role_with("a", 1, "i", fields);
        world.apply(service(name, 1, json!([role]))).await;
        let (_, message) = world
            .until("the StormService says what is refused", || async {
                let told = world.told(name, "ReplicaFailure").await?;
                told.1.contains("exceeded quota").then_some(told)
            })
            .await;
        assert!(message.starts_with("RoleSet "), "{message}");
        assert!(message.contains(below), "{message}");
        assert_eq!(message.matches("exceeded quota").count(), 1, "{message}");
        assert!(!is_dump(&message), "{message}");
        world
            .until("an event says so too", || async {
                let events = world.events("StormService", name);
                let told = events
                    .iter()
                    .any(|(_, note)| note.contains("exceeded quota"));
                told.then_some(())
            })
            .await;
    }
    let sets = world.all(&world.role_sets()).await;
    let set = sets.iter().find(|set| set.name_any().starts_with("single"));
    let events = world.events("RoleSet", &set.unwrap().name_any());
    let told = events.iter().filter(|(reason, _)| reason == "FailedCreate");
    assert_eq!(
        told.count(),
        1,
        "once, however often it is tried: {events:?}"
    );
    let groups = world.all(&world.pod_sets()).await;
    let events = world.events("PodSet", &groups[0].name_any());
    assert!(
        events.iter().any(|(reason, _)| reason == "FailedCreate"),
        "{events:?}"
    );
    assert!(!is_dump(&controller.log()), "{}", controller.log());

    world.kubectl(&["delete", "resourcequota", "none"]);
    // It is tried again by itself, later each time; a change asks at once.
    for name in ["single", "group"] {
        world.kubectl(&[
            "annotate",
            "rolesets,podsets",
            "--all",
            "look=again",
            "--overwrite",
        ]);
        let ready = world.until_ready(name).await;
        let conditions = ready.status.unwrap().conditions;
        assert_eq!(condition(&conditions, "ReplicaFailure"), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_whose_name_somebody_elses_service_has_is_not_ready_until_that_goes() {
    let world = World::new(cluster_or_skip!(), "taken").await;
    let _controller = world.controller();
    let foreign = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "llm"},
        "spec": {"selector": {"app": "other"}, "ports": [{"port": 80}]}});
    world.apply(foreign).await;
    world
        .apply(service("llm", 1, json!([role("a", 1, "i")])))
        .await;
    let message = until_nameless(&world, "llm").await;
    assert!(
        message.contains("Service llm exists and belongs to somebody else"),
        "{message}"
    );
    let events = world.events("StormService", "llm");
    assert!(
        events.iter().any(|(reason, _)| reason == "NameTaken"),
        "{events:?}"
    );
    assert_eq!(
        world.all(&world.pods()).await.len(),
        1,
        "pods run meanwhile"
    );
    world.kubectl(&["delete", "service", "llm"]);
    world.until_ready("llm").await;
    let address = world.kubectl(&["get", "service", "llm", "-o", "jsonpath={.spec.clusterIP}"]);
    assert_eq!(address.trim(), "None");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_whose_name_no_service_may_have_is_not_ready_and_says_why() {
    let world = World::new(cluster_or_skip!(), "strict").await;
    let _controller = world.controller();
    world
        .apply(service("7b-llm", 1, json!([role("a", 1, "i")])))
        .await;
    let message = until_nameless(&world, "7b-llm").await;
    assert!(message.contains("metadata.name"), "{message}");
    assert!(!is_dump(&message), "{message}");
    world.kubectl(&["delete", "stormservice", "7b-llm", "--timeout=80s"]);
}

/// Waits until a StormService says that its pods have no names although all RoleSets are ready.
async fn until_nameless(world: &World, name: &str) -> String {
    world
        .until("it says that pods have no names", || async {
            let status = world.services().get(name).await.ok()?.status?;
            let (reason, message) = world.told(name, "Ready").await?;
            let nameless = reason == "NoHeadlessService" && status.ready_replicas == 1;
            let is_ready = condition(&status.conditions, "Ready") == Some(true);
            (nameless && !is_ready).then_some(message)
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_tells_its_steps_and_its_end() {
    let world = World::new(cluster_or_skip!(), "steps").await;
    let _controller = world.controller();
    world
        .apply(service("llm", 3, json!([role("a", 2, "i")])))
        .await;
    world.until_ready("llm").await;
    let rollouts = |kind: &str, name: &str| -> Vec<String> {
        let events = world.events(kind, name).into_iter();
        let rollouts = events.filter(|(reason, _)| reason == "Rollout");
        rollouts.map(|(_, note)| note).collect()
    };
    assert_eq!(
        rollouts("StormService", "llm"),
        [""; 0],
        "nothing has rolled yet"
    );
    let sets = world.all(&world.role_sets()).await;
    // There and back and there again: each is told, also where it is the same once more.
    for (nth, image) in [(1, "j"), (2, "i"), (3, "j")] {
        world
            .apply(service("llm", 3, json!([role("a", 2, image)])))
            .await;
        world.until_ready("llm").await;
        let (steps, ends) = world
            .until("its end is told", || async {
                let told = rollouts("StormService", "llm");
                let (ends, others): (Vec<_>, Vec<_>) = told
                    .into_iter()
                    .partition(|note| note.ends_with(": complete"));
                let steps = others
                    .into_iter()
                    .filter(|note| note.contains(": updating "));
                (ends.len() == nth).then_some((steps.count(), ends))
            })
            .await;
        assert_eq!(steps, 3 * nth, "one RoleSet at a time: {ends:?}");
        for set in &sets {
            let steps = rollouts("RoleSet", &set.name_any());
            assert!(steps.len() >= nth, "{steps:?}");
            assert!(
                steps.iter().all(|note| note.starts_with("role a ")),
                "{steps:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_annotation_for_aibrix_sidecar_is_answered_by_a_condition() {
    let world = World::new(cluster_or_skip!(), "sidecar").await;
    let _controller = world.controller();
    let mut object: Value = service("llm", 1, json!([role("a", 1, "i")]));
    object["metadata"]["annotations"] = json!({"model.aibrix.ai/sidecar-injection": "true"});
    world.apply(object).await;
    let ready = world.until_ready("llm").await;
    let conditions = ready.status.unwrap().conditions;
    assert_eq!(condition(&conditions, "SidecarNotInjected"), Some(true));
    world.kubectl(&[
        "annotate",
        "stormservice",
        "llm",
        "model.aibrix.ai/sidecar-injection-",
    ]);
    world
        .until("the condition goes with the annotation", || async {
            world
                .told("llm", "SidecarNotInjected")
                .await
                .is_none()
                .then_some(())
        })
        .await;
}
