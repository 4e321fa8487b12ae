//! Revisions of a StormService's template, kept as ControllerRevisions in AIBrix's form.
//!
//! Replica counts are in the data but outside of what is compared and hashed: scaling mints no
//! revision, and going back to one undoes no scaling.

use std::collections::BTreeSet;

use kvtide_control_api::{RoleSetTemplate, RoleSpec, SchedulingStrategy};
use serde_json::{Map, Value, json};

use super::canonical::{canonical, hash_text};

/// Letters of a revision's hash.
const HASH_LENGTH: usize = 10;
/// Old revisions kept where the user gives no number.
pub const HISTORY_LIMIT_DEFAULT: i32 = 10;

/// What a ControllerRevision holds: the template as a patch that replaces it.
#[must_use]
pub fn data(template: &RoleSetTemplate) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_default();
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

/// The template in a revision's data.
///
/// # Errors
///
/// When it is not one.
pub fn template(data: &Value) -> Result<RoleSetTemplate, serde_json::Error> {
    let mut template = data["spec"]["template"].clone();
    if let Some(fields) = template.as_object_mut() {
        fields.remove("$patch");
    }
    serde_json::from_value(template)
}

/// What two revisions must share to be the same.
#[must_use]
pub fn identity(data: &Value) -> Value {
    let mut template = canonical(&data["spec"]["template"]);
    if let Some(fields) = template.as_object_mut() {
        fields.remove("$patch");
    }
    let roles = template
        .pointer_mut("/spec/roles")
        .and_then(Value::as_array_mut);
    for role in roles.into_iter().flatten().filter_map(Value::as_object_mut) {
        role.remove("replicas");
    }
    // What the API server fills in is the same as nothing.
    if let Some(spec) = template.get_mut("spec").and_then(Value::as_object_mut) {
        remove_default(spec, "updateStrategy", &json!("Sequential"));
    }
    template
}

fn remove_default(fields: &mut Map<String, Value>, key: &str, default: &Value) {
    if fields.get(key) == Some(default) {
        fields.remove(key);
    }
}

/// The hash in a revision's name. `collisions` moves it where the name is taken by other data.
#[must_use]
pub fn hash(data: &Value, collisions: i32) -> String {
    let identity = identity(data).to_string();
    let text = if collisions == 0 {
        identity
    } else {
        format!("{identity}/{collisions}")
    };
    hash_text(&text, HASH_LENGTH)
}

/// Whether going from one template to the other needs new RoleSets: only a change of the scheduler
/// that gangs the whole RoleSet does, because it is written on every pod.
#[must_use]
pub fn needs_replacement(
    from: Option<&SchedulingStrategy>,
    to: Option<&SchedulingStrategy>,
) -> bool {
    from.and_then(SchedulingStrategy::scheduler) != to.and_then(SchedulingStrategy::scheduler)
}

/// Names of the revisions to delete: the oldest that nothing uses, beyond the limit.
#[must_use]
pub fn surplus(revisions: &[(String, i64)], used: &BTreeSet<&str>, limit: i32) -> Vec<String> {
    let mut unused: Vec<&(String, i64)> = revisions
        .iter()
        .filter(|(name, _)| !used.contains(name.as_str()))
        .collect();
    unused.sort_by_key(|(name, number)| (*number, name.clone()));
    let limit = usize::try_from(limit).unwrap_or(0);
    let surplus = unused.len().saturating_sub(limit);
    unused
        .into_iter()
        .take(surplus)
        .map(|(name, _)| name.clone())
        .collect()
}

/// Letters of a role's hash.
const ROLE_HASH_LENGTH: usize = 8;

