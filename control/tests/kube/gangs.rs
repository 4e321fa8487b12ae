//! PodGroups of the three schedulers, with and without their kinds installed. The kinds here take
//! anything; the schedulers themselves do not run.

use kube::ResourceExt;
use kube::api::{Api, ApiResource, DynamicObject, ObjectMeta};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::world::{Controller, World, condition, pod_group_crd, role, role_with, service, uids};

const KINDS: [(&str, &str); 3] = [
    ("scheduling.godel.kubewharf.io", "v1alpha1"),
    ("scheduling.x-k8s.io", "v1alpha1"),
    ("scheduling.volcano.sh", "v1beta1"),
];

const FLAGS: [&str; 2] = [
    "--leader-elect=false",
    "--coscheduling-scheduler-name=gang-scheduler",
];

fn ganged(name: &str, strategy: &Value) -> Value {
    let roles = json!([
        role("router", 1, "i"),
        role_with("p", 2, "i", json!({"podGroupSize": 2}))
    ]);
    let mut service = service(name, 1, roles);
    service["spec"]["template"]["spec"]["schedulingStrategy"] = strategy.clone();
    service
}

async fn groups(world: &World, (group, version): (&str, &str)) -> Vec<DynamicObject> {
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, "PodGroup"));
    let api: Api<DynamicObject> =
        Api::namespaced_with(world.client.clone(), &world.namespace, &kind);
    world.all(&api).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_are_ganged_where_the_scheduler_is_installed_and_run_without_where_not() {
    let world = World::alone(cluster_or_skip!(), "gangs").await;
    let mut controller = world.controller();
    world
        .apply(ganged("none", &json!({"godelSchedulingStrategy": {}})))
        .await;
    world.until_ready("none").await;
    let set = world.all(&world.role_sets()).await.pop().unwrap();
    let conditions = set.status.unwrap().conditions;
    assert_eq!(condition(&conditions, "PodGroupUnavailable"), Some(true));
    for pod in world.all(&world.pods()).await {
        assert!(
            !pod.labels()
                .contains_key("godel.bytedance.com/pod-group-name")
        );
        assert_eq!(
            pod.spec.unwrap().scheduler_name.as_deref(),
            Some("default-scheduler")
        );
    }
    let events = world.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
    assert!(events.contains("PodGroupUnavailable"), "{events}");
    world.kubectl(&["delete", "stormservice", "none", "--timeout=80s"]);
    controller.kill();

    too_late(&world).await;
    let mut controller = world.controller_with(&FLAGS);
    whole_role_set(&world, &mut controller).await;
    each_pod_set(&world).await;
    not_ours(&world).await;
}

fn install(world: &World) {
    for (group, version) in KINDS {
        let file = world.cluster.home().join(format!("{group}.json"));
        std::fs::write(&file, pod_group_crd(group, version).to_string()).unwrap();
        world.kubectl(&["apply", "-f", file.to_str().unwrap()]);
        let crd = format!("crd/podgroups.{group}");
        world.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &crd]);
    }
}

fn volcano_group(meta: &ObjectMeta) -> Option<&String> {
    meta.annotations
        .as_ref()?
        .get("scheduling.k8s.io/group-name")
}

