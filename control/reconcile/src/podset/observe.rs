//! What there is of a PodSet: reads the caches.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kvtide_control_api::meta::{Key, group_index, seconds, uid_of};
use kvtide_control_api::observed::ObservedPod;
use kvtide_control_api::target::Target;
use kvtide_control_api::{PodSet, PodSetSpec, keys};
use kvtide_control_core::recovery::{self, PodView, SetView};
use kvtide_control_core::restarts::Baseline;

use crate::context::Context;

pub(super) fn baseline(meta: &ObjectMeta) -> Option<Baseline> {
    let annotation = meta.annotations.as_ref()?.get(keys::RESTARTS_BEFORE);
    Baseline::read(annotation.map(String::as_str))
}

pub(super) struct Observed {
    pub(super) pods: Vec<Arc<ObservedPod>>,
    pub(super) view: SetView,
    pub(super) look_again: Option<Duration>,
}

impl Observed {
    /// Which pods are ill and with what.
    pub(super) fn ailments(&self) -> String {
        let policy = self.view.policy;
        let ill = self
            .pods
            .iter()
            .zip(&self.view.pods)
            .filter_map(|(pod, view)| {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                view.ailment(policy)
                    .map(|ailment| format!("pod {name} {ailment}"))
            });
        ill.collect::<Vec<_>>().join("; ")
    }
}

/// What pods are judged by besides their own state.
pub(super) struct Terms {
    /// Whether the template lets them be deleted by force.
    pub(super) force: bool,
    /// Restarts that do not count.
    pub(super) before: Baseline,
}

impl Terms {
    pub(super) fn of(meta: &ObjectMeta, spec: Option<&PodSetSpec>) -> Self {
        let opted_in = |spec: &PodSetSpec| {
            spec.template.meta("annotations", keys::FORCE_DELETE) == Some("true")
        };
        Self {
            force: spec.is_some_and(opted_in),
            before: baseline(meta).unwrap_or_default(),
        }
    }
}

/// The pods as the planner takes them, and when time alone changes them.
pub(super) fn views_of(
    pods: &[Arc<ObservedPod>],
    terms: &Terms,
    now: &Time,
    context: &Context,
) -> (Vec<PodView>, Option<Duration>) {
    let mut look_again: Option<Duration> = None;
    let mut soon =
        |delay: Duration| look_again = Some(look_again.map_or(delay, |at| at.min(delay)));
    let mut views: Vec<PodView> = Vec::with_capacity(pods.len());
    for pod in pods {
        views.push(view_of(pod, terms, now, context, &mut soon));
    }
    (views, look_again)
}

pub(super) fn dereference(
    set: &PodSet,
    target: &Target,
    now: &Time,
    context: &Context,
) -> Observed {
    let uid = &target.uid;
    let pods = context.pods_of(uid);
    let terms = Terms::of(&set.metadata, Some(&set.spec));
    let (mut views, look_again) = views_of(&pods, &terms, now, context);
    let cached = |uid: &str| {
        pods.iter()
            .any(|pod| pod.metadata.uid.as_deref() == Some(uid))
    };
    for meta in context.ledger.unseen(uid, "Pod", cached) {
        views.push(PodView {
            index: group_index(&meta),
            ..PodView::default()
        });
    }
    let status = set.status.clone().unwrap_or_default();
    let (attempts, last_attempt) = recovery::attempts(&status);
    let since_last = now.0.as_second() - seconds(last_attempt.as_ref());
    let view = SetView {
        size: set.spec.pod_group_size,
        policy: set.spec.recovery_policy.unwrap_or_default(),
        pods: views,
        was_complete: status.total_pods >= set.spec.pod_group_size,
        attempts,
        since_last: Duration::from_secs(since_last.try_into().unwrap_or(0)),
    };
    Observed {
        pods,
        view,
        look_again,
    }
}

fn view_of(
    pod: &ObservedPod,
    terms: &Terms,
    now: &Time,
    context: &Context,
    soon: &mut impl FnMut(Duration),
) -> PodView {
    let node = pod.spec.node_name.clone().map(|name| Key {
        namespace: String::new(),
        name,
    });
    let node = node.and_then(|key| context.nodes.get(&key));
    let limit = context.settings.node_lost_after;
    let mut node_lost = false;
    if let Some(since) = node.as_ref().and_then(|node| node.not_ready_since()) {
        let lasted = now.0.as_second() - since.0.as_second();
        let lasted = Duration::from_secs(lasted.try_into().unwrap_or(0));
        node_lost = lasted >= limit;
        if !node_lost {
            soon(limit - lasted + Duration::from_secs(1));
        }
    }
    let going = context.is_going(&pod.metadata);
    // The deletion timestamp is when the grace period ends.
    let overdue = pod
        .metadata
        .deletion_timestamp
        .as_ref()
        .is_some_and(|end| end.0 < now.0);
    let may_force = terms.force || node.as_ref().is_some_and(|node| node.is_out_of_service());
    if going && may_force && !overdue {
        let left = seconds(pod.metadata.deletion_timestamp.as_ref()) - now.0.as_second();
        soon(Duration::from_secs(left.max(0).unsigned_abs() + 1));
    }
    PodView {
        index: group_index(&pod.metadata),
        going,
        stuck: going && overdue && may_force,
        finished: pod.is_finished(),
        crash_looping: pod.is_crash_looping(),
        restarted: terms
            .before
            .is_exceeded(uid_of(&pod.metadata), pod.restarts()),
        node_lost,
        started: pod.has_started(),
        ready: pod.is_ready(),
    }
}
