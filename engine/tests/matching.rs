//! What a request is offered, and what becomes of it.

mod common;

use std::time::{Duration, Instant};

use common::{Node, key, keys};
use kvtide_engine::{Eviction, SaveJob, Sequence};
use kvtide_model::{Namespace, Scope};

fn sequence(blocks: u32) -> Sequence {
    let root = Namespace::default().root(&Scope::default());
    let mut sequence = Sequence::new(root, 4, vec![]);
    sequence.extend(&(0..blocks * 4).collect::<Vec<u32>>());
    sequence
}

/// Two blocks saved, and two more whose save has begun.
fn half_saved(node: &Node) -> (Sequence, SaveJob) {
    let request = sequence(4);
    node.compute(0, 1);
    node.save(&request.keys()[..2], &[0, 1]);
    let plan = request.plan_save(&node.session, 2, &[2, 3]);
    (
        request,
        SaveJob {
            job: plan.job,
            moves: plan.moves,
        },
    )
}

#[test]
fn blocks_that_are_being_saved_are_matched_unless_the_load_must_succeed() {
    let node = Node::new(8, 1, Eviction::Lru);
    let (mut request, _saving) = half_saved(&node);
    let found = request.match_blocks(&node.session, 0, 4, false);
    assert_eq!((found.blocks, found.complete), (4, false));
    let found = request.match_blocks(&node.session, 0, 4, true);
    assert_eq!((found.blocks, found.complete), (2, true));
}

#[test]
fn a_load_that_waits_in_vain_keeps_what_is_complete() {
    let node = Node::new(8, 1, Eviction::Lru);
    let (mut request, _saving) = half_saved(&node);
    let _ = request.match_blocks(&node.session, 0, 4, false);
    let mut load = request
        .begin_load(&node.session, 0, vec![8, 9, 10, 11])
        .expect("matched");
    let (now, timeout) = (Instant::now(), Duration::from_secs(60));
    assert_eq!(load.next_part(now, timeout), None, "it waits");
    let some = load
        .next_part(now + timeout * 2, timeout)
        .expect("it has waited long enough");
    let blocks: Vec<u32> = some.moves.iter().map(|m| m.block).collect();
    assert_eq!((blocks, some.lost, some.last), (vec![8, 9], None, false));
    let none = load
        .next_part(now + timeout * 4, timeout)
        .expect("nothing has come since");
    assert!(none.moves.is_empty());
    let lost = (none.lost, none.last);
    assert_eq!(lost, (Some(10), true), "the engine computes from here on");
}

#[test]
fn a_load_goes_ahead_once_the_save_it_joined_has_ended() {
    let node = Node::new(8, 1, Eviction::Lru);
    let (mut request, saving) = half_saved(&node);
    let _ = request.match_blocks(&node.session, 0, 4, false);
    let mut load = request
        .begin_load(&node.session, 0, vec![8, 9, 10, 11])
        .expect("matched");
    node.workers[0].save_now(vec![saving]);
    assert!(node.session.drain(Duration::from_secs(10)));
    let plan = load
        .next_part(Instant::now(), Duration::from_secs(60))
        .expect("ready");
    assert_eq!((plan.moves.len(), plan.lost, plan.last), (4, None, true));
}

#[test]
fn a_long_load_goes_in_parts_while_the_rest_is_still_being_saved() {
    const BLOCKS: u32 = 100;
    let node = Node::new(128, 1, Eviction::Lru);
    let mut request = sequence(BLOCKS);
    node.save(&request.keys()[..40], &[7; 40]);
    let saving = node
        .session
        .begin_save(request.keys(), 40, &[7; BLOCKS as usize - 40]);
    let (now, timeout) = (Instant::now(), Duration::from_secs(60));
    let _ = request.match_blocks(&node.session, 0, BLOCKS as usize, false);
    let mut load = request
        .begin_load(&node.session, 0, (0..BLOCKS).collect())
        .expect("matched");
    let first = load.next_part(now, timeout).expect("40 have come");
    assert_eq!(
        (first.moves.len(), first.lost, first.last),
        (40, None, false)
    );
    assert_eq!(load.next_part(now, timeout), None, "nothing has come since");
    node.workers[0].save_now(vec![SaveJob {
        job: saving.job,
        moves: saving.moves,
    }]);
    assert!(node.session.drain(Duration::from_secs(10)));
    let rest = load.next_part(now, timeout).expect("all have come");
    assert_eq!((rest.moves.len(), rest.lost, rest.last), (60, None, true));
    let blocks = first.moves.iter().chain(&rest.moves).map(|m| m.block);
    assert!(blocks.eq(0..BLOCKS), "each once, in order");
}

