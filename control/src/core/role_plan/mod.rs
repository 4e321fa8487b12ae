//! What one role of a RoleSet needs next: which replicas to create and which to delete.
//!
//! A replica is a pod, or a PodSet where `podGroupSize` is above 1. *Indexed* replicas have slots
//! `0..replicas` (stateful pods, PodSets); plain ones are interchangeable.

use std::collections::BTreeMap;

use super::budget::{Budget, CREATIONS_MAX};
use crate::api::RoleStatus;

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
    /// When it was created, in seconds; the newest go first.
    pub created_s: i64,
}

impl Replica {
    fn is_active(&self) -> bool {
        matches!(self.state, ReplicaState::Waiting | ReplicaState::Ready)
    }

    fn is_ready(&self) -> bool {
        self.state == ReplicaState::Ready
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

fn count(units: &[Replica], wanted: impl Fn(&Replica) -> bool) -> i32 {
    i32::try_from(units.iter().filter(|unit| wanted(unit)).count()).unwrap_or(i32::MAX)
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

    /// Brings the number of replicas to the wanted one, whatever they are made from.
    #[must_use]
    pub fn scale(&self) -> RolePlan {
        let mut plan = if self.indexed {
            self.scale_indexed()
        } else {
            self.scale_plain()
        };
        let mut surplus = self.active() + self.held() - self.tolerated();
        for (at, unit) in self.units.iter().enumerate() {
            let unwanted = match unit.state {
                ReplicaState::Finished => true,
                ReplicaState::Held if self.indexed => !self.is_slot(unit.index),
                ReplicaState::Held => {
                    surplus -= 1;
                    surplus >= 0
                }
                _ => false,
            };
            if unwanted {
                plan.delete.push(at);
            }
        }
        plan
    }

    fn is_slot(&self, index: Option<i32>) -> bool {
        index.is_some_and(|index| (0..self.replicas).contains(&index))
    }

    /// How many are not too many. In the middle of a rollout a surge is not: the new ones are waited for.
    fn tolerated(&self) -> i32 {
        if self.active_positions().any(|at| !self.units[at].updated) {
            self.ceiling()
        } else {
            self.replicas
        }
    }

    fn scale_plain(&self) -> RolePlan {
        let mut plan = RolePlan::default();
        let active = self.active();
        if active < self.replicas {
            let room = self.ceiling() - active - self.going();
            plan.create_plain(room.min(self.replicas - active - self.held()));
            return plan;
        }
        let ceiling = self.tolerated();
        let floor = self.replicas - self.budget.unavailable;
        let mut left = active;
        let mut ready = count(&self.units, Replica::is_ready);
        for at in self.least_wanted_first() {
            if left <= self.replicas {
                break;
            }
            let unit = &self.units[at];
            // Taking an outdated one away is a step of the rollout.
            let harmless = !self.paused && !unit.updated && (!unit.is_ready() || ready > floor);
            if left > ceiling || harmless {
                plan.delete.push(at);
                left -= 1;
                ready -= i32::from(unit.is_ready());
            }
        }
        plan
    }

    /// Outdated before updated, waiting before ready, newest first.
    fn least_wanted_first(&self) -> Vec<usize> {
        let mut order: Vec<usize> = self.active_positions().collect();
        order.sort_by_key(|&at| {
            let unit = &self.units[at];
            (
                unit.updated,
                unit.is_ready(),
                std::cmp::Reverse(unit.created_s),
                at,
            )
        });
        order
    }

    fn scale_indexed(&self) -> RolePlan {
        let (slots, strays) = self.slots();
        let mut plan = RolePlan::default();
        let mut spare = if self.paused {
            self.active() - self.ceiling()
        } else {
            self.ready() - self.replicas + self.budget.unavailable
        };
        let mut filled = i32::try_from(slots.len()).unwrap_or(i32::MAX);
        for at in strays {
            let unit = &self.units[at];
            // Without a slot it comes from before the role had any: it serves until others do.
            let serving = unit.index.is_none() && (self.paused || unit.is_ready());
            if serving && spare <= 0 {
                filled = filled.saturating_add(1);
                continue;
            }
            spare -= i32::from(serving);
            plan.delete.push(at);
        }
        let mut room = self.ceiling() - self.active() - self.going();
        if self.paused {
            // A surge is not begun, and one that was begun stands.
            room = room.min(self.replicas - filled);
        } else {
            let surplus = slots.values().filter(|slot| slot.len() > 1);
            plan.delete
                .extend(surplus.flat_map(|slot| self.surplus(slot)));
        }
        let room = usize::try_from(room.min(CREATIONS_MAX)).unwrap_or(0);
        let free = (0..self.replicas)
            .filter(|index| !slots.contains_key(index) && !self.name_is_taken(*index));
        plan.create.extend(free.take(room).map(Some));
        plan
    }

    /// A name is made of template and slot, so what goes from there must be gone first.
    fn name_is_taken(&self, index: i32) -> bool {
        self.units
            .iter()
            .any(|unit| unit.index == Some(index) && unit.updated && !unit.is_active())
    }

    /// Of several replicas in a slot: the one updated and ready stays; before there is one, a ready
    /// outdated one and an updated one on its way stay.
    fn surplus(&self, slot: &[usize]) -> Vec<usize> {
        let find = |updated: bool, ready: bool| {
            slot.iter().copied().find(move |&at| {
                self.units[at].updated == updated && self.units[at].is_ready() == ready
            })
        };
        let kept: Vec<usize> = match find(true, true) {
            Some(settled) => vec![settled],
            None => [find(false, true), find(true, false)]
                .into_iter()
                .flatten()
                .collect(),
        };
        // Two that are outdated and waiting: one is enough.
        let kept = if kept.is_empty() {
            slot[..1].to_vec()
        } else {
            kept
        };
        slot.iter()
            .copied()
            .filter(|at| !kept.contains(at))
            .collect()
    }

    /// Moves the role towards its present template, within the budget and at most to the end of
    /// `step`, where steps are kept.
    #[must_use]
    pub fn roll(&self, step: Option<i32>) -> RolePlan {
        let target = step.map_or(self.replicas, |step| self.step_target(step));
        if self.indexed {
            self.roll_indexed(target)
        } else {
            self.roll_plain(target)
        }
    }

    fn roll_plain(&self, target: i32) -> RolePlan {
        let mut plan = RolePlan::default();
        let updated = count(&self.units, |unit| unit.is_active() && unit.updated);
        let outdated = self.active() - updated;
        if outdated == 0 || updated >= target && target < self.replicas {
            return plan;
        }
        let mut may_go = outdated - (self.replicas - target);
        let mut spare =
            count(&self.units, Replica::is_ready) - self.replicas + self.budget.unavailable;
        for at in self.least_wanted_first() {
            let unit = &self.units[at];
            if unit.updated || may_go <= 0 {
                break;
            }
            if unit.is_ready() {
                if spare <= 0 {
                    break;
                }
                spare -= 1;
            }
            plan.delete.push(at);
            may_go -= 1;
        }
        let room = self.ceiling() - self.active() - self.going();
        plan.create_plain(room.min(target - updated));
        plan
    }

    fn roll_indexed(&self, target: i32) -> RolePlan {
        let mut plan = RolePlan::default();
        let (slots, _) = self.slots();
        let slot_count = |wanted: &dyn Fn(&Replica) -> bool| {
            let found = slots
                .values()
                .filter(|slot| slot.iter().any(|&at| wanted(&self.units[at])));
            i32::try_from(found.count()).unwrap_or(i32::MAX)
        };
        let updated = slot_count(&|unit| unit.updated);
        let filled = slot_count(&|_| true);
        let outdated = filled - updated;
        let mut spare = (slot_count(&Replica::is_ready) - self.replicas + self.budget.unavailable)
            .min(outdated - (self.replicas - target));
        let all = i32::try_from(self.units.len()).unwrap_or(i32::MAX);
        let mut room = (self.ceiling() - all).min(target - updated);
        for (index, slot) in slots {
            let [at] = slot.as_slice() else {
                continue; // Scaling sees to empty and to crowded slots.
            };
            let unit = &self.units[*at];
            if unit.updated {
                continue;
            }
            if !unit.is_ready() {
                plan.delete.push(*at);
            } else if spare > 0 {
                plan.delete.push(*at);
                spare -= 1;
            } else if room > 0 {
                plan.create.push(Some(index));
                room -= 1;
            }
        }
        plan
    }

    fn step_length(&self) -> i32 {
        let Budget { surge, unavailable } = self.budget;
        surge.saturating_add(unavailable).max(1)
    }

    fn step_target(&self, step: i32) -> i32 {
        self.step_length().saturating_mul(step).min(self.replicas)
    }

    /// The first step, from 1, that is not complete: all its replicas updated and ready.
    #[must_use]
    pub fn current_step(&self) -> i32 {
        let settled = count(&self.units, |unit| unit.updated && unit.is_ready());
        settled / self.step_length() + 1
    }
}

#[cfg(test)]
mod tests;
