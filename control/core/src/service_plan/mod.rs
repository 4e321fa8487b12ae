//! What a StormService needs next: which RoleSets to create, to delete, and to bring to the present
//! revision in place.

use kvtide_control_api::UpdateType;

use super::budget::{Allowance, Budget, CREATIONS_MAX, Presence};

/// A RoleSet as its StormService sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetView {
    /// Its index, where it has one.
    pub index: Option<i32>,
    /// Whether it is of the present revision.
    pub updated: bool,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether all its roles have rolled to what it asks for, and are ready.
    pub settled: bool,
    /// Whether it is being deleted.
    pub going: bool,
    /// Whether the present revision differs in what a RoleSet cannot change in place.
    pub replace: bool,
}

/// Which revision a new RoleSet is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revision {
    /// The present template's.
    Update,
    /// The one that was complete last.
    Current,
}

/// What is wanted and what is there.
#[derive(Clone, Debug)]
pub struct ServiceView {
    /// Wanted RoleSets.
    pub replicas: i32,
    /// How far a rollout may stray from them.
    pub budget: Budget,
    /// One after the other, or all at once.
    pub update: UpdateType,
    /// Whether rollouts stop.
    pub paused: bool,
    /// Whether indices are fixed to `0..replicas`.
    pub stateful: bool,
    /// What is there.
    pub sets: Vec<SetView>,
}

/// What to do; numbers in `delete` and `update` are positions in [`ServiceView::sets`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Indices to create RoleSets at.
    pub create: Vec<(i32, Revision)>,
    /// RoleSets to delete.
    pub delete: Vec<usize>,
    /// RoleSets to bring to the present revision in place.
    pub update: Vec<usize>,
}

impl ServicePlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.create.is_empty() && self.delete.is_empty() && self.update.is_empty()
    }
}

