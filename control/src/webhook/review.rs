//! What a request alone tells: pure.

use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, Operation};
use kvtide_control_api::{RoleSetSpec, StormServiceSpec, keys};
use kvtide_control_core::validate::{self, Violation};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What is said to a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Why it is refused, if it is.
    pub(super) violations: Vec<Violation>,
    /// What its author should know; `kubectl` prints it.
    pub(super) warnings: Vec<String>,
}

impl Verdict {
    /// Both together.
    pub(super) fn join(&mut self, other: Self) {
        self.violations.extend(other.violations);
        self.warnings.extend(other.warnings);
    }

    fn refused(path: &str, message: String) -> Self {
        let violation = Violation {
            path: path.to_owned(),
            message,
        };
        Self {
            violations: vec![violation],
            warnings: Vec::new(),
        }
    }
}

/// A spec of one of our kinds that somebody writes or changes.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Written {
    /// Of a StormService, and what it was before.
    StormService(Box<StormServiceSpec>, Option<Box<StormServiceSpec>>),
    /// Of a RoleSet, and what it was before.
    RoleSet(Box<RoleSetSpec>, Option<Box<RoleSetSpec>>),
}

/// The spec that a request writes. None where it is not ours, does not change, or goes.
///
/// # Errors
///
/// When the types cannot hold it.
pub(super) fn written(
    request: &AdmissionRequest<DynamicObject>,
) -> Result<Option<Written>, serde_json::Error> {
    let Some(object) = &request.object else {
        return Ok(None);
    };
    let old = request.old_object.as_ref();
    let old = old.and_then(|old| old.data.get("spec"));
    let spec = object.data.get("spec").cloned().unwrap_or_default();
    let unchanged = request.operation == Operation::Update && old == Some(&spec);
    if unchanged || object.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    Ok(match request.kind.kind.as_str() {
        "StormService" => Some(Written::StormService(
            serde_json::from_value(spec)?,
            read(old),
        )),
        "RoleSet" => Some(Written::RoleSet(serde_json::from_value(spec)?, read(old))),
        _ => None,
    })
}

/// What is stored is not complained about: where it cannot be read, all of the new one is looked at.
fn read<T: DeserializeOwned>(old: Option<&Value>) -> Option<T> {
    serde_json::from_value(old?.clone()).ok()
}

/// Everything that can be said without asking anybody.
pub(super) fn look_at(request: &AdmissionRequest<DynamicObject>) -> Verdict {
    let name = &request.name;
    let mut verdict = match written(request) {
        Ok(Some(Written::StormService(spec, old))) => {
            let mut violations = validate::stormservice(name, &spec);
            violations.extend(validate::group_names(name, &spec, old.as_deref()));
            let template = spec.template.spec.unwrap_or_default();
            Verdict {
                violations,
                warnings: validate::doubts(&template, "spec.template.spec"),
            }
        }
        Ok(Some(Written::RoleSet(spec, _))) => Verdict {
            violations: validate::role_set(name, &spec),
            warnings: validate::doubts(&spec, "spec"),
        },
        Ok(None) => Verdict::default(),
        Err(error) => Verdict::refused("spec", error.to_string()),
    };
    if asks_for_sidecar(request) {
        verdict.warnings.push(validate::SIDECAR_NOT_INJECTED.into());
    }
    verdict
}

/// Whether a StormService is made with the annotation that asks for AIBrix's sidecar, or given it, or
/// changed while it has it.
fn asks_for_sidecar(request: &AdmissionRequest<DynamicObject>) -> bool {
    let asks = |object: &DynamicObject| {
        let annotations = object.metadata.annotations.as_ref();
        annotations.is_some_and(|all| all.contains_key(keys::SIDECAR_INJECTION))
    };
    let old = request.old_object.as_ref();
    let (Some(new), "StormService") = (&request.object, request.kind.kind.as_str()) else {
        return false;
    };
    let same_spec = old.is_some_and(|old| old.data.get("spec") == new.data.get("spec"));
    asks(new) && !(same_spec && old.is_some_and(asks))
}

#[cfg(test)]
pub(super) mod tests {
    use kube::core::admission::AdmissionReview;
    use serde_json::json;

    use super::*;

