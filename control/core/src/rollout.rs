//! The roles of a RoleSet together: who waits for whom.

use kvtide_control_api::RoleUpdateOrder;

use super::role_plan::{RolePlan, RoleView};

/// One role and its place in the order.
#[derive(Clone, Debug)]
pub struct RoleEntry {
    /// Lower rolls first, none rolls last.
    pub upgrade_order: Option<i32>,
    /// False while the role waits for its dependencies to become ready for the first time.
    pub may_start: bool,
    /// Whether it began to roll and has not been completely updated and ready since.
    pub rolling: bool,
    /// What is wanted and what is there.
    pub view: RoleView,
}

impl RoleEntry {
    /// Whether other roles wait for this one. One with nothing to roll is not waited for, ready or not: it
    /// may be waiting for the very change of another that makes it ready again. Nor is one that may not
    /// start.
    fn is_waited_for(&self) -> bool {
        self.may_start && self.rolling && !self.view.is_done()
    }
}

/// What every role needs next, in the order of `roles`. As long as any role's number is being
/// corrected, or any is paused, none rolls.
#[must_use]
pub fn plan(order: RoleUpdateOrder, roles: &[RoleEntry]) -> Vec<RolePlan> {
    let scaling: Vec<RolePlan> = roles
        .iter()
        .map(|role| {
            if role.may_start {
                role.view.scale()
            } else {
                RolePlan::default()
            }
        })
        .collect();
    let paused = roles.iter().any(|role| role.view.paused);
    if paused || scaling.iter().any(|plan| !plan.is_empty()) {
        return scaling;
    }
    let mut plans = vec![RolePlan::default(); roles.len()];
    match order {
        RoleUpdateOrder::Parallel => {
            for (plan, role) in plans.iter_mut().zip(roles) {
                *plan = role.view.roll(None);
            }
        }
        RoleUpdateOrder::Sequential => {
            let blocker = blocker(roles);
            for at in upgrade_sequence(roles) {
                if roles[at].may_start {
                    plans[at] = roles[at].view.roll(None);
                }
                if Some(at) == blocker {
                    break;
                }
            }
        }
        RoleUpdateOrder::Interleave => {
            let waited_for = roles.iter().filter(|role| role.is_waited_for());
            let step = waited_for.map(|role| role.view.current_step()).min();
            for (plan, role) in plans.iter_mut().zip(roles) {
                let level = step.is_some_and(|step| role.view.current_step() <= step);
                if role.is_waited_for() && level {
                    *plan = role.view.roll(step);
                }
            }
        }
    }
    plans
}

/// With Sequential, the role that those after it wait for.
fn blocker(roles: &[RoleEntry]) -> Option<usize> {
    let mut sequence = upgrade_sequence(roles).into_iter();
    sequence.find(|&at| roles[at].is_waited_for())
}

/// With Sequential, the role that holds others up, and those: positions in `roles`.
#[must_use]
pub fn held_up(roles: &[RoleEntry]) -> Option<(usize, Vec<usize>)> {
    let blocker = blocker(roles)?;
    let behind = upgrade_sequence(roles).into_iter();
    let behind = behind.skip_while(|&at| at != blocker).skip(1);
    let held: Vec<usize> = behind.filter(|&at| roles[at].view.has_outdated()).collect();
    (!held.is_empty()).then_some((blocker, held))
}

