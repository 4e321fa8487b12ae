//! PodGroups: one for a RoleSet or one for each PodSet, in the shape of the scheduler that is meant.

use kvtide_control_api::{RoleSetSpec, Scheduler, SchedulingStrategy};
use serde_json::{Map, Value, json};

/// Pods of a whole RoleSet: what must fit at once where the user gives no number.
#[must_use]
pub fn role_set_members(spec: &RoleSetSpec) -> i32 {
    spec.roles.iter().fold(0_i32, |sum, role| {
        let pods = role
            .replicas
            .unwrap_or(1)
            .saturating_mul(role.pod_group_size.unwrap_or(1).max(1));
        sum.saturating_add(pods.max(0))
    })
}

/// What a PodGroup asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    /// As many members at once as the user says, or else this number.
    ForAll(i32),
    /// For each member by itself: some pods run outside, and whoever waited for them waited for ever.
    ForEach,
}

/// The fields that say what must fit at once.
const AT_ONCE: [&str; 3] = ["minMember", "minTaskMember", "minResources"];

/// The PodGroup's spec. Fields that a scheduler's PodGroup lacks do not appear, and neither do fields
/// that nobody gave.
#[must_use]
pub fn spec(strategy: &SchedulingStrategy, asks: Asks) -> Option<Value> {
    let mut spec = match strategy.scheduler()? {
        Scheduler::Godel => serde_json::to_value(strategy.godel_scheduling_strategy.as_ref()?),
        Scheduler::Coscheduling => {
            serde_json::to_value(strategy.coscheduling_scheduling_strategy.as_ref()?)
        }
        Scheduler::Volcano => serde_json::to_value(strategy.volcano_scheduling_strategy.as_ref()?),
    }
    .ok()?;
    let fields: &mut Map<String, Value> = spec.as_object_mut()?;
    let members = match asks {
        Asks::ForAll(members) => members.max(1),
        Asks::ForEach => {
            fields.retain(|field, _| !AT_ONCE.contains(&field.as_str()));
            1
        }
    };
    fields.entry("minMember").or_insert(json!(members));
    Some(spec)
}

/// The PodGroup, as server-side apply takes it.
#[must_use]
pub fn build(
    strategy: &SchedulingStrategy,
    asks: Asks,
    name: &str,
    label: (&str, &str),
    owner: &Value,
) -> Option<Value> {
    let (group, version) = strategy.scheduler()?.api_version();
    Some(json!({
        "apiVersion": format!("{group}/{version}"),
        "kind": "PodGroup",
        "metadata": {"name": name, "labels": {label.0: label.1}, "ownerReferences": [owner]},
        "spec": spec(strategy, asks)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strategy(value: Value) -> SchedulingStrategy {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_number_that_was_given_is_kept_and_a_missing_one_computed() {
        let table = [
            (
                json!({"coschedulingSchedulingStrategy": {}}),
                json!({"minMember": 7}),
            ),
            (
                json!({"coschedulingSchedulingStrategy": {"minMember": 2}}),
                json!({"minMember": 2}),
            ),
            (
                json!({"volcanoSchedulingStrategy": {"minMember": 0}}),
                json!({"minMember": 7}),
            ),
            (
                json!({"volcanoSchedulingStrategy": {"queue": "q", "minTaskMember": {"prefill": 2}}}),
                json!({"minMember": 7, "queue": "q", "minTaskMember": {"prefill": 2}}),
            ),
            (
                json!({"godelSchedulingStrategy": {"application": "a", "scheduleTimeoutSeconds": 5}}),
                json!({"minMember": 7, "application": "a", "scheduleTimeoutSeconds": 5}),
            ),
        ];
        for (written, expected) in table {
            assert_eq!(
                spec(&strategy(written.clone()), Asks::ForAll(7)),
                Some(expected),
                "{written}"
            );
        }
        assert_eq!(spec(&SchedulingStrategy::default(), Asks::ForAll(7)), None);
    }

    #[test]
    fn a_gang_with_pods_outside_asks_for_each_by_itself() {
        let written = json!({"volcanoSchedulingStrategy": {"queue": "q", "minMember": 4,
            "minTaskMember": {"prefill": 2}, "minResources": {"cpu": 4}}});
        assert_eq!(
            spec(&strategy(written), Asks::ForEach),
            Some(json!({"minMember": 1, "queue": "q"}))
        );
    }

    #[test]
    fn a_role_set_counts_all_its_pods() {
        let spec: RoleSetSpec = serde_json::from_value(json!({"roles": [
            {"name": "prefill", "replicas": 3, "podGroupSize": 2}, {"name": "router"},
        ]}))
        .unwrap();
        assert_eq!(role_set_members(&spec), 7);
    }
}
