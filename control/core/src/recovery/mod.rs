//! What a PodSet needs next: which pods are missing, which are past help, and when to give up.
//!
//! A pod is unhealthy when it ended, when a container of it is in CrashLoopBackOff, when its node
//! has been lost for a while, and, where one failure takes all, when any container restarted. Mere
//! unreadiness is not: a pod may be loading a model.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kvtide_control_api::meta::seconds;
use kvtide_control_api::{PodSetPhase, PodSetStatus, RecoveryPolicy, conditions, find_condition};

/// How often and how far apart recovery is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Between the first attempt and the second; doubles from there.
    pub first: Duration,
    /// No longer than this.
    pub longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(10),
            longest: Duration::from_secs(300),
        }
    }
}

impl Backoff {
    /// How long after attempt `attempts` the next may follow; none once the longest was waited.
    #[must_use]
    pub fn after(self, attempts: u32) -> Option<Duration> {
        let Some(doublings) = attempts.checked_sub(1) else {
            return Some(Duration::ZERO);
        };
        let factor = |doublings: u32| self.first.saturating_mul(1 << doublings.min(20));
        let given_up = doublings > 0 && factor(doublings - 1) >= self.longest;
        (!given_up).then(|| factor(doublings).min(self.longest))
    }

    /// How long a set that counts `attempts` and has been healthy for `healthy` must stay so until
    /// they are forgotten; none where nothing is counted.
    #[must_use]
    pub fn forgotten_in(self, attempts: u32, healthy: Duration) -> Option<Duration> {
        (attempts > 0).then(|| self.longest.saturating_sub(healthy))
    }
}

/// A pod of a PodSet, as it was observed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent observations of one pod"
)]
pub struct PodView {
    /// Its index, where it says one.
    pub index: Option<i32>,
    /// Being deleted.
    pub going: bool,
    /// Being deleted, its grace period over, and nobody will ever confirm it (or the user opted in).
    pub stuck: bool,
    /// Ended.
    pub finished: bool,
    /// A container waits in CrashLoopBackOff.
    pub crash_looping: bool,
    /// A container has restarted since that counts.
    pub restarted: bool,
    /// Its node has not been ready for a while.
    pub node_lost: bool,
    /// It left the phase Pending.
    pub started: bool,
    /// It is ready.
    pub ready: bool,
}

impl PodView {
    /// Why this pod is past help, if it is.
    #[must_use]
    pub fn ailment(&self, policy: RecoveryPolicy) -> Option<&'static str> {
        if self.going {
            None
        } else if self.finished {
            Some("ended")
        } else if self.crash_looping {
            Some("is in CrashLoopBackOff")
        } else if self.node_lost {
            Some("is on a node that is lost")
        } else if policy.recreates_all() && self.restarted {
            Some("restarted a container")
        } else {
            None
        }
    }
}

/// Counts recoveries in the condition Recovering's reason: `Attempt3`.
const ATTEMPT: &str = "Attempt";

/// How often recovery was tried, and when last.
#[must_use]
pub fn attempts(status: &PodSetStatus) -> (u32, Option<Time>) {
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

/// The reason of the condition for the recovery with this number.
#[must_use]
pub fn attempt(number: u32) -> String {
    format!("{ATTEMPT}{number}")
}

/// How long the set must stay as healthy as it is until its recoveries are forgotten; none where it
/// is not, or there were none.
#[must_use]
pub fn forget_in(status: &PodSetStatus, backoff: Backoff, now: &Time) -> Option<Duration> {
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

/// What is wanted and what is there.
#[derive(Clone, Debug)]
pub struct SetView {
    /// Wanted pods, at indices from 0.
    pub size: i32,
    /// What a failure does.
    pub policy: RecoveryPolicy,
    /// What is there.
    pub pods: Vec<PodView>,
    /// Whether all pods were there once since the group was last made.
    pub was_complete: bool,
    /// Recoveries since it was last healthy for long.
    pub attempts: u32,
    /// How long ago the last of them was.
    pub since_last: Duration,
}

/// What to do; numbers are positions in [`SetView::pods`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryPlan {
    /// Indices to create pods at.
    pub create: Vec<i32>,
    /// Pods to delete.
    pub delete: Vec<usize>,
    /// Pods to delete by force.
    pub force: Vec<usize>,
    /// This is a recovery, to be counted.
    pub attempt: bool,
    /// Recovery is given up.
    pub given_up: bool,
    /// When to look again.
    pub again_in: Option<Duration>,
}

impl SetView {
    /// The next step.
    #[must_use]
    pub fn plan(&self, backoff: Backoff) -> RecoveryPlan {
        let force = (0..self.pods.len())
            .filter(|&at| self.pods[at].stuck)
            .collect();
        let mut plan = RecoveryPlan {
            force,
            ..RecoveryPlan::default()
        };
        if self.policy.recreates_all() {
            self.recreate(backoff, &mut plan);
        } else {
            self.replace(backoff, &mut plan);
        }
        plan
    }

    fn here(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.pods.len()).filter(|&at| !self.pods[at].going)
    }

    fn ill(&self) -> Vec<usize> {
        self.here()
            .filter(|&at| self.pods[at].ailment(self.policy).is_some())
            .collect()
    }

    /// Indices without any pod: a going one still holds its name.
    fn missing(&self) -> Vec<i32> {
        let taken = |index: i32| self.pods.iter().any(|pod| pod.index == Some(index));
        (0..self.size).filter(|&index| !taken(index)).collect()
    }

    fn strays(&self) -> Vec<usize> {
        let wanted =
            |index: Option<i32>| index.is_some_and(|index| (0..self.size).contains(&index));
        self.here()
            .filter(|&at| !wanted(self.pods[at].index))
            .collect()
    }

    fn replace(&self, backoff: Backoff, plan: &mut RecoveryPlan) {
        plan.create = self.missing();
        plan.delete = self.strays();
        let mut ill = self.ill();
        ill.retain(|at| !plan.delete.contains(at));
        self.recover(ill, backoff, plan);
    }

    fn recreate(&self, backoff: Backoff, plan: &mut RecoveryPlan) {
        let here: Vec<usize> = self.here().collect();
        let any_going = here.len() < self.pods.len();
        let missing = self.missing();
        let ill = self.ill();
        if any_going {
            // The group is on its way out: whatever is left of it goes too, at once.
            plan.delete = here;
        } else if !ill.is_empty() {
            self.recover(here, backoff, plan);
        } else if here.is_empty() {
            plan.create = missing;
        } else if !missing.is_empty() {
            let has_lived = self.was_complete || here.iter().any(|&at| self.pods[at].started);
            if has_lived {
                plan.delete = here;
            } else {
                plan.create = missing;
            }
        } else {
            plan.delete = self.strays();
        }
    }

    /// Deletes `pods`, unless it is too early or too late for that.
    fn recover(&self, pods: Vec<usize>, backoff: Backoff, plan: &mut RecoveryPlan) {
        if pods.is_empty() {
            return;
        }
        match backoff.after(self.attempts) {
            None => plan.given_up = true,
            Some(delay) if self.since_last < delay => {
                plan.again_in = Some(delay - self.since_last);
            }
            Some(_) => {
                plan.delete.extend(pods);
                plan.attempt = true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