/// Positions of the roles in the order in which they roll.
fn upgrade_sequence(roles: &[RoleEntry]) -> Vec<usize> {
    let mut sequence: Vec<usize> = (0..roles.len()).collect();
    sequence.sort_by_key(|&at| (roles[at].upgrade_order.is_none(), roles[at].upgrade_order));
    sequence
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::role_plan::{Replica, ReplicaState};

    fn role(
        upgrade_order: Option<i32>,
        units: &[(bool, ReplicaState)],
        replicas: i32,
    ) -> RoleEntry {
        let units = units
            .iter()
            .map(|&(updated, state)| Replica {
                index: None,
                updated,
                state,
                created_s: 0,
                waiting_since_s: 0,
            })
            .collect();
        let mut entry = RoleEntry {
            upgrade_order,
            may_start: true,
            rolling: true,
            view: RoleView {
                replicas,
                budget: Budget {
                    surge: 0,
                    unavailable: 1,
                },
                indexed: false,
                paused: false,
                units,
            },
        };
        entry.rolling = entry.view.has_outdated();
        entry
    }

    /// A role that began to roll with this change.
    fn rolled(upgrade_order: Option<i32>, units: &[(bool, ReplicaState)]) -> RoleEntry {
        let replicas = i32::try_from(units.len()).unwrap();
        RoleEntry {
            rolling: true,
            ..role(upgrade_order, units, replicas)
        }
    }

    const OLD: (bool, ReplicaState) = (false, ReplicaState::Ready);
    const NEW: (bool, ReplicaState) = (true, ReplicaState::Ready);
    const STARTING: (bool, ReplicaState) = (true, ReplicaState::Waiting);

    fn moving(order: RoleUpdateOrder, roles: &[RoleEntry]) -> Vec<bool> {
        plan(order, roles)
            .iter()
            .map(|plan| !plan.is_empty())
            .collect()
    }

    #[test]
    fn sequential_rolls_one_role_at_a_time_and_unordered_ones_last() {
        use RoleUpdateOrder::Sequential;
        let decode = role(None, &[OLD], 1);
        let router = role(Some(1), &[OLD], 1);
        let prefill = role(Some(2), &[OLD], 1);
        let roles = [decode.clone(), router, prefill.clone()];
        assert_eq!(moving(Sequential, &roles), [false, true, false]);
        let roles = [
            decode.clone(),
            rolled(Some(1), &[STARTING]),
            prefill.clone(),
        ];
        assert_eq!(
            moving(Sequential, &roles),
            [false, false, false],
            "the router is waited for"
        );
        let roles = [decode.clone(), role(Some(1), &[NEW], 1), prefill];
        assert_eq!(moving(Sequential, &roles), [false, false, true]);
        let roles = [decode, role(Some(1), &[NEW], 1), role(Some(2), &[NEW], 1)];
        assert_eq!(moving(Sequential, &roles), [true, false, false]);
    }

    #[test]
    fn a_role_with_nothing_to_roll_is_not_waited_for() {
        use RoleUpdateOrder::{Interleave, Sequential};
        // The router is not ready because decode is broken; what mends it is decode's rollback.
        let router = role(Some(1), &[STARTING, NEW], 2);
        let decode = role(Some(2), &[OLD, NEW, NEW], 3);
        for order in [Sequential, Interleave] {
            let roles = [router.clone(), decode.clone()];
            assert_eq!(moving(order, &roles), [false, true], "{order:?}");
            assert_eq!(held_up(&roles), None);
        }
    }

    #[test]
    fn who_holds_up_whom_is_known() {
        let decode = role(None, &[OLD], 1);
        let settled = role(Some(3), &[NEW], 1);
        let router = rolled(Some(1), &[STARTING]);
        let prefill = role(Some(2), &[OLD], 1);
        let roles = [decode, settled, router, prefill];
        assert_eq!(held_up(&roles), Some((2, vec![3, 0])));
        assert_eq!(held_up(&roles[2..3]), None, "nobody is held up");
    }

    #[test]
    fn roles_of_one_order_roll_as_listed() {
        let roles = [role(Some(1), &[OLD], 1), role(Some(1), &[OLD], 1)];
        assert_eq!(moving(RoleUpdateOrder::Sequential, &roles), [true, false]);
    }

    #[test]
    fn parallel_rolls_all() {
        let roles = [role(Some(2), &[OLD], 1), role(Some(1), &[OLD], 1)];
        assert_eq!(moving(RoleUpdateOrder::Parallel, &roles), [true, true]);
    }

    #[test]
    fn interleave_lets_no_role_get_a_step_ahead() {
        use RoleUpdateOrder::Interleave;
        let ahead = role(None, &[OLD, OLD, NEW], 3);
        let behind = role(None, &[OLD, OLD, OLD], 3);
        assert_eq!(moving(Interleave, &[ahead.clone(), behind]), [false, true]);
        let level = role(None, &[OLD, OLD, NEW], 3);
        assert_eq!(moving(Interleave, &[ahead, level]), [true, true]);
    }

    #[test]
    fn correcting_a_number_goes_before_rolling() {
        let missing = role(Some(2), &[], 1);
        let outdated = role(Some(1), &[OLD], 1);
        let plans = plan(RoleUpdateOrder::Sequential, &[missing, outdated]);
        assert_eq!(plans[0].create.len(), 1);
        assert!(plans[1].is_empty());
    }

    #[test]
    fn a_pause_holds_every_order() {
        use RoleUpdateOrder::{Interleave, Parallel, Sequential};
        let mut outdated = role(None, &[OLD], 1);
        outdated.view.paused = true;
        for order in [Sequential, Parallel, Interleave] {
            let roles = std::slice::from_ref(&outdated);
            assert_eq!(moving(order, roles), [false], "{order:?}");
        }
    }

    #[test]
    fn a_gated_role_is_not_created() {
        let mut gated = role(None, &[], 2);
        gated.may_start = false;
        assert_eq!(moving(RoleUpdateOrder::Parallel, &[gated]), [false]);
    }

    #[test]
    fn a_gated_role_does_not_hold_up_the_one_it_waits_for() {
        use RoleUpdateOrder::{Interleave, Parallel, Sequential};
        let mut gated = role(None, &[], 2);
        gated.may_start = false;
        let first = |mut gated: RoleEntry| {
            gated.upgrade_order = Some(0);
            gated
        };
        // Its first step is over, so a gated role at step 1 must not hold it.
        let awaited = role(None, &[OLD, NEW], 2);
        for order in [Sequential, Parallel, Interleave] {
            let table = [
                (
                    "listed first",
                    [gated.clone(), awaited.clone()],
                    [false, true],
                ),
                (
                    "listed last",
                    [awaited.clone(), gated.clone()],
                    [true, false],
                ),
                (
                    "ordered first, listed last",
                    [awaited.clone(), first(gated.clone())],
                    [true, false],
                ),
            ];
            for (name, roles, expected) in table {
                assert_eq!(moving(order, &roles), expected, "{order:?}, {name}");
            }
        }
    }
}
