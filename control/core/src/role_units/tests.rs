//! What is made of a RoleSet's pods and PodSets, at a given time.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::*;

const BACKOFF: Backoff = Backoff {
    first: Duration::from_secs(10),
    longest: Duration::from_secs(300),
};

fn at(second: i64) -> Time {
    Time(Timestamp::from_second(second).unwrap())
}

fn set(roles: Value, annotations: Value) -> RoleSet {
    serde_json::from_value(json!({
        "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "RoleSet",
        "metadata": {"name": "llm", "uid": "u", "annotations": annotations},
        "spec": {"roles": roles},
    }))
    .unwrap()
}

fn role(name: &str) -> Value {
    json!({"name": name, "replicas": 1, "template": {"spec": {"containers": [{"name": "c"}]}}})
}

fn hash_of(set: &RoleSet, at: usize) -> String {
    revision::role_hash(&set.spec.roles[at])
}

/// A pod of a role that was made at second 0.
fn pod(role: &str, hash: &str, status: Value) -> Seen<Arc<ObservedPod>> {
    let pod = json!({
        "metadata": {"name": format!("{role}-pod"), "uid": format!("{role}-uid"),
            "creationTimestamp": "1970-01-01T00:00:00Z",
            "labels": {keys::ROLE_NAME: role, keys::ROLE_TEMPLATE_HASH: hash}},
        "status": status,
    });
    Seen {
        object: Arc::new(serde_json::from_value(pod).unwrap()),
        going: false,
    }
}

fn ready() -> Value {
    json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]})
}

/// One that ended 20 seconds after it was made.
fn ended() -> Value {
    json!({"phase": "Failed", "containerStatuses": [{"name": "c", "state": {
        "terminated": {"finishedAt": "1970-01-01T00:00:20Z"}}}]})
}

fn built(set: &RoleSet, pods: Vec<Seen<Arc<ObservedPod>>>, now: i64) -> Built {
    let found = Found {
        pods,
        ..Found::default()
    };
    let observed = observe(set, found, &at(now), BACKOFF.longest);
    build(set, observed, &at(now), BACKOFF)
}

fn states(built: &Built, role: &str) -> Vec<ReplicaState> {
    let units = built.observed.roles[role].units.iter();
    units.map(|unit| unit.replica.state).collect()
}

#[test]
fn a_pod_that_ends_early_is_replaced_at_once_the_first_time_and_later_the_next() {
    let first = set(json!([role("decode")]), json!({}));
    let hash = hash_of(&first, 0);
    let now = built(&first, vec![pod("decode", &hash, ended())], 30);
    assert_eq!(now.replaced, ["decode"]);
    assert_eq!(states(&now, "decode"), [ReplicaState::Finished]);
    // What was noted of it is what the next look reads.
    let noted = json!({(keys::EARLY_ENDS): now.observed.early_ends.write()});
    let again = set(json!([role("decode")]), noted);
    let held = built(&again, vec![pod("decode", &hash, ended())], 31);
    assert_eq!(
        (held.held, held.replaced),
        (vec!["decode".to_owned()], vec![])
    );
    assert!(held.observed.look_again.is_some());
    let due = built(&again, vec![pod("decode", &hash, ended())], 30 + 301);
    assert_eq!(due.replaced, ["decode"]);
}

#[test]
fn a_pod_of_a_former_template_is_outdated_and_is_not_held() {
    let set = set(json!([role("decode")]), json!({}));
    let built = built(&set, vec![pod("decode", "former", ended())], 30);
    let [unit] = built.observed.roles["decode"].units.as_slice() else {
        panic!("one replica");
    };
    assert!(!unit.replica.updated);
    assert!(built.held.is_empty() && built.replaced.is_empty());
}

#[test]
fn a_role_starts_when_those_it_depends_on_are_ready_or_it_started_before() {
    let mut decode = role("decode");
    decode["dependencies"] = json!(["prefill"]);
    let roles = json!([role("prefill"), decode]);
    let may_start = |annotations: Value, pods: Vec<Seen<Arc<ObservedPod>>>| {
        let built = built(&set(roles.clone(), annotations), pods, 30);
        built.entries[1].may_start
    };
    let hash = hash_of(&set(roles.clone(), json!({})), 0);
    assert!(!may_start(json!({}), vec![]));
    assert!(!may_start(
        json!({}),
        vec![pod("prefill", &hash, json!({}))]
    ));
    assert!(may_start(json!({}), vec![pod("prefill", &hash, ready())]));
    let started = json!({(keys::STARTED_ROLES): "decode,prefill"});
    assert!(may_start(started, vec![]));
}

#[test]
fn a_replica_of_a_role_that_is_gone_is_an_orphan_unless_it_goes_already() {
    let set = set(json!([role("decode")]), json!({}));
    let stays = pod("prefill", "h", ready());
    let goes = Seen {
        going: true,
        ..stays.clone()
    };
    let released = pod("", "h", ready());
    let found = built(&set, vec![stays, goes, released], 30).observed;
    assert_eq!((found.orphans.len(), found.released.len()), (1, 1));
}

#[test]
fn a_pod_set_of_another_size_or_kind_is_outdated() {
    let mut wanted = role("decode");
    wanted["podGroupSize"] = json!(2);
    let set = set(json!([wanted]), json!({}));
    let hash = hash_of(&set, 0);
    let group = |size: i32| Seen {
        object: Ok(serde_json::from_value(json!({
            "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "PodSet",
            "metadata": {"name": "g", "labels": {keys::ROLE_NAME: "decode",
                keys::ROLE_TEMPLATE_HASH: hash}},
            "spec": {"podGroupSize": size, "template": {}},
        }))
        .unwrap()),
        going: false,
    };
    for (size, updated) in [(2, true), (3, false)] {
        let found = Found {
            groups: vec![group(size)],
            pods: vec![pod("decode", &hash, ready())],
            ..Found::default()
        };
        let observed = observe(&set, found, &at(30), BACKOFF.longest);
        let built = build(&set, observed, &at(30), BACKOFF);
        let units = built.observed.roles["decode"].units.iter();
        let updated_of = |group: bool| {
            let mut units = units.clone().filter(|unit| unit.is_group == group);
            units.next().map(|unit| unit.replica.updated)
        };
        assert_eq!(updated_of(true), Some(updated), "size {size}");
        assert_eq!(
            updated_of(false),
            Some(false),
            "a pod where groups are wanted"
        );
    }
}
