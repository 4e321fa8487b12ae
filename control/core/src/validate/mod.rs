//! What a spec must satisfy before anything is done with it. The API server has checked most of it
//! already, by schema and CEL; what is here holds for objects from before those rules, and for what
//! needs a graph. The webhook asks the same questions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kvtide_control_api::crds::{DEPENDENCIES_MAX, POD_SET_SUFFIX_LENGTH_MAX, ROLES_MAX};
use kvtide_control_api::{RoleSetSpec, RoleSpec, SchedulingStrategy, StormServiceSpec};

use super::budget::Budget;
use super::names::NAME_LENGTH_MAX;
use super::pod_group::role_set_members;

/// What is said to an annotation that asks for AIBrix's sidecar.
pub const SIDECAR_NOT_INJECTED: &str = "metadata.annotations[model.aibrix.ai/sidecar-injection] is \
    ignored: pods get no aibrix-runtime container; add it to the pod templates";

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which field, as in a manifest.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.path, self.message)
    }
}

/// All of them in one line.
#[must_use]
pub fn describe(violations: &[Violation]) -> String {
    violations
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

struct Findings(Vec<Violation>);

impl Findings {
    fn add(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.0.push(Violation {
            path: path.into(),
            message: message.into(),
        });
    }
}

/// Everything that is wrong with a StormService.
#[must_use]
pub fn stormservice(name: &str, spec: &StormServiceSpec) -> Vec<Violation> {
    let mut findings = Findings(Vec::new());
    check_name(name, &mut findings);
    let replicas = spec.replicas.unwrap_or(1);
    if replicas < 0 {
        findings.add("spec.replicas", "is negative; give 0 or more");
    }
    if let Some(strategy) = &spec.update_strategy
        && let Err(error) = Budget::resolve(&strategy.budget, replicas)
    {
        findings.add(
            format!("spec.updateStrategy.{}", error.field),
            error.to_string(),
        );
    }
    let labels = spec
        .template
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.labels.clone());
    if let Err(message) = matches(&spec.selector, &labels.unwrap_or_default()) {
        findings.add("spec.selector", message);
    }
    match &spec.template.spec {
        None => findings.add("spec.template.spec", "is missing; give at least its roles"),
        Some(roles) => check_role_set(roles, "spec.template.spec", &mut findings),
    }
    findings.0
}

/// Roles whose pods' host names would be shortened and that are not in `old`. One that is stored
/// already goes on under shortened names: AIBrix v0.5.0 takes a few more letters.
#[must_use]
pub fn group_names(
    name: &str,
    spec: &StormServiceSpec,
    old: Option<&StormServiceSpec>,
) -> Vec<Violation> {
    fn roles(spec: &StormServiceSpec) -> impl Iterator<Item = &RoleSpec> {
        spec.template.spec.iter().flat_map(|spec| &spec.roles)
    }
    let is_group = |role: &RoleSpec| role.pod_group_size.unwrap_or(1) > 1;
    let mut findings = Findings(Vec::new());
    for (at, role) in roles(spec).enumerate() {
        let length = name.len() + role.name.len() + POD_SET_SUFFIX_LENGTH_MAX;
        let known = old
            .into_iter()
            .flat_map(roles)
            .any(|old| old.name == role.name && is_group(old));
        if is_group(role) && length > NAME_LENGTH_MAX && !known {
            findings.add(
                format!("spec.template.spec.roles[{at}].name"),
                format!(
                    "the names of the StormService and of a role with podGroupSize above 1 may \
                     have {} characters together: their pods' host names have {NAME_LENGTH_MAX}",
                    NAME_LENGTH_MAX - POD_SET_SUFFIX_LENGTH_MAX
                ),
            );
        }
    }
    findings.0
}

/// Everything that is wrong with a RoleSet.
#[must_use]
pub fn role_set(name: &str, spec: &RoleSetSpec) -> Vec<Violation> {
    let mut findings = Findings(Vec::new());
    check_name(name, &mut findings);
    check_role_set(spec, "spec", &mut findings);
    findings.0
}

