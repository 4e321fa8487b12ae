//! How the pods of a RoleSet or PodSet are scheduled together, if they are.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use kube::runtime::events::EventType;
use kvtide_control_api::conditions::POD_GROUP_UNAVAILABLE;
use kvtide_control_api::{Condition, Scheduler, SchedulingStrategy, set_condition};
use kvtide_control_core::pod::Gang;
use kvtide_control_core::pod_group::Asks;
use kvtide_control_kube::error::Error;

use super::kind::scheduler_name;
use crate::context::Context;

/// When to ask again whether a PodGroup kind was installed.
const ASK_AGAIN: Duration = Duration::from_secs(15);

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ganging {
    /// No gang is asked for.
    None,
    /// One is asked for, and its kind is not installed.
    Unavailable(Scheduler),
    /// Pods run outside of it: its kind was installed later, or AIBrix made them under a key that
    /// nobody reads. Until they are replaced it asks for each member by itself.
    Joining(Scheduler),
    /// One by this scheduler.
    Of(Scheduler),
}

impl Ganging {
    /// What holds for an object with this metadata; `siblings` are the pods, or PodSets, of the gang
    /// that are there and stay.
    pub(crate) async fn of<'a, K: Resource<DynamicType = ()>>(
        meta: &ObjectMeta,
        strategy: Option<&SchedulingStrategy>,
        mut siblings: impl Iterator<Item = &'a ObjectMeta>,
        context: &Context,
    ) -> Result<Self, Error> {
        let Some(scheduler) = strategy.and_then(SchedulingStrategy::scheduler) else {
            return Ok(Self::None);
        };
        let installed = context
            .gangs
            .is_installed(&context.client, scheduler)
            .await?;
        let name = meta.name.as_deref().unwrap_or_default();
        let gang = Gang {
            scheduler,
            name,
            scheduler_name: None,
        };
        let ganging = if !installed {
            Self::Unavailable(scheduler)
        } else if siblings.any(|sibling| !gang.includes(sibling)) {
            Self::Joining(scheduler)
        } else {
            Self::Of(scheduler)
        };
        if let Some((_, note)) = ganging.excuse() {
            context
                .tell::<K>(meta, EventType::Warning, POD_GROUP_UNAVAILABLE, note)
                .await;
        }
        Ok(ganging)
    }

    /// The gang that new pods join.
    pub(crate) fn gang<'a>(self, name: &'a str, context: &'a Context) -> Option<Gang<'a>> {
        let (Self::Of(scheduler) | Self::Joining(scheduler)) = self else {
            return None;
        };
        let coscheduling = context.settings.coscheduling_scheduler_name.as_deref();
        Some(Gang {
            scheduler,
            name,
            scheduler_name: scheduler_name(scheduler, coscheduling),
        })
    }

    /// What its PodGroup asks for, where there is one; `members` where the user gives no number.
    pub(crate) fn asks(self, members: i32) -> Option<Asks> {
        match self {
            Self::None | Self::Unavailable(_) => None,
            Self::Joining(_) => Some(Asks::ForEach),
            Self::Of(_) => Some(Asks::ForAll(members)),
        }
    }

    /// When to ask again.
    pub(crate) fn look_again(self) -> Option<Duration> {
        matches!(self, Self::Unavailable(_)).then_some(ASK_AGAIN)
    }

    /// Why there is no gang although one is asked for: a reason and a message.
    fn excuse(self) -> Option<(&'static str, String)> {
        match self {
            Self::None | Self::Of(_) => None,
            Self::Unavailable(scheduler) => {
                let (group, version) = scheduler.api_version();
                let message = format!(
                    "the kind PodGroup of {group}/{version} is not installed: pods are scheduled \
                     one by one until it is"
                );
                Some(("NotInstalled", message))
            }
            Self::Joining(scheduler) => {
                let (group, version) = scheduler.api_version();
                let message = format!(
                    "pods run that are not in the PodGroup of {group}/{version}: what replaces them \
                     joins it one by one, and it asks for all at once again when none is outside"
                );
                Some(("PodsOutside", message))
            }
        }
    }

    /// Says so.
    pub(crate) fn set_condition(self, all: &mut Vec<Condition>, now: &Time) {
        match self.excuse() {
            Some((reason, message)) => {
                set_condition(all, POD_GROUP_UNAVAILABLE, true, reason, message, now);
            }
            None => all.retain(|condition| condition.kind != POD_GROUP_UNAVAILABLE),
        }
    }
}
