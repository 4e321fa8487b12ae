//! PodSet: pods that live and die together.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use serde_json::{Map, Value, json};

use super::apply::{Doomed, owner_reference, resource};
use super::context::{Context, seconds};
use super::error::{self, Error};
use super::farewell::Farewell;
use super::ganging::Ganging;
use super::gangs::Wanted;
use super::observed::ObservedPod;
use super::{Key, conditions};
use crate::api::{
    PodSet, PodSetPhase, PodSetSpec, PodSetStatus, find_condition, keys, set_condition,
};
use crate::core::names;
use crate::core::pod::{self, Gang, Marks};
use crate::core::recovery::{Backoff, PodView, RecoveryPlan, SetView};
use crate::core::restarts::Baseline;

/// Counts recoveries in the condition Recovering's reason: `Attempt3`.
const ATTEMPT: &str = "Attempt";

/// Reconciles one PodSet.
///
/// # Errors
///
/// When the API server refuses something; the object is tried again.
pub async fn reconcile(
    object: Arc<DeserializeGuard<PodSet>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let set = match &object.0 {
        Ok(set) => set,
        Err(invalid) if invalid.metadata.deletion_timestamp.is_some() => {
            return finalize(&invalid.metadata, None, &context).await;
        }
        Err(invalid) => return super::stormservice::undecodable::<PodSet>(&context, invalid).await,
    };
    let set = context.ledger.with_newest_status(set);
    let set = set.as_ref();
    if set.metadata.deletion_timestamp.is_some() {
        return finalize(&set.metadata, Some(&set.spec), &context).await;
    }
    if prepare(set, &context).await? {
        // The watch shows the object again, with its marks.
        return Ok(Action::await_change());
    }
    let observed = dereference(set, &context);
    let plan = observed.view.plan(context.settings.backoff);
    let gang = gang(set, &observed, &context).await?;
    if plan.attempt {
        // Counted before it is made: one that is cut short was made none the less.
        write_status(set, &observed, &plan, &gang, None, &context).await?;
    }
    let applied = apply(set, &observed, &plan, &gang, &context).await;
    let again = plan.again_in.or(observed.look_again).into_iter();
    let mut again = again.chain(gang.look_again()).min();
    let changed = !plan.create.is_empty() || !plan.delete.is_empty();
    // What was just created or deleted is told of when the watch shows it.
    let failure = error::failure(&applied);
    if !changed || failure.is_some() {
        let status = write_status(set, &observed, &plan, &gang, failure, &context).await?;
        let forget = forget_in(&status, context.settings.backoff, &context.now());
        again = again.into_iter().chain(forget).min();
    }
    applied?;
    Ok(again.map_or_else(Action::await_change, Action::requeue))
}

/// Puts finalizer and marks on a PodSet that lacks them. Returns whether anything was written.
async fn prepare(set: &PodSet, context: &Context) -> Result<bool, Error> {
    let meta = &set.metadata;
    let (namespace, name) = names_of(meta);
    let mut patch = json!({"metadata": {}});
    let mut finalizers = meta.finalizers.clone().unwrap_or_default();
    if !finalizers
        .iter()
        .any(|held| held == keys::POD_SET_FINALIZER)
    {
        finalizers.push(keys::POD_SET_FINALIZER.to_owned());
        patch["metadata"]["finalizers"] = json!(finalizers);
        patch["metadata"]["resourceVersion"] = json!(meta.resource_version);
    }
    let counts = set.spec.recovery_policy.unwrap_or_default().recreates_all();
    match (counts, baseline(meta)) {
        (true, None) => {
            let pods = context.pods_of(uid_of(meta));
            let restarts = pods
                .iter()
                .map(|pod| (uid_of(&pod.metadata), pod.restarts()));
            let baseline = Baseline::of(restarts).write();
            patch["metadata"]["annotations"][keys::RESTARTS_BEFORE] = json!(baseline);
        }
        // The next time begins anew.
        (false, Some(_)) => {
            patch["metadata"]["annotations"][keys::RESTARTS_BEFORE] = Value::Null;
        }
        (true, Some(_)) | (false, None) => {}
    }
    if patch["metadata"].as_object().is_some_and(Map::is_empty) {
        return Ok(false);
    }
    let kind = resource::<PodSet>();
    context.writer.merge(&kind, namespace, name, &patch).await?;
    Ok(true)
}

