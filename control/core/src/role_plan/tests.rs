//! What a role needs next, as tables.

use super::*;

const W: ReplicaState = ReplicaState::Waiting;
const R: ReplicaState = ReplicaState::Ready;
const G: ReplicaState = ReplicaState::Going { overdue: false };
const OVERDUE: ReplicaState = ReplicaState::Going { overdue: true };
const F: ReplicaState = ReplicaState::Finished;
const H: ReplicaState = ReplicaState::Held;

/// `n`ew or `o`ld, and a state; created in the order given.
fn plain(replicas: i32, surge: i32, unavailable: i32, units: &[(char, ReplicaState)]) -> RoleView {
    let units = units
        .iter()
        .zip(0..)
        .map(|(&(age, state), created_s)| Replica {
            index: None,
            updated: age == 'n',
            state,
            created_s,
            waiting_since_s: created_s,
        });
    let budget = Budget { surge, unavailable };
    RoleView {
        replicas,
        budget,
        indexed: false,
        paused: false,
        units: units.collect(),
    }
}

fn indexed(
    replicas: i32,
    surge: i32,
    unavailable: i32,
    units: &[(i32, char, ReplicaState)],
) -> RoleView {
    let units = units.iter().map(|&(index, age, state)| Replica {
        index: Some(index),
        updated: age == 'n',
        state,
        created_s: 0,
        waiting_since_s: 0,
    });
    let budget = Budget { surge, unavailable };
    RoleView {
        replicas,
        budget,
        indexed: true,
        paused: false,
        units: units.collect(),
    }
}

fn plan(create: &[Option<i32>], delete: &[usize]) -> RolePlan {
    RolePlan {
        create: create.to_vec(),
        delete: delete.to_vec(),
    }
}

#[test]
fn plain_replicas_scale() {
    let table = [
        (
            "from nothing",
            plain(2, 0, 1, &[]),
            plan(&[None, None], &[]),
        ),
        (
            "enough",
            plain(2, 0, 1, &[('n', R), ('n', W)]),
            plan(&[], &[]),
        ),
        (
            "one goes and holds its place",
            plain(2, 0, 1, &[('n', R), ('n', G)]),
            plan(&[], &[]),
        ),
        (
            "an overdue one does not",
            plain(2, 0, 1, &[('n', R), ('n', OVERDUE)]),
            plan(&[None], &[]),
        ),
        (
            "surge gives room beside it",
            plain(2, 1, 0, &[('n', R), ('n', G)]),
            plan(&[None], &[]),
        ),
        (
            "a finished one is deleted",
            plain(1, 0, 1, &[('n', F)]),
            plan(&[None], &[0]),
        ),
        (
            "waiting goes first",
            plain(1, 0, 1, &[('n', R), ('n', W)]),
            plan(&[], &[1]),
        ),
        (
            "then the newest",
            plain(1, 0, 1, &[('n', R), ('n', R)]),
            plan(&[], &[1]),
        ),
        (
            "none ready does not stall",
            plain(1, 0, 1, &[('n', W), ('n', W)]),
            plan(&[], &[1]),
        ),
        ("to nothing", plain(0, 0, 0, &[('n', R)]), plan(&[], &[0])),
    ];
    for (name, view, expected) in table {
        assert_eq!(view.scale(), expected, "{name}");
    }
}

#[test]
fn a_surge_is_not_scaled_away_before_it_is_ready() {
    let waiting = plain(2, 1, 0, &[('o', R), ('o', R), ('n', W)]);
    assert_eq!(waiting.scale(), plan(&[], &[]));
    let ready = plain(2, 1, 0, &[('o', R), ('o', R), ('n', R)]);
    assert_eq!(ready.scale(), plan(&[], &[1]), "an outdated one makes room");
    let beyond = plain(1, 1, 0, &[('o', R), ('o', R), ('n', W)]);
    assert_eq!(
        beyond.scale(),
        plan(&[], &[1]),
        "down to replicas and surge"
    );
}

#[test]
fn plain_replicas_roll_within_the_budget() {
    let table = [
        (
            "one may be missing",
            plain(2, 0, 1, &[('o', R), ('o', R)]),
            plan(&[], &[1]),
        ),
        (
            "not two",
            plain(2, 0, 1, &[('o', R), ('n', W)]),
            plan(&[], &[]),
        ),
        (
            "what waits goes freely",
            plain(2, 0, 1, &[('o', R), ('o', W)]),
            plan(&[], &[1]),
        ),
        (
            "surge first",
            plain(2, 1, 0, &[('o', R), ('o', R)]),
            plan(&[None], &[]),
        ),
        (
            "nothing outdated",
            plain(2, 1, 0, &[('n', R), ('n', R)]),
            plan(&[], &[]),
        ),
    ];
    for (name, view, expected) in table {
        assert_eq!(view.roll(None), expected, "{name}");
    }
}

