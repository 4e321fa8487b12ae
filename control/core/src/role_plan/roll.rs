//! Rollouts: which replica is replaced next.

use std::collections::BTreeMap;

use super::{RolePlan, RoleView, count, number};
use crate::budget::Budget;

impl RoleView {
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
        let mut allowance = self.allowance();
        for at in self.least_wanted_first() {
            let unit = &self.units[at];
            if unit.updated || may_go <= 0 || !allowance.take(unit.is_ready()) {
                break;
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
        let is_outdated = |slot: &[usize]| slot.iter().all(|&at| !self.units[at].updated);
        let outdated = slots.values().filter(|slot| is_outdated(slot)).count();
        let mut may_begin = number(outdated) - (self.replicas - target);
        let mut room = self.ceiling() - number(self.units.len());
        let mut allowance = self.allowance();
        for (index, at) in self.lone_and_outdated(&slots) {
            if may_begin <= 0 {
                break;
            }
            if allowance.take(self.units[at].is_ready()) {
                plan.delete.push(at);
            } else if room > 0 && !self.name_is_taken(index) {
                plan.create.push(Some(index));
                room -= 1;
            } else {
                continue;
            }
            may_begin -= 1;
        }
        plan
    }

    /// Slots with one outdated replica and no other, and where it is: waiting before ready. Scaling sees
    /// to empty and to crowded slots.
    fn lone_and_outdated(&self, slots: &BTreeMap<i32, Vec<usize>>) -> Vec<(i32, usize)> {
        let mut lone: Vec<(i32, usize)> = slots
            .iter()
            .filter_map(|(&index, slot)| match slot.as_slice() {
                [at] if !self.units[*at].updated => Some((index, *at)),
                _ => None,
            })
            .collect();
        lone.sort_by_key(|&(index, at)| (self.units[at].missed(), index));
        lone
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