/// A name becomes a label's value and part of its pods' host names.
fn check_name(name: &str, findings: &mut Findings) {
    if name.len() > NAME_LENGTH_MAX {
        findings.add(
            "metadata.name",
            format!(
                "has {} characters; it becomes a label and may have {NAME_LENGTH_MAX}",
                name.len()
            ),
        );
    }
    let is_inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    let is_label = name.bytes().all(|byte| is_inner(&byte)) && !name.starts_with('-');
    if !is_label || name.ends_with('-') {
        findings.add(
            "metadata.name",
            format!(
                "{name:?} becomes part of its pods' host names; use lower-case letters, digits and \
                 '-', with a letter or digit first and last"
            ),
        );
    }
}

/// What is taken and will not do what its author means.
#[must_use]
pub fn doubts(spec: &RoleSetSpec, path: &str) -> Vec<String> {
    let waits = |strategy: &Option<SchedulingStrategy>, path: &str, pods: i32| {
        let members = strategy.as_ref()?.min_member()?;
        (members > pods).then(|| {
            format!(
                "{path}.schedulingStrategy: minMember is {members} and the gang has {pods} pods: it \
                 waits for ever; leave minMember out to have it computed"
            )
        })
    };
    let whole = waits(&spec.scheduling_strategy, path, role_set_members(spec));
    let roles = spec.roles.iter().enumerate();
    let groups = roles.filter_map(|(at, role)| {
        let size = role.pod_group_size.filter(|size| *size > 1)?;
        waits(
            &role.scheduling_strategy,
            &format!("{path}.roles[{at}]"),
            size,
        )
    });
    whole.into_iter().chain(groups).collect()
}

fn check_role_set(spec: &RoleSetSpec, path: &str, findings: &mut Findings) {
    if spec.roles.len() > ROLES_MAX {
        findings.add(
            format!("{path}.roles"),
            format!("has more than {ROLES_MAX} roles"),
        );
        return;
    }
    let names: Vec<&str> = spec.roles.iter().map(|role| role.name.as_str()).collect();
    check_strategy(spec.scheduling_strategy.as_ref(), &names, path, findings);
    let mut seen = BTreeSet::new();
    for (at, role) in spec.roles.iter().enumerate() {
        let path = format!("{path}.roles[{at}]");
        if role.name.is_empty() {
            findings.add(
                format!("{path}.name"),
                "is empty; a role is known by its name",
            );
        } else if !seen.insert(role.name.as_str()) {
            findings.add(
                format!("{path}.name"),
                format!("{:?} is there twice", role.name),
            );
        }
        check_role(role, &path, findings);
        let gang = spec
            .scheduling_strategy
            .as_ref()
            .and_then(SchedulingStrategy::scheduler);
        if gang.is_some() && !role.dependencies.is_empty() {
            findings.add(
                format!("{path}.dependencies"),
                "exclude a schedulingStrategy of the whole RoleSet: the gang would wait for pods \
                 that wait for the gang",
            );
        }
        let own = role
            .scheduling_strategy
            .as_ref()
            .and_then(SchedulingStrategy::scheduler);
        if gang.is_some() && own.is_some() && role.pod_group_size.unwrap_or(1) > 1 {
            findings.add(
                format!("{path}.schedulingStrategy"),
                "excludes a schedulingStrategy of the whole RoleSet: a pod is in one gang",
            );
        }
    }
    check_dependencies(&spec.roles, path, findings);
}