#[test]
fn slots_are_filled_and_cleared() {
    let table = [
        (
            "from nothing",
            indexed(2, 0, 1, &[]),
            plan(&[Some(0), Some(1)], &[]),
        ),
        (
            "a hole",
            indexed(2, 0, 1, &[(1, 'n', R)]),
            plan(&[Some(0)], &[]),
        ),
        (
            "its name must be free",
            indexed(1, 1, 0, &[(0, 'n', G)]),
            plan(&[], &[]),
        ),
        (
            "another template has another name",
            indexed(1, 1, 0, &[(0, 'o', G)]),
            plan(&[Some(0)], &[]),
        ),
        (
            "beyond the last slot",
            indexed(1, 0, 1, &[(0, 'n', R), (1, 'n', R)]),
            plan(&[], &[1]),
        ),
        (
            "settled wins",
            indexed(1, 1, 0, &[(0, 'o', R), (0, 'n', R)]),
            plan(&[], &[0]),
        ),
        (
            "on its way is waited for",
            indexed(1, 1, 0, &[(0, 'o', R), (0, 'n', W)]),
            plan(&[], &[]),
        ),
        (
            "a finished one is in the way",
            indexed(1, 0, 1, &[(0, 'n', F)]),
            plan(&[], &[0]),
        ),
    ];
    for (name, view, expected) in table {
        assert_eq!(view.scale(), expected, "{name}");
    }
}

#[test]
fn what_ended_early_holds_its_place() {
    let table = [
        ("plain", plain(2, 0, 1, &[('n', R), ('n', H)]), &[][..]),
        ("surge", plain(2, 1, 0, &[('n', R), ('n', H)]), &[]),
        ("scaled in", plain(1, 0, 1, &[('n', R), ('n', H)]), &[1]),
        ("to nothing", plain(0, 0, 1, &[('n', H), ('n', H)]), &[0, 1]),
        ("slot", indexed(1, 1, 0, &[(0, 'n', H)]), &[]),
        (
            "no slot",
            indexed(1, 0, 1, &[(0, 'n', R), (1, 'n', H)]),
            &[1],
        ),
    ];
    for (name, view, delete) in table {
        assert_eq!(view.scale(), plan(&[], delete), "{name}");
        assert!(delete.is_empty() != view.is_done(), "{name}");
    }
    let surging = plain(2, 1, 0, &[('o', R), ('o', R), ('n', H)]);
    assert_eq!(surging.scale(), plan(&[], &[]));
    assert_eq!(surging.roll(None), plan(&[], &[]), "no other one either");
    let slots = [(0, 'o', R), (0, 'n', H), (1, 'o', R), (2, 'o', R)];
    let surging = indexed(3, 2, 0, &slots);
    assert_eq!(
        surging.roll(None),
        plan(&[Some(1)], &[]),
        "its name is taken"
    );
}

#[test]
fn a_pause_replaces_nothing_and_keeps_the_number() {
    let table = [
        (
            "outdated ones stay",
            plain(2, 0, 1, &[('o', R), ('o', W)]),
            plan(&[], &[]),
        ),
        (
            "what is missing is made",
            plain(2, 0, 1, &[('o', R)]),
            plan(&[None], &[]),
        ),
        (
            "what ended is replaced",
            plain(2, 0, 1, &[('o', R), ('o', F)]),
            plan(&[None], &[1]),
        ),
        (
            "a surge stands also when it is ready",
            plain(2, 1, 0, &[('o', R), ('o', R), ('n', R)]),
            plan(&[], &[]),
        ),
        (
            "scaling in goes on, of both ages",
            plain(1, 0, 1, &[('o', R), ('o', R), ('n', R)]),
            plan(&[], &[1, 2]),
        ),
        (
            "scaling in takes what does not serve, whatever it is made from",
            plain(2, 0, 1, &[('o', R), ('o', R), ('o', R), ('n', W)]),
            plan(&[], &[3, 2]),
        ),
        (
            "the last to go is one that serves",
            plain(1, 0, 1, &[('o', R), ('n', W)]),
            plan(&[], &[1]),
        ),
        (
            "a surge that has not come is not waited for",
            plain(2, 2, 0, &[('o', R), ('o', R), ('o', R), ('o', R)]),
            plan(&[], &[3, 2]),
        ),
        (
            "nothing wanted is nothing there",
            plain(0, 1, 0, &[('o', R), ('n', R)]),
            plan(&[], &[1, 0]),
        ),
        (
            "a slot with two",
            indexed(1, 1, 0, &[(0, 'o', R), (0, 'n', R)]),
            plan(&[], &[]),
        ),
        (
            "an empty slot",
            indexed(2, 1, 0, &[(0, 'o', R)]),
            plan(&[Some(1)], &[]),
        ),
        (
            "a slot beyond the number",
            indexed(1, 0, 1, &[(0, 'o', R), (1, 'o', R)]),
            plan(&[], &[1]),
        ),
    ];
    for (name, mut view, expected) in table {
        view.paused = true;
        assert_eq!(view.scale(), expected, "{name}");
    }
    for surge in [0, 1] {
        let mut becoming = plain(2, surge, 1, &[('o', R), ('o', R)]);
        becoming.indexed = true;
        becoming.paused = true;
        assert_eq!(becoming.scale(), plan(&[], &[]), "from pods to groups");
    }
}

