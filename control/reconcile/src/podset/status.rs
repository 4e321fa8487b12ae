//! The status of a PodSet, which also counts its recoveries.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::events::EventType;
use kvtide_control_api::{PodSet, PodSetPhase, PodSetStatus, conditions, set_condition};
use kvtide_control_core::recovery::{self, PodView, RecoveryPlan};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;

use super::observe::Observed;
use crate::context::Context;
use crate::frame::Kind;
use crate::gangs::Ganging;
use crate::status::note_failure;

pub(super) async fn write_status(
    set: &PodSet,
    observed: &Observed,
    plan: &RecoveryPlan,
    gang: &Ganging,
    failure: Option<&Error>,
    now: &Time,
    context: &Context,
) -> Result<PodSetStatus, Error> {
    let status = status_of(set, observed, plan, gang, failure, now, context);
    if status.phase == Some(PodSetPhase::Failed) {
        let note = format!("recovery was given up: {}", observed.ailments());
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
    now: &Time,
    context: &Context,
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
    set.note_generation(&mut status, now, context);
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
        let reason = recovery::attempt(observed.view.attempts + 1);
        let kind = conditions::RECOVERING;
        set_condition(all, kind, true, &reason, observed.ailments(), now);
    }
    gang.set_condition(all, now);
    note_failure(all, failure.map(ToString::to_string), now);
    if recovery::forget_in(&status, context.settings.backoff, now) == Some(Duration::ZERO) {
        let (all, kind) = (&mut status.conditions, conditions::RECOVERING);
        set_condition(all, kind, false, "Recovered", "", now);
    }
    status
}
