//! Rollouts: which replica is replaced next.

use super::{Replica, RolePlan, RoleView, count};
use crate::core::budget::Budget;

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
            } else if room > 0 && !self.name_is_taken(index) {
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
