//! A RoleSet as its StormService wants it.

use std::collections::{BTreeMap, HashSet};

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int;
use kvtide_control_api::target::Target;
use kvtide_control_api::{
    GROUP, RoleSet, RoleSetSpec, RoleSetTemplate, RoleSpec, RolloutBudget, StormService,
    UpdateType, VERSION, keys,
};
use serde_json::{Value, json};

use super::budget::Budget;
use super::canonical::canonical;
use super::names;

/// Candidates for a RoleSet's name.
const NAMES_MAX: u32 = 1 << 20;

/// Labels or annotations.
pub type Marks = BTreeMap<String, String>;

/// Replicas by role.
pub type ReplicaCounts = BTreeMap<String, i32>;

/// The spec of a RoleSet of this StormService: the template's, with the present replica counts, and
/// where RoleSets may not be missing, roles that surge.
#[must_use]
pub fn set_spec(service: &StormService, template: &RoleSetTemplate) -> RoleSetSpec {
    let spec = template.spec.clone().unwrap_or_default();
    let mut spec = with_present_replicas(service, spec);
    let strategy = service.spec.update_strategy.clone().unwrap_or_default();
    let replicas = service.spec.replicas.unwrap_or(1);
    let budget = Budget::resolve(&strategy.budget, replicas).ok();
    let rolling = strategy.kind.unwrap_or_default() == UpdateType::RollingUpdate;
    let surges = |budget: &Budget| rolling && budget.unavailable == 0 && replicas > 0;
    let Some(budget) = budget.filter(surges) else {
        return spec;
    };
    for role in &mut spec.roles {
        let written = role.update_strategy.as_ref();
        if written.is_none_or(|own| own.max_surge.is_none() && own.max_unavailable.is_none()) {
            role.update_strategy = Some(RolloutBudget {
                max_surge: Some(Int(budget.surge)),
                max_unavailable: Some(Int(0)),
            });
        }
    }
    spec
}

/// A spec with the replica counts that the StormService has now.
fn with_present_replicas(service: &StormService, mut spec: RoleSetSpec) -> RoleSetSpec {
    for role in &mut spec.roles {
        if let Some(present) = present_role(service, &role.name) {
            role.replicas = present.replicas;
        }
    }
    spec
}

/// The spec of a RoleSet of an older revision, whose turn has not come: with the replica counts of roles
/// that were scaled since the present revision came, when they had those of `arrived`. A count that came
/// with the revision waits with the rest of it.
#[must_use]
pub fn with_scaled_replicas(
    service: &StormService,
    arrived: &ReplicaCounts,
    mut spec: RoleSetSpec,
) -> RoleSetSpec {
    for role in &mut spec.roles {
        let present = present_role(service, &role.name);
        let scaled = present.filter(|role| arrived.get(&role.name) != Some(&replicas_of(role)));
        if let Some(present) = scaled {
            role.replicas = present.replicas;
        }
    }
    spec
}

fn present_role<'a>(service: &'a StormService, name: &str) -> Option<&'a RoleSpec> {
    let spec = service.spec.template.spec.as_ref()?;
    spec.roles.iter().find(|role| role.name == name)
}

fn replicas_of(role: &RoleSpec) -> i32 {
    role.replicas.unwrap_or(1)
}

/// How many replicas each role of a template is to have.
#[must_use]
pub fn replica_counts(template: &RoleSetTemplate) -> ReplicaCounts {
    let roles = template.spec.iter().flat_map(|spec| &spec.roles);
    roles
        .map(|role| (role.name.clone(), replicas_of(role)))
        .collect()
}

/// Of the counts that came with a revision, those that still wait with it. A role that was scaled since
/// waits no more, also if it comes back to that number.
#[must_use]
pub fn still_waiting(mut arrived: ReplicaCounts, template: &RoleSetTemplate) -> ReplicaCounts {
    let present = replica_counts(template);
    arrived.retain(|role, count| present.get(role) == Some(count));
    arrived
}

/// Brings labels or annotations to those of another revision. What the `former` template gave goes,
/// unless somebody gave it another value since; what others added stays.
pub fn renew(present: &mut Option<Marks>, former: Option<&Marks>, wanted: Marks) {
    let present = present.get_or_insert_default();
    present.retain(|key, value| former.and_then(|former| former.get(key)) != Some(value));
    present.extend(wanted);
}

