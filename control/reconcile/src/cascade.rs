//! What a deleted object does with its children.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kvtide_control_api::SchedulingStrategy;
use kvtide_control_api::target::Target;
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;

use super::context::Context;

/// Garbage collection's finalizer of an object whose children are to stay: `kubectl delete
/// --cascade=orphan` sets it together with the deletion time.
const ORPHAN: &str = "orphan";

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cascade {
    /// They go first.
    TakeChildren,
    /// They stay. Our finalizer goes at once: once garbage collection has taken its own, nothing says
    /// any more that they were to stay, and a cache may still show them as ours.
    LeaveChildren,
    /// Our finalizer is gone, and with it our part.
    Over,
}

impl Cascade {
    /// Of an object that is being deleted.
    pub(super) fn of(meta: &ObjectMeta, finalizer: &str) -> Self {
        let finalizers = meta.finalizers.as_deref().unwrap_or_default();
        let has = |wanted: &str| finalizers.iter().any(|held| held == wanted);
        match (has(finalizer), has(ORPHAN)) {
            (false, _) => Self::Over,
            (true, true) => Self::LeaveChildren,
            (true, false) => Self::TakeChildren,
        }
    }
}

/// Whether the children of a deleted object are to go first. Where not, our part in it is over.
///
/// # Errors
///
/// When the API server refuses.
pub(super) async fn takes_children<K: Resource<DynamicType = ()>>(
    meta: &ObjectMeta,
    finalizer: &str,
    context: &Context,
) -> Result<bool, Error> {
    match Cascade::of(meta, finalizer) {
        Cascade::Over => Ok(false),
        Cascade::LeaveChildren => {
            let kind = resource::<K>();
            context.writer.release(&kind, meta, finalizer).await?;
            Ok(false)
        }
        Cascade::TakeChildren => Ok(true),
    }
}

/// Deletes the PodGroup of an object that goes, if it had one.
///
/// # Errors
///
/// When the API server refuses.
pub(super) async fn take_group(
    target: &Target,
    strategy: Option<&SchedulingStrategy>,
    context: &Context,
) -> Result<(), Error> {
    let Some(scheduler) = strategy.and_then(SchedulingStrategy::scheduler) else {
        return Ok(());
    };
    let (client, writer) = (&context.client, &context.writer);
    context
        .gangs
        .remove(client, writer, target, scheduler)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_stay_when_they_are_to_be_orphaned() {
        let table: [(&[&str], Cascade); 4] = [
            (&["ours"], Cascade::TakeChildren),
            (&["ours", "somebody's"], Cascade::TakeChildren),
            (&["orphan", "ours"], Cascade::LeaveChildren),
            (&["orphan"], Cascade::Over),
        ];
        for (finalizers, expected) in table {
            let meta = ObjectMeta {
                finalizers: Some(finalizers.iter().map(ToString::to_string).collect()),
                ..ObjectMeta::default()
            };
            assert_eq!(Cascade::of(&meta, "ours"), expected, "{finalizers:?}");
        }
    }
}
