//! The kinds of PodGroup, one for each scheduler that knows gangs.

use kube::api::ApiResource;
use kvtide_control_api::Scheduler;

/// What a PodGroup is called in the ledger and in errors.
pub(super) const PURPOSE: &str = "PodGroup";

/// The kind of a scheduler's PodGroup.
#[must_use]
pub(crate) fn resource(scheduler: Scheduler) -> ApiResource {
    let (group, version) = scheduler.api_version();
    ApiResource {
        group: group.into(),
        version: version.into(),
        api_version: format!("{group}/{version}"),
        kind: "PodGroup".into(),
        plural: "podgroups".into(),
    }
}

/// The scheduler to name in pods that name none.
#[must_use]
pub(crate) fn scheduler_name(scheduler: Scheduler, coscheduling: Option<&str>) -> Option<&str> {
    match scheduler {
        Scheduler::Volcano => Some("volcano"),
        Scheduler::Godel => Some("godel-scheduler"),
        Scheduler::Coscheduling => coscheduling,
    }
}