fn number(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

impl ServiceView {
    /// The next step: numbers are corrected before anything rolls.
    #[must_use]
    pub fn plan(&self) -> ServicePlan {
        let scaling = self.scale();
        if !scaling.is_empty() || self.paused {
            return scaling;
        }
        self.roll()
    }

    fn active(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.sets.len()).filter(|&at| !self.sets[at].going)
    }

    fn two_revisions(&self) -> bool {
        self.active().any(|at| self.sets[at].updated)
            && self.active().any(|at| !self.sets[at].updated)
    }

    fn surge(&self) -> i32 {
        match self.update {
            UpdateType::RollingUpdate => self.budget.surge,
            UpdateType::InPlaceUpdate => 0,
        }
    }

    /// Wanted RoleSets and surge.
    fn ceiling(&self) -> i32 {
        self.replicas.saturating_add(self.surge())
    }

    fn scale(&self) -> ServicePlan {
        let active = number(self.active().count());
        if active < self.replicas {
            self.scale_out(active)
        } else {
            self.scale_in(active)
        }
    }

    fn scale_out(&self, active: i32) -> ServicePlan {
        let room = self.ceiling() - number(self.sets.len());
        let missing = (self.replicas - active).min(room).clamp(0, CREATIONS_MAX);
        let mut of_current = 0;
        if self.paused {
            // A paused rollout keeps its proportion, after every step.
            let current = self.active().filter(|&at| !self.sets[at].updated).count();
            let wanted = proportion(number(current), active, active + missing);
            let nothing_yet = active == 0;
            of_current = if nothing_yet {
                0
            } else {
                (wanted - number(current)).clamp(0, missing)
            };
        }
        let create = self
            .free_indices(missing)
            .into_iter()
            .zip(0..)
            .map(|(index, nth)| {
                (
                    index,
                    if nth < of_current {
                        Revision::Current
                    } else {
                        Revision::Update
                    },
                )
            })
            .collect();
        ServicePlan {
            create,
            ..ServicePlan::default()
        }
    }

    /// The lowest indices that no RoleSet has, not even one that goes. Stateful ones wait for theirs.
    fn free_indices(&self, count: i32) -> Vec<i32> {
        let taken = |index: i32| self.sets.iter().any(|set| set.index == Some(index));
        let last = if self.stateful {
            self.replicas
        } else {
            i32::MAX
        };
        let count = usize::try_from(count).unwrap_or(0);
        (0..last)
            .filter(|&index| !taken(index))
            .take(count)
            .collect()
    }

    fn scale_in(&self, active: i32) -> ServicePlan {
        let surplus = usize::try_from(active - self.replicas).unwrap_or(0);
        if surplus == 0 {
            return ServicePlan::default();
        }
        let mut order: Vec<usize> = self.active().collect();
        let delete = if self.paused && self.two_revisions() && !self.stateful {
            self.proportional_surplus(order, surplus)
        } else {
            order.sort_by_key(|&at| {
                let set = &self.sets[at];
                // Who asks for an index below the count must find it.
                let within = self.stateful && set.index.is_some_and(|index| index < self.replicas);
                let latest = std::cmp::Reverse(set.index);
                (within, set.updated, set.ready, latest, at)
            });
            self.surplus(order, active)
        };
        ServicePlan {
            delete,
            ..ServicePlan::default()
        }
    }

    /// RoleSets to take away, of those in `order`. In the middle of a rollout the new ones of a surge are
    /// too many only once they are ready: before that outdated ones go within the budget, and beyond the
    /// surge those that are ready go last.
    fn surplus(&self, order: Vec<usize>, active: i32) -> Vec<usize> {
        let count = |surplus: i32| usize::try_from(surplus).unwrap_or(0);
        let mut surplus = active - self.replicas;
        // Fixed indices leave no choice.
        if self.paused || self.stateful || !self.two_revisions() {
            return order.into_iter().take(count(surplus)).collect();
        }
        let mut allowance = self.allowance(self.budget, &[], |set| set.ready);
        let mut chosen = Vec::new();
        let mut rest = Vec::new();
        for at in order {
            let set = &self.sets[at];
            if surplus > 0 && !set.updated && allowance.take(set.ready) {
                chosen.push(at);
                surplus -= 1;
            } else {
                rest.push(at);
            }
        }
        rest.sort_by_key(|&at| self.sets[at].ready);
        chosen.extend(rest.into_iter().take(count(surplus - self.surge())));
        chosen
    }

    /// What a rollout may take away within `budget`, where those that `serves` says are ready, and those
    /// that begin to change now, in `begun`, are not.
    fn allowance(
        &self,
        budget: Budget,
        begun: &[usize],
        serves: impl Fn(&SetView) -> bool,
    ) -> Allowance {
        let mut present = Presence::default();
        for at in self.active() {
            let set = &self.sets[at];
            let begins = begun.contains(&at);
            let ready = serves(set) && !begins;
            present.places += 1;
            present.ready += i32::from(ready);
            present.starting += i32::from(!ready && (set.updated || begins));
        }
        budget.allowance(self.replicas, present)
    }

    /// Those that are not ready first, then of each revision its share.
    fn proportional_surplus(&self, mut order: Vec<usize>, surplus: usize) -> Vec<usize> {
        order.sort_by_key(|&at| {
            (
                self.sets[at].ready,
                std::cmp::Reverse(self.sets[at].index),
                at,
            )
        });
        let mut delete: Vec<usize> = order
            .iter()
            .copied()
            .filter(|&at| !self.sets[at].ready)
            .take(surplus)
            .collect();
        let ready: Vec<usize> = order
            .into_iter()
            .filter(|&at| self.sets[at].ready)
            .collect();
        let left = surplus - delete.len();
        let outdated: Vec<usize> = ready
            .iter()
            .copied()
            .filter(|&at| !self.sets[at].updated)
            .collect();
        let kept = number(ready.len().saturating_sub(left));
        let kept_outdated = proportion(number(outdated.len()), number(ready.len()), kept);
        let of_outdated = (outdated.len() - usize::try_from(kept_outdated).unwrap_or(0)).min(left);
        delete.extend(outdated.into_iter().take(of_outdated));
        let updated = ready.into_iter().filter(|&at| self.sets[at].updated);
        delete.extend(updated.take(left - of_outdated));
        delete
    }

    /// The budget of replacements. Where a surge cannot be made, because indices are fixed or all roll in
    /// place, one may go, or else nothing ever would.
    fn replacing(&self) -> Budget {
        let mut budget = self.budget;
        if self.stateful || self.surge() == 0 {
            budget.unavailable = budget.unavailable.max(1);
        }
        budget
    }

    fn roll(&self) -> ServicePlan {
        let mut plan = ServicePlan::default();
        let mut outdated: Vec<usize> = self.active().filter(|&at| !self.sets[at].updated).collect();
        outdated.sort_by_key(|&at| (self.sets[at].ready, self.sets[at].index, at));
        let (replaced, in_place): (Vec<usize>, Vec<usize>) =
            outdated.into_iter().partition(|&at| self.sets[at].replace);
        // What can be changed in place is changed first: it may already be on its way.
        let in_flight = |at: &usize| self.sets[*at].updated && !self.sets[*at].settled;
        let mut in_flight = number(self.active().filter(in_flight).count());
        // One at a time at least: its roles' own surge keeps it serving.
        let in_place_max = self.budget.unavailable.max(1);
        let serves = |set: &SetView| set.ready && (!set.updated || set.settled);
        let mut ready = number(self.active().filter(|&at| serves(&self.sets[at])).count());
        for at in in_place {
            let all_at_once = self.update == UpdateType::InPlaceUpdate;
            let set = &self.sets[at];
            let within =
                in_flight < in_place_max && (!set.ready || ready > self.replicas - in_place_max);
            if all_at_once || within {
                plan.update.push(at);
                in_flight += 1;
                ready -= i32::from(set.ready);
            }
        }
        let mut allowance = self.allowance(self.replacing(), &plan.update, serves);
        for &at in &replaced {
            if allowance.take(self.sets[at].ready) {
                plan.delete.push(at);
            }
        }
        if !replaced.is_empty() {
            let updated = number(self.active().filter(|&at| self.sets[at].updated).count());
            let room = self.ceiling() - number(self.sets.len());
            let create = room.min(self.replicas - updated).clamp(0, CREATIONS_MAX);
            let indices = self.free_indices(create).into_iter();
            plan.create = indices.map(|index| (index, Revision::Update)).collect();
        }
        plan
    }
}

/// `part` of `whole`, scaled to `wanted` and rounded to the nearest.
fn proportion(part: i32, whole: i32, wanted: i32) -> i32 {
    if whole <= 0 {
        return 0;
    }
    let (part, whole, wanted) = (i64::from(part), i64::from(whole), i64::from(wanted));
    i32::try_from((2 * part * wanted + whole) / (2 * whole)).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;