#[test]
fn a_damaged_block_ends_the_match_and_is_dropped_unless_another_match_holds_it() {
    let node = Node::new(8, 1, Eviction::Lru);
    let mut request = sequence(3);
    let saved = node.save(request.keys(), &[0, 1, 2]).moves;
    let mut other = sequence(3);
    assert_eq!(other.match_blocks(&node.session, 0, 3, false).blocks, 3);
    node.damage(saved[1].slot.slot, 0, 99);
    let found = request.match_blocks(&node.session, 0, 3, false);
    assert_eq!(found.blocks, 3);
    assert_eq!(request.verify(&node.session, 3), 1);
    assert_eq!(
        node.session.counters().damaged_blocks,
        0,
        "vLLM was told of the other match"
    );
    let mut load = other
        .begin_load(&node.session, 0, vec![8, 9, 10])
        .expect("still held");
    assert!(
        load.next_part(Instant::now(), Duration::from_secs(60))
            .is_some_and(|part| part.lost.is_none())
    );
    drop(load);
    let _ = request.match_blocks(&node.session, 0, 3, false);
    assert_eq!(request.verify(&node.session, 3), 1);
    assert_eq!(node.session.counters().damaged_blocks, 1);
    assert_eq!(request.match_blocks(&node.session, 0, 3, false).blocks, 1);
}

#[test]
fn a_match_that_is_not_used_is_given_back() {
    let node = Node::new(8, 1, Eviction::Lru);
    let mut request = sequence(2);
    node.save(request.keys(), &[0, 1]);
    let _ = request.match_blocks(&node.session, 0, 2, false);
    assert!(!request.expire(Instant::now()));
    assert!(request.expire(Instant::now() + Duration::from_secs(3600)));
    assert!(request.begin_load(&node.session, 0, vec![5, 6]).is_none());
}

/// A request with three blocks, all of them saved and verified.
fn verified(node: &Node) -> Sequence {
    let mut request = sequence(3);
    node.save(request.keys(), &[0, 1, 2]);
    assert_eq!(ask(node, &mut request, 0), 3);
    assert_eq!(node.session.counters().verified_blocks, 3);
    request
}

/// Asks for what must be loadable from `from` on, as a request does that waits.
fn ask(node: &Node, request: &mut Sequence, from: usize) -> usize {
    let found = request.match_blocks(&node.session, from, request.keys().len(), true);
    request.verify(&node.session, found.blocks)
}

#[test]
fn a_request_that_waits_is_verified_once() {
    let node = Node::new(8, 2, Eviction::Lru);
    let mut request = verified(&node);
    for _ in 0..100 {
        assert_eq!(ask(&node, &mut request, 0), 3);
    }
    assert_eq!(node.session.counters().verified_blocks, 3);
    let mut load = request
        .begin_load(&node.session, 0, vec![8, 9, 10])
        .expect("still held");
    let plan = load.next_part(Instant::now(), Duration::from_secs(60));
    assert!(plan.is_some_and(|plan| plan.moves.len() == 3));
}

#[test]
fn what_was_saved_meanwhile_is_added_to_a_match_and_verified_alone() {
    let node = Node::new(8, 1, Eviction::Lru);
    let (mut request, saving) = half_saved(&node);
    assert_eq!(ask(&node, &mut request, 0), 2);
    node.workers[0].save_now(vec![saving]);
    assert!(node.session.drain(Duration::from_secs(10)));
    assert_eq!(ask(&node, &mut request, 0), 4);
    assert_eq!(node.session.counters().verified_blocks, 4);
    // The prompt grows, as that of a preempted request.
    request.extend(&(16..20).collect::<Vec<u32>>());
    node.save_from(request.keys(), 4, &[4]);
    assert_eq!(ask(&node, &mut request, 0), 5);
    assert_eq!(node.session.counters().verified_blocks, 5);
}

#[test]
fn a_match_follows_the_engines_own_hit() {
    let node = Node::new(8, 1, Eviction::Lru);
    let mut request = verified(&node);
    assert_eq!(ask(&node, &mut request, 2), 1);
    assert_eq!(node.session.counters().verified_blocks, 3);
    assert!(
        request
            .begin_load(&node.session, 0, vec![8, 9, 10])
            .is_none()
    );
    // The engine has lost what it had: all blocks are asked for again.
    assert_eq!(ask(&node, &mut request, 0), 3);
    assert_eq!(node.session.counters().verified_blocks, 6);
    node.session.clear();
    request.release();
    assert_eq!(node.session.gauges().free, 8, "a pin was lost");
}

