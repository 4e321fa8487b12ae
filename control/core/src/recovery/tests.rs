//! What a PodSet needs next, as tables.

use k8s_openapi::jiff::Timestamp;
use kvtide_control_api::set_condition;

use super::*;

fn pod(index: i32, flags: &str) -> PodView {
    PodView {
        index: Some(index),
        going: flags.contains('g'),
        stuck: flags.contains('s'),
        finished: flags.contains('f'),
        crash_looping: flags.contains('c'),
        restarted: flags.contains('r'),
        node_lost: flags.contains('n'),
        started: !flags.contains('p'),
        ready: flags.is_empty(),
    }
}

fn set(policy: RecoveryPolicy, pods: &[(i32, &str)]) -> SetView {
    SetView {
        size: 3,
        policy,
        pods: pods
            .iter()
            .map(|&(index, flags)| pod(index, flags))
            .collect(),
        was_complete: true,
        attempts: 0,
        since_last: Duration::ZERO,
    }
}

/// What is there, and what is created and deleted.
type Row<'a> = (&'a str, &'a [(i32, &'a str)], (&'a [i32], &'a [usize]));

const ONE: RecoveryPolicy = RecoveryPolicy::ReplaceUnhealthy;
const ALL: RecoveryPolicy = RecoveryPolicy::FullRecreate;

fn step(policy: RecoveryPolicy, pods: &[(i32, &str)]) -> (Vec<i32>, Vec<usize>) {
    let plan = set(policy, pods).plan(Backoff::default());
    (plan.create, plan.delete)
}

#[test]
fn replace_unhealthy_touches_only_what_failed() {
    let table: [Row<'_>; 8] = [
        ("from nothing", &[], (&[0, 1, 2], &[])),
        ("healthy", &[(0, ""), (1, ""), (2, "")], (&[], &[])),
        ("one is missing", &[(0, ""), (2, "")], (&[1], &[])),
        (
            "a going one holds its name",
            &[(0, ""), (1, "g"), (2, "")],
            (&[], &[]),
        ),
        ("one ended", &[(0, ""), (1, "f"), (2, "")], (&[], &[1])),
        ("crash loop", &[(0, "c"), (1, ""), (2, "")], (&[], &[0])),
        (
            "a restart alone is nothing",
            &[(0, "r"), (1, ""), (2, "")],
            (&[], &[]),
        ),
        ("lost node", &[(0, "n"), (1, ""), (2, "")], (&[], &[0])),
    ];
    for (name, pods, (create, delete)) in table {
        assert_eq!(
            step(ONE, pods),
            (create.to_vec(), delete.to_vec()),
            "{name}"
        );
    }
}

#[test]
fn full_recreate_is_never_half_old_half_new() {
    let table: [Row<'_>; 7] = [
        ("from nothing", &[], (&[0, 1, 2], &[])),
        (
            "a restart takes all",
            &[(0, "r"), (1, ""), (2, "")],
            (&[], &[0, 1, 2]),
        ),
        (
            "a vanished pod takes all",
            &[(0, ""), (2, "")],
            (&[], &[0, 1]),
        ),
        (
            "a going pod takes the rest",
            &[(0, ""), (1, "g"), (2, "")],
            (&[], &[0, 2]),
        ),
        (
            "nothing is made before all are gone",
            &[(0, "g")],
            (&[], &[]),
        ),
        ("healthy", &[(0, ""), (1, ""), (2, "")], (&[], &[])),
        (
            "one too many",
            &[(0, ""), (1, ""), (2, ""), (3, "")],
            (&[], &[3]),
        ),
    ];
    for (name, pods, (create, delete)) in table {
        assert_eq!(
            step(ALL, pods),
            (create.to_vec(), delete.to_vec()),
            "{name}"
        );
    }
    assert_eq!(
        step(RecoveryPolicy::Recreate, &[(0, ""), (2, "")]),
        (vec![], vec![0, 1])
    );
}

