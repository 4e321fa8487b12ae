//! Children that somebody takes away from the controllers without deleting them.

use kube::ResourceExt;
use serde_json::json;

use crate::cluster_or_skip;
use crate::world::{World, role, role_with, service, uids};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orphaned_role_set_keeps_its_names_and_has_a_successor() {
    let world = World::new(cluster_or_skip!(), "successor").await;
    let _controller = world.controller();
    let roles = json!([
        role_with("a", 2, "i", json!({"stateful": true})),
        role_with("p", 1, "i", json!({"podGroupSize": 2})),
    ]);
    world.apply(service("llm", 1, roles)).await;
    world.until_ready("llm").await;
    let first = world.all(&world.role_sets()).await.remove(0).name_any();
    let left = uids(&world.all(&world.pods()).await);
    world.kubectl(&[
        "delete",
        "roleset",
        &first,
        "--cascade=orphan",
        "--timeout=80s",
    ]);
    world
        .until("there is another", || async {
            let sets = world.all(&world.role_sets()).await;
            (sets.len() == 1 && sets[0].name_any() != first).then_some(())
        })
        .await;
    let pods = world
        .until("its pods are there too", || async {
            let pods = uids(&world.all(&world.pods()).await);
            (pods.len() == 8).then_some(pods)
        })
        .await;
    world.until_ready("llm").await;
    assert!(left.iter().all(|uid| pods.contains(uid)), "they stay");

    // The same of a group: its pods stay, and it is replaced.
    let labelled = format!("role-name=p,roleset-name!={first}");
    let group = world.kubectl(&["get", "podsets", "-l", &labelled, "-o", "name"]);
    world.kubectl(&["delete", group.trim(), "--cascade=orphan", "--timeout=80s"]);
    world
        .until("its pods are replaced", || async {
            (world.all(&world.pods()).await.len() == 10).then_some(())
        })
        .await;
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    let still = uids(&world.all(&world.pods()).await);
    assert_eq!(still.len(), 6, "the service took its own alone");
    assert!(left.iter().all(|uid| still.contains(uid)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_whose_label_is_taken_off_is_released_and_replaced() {
    let world = World::new(cluster_or_skip!(), "release").await;
    let _controller = world.controller();
    let stateful = role_with("s", 1, "i", json!({"stateful": true}));
    world
        .apply(service("llm", 1, json!([role("a", 2, "i"), stateful])))
        .await;
    world.until_ready("llm").await;
    let mut released = Vec::new();
    // The one that stands for the RoleSet before an autoscaler is no more that one either.
    let mark = "control.kvtide.io/scaling-target";
    for (role, number) in [("a", 2), ("s", 1)] {
        let mut pods = world.pods_of(role).await;
        pods.sort_by_key(|pod| !pod.labels().contains_key(mark));
        let pod = pods.remove(0);
        world.kubectl(&["label", "pod", &pod.name_any(), "role-name-"]);
        world
            .until("it is replaced", || async {
                (world.pods_of(role).await.len() == number).then_some(())
            })
            .await;
        world.until_ready("llm").await;
        released.push(pod);
    }
    world.until_quiet().await;
    for pod in &released {
        let now = world.pods().get(&pod.name_any()).await.unwrap();
        assert_eq!(now.uid(), pod.uid());
        assert_eq!(now.metadata.owner_references, None);
        assert_eq!(now.metadata.deletion_timestamp, None);
        assert!(!now.labels().contains_key(mark), "{:?}", now.labels());
    }
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    let still = uids(&world.all(&world.pods()).await);
    assert_eq!(still, uids(&released), "they are nobody's");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreground_deletion_leaves_nothing() {
    let world = World::new(cluster_or_skip!(), "foreground").await;
    let _controller = world.controller();
    let roles = json!([
        role("a", 2, "i"),
        role_with("p", 2, "i", json!({"podGroupSize": 2})),
    ]);
    world.apply(service("llm", 2, roles)).await;
    world.until_ready("llm").await;
    let foreground = "--cascade=foreground";
    let set = world.all(&world.role_sets()).await.remove(0);
    world.kubectl(&[
        "delete",
        "roleset",
        &set.name_any(),
        foreground,
        "--timeout=80s",
    ]);
    world
        .until("it was made again", || async {
            (world.all(&world.pods()).await.len() == 12).then_some(())
        })
        .await;
    world.kubectl(&["delete", "stormservice", "llm", foreground, "--timeout=80s"]);
    let kinds = "rolesets,podsets,pods,services,controllerrevisions";
    assert_eq!(world.kubectl(&["get", kinds, "-o", "name"]).trim(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_of_the_same_name_takes_over_what_was_left_behind() {
    let world = World::new(cluster_or_skip!(), "again").await;
    let _controller = world.controller();
    let object = || {
        let group = role_with("p", 1, "i", json!({"podGroupSize": 2}));
        service("llm", 2, json!([role("a", 2, "i"), group]))
    };
    world.apply(object()).await;
    world.until_ready("llm").await;
    let (pods, sets) = (
        uids(&world.all(&world.pods()).await),
        uids(&world.all(&world.role_sets()).await),
    );
    let uid_of = |kind: &str, name: &str| {
        world.kubectl(&["get", kind, name, "-o", "jsonpath={.metadata.uid}"])
    };
    let headless = uid_of("service", "llm");
    let orphan = "--cascade=orphan";
    world.kubectl(&["delete", "stormservice", "llm", orphan, "--timeout=80s"]);
    world.apply(object()).await;
    world.until_ready("llm").await;
    world.until_quiet().await;
    assert_eq!(uids(&world.all(&world.role_sets()).await), sets);
    assert_eq!(
        uids(&world.all(&world.pods()).await),
        pods,
        "no pod is there twice"
    );
    assert_eq!(uid_of("service", "llm"), headless);
    let owner = "jsonpath={.items[*].metadata.ownerReferences[*].uid}";
    let now = uid_of("stormservice", "llm");
    for kind in ["services", "controllerrevisions"] {
        assert_eq!(
            world.kubectl(&["get", kind, "-o", owner]).trim(),
            now,
            "{kind}"
        );
    }
    let events = world.events("StormService", "llm");
    assert!(
        events.iter().any(|(reason, _)| reason == "Adopted"),
        "{events:?}"
    );

    // What was taken over rolls and goes as its own.
    let mut changed = object();
    changed["spec"]["template"]["spec"]["roles"][0] = role("a", 2, "j");
    world.apply(changed).await;
    world.until_ready("llm").await;
    assert_eq!(uids(&world.all(&world.role_sets()).await), sets);
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    let kinds = "rolesets,podsets,pods,services,controllerrevisions";
    assert_eq!(world.kubectl(&["get", kinds, "-o", "name"]).trim(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revisions_that_a_stateful_set_left_behind_are_not_taken_over() {
    let world = World::new(cluster_or_skip!(), "revisions").await;
    let _controller = world.controller();
    let object = || service("llm", 1, json!([role("a", 1, "i")]));
    world.apply(object()).await;
    world.until_ready("llm").await;
    let orphan = "--cascade=orphan";
    world.kubectl(&["delete", "stormservice", "llm", orphan, "--timeout=80s"]);
    let data =
        json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}});
    let foreign = json!({"apiVersion": "apps/v1", "kind": "ControllerRevision",
        "metadata": {"name": "llm-foreign", "labels": {"name": "llm"}}, "data": data, "revision": 1});
    world.apply(foreign).await;
    world.apply(object()).await;
    world.until_ready("llm").await;
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    let left = world.kubectl(&["get", "controllerrevisions", "-o", "name"]);
    assert_eq!(left.trim(), "controllerrevision.apps/llm-foreign");
}