#[test]
fn a_kept_match_ends_when_the_pool_is_cleared() {
    for certain in [true, false] {
        let node = Node::new(8, 1, Eviction::Lru);
        let mut request = verified(&node);
        node.session.clear();
        assert_eq!(request.match_blocks(&node.session, 0, 3, certain).blocks, 0);
        assert_eq!(
            node.session.gauges().free,
            8,
            "cleared blocks are still held"
        );
        node.save(request.keys(), &[0, 1, 2]);
        assert_eq!(ask(&node, &mut request, 0), 3);
        assert_eq!(node.session.counters().verified_blocks, 6);
    }
}

#[test]
fn a_kept_match_loses_a_block_that_another_load_found_damaged() {
    for certain in [true, false] {
        let node = Node::new(8, 1, Eviction::Lru);
        let mut request = verified(&node);
        let slots = node.session.lookup(request.keys()).lease.slots().to_vec();
        node.session.drop_damaged(&slots[1..2]);
        assert_eq!(request.match_blocks(&node.session, 0, 3, certain).blocks, 1);
    }
}

#[test]
fn a_match_that_has_expired_is_verified_again() {
    let node = Node::new(8, 1, Eviction::Lru);
    let mut request = verified(&node);
    assert!(request.expire(Instant::now() + Duration::from_secs(3600)));
    assert_eq!(ask(&node, &mut request, 0), 3);
    assert_eq!(node.session.counters().verified_blocks, 6);
}

#[test]
fn no_more_is_verified_than_will_be_loaded() {
    let node = Node::new(8, 1, Eviction::Lru);
    let mut request = sequence(3);
    let saved = node.save(request.keys(), &[0, 1, 2]).moves;
    node.damage(saved[2].slot.slot, 0, 7);
    let found = request.match_blocks(&node.session, 0, 3, true);
    assert_eq!((found.blocks, request.verify(&node.session, 2)), (3, 2));
    assert_eq!(node.session.counters().verified_blocks, 2);
    assert_eq!(request.verify(&node.session, 3), 2, "the last is damaged");
    assert_eq!(node.session.counters().verified_blocks, 3);
}

#[test]
fn whether_a_block_is_held_can_be_asked_without_a_match() {
    let node = Node::new(8, 1, Eviction::Lru);
    let (request, _saving) = half_saved(&node);
    assert!(request.is_held(&node.session, 1, true));
    assert!(request.is_held(&node.session, 2, false));
    assert!(
        !request.is_held(&node.session, 2, true),
        "it is still being saved"
    );
    assert!(!request.is_held(&node.session, 4, false));
    assert!(node.session.gauges().held == 4 && node.session.counters().verified_blocks == 0);
}

#[test]
fn a_lookup_that_is_not_used_changes_nothing_in_what_is_given_up() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let node = Node::new(6, 1, eviction);
        let mut request = sequence(3);
        node.save(request.keys(), &[0, 1, 2]);
        node.save(&keys(100..103), &[3, 4, 5]);
        for _ in 0..100 {
            assert_eq!(ask(&node, &mut request, 0), 3);
        }
        request.release();
        node.save(&keys(200..203), &[6, 7, 8]);
        assert!(!request.is_held(&node.session, 0, false), "{eviction:?}");
        assert!(node.session.holds(key(100), true), "{eviction:?}");
    }
}

#[test]
fn a_load_that_begins_is_a_use() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let node = Node::new(6, 1, eviction);
        let mut request = sequence(3);
        node.save(request.keys(), &[0, 1, 2]);
        node.save(&keys(100..103), &[3, 4, 5]);
        assert_eq!(ask(&node, &mut request, 0), 3);
        drop(
            request
                .begin_load(&node.session, 0, vec![8, 9, 10])
                .expect("matched"),
        );
        node.save(&keys(200..203), &[6, 7, 8]);
        assert!(request.is_held(&node.session, 0, true), "{eviction:?}");
        assert!(!node.session.holds(key(102), false), "{eviction:?}");
    }
}

#[test]
fn a_load_of_what_was_cleared_meanwhile_is_no_use() {
    let node = Node::new(6, 1, Eviction::Lru);
    let mut request = verified(&node);
    node.session.clear();
    node.save(&keys(100..103), &[3, 4, 5]);
    drop(
        request
            .begin_load(&node.session, 0, vec![8, 9, 10])
            .expect("still pinned"),
    );
    node.save(&keys(200..206), &[0; 6]);
    assert_eq!(node.session.lookup(&keys(200..206)).lease.len(), 6);
}
