//! What one role of a RoleSet needs next: which replicas to create and which to delete.
//!
//! A replica is a pod, or a PodSet where `podGroupSize` is above 1. *Indexed* replicas have slots
//! `0..replicas` (stateful pods, PodSets); plain ones are interchangeable.

mod roll;
mod scale;

use std::cmp::Reverse;
use std::collections::BTreeMap;

use kvtide_control_api::RoleStatus;

use super::budget::{Allowance, Budget, CREATIONS_MAX, Presence};

/// Where a replica is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    /// Being deleted. One that outstayed its grace period no longer holds a place.
    Going {
        /// Whether its grace period is over.
        overdue: bool,
    },
    /// Ended, and will not run again.
    Finished,
    /// Ended soon after it was made from the present template. It holds its place until its
    /// replacement is due.
    Held,
    /// There, and not ready.
    Waiting,
    /// Ready.
    Ready,
}

/// One replica as it was observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Its slot, where it says one.
    pub index: Option<i32>,
    /// Whether it is made from the role's present template.
    pub updated: bool,
    /// Where it is in its life.
    pub state: ReplicaState,
    /// When it was created, in seconds; of those that are ready, the newest go first.
    pub created_s: i64,
    /// Since when it waits to be ready, in seconds: since it was made, or since it last was ready.
    pub waiting_since_s: i64,
}

impl Replica {
    fn is_active(&self) -> bool {
        matches!(self.state, ReplicaState::Waiting | ReplicaState::Ready)
    }

    fn is_ready(&self) -> bool {
        self.state == ReplicaState::Ready
    }

    /// Orders replicas by how much they are missed: waiting before ready, the longest waiting first.
    fn missed(&self) -> (bool, i64) {
        let ready = self.is_ready();
        (ready, if ready { 0 } else { self.waiting_since_s })
    }

    /// Orders replicas that are alike otherwise. Outdated ones that wait: the longest first, as the least
    /// likely to be ready again. Others: the newest first, as those that have come the least far.
    fn turn(&self) -> (i64, Reverse<i64>) {
        let stale = !self.updated && !self.is_ready();
        let since_s = if stale { self.waiting_since_s } else { 0 };
        (since_s, Reverse(self.created_s))
    }
}

/// One role: what is wanted and what is there.
#[derive(Clone, Debug)]
pub struct RoleView {
    /// Wanted replicas.
    pub replicas: i32,
    /// How far a rollout may stray from them.
    pub budget: Budget,
    /// Whether replicas have slots.
    pub indexed: bool,
    /// Whether rollouts stop: nothing is replaced, and only what is missing or too much is corrected.
    pub paused: bool,
    /// What is there.
    pub units: Vec<Replica>,
}

/// What to do; deletions are positions in [`RoleView::units`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RolePlan {
    /// One entry for each replica to create: its slot, or none for a plain one.
    pub create: Vec<Option<i32>>,
    /// Replicas to delete.
    pub delete: Vec<usize>,
}

impl RolePlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.create.is_empty() && self.delete.is_empty()
    }

    fn create_plain(&mut self, count: i32) {
        let count = count.clamp(0, CREATIONS_MAX);
        self.create.extend((0..count).map(|_| None));
    }
}

fn number(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn count(units: &[Replica], wanted: impl Fn(&Replica) -> bool) -> i32 {
    number(units.iter().filter(|unit| wanted(unit)).count())
}

impl RoleView {
    /// Replicas that hold a place and do not serve: still holding resources while they go, or not to
    /// be replaced yet.
    fn going(&self) -> i32 {
        let going = ReplicaState::Going { overdue: false };
        self.held() + count(&self.units, |unit| unit.state == going)
    }

    fn held(&self) -> i32 {
        count(&self.units, |unit| unit.state == ReplicaState::Held)
    }

    fn active(&self) -> i32 {
        count(&self.units, Replica::is_active)
    }

    fn active_positions(&self) -> impl Iterator<Item = usize> + '_ {
        self.units
            .iter()
            .enumerate()
            .filter(|(_, unit)| unit.is_active())
            .map(|(at, _)| at)
    }

    /// How many are ready.
    #[must_use]
    pub fn ready(&self) -> i32 {
        count(&self.units, Replica::is_ready)
    }

    /// The counts of the role's status; its name is left empty.
    #[must_use]
    pub fn status(&self) -> RoleStatus {
        let (active, ready) = (self.active(), self.ready());
        RoleStatus {
            name: String::new(),
            replicas: active,
            ready_replicas: ready,
            not_ready_replicas: active - ready,
            updated_replicas: count(&self.units, |unit| unit.updated && unit.is_active()),
            updated_ready_replicas: count(&self.units, |unit| unit.updated && unit.is_ready()),
        }
    }

    /// Wanted replicas and surge.
    fn ceiling(&self) -> i32 {
        self.replicas.saturating_add(self.budget.surge)
    }

    /// Active replicas by slot, where there are any, and those without a valid one.
    fn slots(&self) -> (BTreeMap<i32, Vec<usize>>, Vec<usize>) {
        let mut slots: BTreeMap<i32, Vec<usize>> = BTreeMap::new();
        let mut strays = Vec::new();
        for at in self.active_positions() {
            match self.units[at].index {
                Some(index) if (0..self.replicas).contains(&index) => {
                    slots.entry(index).or_default().push(at);
                }
                _ => strays.push(at),
            }
        }
        (slots, strays)
    }

    /// Active replicas by the place that they take: those of one slot share it, any other has its own.
    /// What is in a slot beyond the number is going anyway.
    fn places(&self) -> Vec<Vec<usize>> {
        if !self.indexed {
            return self.active_positions().map(|at| vec![at]).collect();
        }
        let (slots, strays) = self.slots();
        let roaming = strays
            .into_iter()
            .filter(|&at| self.units[at].index.is_none());
        slots
            .into_values()
            .chain(roaming.map(|at| vec![at]))
            .collect()
    }

    /// What a rollout may take away now.
    fn allowance(&self) -> Allowance {
        let mut present = Presence::default();
        for place in self.places() {
            let units = || place.iter().map(|&at| &self.units[at]);
            let ready = units().any(Replica::is_ready);
            present.places += 1;
            present.ready += i32::from(ready);
            present.starting += i32::from(!ready && units().all(|unit| unit.updated));
        }
        self.budget.allowance(self.replicas, present)
    }

    /// Whether a rollout has something to replace.
    #[must_use]
    pub fn has_outdated(&self) -> bool {
        self.units
            .iter()
            .any(|unit| unit.is_active() && !unit.updated)
    }

    /// Whether every wanted replica is updated and ready, and no other is there.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let active = self.active();
        let settled = count(&self.units, |unit| unit.updated && unit.is_ready());
        if self.indexed {
            let (slots, strays) = self.slots();
            let filled = i32::try_from(slots.len()) == Ok(self.replicas);
            let alone = slots.values().all(|slot| slot.len() == 1);
            strays.is_empty() && settled == active && filled && alone
        } else {
            settled == active && active == self.replicas
        }
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