#[test]
fn replicas_from_before_there_were_slots_go_within_the_budget() {
    let mut view = plain(2, 0, 1, &[('o', R), ('o', R)]);
    view.indexed = true;
    assert_eq!(view.scale(), plan(&[], &[0]), "one may be missing");
    let mut view = plain(2, 0, 1, &[('o', R)]);
    view.indexed = true;
    assert_eq!(
        view.scale(),
        plan(&[Some(0)], &[]),
        "a slot is filled before the next goes"
    );
}

#[test]
fn slots_roll_within_the_budget() {
    let table = [
        (
            "one missing",
            indexed(2, 0, 1, &[(0, 'o', R), (1, 'o', R)]),
            plan(&[], &[0]),
        ),
        (
            "not the next",
            indexed(2, 0, 1, &[(0, 'n', W), (1, 'o', R)]),
            plan(&[], &[]),
        ),
        (
            "surge",
            indexed(2, 1, 0, &[(0, 'o', R), (1, 'o', R)]),
            plan(&[Some(0)], &[]),
        ),
        (
            "waiting goes freely",
            indexed(2, 0, 1, &[(0, 'n', R), (1, 'o', W)]),
            plan(&[], &[1]),
        ),
    ];
    for (name, view, expected) in table {
        assert_eq!(view.roll(None), expected, "{name}");
    }
}

#[test]
fn what_is_not_ready_goes_within_the_budget_too() {
    let table = [
        (
            "nothing is ready",
            plain(4, 0, 1, &[('o', W); 4]),
            plan(&[], &[0]),
        ),
        (
            "the new one is waited for",
            plain(4, 0, 1, &[('o', R), ('o', R), ('o', W), ('n', W)]),
            plan(&[], &[]),
        ),
        (
            "so is a surge",
            plain(3, 1, 0, &[('o', R), ('o', R), ('o', W), ('n', W)]),
            plan(&[], &[]),
        ),
        (
            "no slot is ready",
            indexed(3, 0, 1, &[(0, 'o', W), (1, 'o', W), (2, 'o', W)]),
            plan(&[], &[0]),
        ),
        (
            "a slot is waited for",
            indexed(3, 0, 1, &[(0, 'n', W), (1, 'o', W), (2, 'o', R)]),
            plan(&[], &[]),
        ),
        (
            "also one with its surge",
            indexed(2, 1, 0, &[(0, 'o', W), (0, 'n', W), (1, 'o', W)]),
            plan(&[], &[]),
        ),
        (
            "the surge begins with what is missed",
            indexed(2, 1, 0, &[(0, 'o', R), (1, 'o', W)]),
            plan(&[Some(1)], &[]),
        ),
    ];
    for (name, view, expected) in table {
        assert_eq!(view.scale(), plan(&[], &[]), "{name}");
        assert_eq!(view.roll(None), expected, "{name}");
    }
    let mut becoming = plain(3, 0, 1, &[('o', W), ('o', R), ('o', W)]);
    becoming.indexed = true;
    assert_eq!(becoming.scale(), plan(&[], &[0]), "from pods to groups");
}

#[test]
fn those_that_have_waited_longest_go_first() {
    // The second was ready a moment ago; the third never was, and is newer.
    let mut view = plain(3, 0, 1, &[('o', R), ('o', W), ('o', W)]);
    view.units[1].waiting_since_s = 100;
    assert_eq!(view.roll(None), plan(&[], &[2]));
    let mut view = indexed(1, 1, 0, &[(0, 'o', W), (0, 'o', W)]);
    view.units[0].waiting_since_s = 100;
    assert_eq!(view.scale(), plan(&[], &[1]), "of one slot");
}

