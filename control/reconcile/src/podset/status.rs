//! The status of a PodSet, which also counts its recoveries.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::seconds;
use kvtide_control_api::{
    PodSet, PodSetPhase, PodSetStatus, conditions, find_condition, set_condition,
};
use kvtide_control_core::recovery::{Backoff, PodView, RecoveryPlan};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;

use super::apply::why;
use super::observe::Observed;
use crate::context::Context;
use crate::gangs::Ganging;
use crate::status::note_failure;

/// Counts recoveries in the condition Recovering's reason: `Attempt3`.
const ATTEMPT: &str = "Attempt";

/// How often recovery was tried, and when last.
pub(super) fn attempts(status: &PodSetStatus) -> (u32, Option<Time>) {
    let condition = find_condition(&status.conditions, conditions::RECOVERING);
    let Some(condition) = condition else {
        return (0, None);
    };
    let attempts = condition
        .reason
        .strip_prefix(ATTEMPT)
        .and_then(|number| number.parse().ok());
    (attempts.unwrap_or(0), condition.last_update_time.clone())
}

pub(super) async fn write_status(
    set: &PodSet,
    observed: &Observed,
    plan: &RecoveryPlan,
    gang: &Ganging,
    failure: Option<&Error>,
    context: &Context,
) -> Result<PodSetStatus, Error> {
    let now = context.now();
    let status = status_of(set, observed, plan, gang, failure, context, &now);
    if status.phase == Some(PodSetPhase::Failed) {
        let note = format!("recovery was given up: {}", why(observed));
        context
            .tell::<PodSet>(&set.metadata, EventType::Warning, "RecoveryGivenUp", note)
            .await;
    }
    context
        .writer
        .status(
            &resource::<PodSet>(),
            &set.metadata,
            set.status.as_ref(),
            &status,
        )
        .await?;
    Ok(status)
}

fn status_of(
    set: &PodSet,
    observed: &Observed,
    plan: &RecoveryPlan,
    gang: &Ganging,
    failure: Option<&Error>,
    context: &Context,
    now: &Time,
) -> PodSetStatus {
    let size = set.spec.pod_group_size;
    let here: Vec<&PodView> = observed
        .view
        .pods
        .iter()
        .filter(|pod| !pod.going && !pod.finished)
        .collect();
    let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
    let total = count(here.len());
    let ready = count(here.iter().filter(|pod| pod.ready).count());
    let mut status = set.status.clone().unwrap_or_default();
    // Nobody waits for it, so there is no other place for it where the field would be dropped.
    let is_kept = !context.crd_gap.gap().pod_set_generation;
    status.observed_generation = set.metadata.generation.filter(|_| is_kept);
    status.total_pods = total;
    status.ready_pods = ready;
    status.phase = Some(if plan.given_up {
        PodSetPhase::Failed
    } else if ready >= size && total == size {
        PodSetPhase::Ready
    } else if here.iter().any(|pod| pod.started) {
        PodSetPhase::Running
    } else {
        PodSetPhase::Pending
    });
    let is_ready = status.phase == Some(PodSetPhase::Ready);
    let all = &mut status.conditions;
    all.retain(|condition| condition.kind != conditions::INVALID);
    let message = format!("{ready} of {size} pods are ready");
    let reason = if is_ready {
        "AllPodsReady"
    } else {
        "PodsNotReady"
    };
    set_condition(all, conditions::READY, is_ready, reason, message, now);
    let (progressing, reason) = if plan.given_up {
        (false, "RecoveryGivenUp")
    } else if is_ready {
        (false, "Complete")
    } else {
        (true, "WaitingForPods")
    };
    set_condition(all, conditions::PROGRESSING, progressing, reason, "", now);
    if plan.attempt {
        let reason = format!("{ATTEMPT}{}", observed.view.attempts + 1);
        let kind = conditions::RECOVERING;
        set_condition(all, kind, true, &reason, why(observed), now);
    }
    gang.set_condition(all, now);
    note_failure(all, failure.map(ToString::to_string), now);
    if forget_in(&status, context.settings.backoff, now) == Some(Duration::ZERO) {
        let (all, kind) = (&mut status.conditions, conditions::RECOVERING);
        set_condition(all, kind, false, "Recovered", "", now);
    }
    status
}

/// How long the set must stay as healthy as it is until its recoveries are forgotten; none where it
/// is not, or there were none.
pub(super) fn forget_in(status: &PodSetStatus, backoff: Backoff, now: &Time) -> Option<Duration> {
    if status.phase != Some(PodSetPhase::Ready) {
        return None;
    }
    let (attempts, last) = attempts(status);
    let ready = find_condition(&status.conditions, conditions::READY)?;
    let since = seconds(ready.last_transition_time.as_ref()).max(seconds(last.as_ref()));
    let healthy = now.0.as_second().saturating_sub(since);
    let healthy = Duration::from_secs(healthy.try_into().unwrap_or(0));
    backoff.forgotten_in(attempts, healthy)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn recoveries_are_forgotten_at_a_time_that_is_known_ahead() {
        let backoff = Backoff::default();
        let mut status = PodSetStatus {
            phase: Some(PodSetPhase::Ready),
            ..PodSetStatus::default()
        };
        let all = &mut status.conditions;
        set_condition(all, conditions::READY, true, "AllPodsReady", "", &at(1000));
        assert_eq!(forget_in(&status, backoff, &at(1100)), None, "none counted");
        let all = &mut status.conditions;
        set_condition(all, conditions::RECOVERING, true, "Attempt7", "", &at(990));
        let left = |status: &PodSetStatus, now: i64| {
            forget_in(status, backoff, &at(now)).map(|left| left.as_secs())
        };
        assert_eq!(left(&status, 1100), Some(200));
        assert_eq!(left(&status, 1300), Some(0));
        status.phase = Some(PodSetPhase::Running);
        assert_eq!(left(&status, 1300), None, "not healthy");
        status.phase = Some(PodSetPhase::Ready);
        let all = &mut status.conditions;
        set_condition(all, conditions::RECOVERING, true, "Attempt8", "", &at(1200));
        assert_eq!(left(&status, 1300), Some(200), "healthy since the last one");
        let all = &mut status.conditions;
        set_condition(
            all,
            conditions::RECOVERING,
            false,
            "Recovered",
            "",
            &at(1500),
        );
        assert_eq!(left(&status, 1500), None);
    }
}