/// Labels and annotations of a RoleSet of a revision.
#[must_use]
pub fn set_marks(
    service: &StormService,
    template: &RoleSetTemplate,
    revision: &str,
) -> (Marks, Marks) {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    let metadata = template.metadata.clone().unwrap_or_default();
    let mut labels = metadata.labels.unwrap_or_default();
    labels.insert(keys::STORM_SERVICE_NAME.into(), name.to_owned());
    labels.insert(keys::STORM_SERVICE_REVISION.into(), revision.to_owned());
    let mut annotations = metadata.annotations.unwrap_or_default();
    annotations.insert(keys::ROLE_SET_REVISION.into(), revision.to_owned());
    (labels, annotations)
}

/// A new RoleSet at an index. `taken` are names that it cannot have.
///
/// # Errors
///
/// When the template cannot be written as JSON.
pub fn build(
    service: &StormService,
    target: &Target,
    index: i32,
    taken: &HashSet<String>,
    template: &RoleSetTemplate,
    revision: &str,
) -> serde_json::Result<Value> {
    let name = (0..NAMES_MAX)
        .map(|nth| names::role_set(&target.name, &target.uid, index, nth))
        .find(|candidate| !taken.contains(candidate));
    let (labels, mut annotations) = set_marks(service, template, revision);
    annotations.insert(keys::ROLE_SET_INDEX.into(), index.to_string());
    annotations.insert(keys::ADOPTED_HASHES.into(), "{}".into());
    let spec = serde_json::to_value(set_spec(service, template))?;
    Ok(json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "RoleSet",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [target.owner_ref],
            "finalizers": [keys::ROLE_SET_FINALIZER],
        },
        "spec": spec,
    }))
}