#[test]
fn a_smaller_number_amid_a_rollout_leaves_what_serves() {
    let six = [('o', R), ('o', R), ('o', R), ('o', R), ('n', W), ('n', W)];
    let table = [
        (
            "a surge of two of four",
            plain(2, 1, 0, &six),
            &[3, 2, 5][..],
        ),
        ("no surge", plain(3, 0, 1, &six), &[3, 2, 5]),
        ("what blinks", plain(1, 0, 0, &[('o', W), ('n', W)]), &[1]),
    ];
    for (name, view, delete) in table {
        assert_eq!(view.scale(), plan(&[], delete), "{name}");
    }
}

#[test]
fn a_role_is_done_when_nothing_else_is_there() {
    assert!(plain(1, 0, 1, &[('n', R), ('o', G)]).is_done());
    assert!(!plain(1, 0, 1, &[('n', R), ('o', R)]).is_done());
    assert!(!plain(1, 0, 1, &[('n', W)]).is_done());
    assert!(indexed(2, 0, 1, &[(0, 'n', R), (1, 'n', R)]).is_done());
    assert!(!indexed(2, 0, 1, &[(0, 'n', R), (1, 'n', R), (2, 'n', R)]).is_done());
    assert!(plain(0, 0, 0, &[]).is_done());
}

#[test]
fn steps_end_when_their_replicas_are_ready() {
    assert_eq!(plain(4, 0, 2, &[('o', R); 4]).current_step(), 1);
    let half = plain(4, 0, 2, &[('o', R), ('o', R), ('n', R), ('n', R)]);
    assert_eq!(half.current_step(), 2);
    assert_eq!(half.roll(Some(1)), plan(&[], &[]), "step 1 is complete");
    assert_eq!(half.roll(Some(2)), plan(&[], &[1, 0]));
    let mixed = plain(4, 0, 2, &[('o', R), ('o', R), ('n', R), ('n', W)]);
    assert_eq!(mixed.current_step(), 1);
}

#[test]
fn an_absurd_number_is_approached_in_bounded_steps() {
    const ALL: i32 = i32::MAX;
    let table = [
        ("from nothing", Vec::new(), 0),
        ("by and by", vec![(0, 'n', R), (2, 'n', W), (7, 'o', G)], 1),
        ("old ones too", vec![(0, 'o', R), (1, 'o', W)], 2),
    ];
    for (name, units, first) in table {
        for (surge, unavailable) in [(0, 1), (ALL, 0), (ALL, ALL)] {
            let mut view = indexed(ALL, surge, unavailable, &units);
            let created = view.scale().create;
            assert_eq!(created.len(), 500, "{name}");
            assert_eq!(created[0], Some(first), "{name}");
            assert!(!view.is_done(), "{name}");
            assert!(view.roll(Some(view.current_step())).create.len() <= 500);
            view.indexed = false;
            assert_eq!(view.scale().create.len(), 500, "{name}");
            assert!(!view.is_done(), "{name}");
            assert!(view.roll(None).create.len() <= 500, "{name}");
        }
    }
}

/// Whatever happens, a rollout ends, and never leaves the budget.
#[test]
fn rollouts_end_within_their_budget() {
    for (surge, unavailable) in [(0, 1), (1, 0), (2, 2), (0, 3), (1, 1)] {
        for indexed in [false, true] {
            let old = |index| Replica {
                index: indexed.then_some(index),
                updated: false,
                state: R,
                created_s: 0,
                waiting_since_s: 0,
            };
            let budget = Budget { surge, unavailable };
            let mut view = RoleView {
                replicas: 3,
                budget,
                indexed,
                paused: false,
                units: (0..3).map(old).collect(),
            };
            let mut clock = 1;
            while !view.is_done() {
                assert!(
                    clock < 100,
                    "surge {surge} unavailable {unavailable}: no end"
                );
                clock += 1;
                let mut next = view.scale();
                if next.is_empty() {
                    next = view.roll(None);
                }
                for unit in &mut view.units {
                    if unit.state == W {
                        unit.state = R;
                    }
                }
                let mut at = 0;
                view.units.retain(|_| {
                    at += 1;
                    !next.delete.contains(&(at - 1))
                });
                view.units.extend(next.create.iter().map(|&index| Replica {
                    index,
                    updated: true,
                    state: W,
                    created_s: clock,
                    waiting_since_s: clock,
                }));
                let active = view.active();
                let ready = count(&view.units, Replica::is_ready);
                assert!(active <= 3 + surge, "{active} with surge {surge}");
                assert!(
                    ready >= 3 - unavailable,
                    "{ready} ready, unavailable {unavailable}"
                );
            }
        }
    }
}