/// The hash of what a role's replicas are made from: the template, and where a replica is a group,
/// its size and who gangs it. Replicas with another one are outdated.
#[must_use]
pub fn role_hash(role: &RoleSpec) -> String {
    let mut made_from = json!({"template": Value::Object(role.template.0.clone())});
    if let Some(size) = role.pod_group_size.filter(|&size| size > 1) {
        let scheduler = role
            .scheduling_strategy
            .as_ref()
            .and_then(SchedulingStrategy::scheduler);
        made_from["podGroupSize"] = json!(size);
        if let Some(scheduler) = scheduler {
            made_from["scheduler"] = json!(format!("{scheduler:?}"));
        }
    }
    super::canonical::hash_name(&made_from, ROLE_HASH_LENGTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template_of(value: Value) -> RoleSetTemplate {
        serde_json::from_value(value).unwrap()
    }

    fn service(image: &str, replicas: i32) -> RoleSetTemplate {
        template_of(
            json!({"metadata": {"labels": {"app": "llm"}}, "spec": {"roles": [
            {"name": "prefill", "replicas": replicas, "template": {"spec": {"containers": [
                {"name": "c", "image": image}]}}}]}}),
        )
    }

    #[test]
    fn scaling_mints_no_revision_and_an_image_does() {
        let first = data(&service("a", 1));
        assert_eq!(hash(&first, 0), hash(&data(&service("a", 5)), 0));
        assert_ne!(hash(&first, 0), hash(&data(&service("b", 1)), 0));
        assert_ne!(
            hash(&first, 0),
            hash(&first, 1),
            "a collision moves the name"
        );
    }

    #[test]
    fn data_comes_back_as_the_template() {
        let written = service("a", 3);
        assert_eq!(template(&data(&written)).unwrap(), written);
    }

    /// The manifest and what AIBrix v0.5.0 made of it: see `tests/kube/recorded/README.md`.
    fn recorded() -> (RoleSetTemplate, Vec<Value>) {
        let manifest = include_str!("../../tests/kube/recorded/manifest.yaml");
        let manifest: Value = serde_norway::from_str(manifest).unwrap();
        let made = include_str!("../../tests/kube/recorded/aibrix-v0.5.0.json");
        (
            template_of(manifest["spec"]["template"].clone()),
            serde_json::from_str(made).unwrap(),
        )
    }

    fn of_kind<'a>(made: &'a [Value], kind: &str) -> &'a Value {
        made.iter().find(|object| object["kind"] == kind).unwrap()
    }

    #[test]
    fn a_revision_that_aibrix_recorded_is_recognised() {
        let (mut written, made) = recorded();
        let stored = &of_kind(&made, "ControllerRevision")["data"];
        assert_eq!(identity(stored), identity(&data(&written)));
        written.spec.as_mut().unwrap().roles[0].replicas = Some(7);
        assert_eq!(identity(stored), identity(&data(&written)), "scaled since");
    }

    #[test]
    fn a_role_that_aibrix_wrote_is_the_one_of_the_manifest() {
        let (written, made) = recorded();
        let spec = of_kind(&made, "RoleSet")["spec"].clone();
        let stored: kvtide_control_api::RoleSetSpec = serde_json::from_value(spec).unwrap();
        let written = written.spec.unwrap();
        assert_eq!(stored.roles.len(), 2);
        for (stored, written) in stored.roles.iter().zip(&written.roles) {
            assert_ne!(stored.template, written.template, "Go respelled nothing");
            assert_eq!(role_hash(stored), role_hash(written), "{}", written.name);
        }
    }

    #[test]
    fn history_keeps_what_is_used_and_the_newest() {
        let revisions: Vec<(String, i64)> = (1..=5)
            .map(|number| (format!("r{number}"), number))
            .collect();
        let used = BTreeSet::from(["r1"]);
        assert_eq!(surplus(&revisions, &used, 2), ["r2", "r3"]);
        assert_eq!(surplus(&revisions, &used, 10), Vec::<String>::new());
    }

    #[test]
    fn a_role_is_outdated_by_template_and_group_size_alone() {
        let role = |value: Value| serde_json::from_value::<RoleSpec>(value).unwrap();
        let pods = json!({"spec": {"containers": [{"name": "c", "image": "a"}]}});
        let plain = role(json!({"name": "r", "template": pods}));
        let more = role(json!({"name": "r", "replicas": 4, "upgradeOrder": 2, "template": pods}));
        assert_eq!(role_hash(&plain), role_hash(&more));
        let alone = role(json!({"name": "r", "podGroupSize": 1, "template": pods}));
        assert_eq!(role_hash(&plain), role_hash(&alone));
        let group = role(json!({"name": "r", "podGroupSize": 2, "template": pods}));
        assert_ne!(role_hash(&plain), role_hash(&group));
    }
}