fn baseline(meta: &ObjectMeta) -> Option<Baseline> {
    let annotation = meta.annotations.as_ref()?.get(keys::RESTARTS_BEFORE);
    Baseline::read(annotation.map(String::as_str))
}

struct Observed {
    pods: Vec<Arc<ObservedPod>>,
    view: SetView,
    look_again: Option<Duration>,
}

fn names_of(meta: &ObjectMeta) -> (&str, &str) {
    (
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

fn uid_of(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

/// What pods are judged by besides their own state.
struct Terms {
    /// Whether the template lets them be deleted by force.
    force: bool,
    /// Restarts that do not count.
    before: Baseline,
}

impl Terms {
    fn of(meta: &ObjectMeta, spec: Option<&PodSetSpec>) -> Self {
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
fn views_of(
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

fn dereference(set: &PodSet, context: &Context) -> Observed {
    let uid = uid_of(&set.metadata);
    let now = context.now();
    let pods = context.pods_of(uid);
    let terms = Terms::of(&set.metadata, Some(&set.spec));
    let (mut views, look_again) = views_of(&pods, &terms, &now, context);
    let cached = |uid: &str| {
        pods.iter()
            .any(|pod| pod.metadata.uid.as_deref() == Some(uid))
    };
    for meta in context.ledger.unseen(uid, "Pod", cached) {
        views.push(PodView {
            index: index_of(&meta),
            ..PodView::default()
        });
    }
    let status = set.status.clone().unwrap_or_default();
    let (attempts, last_attempt) = attempts(&status);
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

/// Where in the group a pod is.
fn index_of(meta: &ObjectMeta) -> Option<i32> {
    let index = meta.labels.as_ref()?.get(keys::POD_GROUP_INDEX)?;
    index.parse().ok()
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
        index: index_of(&pod.metadata),
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

/// How often recovery was tried, and when last.
fn attempts(status: &PodSetStatus) -> (u32, Option<Time>) {
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

/// How the pods of the PodSet are scheduled together.
async fn gang(set: &PodSet, observed: &Observed, context: &Context) -> Result<Ganging, Error> {
    let strategy = set.spec.scheduling_strategy.as_ref();
    let siblings = observed.pods.iter().map(|pod| &pod.metadata);
    let siblings = siblings.filter(|meta| !context.is_going(meta));
    Ganging::of::<PodSet>(&set.metadata, strategy, siblings, context).await
}

async fn apply(
    set: &PodSet,
    observed: &Observed,
    plan: &RecoveryPlan,
    gang: &Ganging,
    context: &Context,
) -> Result<(), Error> {
    let (namespace, name) = names_of(&set.metadata);
    let uid = uid_of(&set.metadata);
    let owner = owner_reference::<PodSet>(&set.metadata);
    // The PodGroup first: a pod that is seen before its group is scheduled alone.
    if let (Ganging::Of(_), Some(strategy)) = (gang, &set.spec.scheduling_strategy) {
        let wanted = Wanted {
            parent: uid,
            namespace,
            name,
            label: (keys::POD_SET_NAME, name),
            owner: &owner,
            strategy,
            members: set.spec.pod_group_size,
        };
        context
            .gangs
            .ensure(&context.writer, &context.ledger, wanted)
            .await?;
    }
    let pods = resource::<Pod>();
    for &at in &plan.force {
        if let Some(pod) = observed.pods.get(at) {
            context
                .writer
                .delete(&pods, namespace, &Doomed::of(&pod.metadata), true)
                .await?;
            let note = format!(
                "deleted pod {} by force: its node is out of service, or its \
                template opted in",
                pod.metadata.name.as_deref().unwrap_or_default()
            );
            context
                .tell::<PodSet>(&set.metadata, EventType::Warning, "ForcedDeletion", note)
                .await;
        }
    }
    let doomed: Vec<Doomed> = plan
        .delete
        .iter()
        .filter_map(|&at| observed.pods.get(at))
        .map(|pod| Doomed::of(&pod.metadata))
        .collect();
    if plan.attempt {
        context
            .tell::<PodSet>(
                &set.metadata,
                EventType::Warning,
                "Recovering",
                why(observed),
            )
            .await;
    }
    context.writer.delete_all(&pods, namespace, doomed).await?;
    let gang = gang.gang(name, context);
    let objects = plan
        .create
        .iter()
        .map(|&index| build_pod(set, index, gang.as_ref(), &owner))
        .collect();
    context
        .writer
        .create_all(uid, "Pod", &pods, namespace, objects)
        .await
}

/// Which pods are ill and with what.
fn why(observed: &Observed) -> String {
    let policy = observed.view.policy;
    let ill = observed
        .pods
        .iter()
        .zip(&observed.view.pods)
        .filter_map(|(pod, view)| {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            view.ailment(policy)
                .map(|ailment| format!("pod {name} {ailment}"))
        });
    ill.collect::<Vec<_>>().join("; ")
}

/// One pod. What the PodSet carries is passed on; the template's own labels come first.
fn build_pod(set: &PodSet, index: i32, gang: Option<&Gang<'_>>, owner: &Value) -> Value {
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

async fn write_status(
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
    let is_kept = !context.schema.gap().pod_set_generation;
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
    match failure {
        Some(error) => set_condition(
            all,
            conditions::REPLICA_FAILURE,
            true,
            "Failure",
            error.to_string(),
            now,
        ),
        None => all.retain(|condition| condition.kind != conditions::REPLICA_FAILURE),
    }
    if forget_in(&status, context.settings.backoff, now) == Some(Duration::ZERO) {
        let (all, kind) = (&mut status.conditions, conditions::RECOVERING);
        set_condition(all, kind, false, "Recovered", "", now);
    }
    status
}

/// How long the set must stay as healthy as it is until its recoveries are forgotten; none where it
/// is not, or there were none.
fn forget_in(status: &PodSetStatus, backoff: Backoff, now: &Time) -> Option<Duration> {
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

/// Lets a deleted PodSet go once its pods are gone. One that cannot be decoded has no `spec`: what
/// that would name besides follows by its owner references.
async fn finalize(
    meta: &ObjectMeta,
    spec: Option<&PodSetSpec>,
    context: &Context,
) -> Result<Action, Error> {
    let kind = resource::<PodSet>();
    match Farewell::of(meta, keys::POD_SET_FINALIZER) {
        Farewell::Over => return Ok(Action::await_change()),
        Farewell::LeaveChildren => {
            context
                .writer
                .release(&kind, meta, keys::POD_SET_FINALIZER)
                .await?;
            return Ok(Action::await_change());
        }
        Farewell::TakeChildren => {}
    }
    let (namespace, name) = names_of(meta);
    let uid = uid_of(meta);
    let pods = context.pods_of(uid);
    let cached = |uid: &str| {
        pods.iter()
            .any(|pod| pod.metadata.uid.as_deref() == Some(uid))
    };
    let unseen = context.ledger.unseen(uid, "Pod", cached);
    let doomed: Vec<Doomed> = pods
        .iter()
        .filter(|pod| !context.is_going(&pod.metadata))
        .map(|pod| Doomed::of(&pod.metadata))
        .collect();
    context
        .writer
        .delete_all(&resource::<Pod>(), namespace, doomed)
        .await?;
    if !pods.is_empty() || !unseen.is_empty() {
        // Stuck pods still hold the set: they are forced under the same conditions as ever.
        let terms = Terms::of(meta, spec);
        let (views, look_again) = views_of(&pods, &terms, &context.now(), context);
        for (pod, view) in pods.iter().zip(&views) {
            if view.stuck {
                let doomed = Doomed::of(&pod.metadata);
                context
                    .writer
                    .delete(&resource::<Pod>(), namespace, &doomed, true)
                    .await?;
            }
        }
        return Ok(Action::requeue(
            look_again.unwrap_or(Duration::from_secs(30)),
        ));
    }
    let strategy = spec.and_then(|spec| spec.scheduling_strategy.as_ref());
    if let Some(scheduler) = strategy.and_then(|strategy| strategy.scheduler()) {
        let client = &context.client;
        let group = (namespace, name);
        context
            .gangs
            .remove(client, &context.writer, group, uid, scheduler)
            .await?;
    }
    context
        .writer
        .release(&kind, meta, keys::POD_SET_FINALIZER)
        .await?;
    Ok(Action::await_change())
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