/// Whether one has to be written for the other: not for what the API server fills in, nor for what
/// Go's JSON leaves out.
#[must_use]
pub fn differs(left: &RoleSet, right: &RoleSet) -> bool {
    let form = |set: &RoleSet| {
        let mut spec = serde_json::to_value(&set.spec).unwrap_or_default();
        // The API server fills it in.
        if spec.get("updateStrategy").is_none() {
            spec["updateStrategy"] = json!("Sequential");
        }
        for role in spec
            .pointer_mut("/roles")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if role.get("replicas").is_none() {
                role["replicas"] = json!(1);
            }
        }
        canonical(&spec)
    };
    left.metadata.labels != right.metadata.labels
        || left.metadata.annotations != right.metadata.annotations
        || left.spec != right.spec && form(left) != form(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(strategy: &Value, roles: &Value) -> StormService {
        let spec = json!({
            "replicas": 2, "selector": {}, "updateStrategy": strategy,
            "template": {"metadata": {"labels": {"app": "llm"}}, "spec": {"roles": roles}},
        });
        StormService::new("llm", serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn roles_surge_where_role_sets_may_not_be_missing() {
        let own = json!({"maxUnavailable": 2});
        let surge = json!({"maxSurge": 1, "maxUnavailable": 0});
        // The StormService's strategy, the role's, and what the RoleSet's role gets.
        let table = [
            (json!({}), Value::Null, Value::Null),
            (json!({"maxSurge": 1}), Value::Null, surge.clone()),
            (json!({"maxSurge": 1}), json!({}), surge),
            (json!({"maxSurge": 1}), own.clone(), own),
            (
                json!({"maxSurge": 1, "maxUnavailable": 1}),
                Value::Null,
                Value::Null,
            ),
            (
                json!({"type": "InPlaceUpdate", "maxSurge": 1}),
                Value::Null,
                Value::Null,
            ),
        ];
        for (strategy, of_role, expected) in table {
            let role = json!({"name": "a", "updateStrategy": of_role});
            let service = service(&strategy, &json!([role]));
            let spec = set_spec(&service, &service.spec.template);
            let got = serde_json::to_value(&spec.roles[0].update_strategy).unwrap();
            assert_eq!(got, expected, "{strategy} {of_role}");
        }
    }

    #[test]
    fn an_older_revision_follows_scaling_alone() {
        let service = service(
            &json!({}),
            &json!([{"name": "a", "replicas": 5}, {"name": "b"}]),
        );
        let old = json!({"roles": [
            {"name": "a", "replicas": 2, "stateful": true}, {"name": "b", "replicas": 3},
            {"name": "gone", "replicas": 4},
        ]});
        // What the roles had when the present revision came, and what an older RoleSet asks for now.
        let table = [
            ("came with the revision", json!({"a": 5, "b": 1}), [2, 3, 4]),
            ("was scaled since", json!({"a": 3, "b": 1}), [5, 3, 4]),
            ("to what a default says", json!({"a": 5, "b": 3}), [2, 1, 4]),
            ("is not known", json!({}), [5, 1, 4]),
        ];
        for (name, arrived, expected) in table {
            let arrived = serde_json::from_value(arrived).unwrap();
            let old = serde_json::from_value(old.clone()).unwrap();
            let spec = with_scaled_replicas(&service, &arrived, old);
            let replicas: Vec<i32> = spec.roles.iter().map(replicas_of).collect();
            assert_eq!(replicas, expected, "{name}");
            assert!(spec.roles[0].stateful, "{name}: it keeps the rest");
        }
    }

    #[test]
    fn a_role_that_was_scaled_does_not_wait_again_when_it_comes_back_to_its_number() {
        let with = |a: i32| {
            let roles = json!([{"name": "a", "replicas": a}, {"name": "b"}]);
            service(&json!({}), &roles)
        };
        let replicas = |service: &StormService, arrived: &ReplicaCounts| -> Vec<i32> {
            let outdated =
                json!({"roles": [{"name": "a", "replicas": 1}, {"name": "b", "replicas": 3}]});
            let outdated = serde_json::from_value(outdated).unwrap();
            let spec = with_scaled_replicas(service, arrived, outdated);
            spec.roles.iter().map(replicas_of).collect()
        };
        let mut arrived = replica_counts(&with(2).spec.template);
        for (scaled_to, expected) in [(2, [1, 3]), (3, [3, 3]), (2, [2, 3])] {
            let service = with(scaled_to);
            arrived = still_waiting(arrived, &service.spec.template);
            assert_eq!(replicas(&service, &arrived), expected, "{scaled_to}");
        }
    }

    #[test]
    fn what_a_template_no_longer_gives_goes_and_what_others_gave_stays() {
        let marks = |pairs: &[(&str, &str)]| -> Marks {
            let pairs = pairs.iter();
            pairs
                .map(|&(key, value)| (key.into(), value.into()))
                .collect()
        };
        let former = marks(&[("app", "llm"), ("team", "a"), ("tier", "x"), ("kept", "1")]);
        let mut present = former.clone();
        present.extend(marks(&[("tier", "theirs"), ("cost-centre", "7")]));
        let mut present = Some(present);
        renew(
            &mut present,
            Some(&former),
            marks(&[("app", "llm"), ("kept", "2")]),
        );
        let expected = marks(&[
            ("app", "llm"),
            ("tier", "theirs"),
            ("cost-centre", "7"),
            ("kept", "2"),
        ]);
        assert_eq!(present, Some(expected));
        renew(&mut present, None, marks(&[("new", "1")]));
        assert_eq!(
            present.map(|marks| marks.len()),
            Some(5),
            "of no known revision nothing goes"
        );
    }

    #[test]
    fn only_what_means_something_else_is_written() {
        let set = |spec: Value| RoleSet::new("r", serde_json::from_value(spec).unwrap());
        let plain = set(json!({"roles": [{"name": "a"}]}));
        let filled = json!({"updateStrategy": "Sequential", "roles": [
            {"name": "a", "replicas": 1, "updateStrategy": {}, "template": {"metadata": {}}}]});
        assert!(!differs(&plain, &set(filled)));
        assert!(differs(
            &plain,
            &set(json!({"roles": [{"name": "a", "replicas": 0}]}))
        ));
        let mut labelled = plain.clone();
        labelled.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
        assert!(differs(&plain, &labelled));
    }

    #[test]
    fn a_role_set_says_whose_it_is_and_of_which_revision() {
        let service = service(&json!({}), &json!([]));
        let (labels, annotations) = set_marks(&service, &service.spec.template, "llm-1");
        assert_eq!(labels["app"], "llm");
        assert_eq!(labels[keys::STORM_SERVICE_NAME], "llm");
        assert_eq!(labels[keys::STORM_SERVICE_REVISION], "llm-1");
        assert_eq!(annotations[keys::ROLE_SET_REVISION], "llm-1");
    }
}
