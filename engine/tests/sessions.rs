//! Several engines on one pool: what each does, and what becomes of the others when it ends.

mod common;

use std::time::Duration;

use common::{Node, keys, open_session, try_open_session};
use kvtide_engine::{Eviction, PoolEvent, SaveJob, SavePlan, Session, SessionError};

const LIMIT: Duration = Duration::from_secs(10);

/// Two engines of one model.
fn two(rows: u32) -> (Node, Session) {
    let node = Node::new(rows, 1, Eviction::Lru);
    let second = open_session(&node.pool);
    (node, second)
}

/// Carries out a plan as the engine's worker would.
fn carry_out(node: &Node, plan: &SavePlan) {
    node.workers[0].save_now(vec![SaveJob {
        job: plan.job,
        moves: plan.moves.clone(),
    }]);
}

#[test]
fn what_one_engine_saves_another_of_the_same_model_finds() {
    let (node, second) = two(8);
    node.save(&keys(0..4), &[0, 1, 2, 3]);
    let plan = second.begin_save(&keys(0..4), 0, &[9, 8, 7, 6]);
    assert_eq!((plan.job, plan.covered), (0, 4), "nothing is saved twice");
    assert_eq!(second.lookup(&keys(0..4)).lease.len(), 4);
}

#[test]
fn an_engine_that_has_stopped_hides_nobody_elses_saves() {
    let (node, second) = two(8);
    let stopped = second.begin_save(&keys(100..102), 0, &[0, 1]);
    assert_ne!(stopped.job, 0);
    let plan = node.session.begin_save(&keys(0..2), 0, &[0, 1]);
    carry_out(&node, &plan);
    assert!(node.session.drain(LIMIT));
    assert!(node.session.lookup(&keys(0..2)).complete);
    assert_eq!(second.poll(), 2);
}

#[test]
fn engines_that_have_blocks_of_the_same_number_wait_for_their_own_saves_only() {
    let (node, second) = two(8);
    let first = node.session.begin_save(&keys(0..1), 0, &[5]);
    assert!(second.saves_reading(&[5]).is_empty());
    let other = second.begin_save(&keys(1..2), 0, &[5]);
    assert_eq!(node.session.saves_reading(&[5]), [first.job]);
    assert_eq!(second.saves_reading(&[5]), [other.job]);
}

#[test]
fn an_engine_that_dies_in_a_save_leaves_no_slot_behind_and_nobody_waiting() {
    let (node, second) = two(4);
    let dead = second.begin_save(&keys(0..3), 0, &[0, 1, 2]);
    let waiting = node.session.lookup(&keys(0..3));
    assert!(!waiting.complete);
    drop(second);
    for place in 0..3 {
        let readiness = waiting.lease.readiness(place);
        assert_eq!(readiness, kvtide_engine::Readiness::Lost(place));
    }
    drop(waiting);
    assert_eq!(node.session.gauges().free, 4);
    assert_eq!(node.session.gauges().saving, 0);

    // It was only held up: what it writes now, into slots that are others' by then, is not served.
    node.compute(7, 70);
    let plan = node.save(&keys(0..4), &[7, 7, 7, 7]);
    assert_eq!(plan.moves.len(), 4);
    carry_out(&node, &dead);
    node.workers[0].finish_saves(&[dead.job]).expect("it ends");
    let found = node.session.lookup(&keys(0..4));
    assert!(found.complete);
    assert_eq!(node.session.first_damaged(&found.lease, 0..4), None);
}

#[test]
fn what_a_dead_engine_has_saved_stays() {
    let (node, second) = two(8);
    let plan = second.begin_save(&keys(0..2), 0, &[0, 1]);
    carry_out(&node, &plan);
    assert!(second.drain(LIMIT));
    drop(second);
    assert_eq!(node.session.lookup(&keys(0..2)).lease.len(), 2);
}

#[test]
fn a_reset_by_one_engine_is_told_to_all_of_its_model() {
    let (node, second) = two(8);
    node.save(&keys(0..2), &[0, 1]);
    let stored: Vec<_> = keys(0..2).into_iter().map(PoolEvent::Stored).collect();
    assert_eq!(node.session.take_events(), stored);
    assert_eq!(second.take_events(), stored);
    node.session.clear();
    assert!(second.lookup(&keys(0..2)).lease.is_empty());
    assert_eq!(node.session.take_events(), [PoolEvent::Cleared]);
    assert_eq!(second.take_events(), [PoolEvent::Cleared]);
}

#[test]
fn what_one_engine_has_pinned_another_cannot_push_out() {
    let (node, second) = two(4);
    node.save(&keys(0..2), &[0, 1]);
    let pinned = second.lookup(&keys(0..2)).lease;
    node.save(&keys(100..104), &[2, 3, 4, 5]);
    assert_eq!(node.session.lookup(&keys(0..2)).lease.len(), 2);
    drop(pinned);
    assert_eq!(node.save(&keys(200..204), &[6; 4]).covered, 4);
    assert!(node.session.lookup(&keys(0..2)).lease.is_empty());
}

#[test]
fn a_lease_that_outlives_its_session_pins_on_and_its_end_is_nobody_elses() {
    let (node, second) = two(4);
    node.save(&keys(0..2), &[0, 1]);
    let late = second.lookup(&keys(0..2)).lease;
    drop(second);
    let third = open_session(&node.pool);
    let pinned = third.lookup(&keys(0..1)).lease;
    node.save(&keys(100..104), &[2, 3, 4, 5]);
    assert_eq!(late.complete_blocks(), 2);
    drop(late);
    node.save(&keys(200..203), &[6; 3]);
    assert_eq!(pinned.complete_blocks(), 1);
}

#[test]
fn a_pool_serves_a_bounded_number_of_engines() {
    let node = Node::new(4, 1, Eviction::Lru);
    let open = || try_open_session(&node.pool);
    let sessions: Vec<Session> = std::iter::from_fn(|| open().ok()).take(10_000).collect();
    let max = sessions.len() + 1;
    assert_eq!(open().err(), Some(SessionError::TooMany { max }));
    drop(sessions);
    assert!(open().is_ok());
}
