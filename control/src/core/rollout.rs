//! The roles of a RoleSet together: who waits for whom.

use super::role_plan::{RolePlan, RoleView};
use crate::api::RoleUpdateOrder;

/// One role and its place in the order.
#[derive(Clone, Debug)]
pub struct RoleEntry {
    /// Lower rolls first, none rolls last.
    pub upgrade_order: Option<i32>,
    /// False while the role waits for its dependencies to become ready for the first time.
    pub may_start: bool,
    /// What is wanted and what is there.
    pub view: RoleView,
}

/// What every role needs next, in the order of `roles`. As long as any role's number is being
/// corrected, or any is paused, none rolls. A role that may not start has nothing to roll and is not waited for: it may
/// be waiting for the very role that comes after it.
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
            let started = |at: &usize| roles[*at].may_start;
            for at in upgrade_sequence(roles).into_iter().filter(started) {
                plans[at] = roles[at].view.roll(None);
                if !roles[at].view.is_done() {
                    break;
                }
            }
        }
        RoleUpdateOrder::Interleave => {
            let unfinished = |role: &RoleEntry| role.may_start && !role.view.is_done();
            let step = roles
                .iter()
                .filter(|role| unfinished(role))
                .map(|role| role.view.current_step())
                .min()
                .unwrap_or(1);
            for (plan, role) in plans.iter_mut().zip(roles) {
                if unfinished(role) && role.view.current_step() <= step {
                    *plan = role.view.roll(Some(step));
                }
            }
        }
    }
    plans
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
    use crate::core::budget::Budget;
    use crate::core::role_plan::{Replica, ReplicaState};

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
            })
            .collect();
        RoleEntry {
            upgrade_order,
            may_start: true,
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
            role(Some(1), &[STARTING], 1),
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