fn check_role(role: &RoleSpec, path: &str, findings: &mut Findings) {
    let replicas = role.replicas.unwrap_or(1);
    if replicas < 0 {
        findings.add(format!("{path}.replicas"), "is negative; give 0 or more");
    }
    if let Some(size) = role.pod_group_size.filter(|size| !(1..=100).contains(size)) {
        findings.add(
            format!("{path}.podGroupSize"),
            format!("is {size}; give 1 to 100"),
        );
    }
    if let Some(budget) = &role.update_strategy
        && let Err(error) = Budget::resolve(budget, replicas)
    {
        findings.add(
            format!("{path}.updateStrategy.{}", error.field),
            error.to_string(),
        );
    }
    let own = [role.name.as_str()];
    check_strategy(role.scheduling_strategy.as_ref(), &own, path, findings);
    if role.dependencies.len() > DEPENDENCIES_MAX {
        findings.add(
            format!("{path}.dependencies"),
            format!("has more than {DEPENDENCIES_MAX}"),
        );
    }
}

/// `roles` are those whose pods are in the gang.
fn check_strategy(
    strategy: Option<&SchedulingStrategy>,
    roles: &[&str],
    path: &str,
    findings: &mut Findings,
) {
    let Some(strategy) = strategy else {
        return;
    };
    let path = format!("{path}.schedulingStrategy");
    if strategy.variants() > 1 {
        let message = "names several schedulers; a pod has one: keep one of them";
        findings.add(&path, message);
    }
    let volcano = strategy.volcano_scheduling_strategy.as_ref();
    let tasks = volcano.and_then(|volcano| volcano.min_task_member.as_ref());
    for task in tasks.into_iter().flat_map(BTreeMap::keys) {
        if !roles.contains(&task.as_str()) {
            findings.add(
                format!("{path}.volcanoSchedulingStrategy.minTaskMember"),
                format!(
                    "{task:?} is not a role of this gang, which would wait for it for ever; its roles \
                     are {}",
                    roles.join(", ")
                ),
            );
        }
    }
}

/// Unknown roles, and cycles: roles that wait for each other would never be created.
fn check_dependencies(roles: &[RoleSpec], path: &str, findings: &mut Findings) {
    let by_name: BTreeMap<&str, &RoleSpec> = roles
        .iter()
        .map(|role| (role.name.as_str(), role))
        .collect();
    for (at, role) in roles.iter().enumerate() {
        for unknown in role
            .dependencies
            .iter()
            .filter(|name| !by_name.contains_key(name.as_str()))
        {
            let known = by_name.keys().copied().collect::<Vec<_>>().join(", ");
            findings.add(
                format!("{path}.roles[{at}].dependencies"),
                format!("{unknown:?} is not a role; the roles are {known}"),
            );
        }
    }
    // Roles that can start, one after the other; what is left waits for itself.
    let mut started: BTreeSet<&str> = BTreeSet::new();
    while let Some(role) = roles.iter().find(|role| {
        !started.contains(role.name.as_str())
            && role
                .dependencies
                .iter()
                .all(|name| started.contains(name.as_str()) || !by_name.contains_key(name.as_str()))
    }) {
        started.insert(&role.name);
    }
    let stuck: Vec<&str> = by_name
        .keys()
        .copied()
        .filter(|name| !started.contains(name))
        .collect();
    if !stuck.is_empty() {
        findings.add(
            format!("{path}.roles"),
            format!(
                "dependencies form a cycle: {} wait for each other",
                stuck.join(", ")
            ),
        );
    }
}

/// Whether a selector matches labels.
///
/// # Errors
///
/// What does not match.
pub fn matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> Result<(), String> {
    for (key, value) in selector.match_labels.iter().flatten() {
        if labels.get(key) != Some(value) {
            return Err(format!(
                "wants {key}={value}, which template.metadata.labels does not have"
            ));
        }
    }
    for requirement in selector.match_expressions.iter().flatten() {
        let value = labels.get(&requirement.key);
        let listed = |value: &String| {
            requirement
                .values
                .as_ref()
                .is_some_and(|values| values.contains(value))
        };
        let holds = match requirement.operator.as_str() {
            "In" => value.is_some_and(listed),
            "NotIn" => !value.is_some_and(listed),
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            other => return Err(format!("has the unknown operator {other:?}")),
        };
        if !holds {
            return Err(format!(
                "wants {} {}, which template.metadata.labels does not satisfy",
                requirement.key, requirement.operator
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