    /// A request for an object of one of our kinds.
    pub(in crate::webhook) fn request(
        operation: &str,
        object: Value,
        old: Value,
    ) -> AdmissionRequest<DynamicObject> {
        let kind = object["kind"].clone();
        let kind = json!({"group": "orchestration.aibrix.ai", "version": "v1alpha1", "kind": kind});
        let plural = json!({"group": "orchestration.aibrix.ai", "version": "v1alpha1",
            "resource": "stormservices"});
        let name = object["metadata"]["name"].clone();
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {"uid": "u", "kind": kind, "resource": plural, "operation": operation,
            "name": name, "namespace": "n", "userInfo": {}, "object": object, "oldObject": old}});
        let review: AdmissionReview<DynamicObject> = serde_json::from_value(review).unwrap();
        review.try_into().unwrap()
    }

    fn is_allowed(operation: &str, object: Value, old: Value) -> bool {
        let verdict = look_at(&request(operation, object, old));
        verdict.violations.is_empty()
    }

    fn cyclic() -> Value {
        json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService",
            "metadata": {"name": "llm"}, "spec": {"selector": {},
            "template": {"spec": {"roles": [{"name": "a", "dependencies": ["b"]},
                {"name": "b", "dependencies": ["a"]}]}}}})
    }

    #[test]
    fn a_cycle_is_refused_with_its_path() {
        let denied = look_at(&request("CREATE", cyclic(), Value::Null));
        let message = validate::describe(&denied.violations);
        assert!(
            message.contains("spec.template.spec.roles: dependencies form a cycle"),
            "{message}"
        );
    }

    #[test]
    fn a_long_name_is_refused_unless_it_was_there_before() {
        let with = |roles: &[(&str, i32)]| {
            let roles: Vec<Value> = roles
                .iter()
                .map(|(name, size)| json!({"name": name, "podGroupSize": size, "replicas": 1}))
                .collect();
            json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService",
                "metadata": {"name": "llm"}, "spec": {"selector": {},
                "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"roles": roles}}}})
        };
        let long = "r".repeat(25);
        let (group, single) = (with(&[(&long, 2)]), with(&[(&long, 1)]));
        let more = with(&[(&long, 3), ("other", 1)]);
        let two = with(&[(&long, 2), (&"o".repeat(25), 2)]);
        let table = [
            ("CREATE", &group, &Value::Null, false),
            ("CREATE", &single, &Value::Null, true),
            ("UPDATE", &more, &group, true),
            ("UPDATE", &group, &single, false),
            ("UPDATE", &two, &group, false),
        ];
        for (operation, new, old, allowed) in table {
            let said = is_allowed(operation, new.clone(), old.clone());
            assert_eq!(said, allowed, "{operation} {new} after {old}");
        }
    }

    #[test]
    fn what_is_stored_already_can_still_be_finalized() {
        assert!(is_allowed("UPDATE", cyclic(), cyclic()));
        let mut going = cyclic();
        going["metadata"]["deletionTimestamp"] = json!("2030-01-01T00:00:00Z");
        assert!(is_allowed("UPDATE", going, Value::Null));
    }

    #[test]
    fn an_annotation_for_the_sidecar_is_warned_of_when_somebody_writes_it() {
        let with = |annotations: Value, replicas: i32| {
            json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService",
                "metadata": {"name": "llm", "annotations": annotations},
                "spec": {"replicas": replicas, "selector": {}, "template": {"spec": {}}}})
        };
        let asking = || json!({"model.aibrix.ai/sidecar-injection": "true"});
        let warned = |operation: &str, new: Value, old: Value| {
            let verdict = look_at(&request(operation, new, old));
            assert_eq!(verdict.violations, []);
            verdict.warnings == [validate::SIDECAR_NOT_INJECTED]
        };
        assert!(warned("CREATE", with(asking(), 1), Value::Null));
        assert!(warned("UPDATE", with(asking(), 1), with(json!({}), 1)));
        assert!(warned("UPDATE", with(asking(), 2), with(asking(), 1)));
        let metadata_alone = ("UPDATE", with(asking(), 1), with(asking(), 1));
        assert!(!warned(
            metadata_alone.0,
            metadata_alone.1,
            metadata_alone.2
        ));
        assert!(!warned("CREATE", with(json!({}), 1), Value::Null));
    }
}