/// The kind is installed while pods run: what replaces them joins a gang that asks for each by itself, or
/// it would wait for them for ever. What is made as a whole is ganged, and so is all once it rolled.
async fn too_late(world: &World) {
    let mut controller = world.controller();
    world
        .apply(ganged("late", &json!({"volcanoSchedulingStrategy": {}})))
        .await;
    world.until_ready("late").await;
    install(world);
    world
        .until("it is noticed", || async {
            let set = world.all(&world.role_sets()).await.pop()?;
            let conditions = set.status?.conditions;
            let condition = conditions
                .iter()
                .find(|condition| condition.kind == "PodGroupUnavailable")?;
            (condition.reason == "PodsOutside").then_some(())
        })
        .await;
    let first = world.all(&world.role_sets()).await[0].name_any();
    let doomed = world.pods_of("router").await.remove(0);
    world.kubectl(&["delete", "pod", &doomed.name_any(), "--wait=false"]);
    world
        .until("the router is replaced", || async {
            let router = world.pods_of("router").await;
            (router.len() == 1 && router[0].uid() != doomed.uid()).then_some(())
        })
        .await;
    world.until_ready("late").await;
    world.kubectl(&["scale", "stormservice/late", "--replicas=2"]);
    world.until_ready("late").await;
    for pod in world.all(&world.pods()).await {
        let set = &pod.labels()["roleset-name"];
        let inside = *set != first || pod.labels()["role-name"] == "router";
        let expected = inside.then_some(set);
        assert_eq!(volcano_group(&pod.metadata), expected, "{}", pod.name_any());
    }
    let asked = async || {
        let found = groups(world, KINDS[2]).await;
        let asked = |group: &DynamicObject| {
            (
                group.name_any() == first,
                group.data["spec"]["minMember"].as_i64(),
            )
        };
        let mut asked: Vec<_> = found.iter().map(asked).collect();
        asked.sort_unstable();
        asked
    };
    assert_eq!(asked().await, [(false, Some(5)), (true, Some(1))]);
    let mut rolled = ganged("late", &json!({"volcanoSchedulingStrategy": {}}));
    rolled["spec"]["replicas"] = json!(2);
    for role in 0..2 {
        rolled["spec"]["template"]["spec"]["roles"][role]["template"]["spec"]["containers"][0]["image"] =
            json!("j");
    }
    world.apply(rolled).await;
    world.until_ready("late").await;
    world
        .until("none is outside", || async {
            let all = asked().await;
            all.iter().all(|(_, asks)| *asks == Some(5)).then_some(())
        })
        .await;
    for pod in world.all(&world.pods()).await {
        let set = &pod.labels()["roleset-name"];
        assert_eq!(
            volcano_group(&pod.metadata),
            Some(set),
            "{}",
            pod.name_any()
        );
    }
    world.kubectl(&["delete", "stormservice", "late", "--timeout=80s"]);
    controller.kill();
}

/// A PodGroup that is somebody else's is not touched, and says so.
async fn not_ours(world: &World) {
    let coscheduling = json!({"coschedulingSchedulingStrategy": {}});
    let mut none = ganged("llm", &coscheduling);
    none["spec"]["replicas"] = json!(0);
    world.apply(none).await;
    let uid = world.services().get("llm").await.unwrap().uid().unwrap();
    let name = kvtide_control_core::names::role_set("llm", &uid, 0, 0);
    world
        .apply(json!({
            "apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup",
            "metadata": {"name": name}, "spec": {"minMember": 42},
        }))
        .await;
    world.apply(ganged("llm", &coscheduling)).await;
    world
        .until("it says so", || async {
            let set = world.role_sets().get_opt(&name).await.ok()??;
            let conditions = set.status?.conditions;
            let failure = conditions
                .iter()
                .find(|condition| condition.kind == "ReplicaFailure")?;
            failure.message.contains("somebody else").then_some(())
        })
        .await;
    assert_eq!(world.all(&world.pods()).await.len(), 0);
    let found = groups(world, KINDS[1]).await;
    assert_eq!(found[0].data["spec"]["minMember"], 42);
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    assert_eq!(groups(world, KINDS[1]).await.len(), 1, "nor deleted");
}

