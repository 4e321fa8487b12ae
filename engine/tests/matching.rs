//! What a request is offered, and what becomes of it.

mod common;

use std::time::{Duration, Instant};

use common::Node;
use kvtide_engine::{Eviction, SaveJob, Sequence, Verify};
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
    let found = request.match_blocks(&node.pool, 0, 4, Verify::Load, false);
    assert_eq!((found.blocks, found.complete), (4, false));
    let found = request.match_blocks(&node.pool, 0, 4, Verify::Always, true);
    assert_eq!((found.blocks, found.complete), (2, true));
}

#[test]
fn a_load_that_waits_in_vain_keeps_what_is_complete() {
    let node = Node::new(8, 1, Eviction::Lru);
    let (mut request, _saving) = half_saved(&node);
    let _ = request.match_blocks(&node.pool, 0, 4, Verify::Load, false);
    let load = request.begin_load(0, vec![8, 9, 10, 11]).expect("matched");
    let (now, timeout) = (Instant::now(), Duration::from_secs(60));
    assert_eq!(load.plan(now, timeout), None, "it waits");
    let plan = load
        .plan(now + timeout * 2, timeout)
        .expect("it has waited long enough");
    assert_eq!(
        plan.moves.iter().map(|m| m.block).collect::<Vec<_>>(),
        [8, 9]
    );
    assert_eq!(plan.lost, [10], "the engine computes from here on");
}

#[test]
fn a_load_goes_ahead_once_the_save_it_joined_has_ended() {
    let node = Node::new(8, 1, Eviction::Lru);
    let (mut request, saving) = half_saved(&node);
    let _ = request.match_blocks(&node.pool, 0, 4, Verify::Load, false);
    let load = request.begin_load(0, vec![8, 9, 10, 11]).expect("matched");
    node.workers[0].save_now(vec![saving]);
    assert!(node.session.drain(Duration::from_secs(10)));
    let plan = load
        .plan(Instant::now(), Duration::from_secs(60))
        .expect("ready");
    assert_eq!((plan.moves.len(), plan.lost.len()), (4, 0));
}

#[test]
fn a_damaged_block_ends_the_match_and_is_dropped_unless_another_match_holds_it() {
    let node = Node::new(8, 1, Eviction::Lru);
    let mut request = sequence(3);
    let saved = node.save(request.keys(), &[0, 1, 2]).moves;
    let mut other = sequence(3);
    assert_eq!(
        other
            .match_blocks(&node.pool, 0, 3, Verify::Load, false)
            .blocks,
        3
    );
    node.damage(saved[1].slot.slot, 0, 99);
    let found = request.match_blocks(&node.pool, 0, 3, Verify::Always, false);
    assert_eq!(found.blocks, 1);
    assert_eq!(
        node.pool.counters().damaged_blocks,
        0,
        "vLLM was told of the other match"
    );
    let load = other.begin_load(0, vec![8, 9, 10]).expect("still held");
    assert!(
        load.plan(Instant::now(), Duration::from_secs(60))
            .is_some_and(|p| p.lost.is_empty())
    );
    drop(load);
    assert_eq!(
        request
            .match_blocks(&node.pool, 0, 3, Verify::Always, false)
            .blocks,
        1
    );
    assert_eq!(node.pool.counters().damaged_blocks, 1);
}

#[test]
fn a_match_that_is_not_used_is_given_back() {
    let node = Node::new(8, 1, Eviction::Lru);
    let mut request = sequence(2);
    node.save(request.keys(), &[0, 1]);
    let _ = request.match_blocks(&node.pool, 0, 2, Verify::Load, false);
    assert!(!request.expire(Instant::now()));
    assert!(request.expire(Instant::now() + Duration::from_secs(3600)));
    assert!(request.begin_load(0, vec![5, 6]).is_none());
}
