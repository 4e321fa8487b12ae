//! Numbers: which replicas are missing, and which are too many.

use std::cmp::Reverse;

use super::{Replica, ReplicaState, RolePlan, RoleView, count, number};
use crate::budget::CREATIONS_MAX;

impl RoleView {
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
    /// At a pause only those stay that have come already, and none where nothing is wanted.
    fn tolerated(&self) -> i32 {
        let updated = count(&self.units, |unit| unit.is_active() && unit.updated);
        if updated == self.active() || self.paused && self.replicas == 0 {
            self.replicas
        } else if self.paused {
            self.ceiling().min(self.replicas.saturating_add(updated))
        } else {
            self.ceiling()
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
        let mut surplus = active - self.replicas;
        if !self.paused {
            // Taking an outdated one away is a step of the rollout.
            let mut allowance = self.allowance();
            for at in self.least_wanted_first() {
                let unit = &self.units[at];
                if surplus <= 0 || unit.updated || !allowance.take(unit.is_ready()) {
                    break;
                }
                plan.delete.push(at);
                surplus -= 1;
            }
        }
        let order = if self.paused {
            self.least_serving_first()
        } else {
            self.least_missed_first()
        };
        let mut beyond = surplus - (self.tolerated() - self.replicas);
        for at in order {
            if beyond <= 0 {
                break;
            }
            if !plan.delete.contains(&at) {
                plan.delete.push(at);
                beyond -= 1;
            }
        }
        plan
    }

    /// Waiting before ready. Of those that wait, outdated ones may have served and come back, so updated
    /// ones go before them.
    fn least_missed_first(&self) -> Vec<usize> {
        self.sorted(|unit| (unit.is_ready(), unit.updated == unit.is_ready()))
    }

    /// Outdated before updated, waiting before ready.
    pub(super) fn least_wanted_first(&self) -> Vec<usize> {
        self.sorted(|unit| (unit.updated, unit.is_ready()))
    }

    fn sorted(&self, kind: impl Fn(&Replica) -> (bool, bool)) -> Vec<usize> {
        let mut order: Vec<usize> = self.active_positions().collect();
        order.sort_by_key(|&at| (kind(&self.units[at]), self.units[at].turn(), at));
        order
    }

    /// Waiting before ready, newest first; of those that are ready, outdated and updated ones in
    /// proportion. At a pause neither template is the better one.
    fn least_serving_first(&self) -> Vec<usize> {
        let newest_first = |wanted: &dyn Fn(&Replica) -> bool| {
            let found = self
                .active_positions()
                .filter(|&at| wanted(&self.units[at]));
            let mut found: Vec<usize> = found.collect();
            found.sort_by_key(|&at| Reverse((self.units[at].created_s, at)));
            found
        };
        let updated = newest_first(&|unit| unit.is_ready() && unit.updated);
        let outdated = newest_first(&|unit| unit.is_ready() && !unit.updated);
        // When so much of its kind has gone, it is its turn: its place by the size of its kind, both
        // times the sizes of the two kinds.
        let turns = |kind: &[usize], other: &[usize]| {
            let places = kind.iter().copied().zip(1..);
            let turns = places.map(|(at, place)| (place * other.len().max(1), at));
            turns.collect::<Vec<_>>()
        };
        let mut ready = turns(&updated, &outdated);
        ready.extend(turns(&outdated, &updated));
        // Stable: of equal turns an updated one goes, as the one that can be made again.
        ready.sort_by_key(|&(turn, _)| turn);
        let mut order = newest_first(&|unit| !unit.is_ready());
        order.extend(ready.into_iter().map(|(_, at)| at));
        order
    }

    fn scale_indexed(&self) -> RolePlan {
        let (slots, strays) = self.slots();
        let mut plan = RolePlan::default();
        let (mut roaming, beyond): (Vec<usize>, Vec<usize>) = strays
            .into_iter()
            .partition(|&at| self.units[at].index.is_none());
        let mut filled = number(slots.len());
        let mut spare = self.active() - self.tolerated() - number(beyond.len());
        let mut allowance = self.allowance();
        plan.delete.extend(beyond);
        // Without a slot they come from before the role had any: they serve until others do.
        roaming.sort_by_key(|&at| self.units[at].missed());
        for at in roaming {
            let goes = if self.paused {
                spare > 0
            } else {
                allowance.take(self.units[at].is_ready())
            };
            if goes {
                plan.delete.push(at);
                spare -= 1;
            } else {
                filled = filled.saturating_add(1);
            }
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
    pub(super) fn name_is_taken(&self, index: i32) -> bool {
        self.units
            .iter()
            .any(|unit| unit.index == Some(index) && unit.updated && !unit.is_active())
    }

    /// Of several replicas in a slot: the one updated and ready stays; before there is one, an outdated
    /// one and an updated one on its way stay. An outdated one that is not ready may become so again.
    fn surplus(&self, slot: &[usize]) -> Vec<usize> {
        let unit = |at: &usize| &self.units[*at];
        let best = |updated: bool| {
            let of_age = slot.iter().filter(move |at| unit(at).updated == updated);
            of_age.min_by_key(|at| (!unit(at).is_ready(), Reverse(unit(at).turn()), **at))
        };
        let kept = match best(true) {
            Some(updated) if unit(updated).is_ready() => [Some(updated), None],
            updated => [updated, best(false)],
        };
        slot.iter()
            .filter(|at| !kept.contains(&Some(*at)))
            .copied()
            .collect()
    }
}