#[test]
fn an_interrupted_creation_is_completed() {
    let mut half = set(ALL, &[(0, "p"), (2, "p")]);
    half.was_complete = false;
    assert_eq!(half.plan(Backoff::default()).create, [1]);
    half.pods[0].started = true;
    assert_eq!(
        half.plan(Backoff::default()).delete,
        [0, 1],
        "one ran: it may be an old one"
    );
}

#[test]
fn attempts_are_spaced_out_and_end() {
    let backoff = Backoff::default();
    let seconds: Vec<Option<u64>> = (0..9)
        .map(|attempts| backoff.after(attempts).map(|delay| delay.as_secs()))
        .collect();
    let expected = [0, 10, 20, 40, 80, 160, 300].map(Some);
    assert_eq!(seconds[..7], expected);
    assert_eq!(seconds[7..], [None, None]);

    let mut ill = set(ONE, &[(0, "c"), (1, ""), (2, "")]);
    ill.attempts = 1;
    ill.since_last = Duration::from_secs(4);
    let early = ill.plan(backoff);
    assert_eq!(
        (early.delete, early.again_in),
        (vec![], Some(Duration::from_secs(6)))
    );
    ill.since_last = Duration::from_secs(10);
    let due = ill.plan(backoff);
    assert_eq!((due.delete, due.attempt), (vec![0], true));
    ill.attempts = 7;
    assert!(ill.plan(backoff).given_up);
}

#[test]
fn attempts_are_forgotten_after_the_longest_pause_in_health() {
    let backoff = Backoff::default();
    let table = [
        (0, 0, None),
        (0, 900, None),
        (1, 0, Some(300)),
        (7, 120, Some(180)),
        (7, 300, Some(0)),
        (7, 301, Some(0)),
    ];
    for (attempts, healthy, expected) in table {
        let left = backoff.forgotten_in(attempts, Duration::from_secs(healthy));
        assert_eq!(
            left.map(|left| left.as_secs()),
            expected,
            "{attempts} {healthy}"
        );
    }
}

#[test]
fn only_stuck_pods_are_forced() {
    let plan = set(ONE, &[(0, "gs"), (1, "g"), (2, "")]).plan(Backoff::default());
    assert_eq!(plan.force, [0]);
    assert!(plan.delete.is_empty());
}

fn at(second: i64) -> Time {
    Time(Timestamp::from_second(second).unwrap())
}

#[test]
fn recoveries_are_forgotten_at_a_time_that_is_known_ahead() {
    let backoff = Backoff::default();
    let mut status = PodSetStatus {
        phase: Some(PodSetPhase::Ready),
        ..PodSetStatus::default()
    };
    let all = &mut status.conditions;
    set_condition(all, conditions::READY, true, "AllPodsReady", "", &at(1000));
    assert_eq!(forget_in(&status, backoff, &at(1100)), None, "none counted");
    let all = &mut status.conditions;
    set_condition(all, conditions::RECOVERING, true, "Attempt7", "", &at(990));
    let left = |status: &PodSetStatus, now: i64| {
        forget_in(status, backoff, &at(now)).map(|left| left.as_secs())
    };
    assert_eq!(left(&status, 1100), Some(200));
    assert_eq!(left(&status, 1300), Some(0));
    status.phase = Some(PodSetPhase::Running);
    assert_eq!(left(&status, 1300), None, "not healthy");
    status.phase = Some(PodSetPhase::Ready);
    let all = &mut status.conditions;
    set_condition(all, conditions::RECOVERING, true, "Attempt8", "", &at(1200));
    assert_eq!(left(&status, 1300), Some(200), "healthy since the last one");
    let all = &mut status.conditions;
    set_condition(
        all,
        conditions::RECOVERING,
        false,
        "Recovered",
        "",
        &at(1500),
    );
    assert_eq!(left(&status, 1500), None);
}
