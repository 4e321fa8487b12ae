//! What all kinds say in their status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kvtide_control_api::conditions::{INVALID, REPLICA_FAILURE};
use kvtide_control_api::{Condition, ConditionStatus, find_condition, set_condition};
use kvtide_control_kube::error::{self, Error};
use kvtide_control_kube::writer::resource;

use super::context::Context;
use super::frame::Kind;

/// Tells of the last write that was refused, or that none was; in one sentence.
pub(super) fn note_failure(all: &mut Vec<Condition>, failure: Option<String>, now: &Time) {
    match failure {
        Some(message) => set_condition(all, REPLICA_FAILURE, true, "Failure", message, now),
        None => all.retain(|condition| condition.kind != REPLICA_FAILURE),
    }
}

/// What keeps children of a kind from being what is wanted, in the words of the first that says so:
/// nobody should have to search below for what is refused. `children` are names and conditions.
pub(super) fn failure_below<'a>(
    kind: &str,
    children: impl Iterator<Item = (&'a str, &'a [Condition])>,
) -> Option<String> {
    let told = |(name, all): (&'a str, &'a [Condition])| {
        let failures = [REPLICA_FAILURE, INVALID].into_iter();
        let mut failures = failures.filter_map(|kind| find_condition(all, kind));
        let failure = failures.find(|condition| condition.status == ConditionStatus::True)?;
        Some((name, failure.message.as_str()))
    };
    let mut told: Vec<(&str, &str)> = children.filter_map(told).collect();
    told.sort_unstable();
    let (name, message) = told.first()?;
    let more = match told.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    Some(format!("{kind} {name}{more}: {message}"))
}

/// Tells of a failure wherever a look at an object ended, so that nobody has to read the log to see
/// why nothing happens: in its conditions, and as an event.
pub(super) async fn tell_failure<K: Kind>(
    object: &K,
    outcome: &Result<Action, Error>,
    context: &Context,
) {
    let Some(failure) = error::failure(outcome) else {
        return;
    };
    let newest = context.ledger.with_newest_status(object);
    let mut status = newest.status().cloned().unwrap_or_default();
    let (kind, meta, said) = (resource::<K>(), object.meta(), failure.to_string());
    note_failure(
        K::conditions(&mut status),
        Some(said.clone()),
        &context.now(),
    );
    let written = context
        .writer
        .status(&kind, meta, newest.status(), &status)
        .await;
    if let Err(error) = written {
        // What failed first is what counts, and it is tried again with it.
        tracing::debug!(%error, "a failure could not be told of");
    }
    context
        .tell::<K>(meta, EventType::Warning, failure.reason(), said)
        .await;
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    #[test]
    fn the_first_of_the_children_that_fail_speaks_for_all() {
        let now = Time(Timestamp::from_second(1).unwrap_or_default());
        let failed = |kind: &str, message: &str| {
            let mut all = Vec::new();
            set_condition(&mut all, kind, true, "Failure", message, &now);
            all
        };
        let fine = failed("Ready", "");
        let (first, second) = (failed(REPLICA_FAILURE, "no quota"), failed(INVALID, "no"));
        let below = |children: &[(&'static str, &Vec<Condition>)]| {
            let children = children.iter().map(|(name, all)| (*name, all.as_slice()));
            failure_below("RoleSet", children)
        };
        assert_eq!(below(&[("a", &fine)]), None);
        let one = below(&[("a", &fine), ("b", &first)]);
        assert_eq!(one.as_deref(), Some("RoleSet b: no quota"));
        let two = below(&[("c", &second), ("b", &first)]);
        assert_eq!(two.as_deref(), Some("RoleSet b (and 1 more): no quota"));
    }
}
