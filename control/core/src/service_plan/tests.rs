//! What a StormService needs next, as tables.

use super::*;

fn set(index: i32, flags: &str) -> SetView {
    SetView {
        index: Some(index),
        updated: flags.contains('u'),
        ready: flags.contains('r'),
        settled: flags.contains('s'),
        going: flags.contains('g'),
        replace: flags.contains('x'),
    }
}

fn view(replicas: i32, budget: (i32, i32), sets: &[&str]) -> ServiceView {
    ServiceView {
        replicas,
        budget: Budget {
            surge: budget.0,
            unavailable: budget.1,
        },
        update: UpdateType::RollingUpdate,
        paused: false,
        stateful: false,
        sets: sets
            .iter()
            .zip(0..)
            .map(|(flags, index)| set(index, flags))
            .collect(),
    }
}

fn created(view: &ServiceView) -> Vec<i32> {
    view.plan()
        .create
        .into_iter()
        .map(|(index, _)| index)
        .collect()
}

#[test]
fn a_stateful_service_keeps_the_indices_below_its_count() {
    for flags in [["", "urs", "urs"], ["rs", "urs", "urs"], ["urs", "", "urs"]] {
        let mut stateful = view(2, (0, 1), &flags);
        stateful.stateful = true;
        assert_eq!(stateful.plan().delete, [2], "{flags:?}");
        stateful.paused = true;
        assert_eq!(stateful.plan().delete, [2], "{flags:?}, paused");
    }
}

#[test]
fn scales_out_at_the_lowest_free_indices() {
    assert_eq!(created(&view(3, (0, 1), &[])), [0, 1, 2]);
    assert_eq!(created(&view(3, (0, 1), &["urs", "urs"])), [2]);
    assert_eq!(
        created(&view(2, (0, 1), &["urs", "g"])),
        [0; 0],
        "one goes and holds its place"
    );
    assert_eq!(
        created(&view(2, (1, 0), &["urs", "g"])),
        [2],
        "surge gives room beside it"
    );
    let mut stateful = view(2, (1, 0), &["urs", "g"]);
    stateful.stateful = true;
    assert_eq!(created(&stateful), [0; 0], "the index is waited for");
}

#[test]
fn an_absurd_number_is_approached_in_bounded_steps() {
    for (surge, unavailable) in [(0, 1), (i32::MAX, 0), (i32::MAX, i32::MAX)] {
        let from_nothing = view(i32::MAX, (surge, unavailable), &[]);
        let indices: Vec<i32> = (0..500).collect();
        assert_eq!(created(&from_nothing), indices, "{surge} {unavailable}");
        let replacing = view(i32::MAX, (surge, unavailable), &["rx", "urs"]);
        assert_eq!(created(&replacing).len(), 500, "{surge} {unavailable}");
        assert!(replacing.roll().create.len() <= 500);
    }
    let mut paused = view(i32::MAX, (0, 1), &["urs", "r"]);
    paused.paused = true;
    let create = paused.plan().create;
    let of_current = |(_, revision): &&(i32, Revision)| *revision == Revision::Current;
    assert_eq!(create.len(), 500);
    assert_eq!(create.iter().filter(of_current).count(), 250);
    let crowded = view(1, (i32::MAX, 0), &["urs", "r", "r"]);
    assert!(crowded.plan().create.is_empty());
}

#[test]
fn scales_in_old_before_new_and_waiting_before_ready() {
    let table: [(&str, &[&str], &[usize]); 4] = [
        ("the highest index", &["urs", "urs"], &[1]),
        ("waiting first", &["u", "urs"], &[0]),
        ("old first", &["urs", "r"], &[1]),
        ("all wait", &["u", "u"], &[1]),
    ];
    for (name, sets, expected) in table {
        assert_eq!(view(1, (0, 1), sets).plan().delete, expected, "{name}");
    }
}

#[test]
fn a_change_reaches_role_sets_in_place_within_the_budget() {
    type Row<'a> = (&'a str, (i32, i32), &'a [&'a str], &'a [usize]);
    let table: [Row<'_>; 11] = [
        ("one at a time", (0, 1), &["r", "r", "r"], &[0]),
        ("it is waited for", (0, 1), &["ur", "r", "r"], &[]),
        ("then the next", (0, 1), &["urs", "r", "r"], &[1]),
        ("two at a time", (0, 2), &["r", "r", "r"], &[0, 1]),
        (
            "what is not ready loses nothing",
            (0, 1),
            &["r", "", "r"],
            &[1],
        ),
        ("surge alone: one at a time", (1, 0), &["r", "r", "r"], &[0]),
        (
            "none is ready: still one at a time",
            (0, 1),
            &["", "", ""],
            &[0],
        ),
        ("the one under way counts", (0, 1), &["u", "", "r"], &[]),
        (
            "two, and those not ready first",
            (0, 2),
            &["r", "r", ""],
            &[2, 0],
        ),
        ("one of two is under way", (0, 2), &["ur", "", ""], &[1]),
        (
            "a ready one is spared for those that are not",
            (0, 1),
            &["urs", "r", ""],
            &[2],
        ),
    ];
    for (name, budget, sets, expected) in table {
        let plan = view(3, budget, sets).plan();
        assert_eq!(plan.update, expected, "{name}");
        assert!(plan.create.is_empty() && plan.delete.is_empty(), "{name}");
    }
}

