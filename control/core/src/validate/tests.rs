//! What is refused, and what is said about it.

use serde_json::{Value, json};

use super::*;

fn spec(roles: &Value, extra: &Value) -> StormServiceSpec {
    let mut role_set = json!({"roles": roles});
    for (key, value) in extra.as_object().into_iter().flatten() {
        role_set[key] = value.clone();
    }
    serde_json::from_value(json!({
        "selector": {"matchLabels": {"app": "llm"}},
        "template": {"metadata": {"labels": {"app": "llm"}}, "spec": role_set},
    }))
    .unwrap()
}

fn paths(spec: &StormServiceSpec) -> Vec<String> {
    stormservice("llm", spec)
        .into_iter()
        .map(|violation| violation.path)
        .collect()
}

#[test]
fn each_wrong_field_is_named() {
    let gang = json!({"schedulingStrategy": {"volcanoSchedulingStrategy": {}}});
    let two = json!({"volcanoSchedulingStrategy": {}, "godelSchedulingStrategy": {}});
    let none = json!({});
    let roles = "spec.template.spec.roles";
    let task = |name: &str| json!({"volcanoSchedulingStrategy": {"minTaskMember": {name: 1}}});
    let whole = json!({"schedulingStrategy": task("x")});
    let volcano = "volcanoSchedulingStrategy.minTaskMember";
    let table: [(Value, &Value, &[String]); 12] = [
        (
            json!([{"name": "a"}]),
            &whole,
            &[format!("spec.template.spec.schedulingStrategy.{volcano}")],
        ),
        (
            json!([{"name": "a", "podGroupSize": 2, "schedulingStrategy": task("b")},
                {"name": "b"}]),
            &none,
            &[format!("{roles}[0].schedulingStrategy.{volcano}")],
        ),
        (
            json!([{"name": "a", "podGroupSize": 2, "schedulingStrategy": task("a")}]),
            &none,
            &[],
        ),
        (
            json!([{"name": "a"}, {"name": "b", "dependencies": ["a"]}]),
            &none,
            &[],
        ),
        (
            json!([{"name": "a", "dependencies": ["x"]}]),
            &none,
            &[format!("{roles}[0].dependencies")],
        ),
        (
            json!([{"name": "a", "dependencies": ["b"]}, {"name": "b", "dependencies": ["a"]}]),
            &none,
            &[roles.into()],
        ),
        (
            json!([{"name": "a", "dependencies": ["a"]}]),
            &none,
            &[roles.into()],
        ),
        (
            json!([{"name": "a"}, {"name": "b", "dependencies": ["a"]}]),
            &gang,
            &[format!("{roles}[1].dependencies")],
        ),
        (
            json!([{"name": "a", "schedulingStrategy": two}]),
            &none,
            &[format!("{roles}[0].schedulingStrategy")],
        ),
        (
            json!([{"name": "a", "podGroupSize": 101}]),
            &none,
            &[format!("{roles}[0].podGroupSize")],
        ),
        (
            json!([{"name": "a"}, {"name": "a"}]),
            &none,
            &[format!("{roles}[1].name")],
        ),
        (
            json!([{"name": "a", "updateStrategy": {"maxSurge": "x"}}]),
            &none,
            &[format!("{roles}[0].updateStrategy.maxSurge")],
        ),
    ];
    for (roles, extra, expected) in table {
        assert_eq!(paths(&spec(&roles, extra)), expected, "{roles}");
    }
}

#[test]
fn names_must_leave_room_for_pods_of_groups_only() {
    let roles = json!([{"name": "prefill", "podGroupSize": 2}]);
    let long = "a".repeat(21);
    assert_eq!(group_names(&long, &spec(&roles, &json!({})), None).len(), 1);
    assert_eq!(
        group_names(&long[1..], &spec(&roles, &json!({})), None).len(),
        0
    );
    assert_eq!(
        stormservice(&long, &spec(&roles, &json!({}))),
        [],
        "a stored one goes on"
    );
    let single = json!([{"name": "prefill"}]);
    assert_eq!(
        group_names(&"a".repeat(63), &spec(&single, &json!({})), None),
        []
    );
    assert_eq!(
        stormservice(&"a".repeat(63), &spec(&single, &json!({}))).len(),
        0
    );
    assert_eq!(
        stormservice(&"a".repeat(64), &spec(&single, &json!({}))).len(),
        1
    );
}

#[test]
fn a_name_that_cannot_be_part_of_a_host_name_is_refused() {
    let spec = spec(&json!([{"name": "a"}]), &json!({}));
    let roles = spec.template.spec.clone().unwrap();
    for name in ["llm.v1", "LLM", "-a", "a-", "a_b"] {
        let of_service = stormservice(name, &spec);
        let of_role_set = role_set(name, &roles);
        assert_eq!(of_service, of_role_set, "{name}");
        assert_eq!(of_service.len(), 1, "{name}");
        assert_eq!(of_service[0].path, "metadata.name");
    }
    for name in ["llm", "7b-llm", "a"] {
        assert_eq!(stormservice(name, &spec), [], "{name}");
    }
}

#[test]
fn a_gang_that_waits_for_more_pods_than_it_has_is_doubted() {
    let doubted = |spec: Value| doubts(&serde_json::from_value(spec).unwrap(), "spec").len();
    let gang = |members: i32| json!({"godelSchedulingStrategy": {"minMember": members}});
    let whole = |members: i32| {
        doubted(json!({"schedulingStrategy": gang(members),
            "roles": [{"name": "a", "replicas": 2}, {"name": "b", "podGroupSize": 2}]}))
    };
    assert_eq!((whole(4), whole(5), whole(0)), (0, 1, 0));
    let role = |members: i32| {
        doubted(json!({"roles": [
            {"name": "a", "podGroupSize": 2, "replicas": 9, "schedulingStrategy": gang(members)}]}))
    };
    assert_eq!((role(2), role(3)), (0, 1));
}

#[test]
fn a_selector_must_match_the_template() {
    let mut wrong = spec(&json!([{"name": "a"}]), &json!({}));
    wrong.selector = serde_json::from_value(json!({"matchLabels": {"app": "other"}})).unwrap();
    assert_eq!(paths(&wrong), ["spec.selector"]);
    wrong.selector = serde_json::from_value(
        json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["llm", "x"]}]}),
    )
    .unwrap();
    assert_eq!(paths(&wrong), Vec::<String>::new());
}