/// One PodGroup for the RoleSet, by each scheduler in turn.
async fn whole_role_set(world: &World, controller: &mut Controller) {
    let table = [
        ("godelSchedulingStrategy", KINDS[0], "godel-scheduler"),
        ("coschedulingSchedulingStrategy", KINDS[1], "gang-scheduler"),
        ("volcanoSchedulingStrategy", KINDS[2], "volcano"),
    ];
    for (strategy, kind, scheduler) in table {
        world.apply(ganged("llm", &json!({strategy: {}}))).await;
        world.until_ready("llm").await;
        let set = world
            .all(&world.role_sets())
            .await
            .pop()
            .unwrap()
            .name_any();
        let found = groups(world, kind).await;
        assert_eq!(found.len(), 1, "{strategy}");
        assert_eq!(found[0].name_any(), set);
        assert_eq!(
            found[0].data["spec"]["minMember"], 5,
            "one router and two groups of two"
        );
        let pods = world.all(&world.pods()).await;
        assert_eq!(pods.len(), 5);
        for pod in pods {
            let key = match strategy {
                "godelSchedulingStrategy" => pod.labels().get("godel.bytedance.com/pod-group-name"),
                "coschedulingSchedulingStrategy" => {
                    pod.labels().get("scheduling.x-k8s.io/pod-group")
                }
                _ => pod.annotations().get("scheduling.k8s.io/group-name"),
            };
            assert_eq!(key, Some(&set), "{strategy}");
            let task = pod.annotations().get("volcano.sh/task-spec");
            let role = pod.labels().get("role-name");
            assert!(
                strategy != "volcanoSchedulingStrategy" || task == role,
                "{task:?}"
            );
            assert_eq!(pod.spec.unwrap().scheduler_name.as_deref(), Some(scheduler));
        }
        // Scaling a role changes what must fit at once; no pod is touched for it.
        let mut scaled = ganged("llm", &json!({strategy: {}}));
        scaled["spec"]["template"]["spec"]["roles"][0]["replicas"] = json!(3);
        world.apply(scaled).await;
        // Whoever goes on where this one was killed finds a PodGroup that is changed, or not yet.
        world
            .until("the change has begun", || async {
                let set = world.all(&world.role_sets()).await.pop()?;
                (set.spec.roles[0].replicas == Some(3)).then_some(())
            })
            .await;
        controller.kill();
        *controller = world.controller_with(&FLAGS);
        world
            .until("the PodGroup follows", || async {
                (groups(world, kind).await[0].data["spec"]["minMember"] == 7).then_some(())
            })
            .await;
        world.until_ready("llm").await;
        // One that somebody deletes is made again.
        let pods = uids(&world.all(&world.pods()).await);
        let lost = groups(world, kind).await[0].uid();
        let plural = format!("podgroups.{}", kind.0);
        world.kubectl(&["delete", &plural, &set]);
        world
            .until("the PodGroup is there again", || async {
                let found = groups(world, kind).await;
                let found = found.first()?;
                let same = found.data["spec"]["minMember"] == 7;
                (found.uid() != lost && same).then_some(())
            })
            .await;
        assert_eq!(uids(&world.all(&world.pods()).await), pods);
        world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
        assert_eq!(
            groups(world, kind).await.len(),
            0,
            "{strategy}: its PodGroup goes with it"
        );
    }
}

/// One PodGroup for each PodSet.
async fn each_pod_set(world: &World) {
    let volcano = json!({"volcanoSchedulingStrategy": {"queue": "q"}});
    let fields = json!({"podGroupSize": 3, "schedulingStrategy": volcano});
    world
        .apply(service("llm", 1, json!([role_with("p", 2, "i", fields)])))
        .await;
    world.until_ready("llm").await;
    let found = groups(world, KINDS[2]).await;
    let mut names: Vec<String> = found.iter().map(ResourceExt::name_any).collect();
    names.sort();
    let mut sets: Vec<String> = world
        .all(&world.pod_sets())
        .await
        .iter()
        .map(ResourceExt::name_any)
        .collect();
    sets.sort();
    assert_eq!(names, sets);
    assert_eq!(found[0].data["spec"], json!({"minMember": 3, "queue": "q"}));
    for pod in world.all(&world.pods()).await {
        let set = &pod.labels()["stormservice.orchestration.aibrix.ai/podset-name"];
        assert_eq!(
            pod.annotations().get("scheduling.k8s.io/group-name"),
            Some(set)
        );
        assert_eq!(pod.spec.unwrap().scheduler_name.as_deref(), Some("volcano"));
    }
    // What is taken out of the strategy goes from PodGroups that exist; no pod is touched for it.
    let pods = uids(&world.all(&world.pods()).await);
    let volcano = json!({"volcanoSchedulingStrategy": {}});
    let fields = json!({"podGroupSize": 3, "schedulingStrategy": volcano});
    world
        .apply(service("llm", 1, json!([role_with("p", 2, "i", fields)])))
        .await;
    world
        .until("the queue is gone", || async {
            let found = groups(world, KINDS[2]).await;
            let alone = json!({"minMember": 3});
            found
                .iter()
                .all(|group| group.data["spec"] == alone)
                .then_some(())
        })
        .await;
    assert_eq!(uids(&world.all(&world.pods()).await), pods);
    world.kubectl(&["delete", "stormservice", "llm", "--timeout=80s"]);
    assert_eq!(groups(world, KINDS[2]).await.len(), 0);
}