#[test]
fn in_place_updates_reach_all_at_once() {
    let mut all = view(3, (0, 1), &["r", "r", "urs"]);
    all.update = UpdateType::InPlaceUpdate;
    assert_eq!(all.plan().update, [0, 1]);
}

#[test]
fn in_place_updates_replace_what_cannot_change_in_place() {
    for budget in [(0, 1), (1, 0)] {
        let mut view = view(3, budget, &["rx", "rx", "rx"]);
        view.update = UpdateType::InPlaceUpdate;
        let plan = view.plan();
        assert!(plan.update.is_empty() && plan.create.is_empty(), "{plan:?}");
        assert_eq!(plan.delete, [0], "{budget:?}");
    }
    let mut next = view(3, (0, 1), &["g", "rx", "rx"]);
    next.update = UpdateType::InPlaceUpdate;
    assert!(next.plan().is_empty(), "the first is waited for");
}

#[test]
fn a_fixed_index_is_replaced_although_only_a_surge_is_allowed() {
    let mut view = view(2, (1, 0), &["rx", "rx"]);
    view.stateful = true;
    let plan = view.plan();
    assert_eq!((plan.create.len(), plan.delete), (0, vec![0]));
    let mut waiting = self::view(2, (1, 0), &["u", "rx"]);
    waiting.stateful = true;
    assert!(waiting.plan().is_empty(), "one at a time");
}

#[test]
fn replaces_where_a_change_needs_it() {
    let surge = view(2, (1, 0), &["rx", "rx"]).plan();
    assert_eq!((surge.create.len(), surge.delete.len()), (1, 0));
    let ready = view(2, (1, 0), &["rx", "rx", "urs"]).plan();
    assert_eq!((ready.create.len(), ready.delete.len()), (0, 1));
    let waiting = view(2, (1, 0), &["rx", "rx", "u"]).plan();
    assert!(waiting.is_empty(), "{waiting:?}");
    let unavailable = view(2, (0, 1), &["rx", "rx"]).plan();
    assert_eq!((unavailable.create.len(), unavailable.delete.len()), (0, 1));
}

#[test]
fn replacements_keep_to_the_budget_whether_ready_or_not() {
    type Row<'a> = (&'a str, (i32, i32), &'a [&'a str], &'a [usize]);
    let table: [Row<'_>; 5] = [
        ("none is ready", (0, 1), &["x", "x", "x"], &[0]),
        (
            "the one that is not goes first",
            (0, 1),
            &["rx", "x", "rx"],
            &[1],
        ),
        ("a new one is waited for", (0, 1), &["u", "x", "rx"], &[]),
        ("so is one under way", (0, 1), &["ur", "x", "rx"], &[]),
        ("none may be missing", (1, 0), &["x", "rx", "rx", "u"], &[]),
    ];
    for (name, budget, sets, expected) in table {
        assert_eq!(view(3, budget, sets).plan().delete, expected, "{name}");
    }
}

#[test]
fn a_smaller_number_amid_a_rollout_leaves_what_serves() {
    let sets = ["u", "u", "u", "r", "r", "r", "r", "r", "r", "r"];
    let view = view(3, (0, 1), &sets);
    let delete = view.plan().delete;
    let left = (0..sets.len()).filter(|at| !delete.contains(at));
    let ready = left.clone().filter(|&at| view.sets[at].ready).count();
    assert_eq!((left.count(), ready), (3, 2), "{delete:?}");
}

#[test]
fn a_pause_stops_rolling_and_keeps_the_proportion_when_scaling() {
    let mut paused = view(2, (0, 1), &["urs", "r"]);
    paused.paused = true;
    assert!(paused.plan().is_empty());
    paused.replicas = 4;
    let revisions: Vec<Revision> = paused
        .plan()
        .create
        .into_iter()
        .map(|(_, revision)| revision)
        .collect();
    assert_eq!(revisions, [Revision::Current, Revision::Update]);
    let mut paused = view(2, (0, 1), &["urs", "urs", "r", "r"]);
    paused.paused = true;
    let delete = paused.plan().delete;
    assert_eq!(delete.len(), 2);
    assert_eq!(
        delete.iter().filter(|&&at| paused.sets[at].updated).count(),
        1
    );
}

#[test]
fn a_surge_does_not_outlive_a_pause_between_revisions() {
    let view = view(1, (0, 1), &["urs", "urs", "u"]);
    assert_eq!(view.plan().delete, [2, 1]);
}
