//! A PodSet, and its pods.

use kvtide_control_api::{GROUP, PodSet, PodSetSpec, RecoveryPolicy, RoleSpec, VERSION, keys};
use serde_json::{Value, json};

use super::names;
use super::pod::{self, Gang, Marks, Place};
use super::restarts::Baseline;

/// The pod at an index. What the PodSet carries is passed on; the template's own labels come first.
#[must_use]
pub fn build_pod(set: &PodSet, index: i32, gang: Option<&Gang<'_>>, owner: &Value) -> Value {
    let PodSetSpec {
        template,
        pod_group_size,
        ..
    } = &set.spec;
    let name = set.metadata.name.as_deref().unwrap_or_default();
    let mut marks = Marks::of_template(template);
    for (key, value) in set.metadata.labels.iter().flatten() {
        marks
            .labels
            .entry(key.clone())
            .or_insert_with(|| value.clone());
    }
    for (key, value) in set.metadata.annotations.iter().flatten() {
        if !key.starts_with("kubectl.kubernetes.io/") && key != keys::RESTARTS_BEFORE {
            marks
                .annotations
                .entry(key.clone())
                .or_insert_with(|| value.clone());
        }
    }
    marks
        .labels
        .insert(keys::POD_SET_NAME.into(), name.to_owned());
    marks
        .labels
        .insert(keys::POD_GROUP_INDEX.into(), index.to_string());
    let label = |key: &str| {
        set.metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(key))
    };
    let role = label(keys::ROLE_NAME).map_or("", String::as_str);
    let mut spec = template.spec();
    if let Some(gang) = gang {
        marks.gang(gang, if role.is_empty() { name } else { role });
        let unset = spec
            .get("schedulerName")
            .and_then(Value::as_str)
            .is_none_or(str::is_empty);
        if let (Some(scheduler), true) = (gang.scheduler_name, unset) {
            spec.insert("schedulerName".into(), json!(scheduler));
        }
    }
    pod::inject_environment(
        &mut spec,
        &[
            (keys::ENV_POD_SET_NAME, name.to_owned()),
            (keys::ENV_POD_GROUP_INDEX, index.to_string()),
            (keys::ENV_POD_GROUP_SIZE, pod_group_size.to_string()),
        ],
    );
    let service = label(keys::STORM_SERVICE_NAME).map_or("", String::as_str);
    pod::pod(
        &names::pod_set_pod(name, index),
        service,
        &marks,
        template,
        spec,
        owner,
    )
}

/// A PodSet that is a replica of a role. Its pods inherit its labels and annotations.
///
/// # Errors
///
/// When the template cannot be written as JSON.
pub fn build(
    name: &str,
    role: &RoleSpec,
    policy: RecoveryPolicy,
    place: &Place<'_>,
    owner: &Value,
) -> serde_json::Result<Value> {
    let mut template = role.template.clone();
    template
        .0
        .insert("spec".into(), Value::Object(place.pod_spec(&role.template)));
    let mut marks = place.marks(Marks::default());
    if policy.recreates_all() {
        let none = Baseline::default().write();
        marks.annotations.insert(keys::RESTARTS_BEFORE.into(), none);
    }
    let spec = PodSetSpec {
        pod_group_size: role.pod_group_size.unwrap_or(1),
        template,
        stateful: role.stateful,
        recovery_policy: Some(policy),
        scheduling_strategy: role.scheduling_strategy.clone(),
    };
    let spec = serde_json::to_value(spec)?;
    Ok(json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "PodSet",
        "metadata": {
            "name": name,
            "labels": marks.labels,
            "annotations": marks.annotations,
            "ownerReferences": [owner],
            "finalizers": [keys::POD_SET_FINALIZER],
        },
        "spec": spec,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvtide_control_api::Scheduler;

    fn set() -> PodSet {
        let object = json!({
            "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "PodSet",
            "metadata": {"name": "p", "labels": {"role-name": "prefill", "app": "mine",
                "storm-service-name": "llm"}, "annotations": {"note": "x",
                "kubectl.kubernetes.io/last-applied-configuration": "{}",
                (keys::RESTARTS_BEFORE): "{}"}},
            "spec": {"podGroupSize": 2, "template": {"metadata": {"labels": {"app": "llm"}},
                "spec": {"containers": [{"name": "c"}]}}},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_pod_knows_its_place_in_the_group() {
        let pod = build_pod(&set(), 1, None, &json!({"uid": "u"}));
        let (labels, annotations) = (&pod["metadata"]["labels"], &pod["metadata"]["annotations"]);
        assert_eq!(pod["metadata"]["name"], "p-1");
        assert_eq!(labels[keys::POD_GROUP_INDEX], "1");
        assert_eq!(labels["role-name"], "prefill", "passed on");
        assert_eq!(labels["app"], "llm", "the template's own comes first");
        assert_eq!(
            annotations,
            &json!({"note": "x"}),
            "not what is about the set"
        );
        assert_eq!(pod["spec"]["subdomain"], "llm");
        let env = &pod["spec"]["containers"][0]["env"];
        let size = json!({"name": keys::ENV_POD_GROUP_SIZE, "value": "2"});
        assert!(env.as_array().unwrap().contains(&size), "{env}");
    }

    #[test]
    fn a_gang_names_its_scheduler_unless_the_template_does() {
        let gang = Gang {
            scheduler: Scheduler::Volcano,
            name: "p",
            scheduler_name: Some("volcano"),
        };
        let mut set = set();
        let pod = build_pod(&set, 0, Some(&gang), &json!({}));
        assert_eq!(pod["spec"]["schedulerName"], "volcano");
        assert_eq!(
            pod["metadata"]["annotations"][keys::VOLCANO_TASK],
            "prefill"
        );
        set.spec.template.0["spec"]["schedulerName"] = json!("own");
        let pod = build_pod(&set, 0, Some(&gang), &json!({}));
        assert_eq!(pod["spec"]["schedulerName"], "own");
    }
}
