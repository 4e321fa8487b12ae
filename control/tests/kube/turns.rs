//! What waits for whom amid a rollout: RoleSets for their turn, roles for those before them.

use std::collections::BTreeMap;

use kube::ResourceExt;
use serde_json::{Value, json};

use crate::cluster_or_skip;
use crate::film::{Film, Scene};
use crate::kubelet::{set_status, status};
use crate::world::{World, images, role, role_with, service, uids};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_count_that_comes_with_a_template_waits_for_the_turn_of_each_role_set() {
    // Down: capacity goes one RoleSet after the other. Up: no pod of the old template is made.
    for (from, to) in [(4, 2), (1, 3)] {
        let world = World::new(cluster_or_skip!(), "counts").await;
        let _controller = world.controller();
        let with =
            |replicas: i32, image: &str| service("llm", 4, json!([role("a", replicas, image)]));
        world.apply(with(from, "a")).await;
        world.until_ready("llm").await;
        let film = Film::start(&world).await;
        world.apply(with(to, "b")).await;
        world.until_ready("llm").await;
        let whole = |scene: &Scene| {
            let mut sets: BTreeMap<String, (i32, i32)> = BTreeMap::new();
            for pod in scene.of("a").filter(|pod| pod.ready && !pod.going) {
                let (old, new) = sets.entry(pod.role_set.clone()).or_default();
                *(if pod.image == "a" { old } else { new }) += 1;
            }
            let whole = |&&(old, new): &&(i32, i32)| old == from || new == to;
            sets.values().filter(whole).count()
        };
        for scene in film.scenes() {
            assert!(
                whole(&scene) >= 3,
                "{from} to {to}, one RoleSet at a time: {scene:?}"
            );
        }
        let made = |write: &&String| write.starts_with("create ") && write.contains("/pods?");
        let writes = world.writes();
        let made = writes.iter().filter(made).count();
        assert_eq!(
            made,
            usize::try_from(4 * (from + to)).unwrap(),
            "{from} to {to}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_is_scaled_amid_a_rollout_is_scaled_in_every_role_set() {
    let world = World::new(cluster_or_skip!(), "scaled").await;
    let _controller = world.controller();
    let with = |replicas: i32, image: &str| service("llm", 2, json!([role("a", replicas, image)]));
    world.apply(with(1, "a")).await;
    world.until_ready("llm").await;
    world.apply(with(2, "never-ready")).await;
    let count = |old: usize, new: usize| {
        let world = &world;
        async move {
            let images = images(&world.pods_of("a").await);
            let new_now = images
                .iter()
                .filter(|image| *image == "never-ready")
                .count();
            ((images.len() - new_now, new_now) == (old, new)).then_some(())
        }
    };
    // The first RoleSet takes the change: its new second pod is waited for, and so is its turn for the
    // other.
    world.until("the rollout stands", || count(2, 1)).await;
    world.until_quiet().await;
    assert!(count(2, 1).await.is_some(), "the other waits with one pod");
    world.apply(with(3, "never-ready")).await;
    world.until("both are scaled", || count(4, 2)).await;
    // And going back to the former template with another count is a change with a turn again.
    world.apply(with(1, "a")).await;
    world.until_ready("llm").await;
    assert_eq!(images(&world.pods_of("a").await), ["a", "a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_is_scaled_and_scaled_back_in_a_pause_is_scaled_in_every_role_set() {
    let world = World::new(cluster_or_skip!(), "scaledback").await;
    let _controller = world.controller();
    let with = |replicas: i32, image: &str, paused: bool| {
        let mut service = service("llm", 2, json!([role("a", replicas, image)]));
        service["spec"]["paused"] = json!(paused);
        service
    };
    let until_old = async |pods: usize| {
        let all_old = || async {
            let now = images(&world.pods_of("a").await);
            (now == vec!["a"; pods]).then_some(())
        };
        let what = format!("there are {pods} pods, of the old template");
        world.until(&what, all_old).await;
        world.until_quiet().await;
        assert_eq!(all_old().await, Some(()), "{what}");
    };
    world.apply(with(1, "a", false)).await;
    world.until_ready("llm").await;
    // Two come with the revision, and wait with it.
    world.apply(with(2, "b", true)).await;
    until_old(2).await;
    world.apply(with(3, "b", true)).await;
    until_old(6).await;
    world.apply(with(2, "b", true)).await;
    until_old(4).await;
    world.apply(with(2, "b", false)).await;
    world.until_ready("llm").await;
    assert_eq!(images(&world.pods_of("a").await), ["b"; 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn labels_and_annotations_that_the_template_no_longer_gives_leave_the_role_sets() {
    let world = World::new(cluster_or_skip!(), "marks").await;
    let _controller = world.controller();
    let with = |labels: Value, annotations: Value| {
        let mut service = service("llm", 2, json!([role("a", 1, "a")]));
        service["spec"]["template"]["metadata"] =
            json!({"labels": labels, "annotations": annotations});
        service
    };
    let full = json!({"app": "llm", "team": "x", "tier": "y"});
    world
        .apply(with(full, json!({"note": "z", "owner": "w"})))
        .await;
    world.until_ready("llm").await;
    let pods = uids(&world.pods_of("a").await);
    world.kubectl(&["label", "rolesets", "--all", "cost-centre=7"]);
    world.kubectl(&["label", "rolesets", "--all", "--overwrite", "tier=theirs"]);
    world
        .apply(with(json!({"app": "llm"}), json!({"note": "z2"})))
        .await;
    world.until_ready("llm").await;
    world.until_quiet().await;
    for set in world.all(&world.role_sets()).await {
        let (labels, annotations) = (set.labels(), set.annotations());
        assert_eq!(labels.get("team"), None, "{labels:?}");
        assert_eq!(annotations.get("owner"), None, "{annotations:?}");
        assert_eq!(annotations["note"], "z2");
        assert_eq!(
            (labels["app"].as_str(), labels["cost-centre"].as_str()),
            ("llm", "7")
        );
        assert_eq!(labels["tier"], "theirs", "somebody else's now");
    }
    assert_eq!(
        uids(&world.pods_of("a").await),
        pods,
        "no pod is replaced for it"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_with_nothing_to_roll_holds_up_no_rollback_and_one_that_rolls_is_named() {
    let world = World::new(cluster_or_skip!(), "holdup").await;
    let _controller = world.controller();
    let with = |router: &str, decode: &str| {
        let ordered = |name: &str, image: &str, order: i32| {
            role_with(name, 2, image, json!({"upgradeOrder": order}))
        };
        service(
            "llm",
            1,
            json!([ordered("router", router, 1), ordered("decode", decode, 2)]),
        )
    };
    let broken = async |role: &str| {
        let images = images(&world.pods_of(role).await);
        (images == ["a", "never-ready"]).then_some(())
    };
    world.apply(with("a", "a")).await;
    world.until_ready("llm").await;
    world.apply(with("a", "never-ready")).await;
    world
        .until("decode is broken", async || broken("decode").await)
        .await;
    // Without decode the router is not ready either.
    let router = world.pods_of("router").await;
    for pod in &router {
        let waiting = status(false, &json!({"running": {}}), 0);
        set_status(&world.client, &world.namespace, &pod.name_any(), &waiting)
            .await
            .unwrap();
    }
    world.until_quiet().await;
    world.apply(with("a", "a")).await;
    world
        .until("decode went back", || async {
            (images(&world.pods_of("decode").await) == ["a", "a"]).then_some(())
        })
        .await;
    for pod in &router {
        let running = status(true, &json!({"running": {}}), 0);
        set_status(&world.client, &world.namespace, &pod.name_any(), &running)
            .await
            .unwrap();
    }
    world.until_ready("llm").await;

    // One that rolls is waited for, and its name is told.
    world.apply(with("never-ready", "b")).await;
    world
        .until("the router is broken", async || broken("router").await)
        .await;
    let told = world.until("it is told who waits", async || {
        let status = world.all(&world.role_sets()).await.pop()?.status?;
        let mut found = status.conditions.into_iter();
        found.find(|found| found.kind == "Progressing" && found.message.contains("decode"))
    });
    let told = told.await;
    assert!(told.message.contains("until router is"), "{told:?}");
    world.until_quiet().await;
    assert_eq!(images(&world.pods_of("decode").await), ["a", "a"]);
}
