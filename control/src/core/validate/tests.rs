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
    let table: [(Value, &Value, &[String]); 9] = [
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
