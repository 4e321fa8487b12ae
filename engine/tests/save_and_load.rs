//! Blocks go to the pool and come back, byte for byte, on every rank.

mod common;

use common::{BLOCKS, LAYERS, Node, keys, moves, wait_load};
use kvtide_engine::{Eviction, Readiness, SaveJob};
use kvtide_model::{BlockMove, SlotRef};
use kvtide_segment::LoadEnd;

#[test]
fn saved_blocks_come_back_on_every_rank() {
    let mut node = Node::new(8, 2, Eviction::S3Fifo);
    (0..4u8).for_each(|i| node.compute(i.into(), 10 + i));
    assert_eq!(node.save(&keys(0..4), &[0, 1, 2, 3]).moves.len(), 4);

    let found = node.session.lookup(&keys(0..6));
    assert!(found.complete);
    assert_eq!(
        found.lease.len(),
        4,
        "the run ends at the first missing block"
    );
    let outcomes = node.load(1, &moves(found.lease.slots(), 8..12));
    assert!(
        outcomes
            .iter()
            .all(|o| o.failed.is_empty() && o.damaged.is_empty())
    );
    (0..4u8).for_each(|i| assert!(node.holds(8 + u32::from(i), 10 + i)));
}

#[test]
fn a_save_follows_the_forward_pass_layer_by_layer() {
    let mut node = Node::new(8, 1, Eviction::S3Fifo);
    let plan = node.session.begin_save(&keys(0..1), 0, &[5]);
    let job = SaveJob {
        job: plan.job,
        moves: plan.moves,
    };
    node.workers[0].begin_step(vec![job]);
    // Layers are computed in any order, each before it is announced.
    for layer in [2, 0, 1] {
        node.caches[0].write(layer, 5, |i| u8::try_from(i % 7 + layer).unwrap());
        assert!(
            node.session.poll() == 1,
            "not complete before the last layer"
        );
        node.workers[0].layer_computed(layer);
    }
    node.workers[0].end_step();
    assert!(node.session.drain(std::time::Duration::from_secs(10)));
    let found = node.session.lookup(&keys(0..1));
    let outcome = node.load(1, &moves(found.lease.slots(), 6..7)).remove(0);
    assert!(outcome.failed.is_empty());
    (0..3)
        .for_each(|layer| assert_eq!(node.caches[0].read(layer, 5), node.caches[0].read(layer, 6)));
}

#[test]
fn what_is_saved_together_after_the_pool_was_cleared_lies_together() {
    let node = Node::new(64, 1, Eviction::S3Fifo);
    let blocks: Vec<u32> = (0..16).collect();
    node.save(&keys(0..16), &blocks);
    node.save(&keys(16..32), &blocks);
    node.session.clear();
    let plan = node
        .session
        .begin_save(&keys(32..56), 0, &(0..24).collect::<Vec<_>>());
    let slots: Vec<u32> = plan.moves.iter().map(|step| step.slot.slot).collect();
    assert_eq!(slots, (0..24).collect::<Vec<_>>());
}

#[test]
fn a_step_that_never_ends_leaves_nothing_behind() {
    let mut node = Node::new(8, 1, Eviction::S3Fifo);
    let plan = node.session.begin_save(&keys(0..2), 0, &[0, 1]);
    node.workers[0].begin_step(vec![SaveJob {
        job: plan.job,
        moves: plan.moves,
    }]);
    node.workers[0].layer_computed(0);
    node.workers[0].abort_step();
    // Nobody waits for a layer that will never be computed.
    node.workers[0].wait_saves(&[plan.job]).expect("saved");
    node.workers[0].end_step();
    assert!(node.session.drain(std::time::Duration::from_secs(10)));
    assert!(node.session.lookup(&keys(0..2)).lease.is_empty());
    assert_eq!(node.session.counters().failed_blocks, 2);
    assert_eq!(node.session.gauges().free, 8);
}

#[test]
fn a_layered_load_is_ahead_of_the_layer_that_waits() {
    let mut node = Node::new(8, 1, Eviction::S3Fifo);
    (0..4u8).for_each(|i| node.compute(i.into(), i));
    node.save(&keys(0..4), &[0, 1, 2, 3]);
    let found = node.session.lookup(&keys(0..4));
    node.workers[0].load_layered(9, moves(found.lease.slots(), 4..8), true);
    for layer in 0..LAYERS as usize {
        node.workers[0].wait_layer(layer).unwrap();
        for i in 0..4 {
            assert_eq!(
                node.caches[0].read(layer, i),
                node.caches[0].read(layer, 4 + i)
            );
        }
    }
    node.workers[0].end_step();
    assert!(wait_load(&mut node.workers[0], 9).failed.is_empty());
}

#[test]
fn a_damaged_row_is_found_by_the_load_that_reads_it_and_then_missing() {
    let mut node = Node::new(8, 2, Eviction::S3Fifo);
    (0..3u8).for_each(|i| node.compute(i.into(), i));
    node.save(&keys(0..3), &[0, 1, 2]);
    let found = node.session.lookup(&keys(0..3));
    let bad = found.lease.slots()[1];
    node.damage(bad.slot, 1, 1234);
    let outcomes = node.load(1, &moves(found.lease.slots(), 8..11));
    assert!(outcomes[0].failed.is_empty(), "rank 0's shard is whole");
    assert_eq!(
        (&outcomes[1].failed[..], &outcomes[1].damaged[..]),
        (&[1][..], &[bad][..])
    );
    node.session.drop_damaged(&outcomes[1].damaged);
    drop(found);
    assert_eq!(node.session.lookup(&keys(0..3)).lease.len(), 1);
    assert_eq!(node.session.counters().damaged_blocks, 1);
    // Saved anew, it is served again.
    assert_eq!(node.save(&keys(0..3), &[0, 1, 2]).moves.len(), 1);
    assert_eq!(node.session.lookup(&keys(0..3)).lease.len(), 3);
}

#[test]
fn the_board_says_of_every_rank_how_a_load_ended() {
    let mut node = Node::new(8, 2, Eviction::Lru);
    node.compute(0, 1);
    node.save(&keys(0..1), &[0]);
    let found = node.session.lookup(&keys(0..1));
    let ends = |node: &Node, job| [0, 1].map(|rank| node.segment.load_end(0, rank, job));
    assert_eq!(ends(&node, 1), [None; 2]);
    node.load(1, &moves(found.lease.slots(), 8..9));
    assert_eq!(ends(&node, 1), [Some(LoadEnd::Whole); 2]);
    assert_eq!(ends(&node, 2), [None; 2], "the place is used again");
    node.damage(found.lease.slots()[0].slot, 1, 77);
    node.load(2, &moves(found.lease.slots(), 8..9));
    let whole_and_failed = [Some(LoadEnd::Whole), Some(LoadEnd::Failed)];
    assert_eq!(ends(&node, 2), whole_and_failed);
}

#[test]
fn a_stale_plan_loads_nothing() {
    let mut node = Node::new(2, 1, Eviction::Lru);
    node.compute(0, 1);
    let stale = node.save(&keys(0..1), &[0]).moves;
    node.save(&keys(1..3), &[1, 2]); // evicts the first
    node.compute(9, 99);
    let outcome = node
        .load(
            1,
            &[BlockMove {
                block: 9,
                ..stale[0]
            }],
        )
        .remove(0);
    assert_eq!(outcome.failed, [0]);
    assert!(node.holds(9, 99), "the engine's block was not touched");
}

#[test]
fn a_plan_out_of_range_fails_and_harms_nobody() {
    let mut node = Node::new(2, 1, Eviction::Lru);
    let plan = node.session.begin_save(&keys(0..1), 0, &[BLOCKS]);
    node.workers[0].save_now(vec![SaveJob {
        job: plan.job,
        moves: plan.moves,
    }]);
    assert!(node.session.drain(std::time::Duration::from_secs(10)));
    assert_eq!(node.session.counters().failed_blocks, 1);
    assert_eq!(node.workers[0].counters().copy_errors, 1);
    let error = node.workers[0].take_error().map(|error| error.to_string());
    assert!(error.is_some_and(|error| error.contains("out of range")));
    assert_eq!(node.workers[0].take_error(), None, "it is told once");
    let slot = SlotRef {
        slot: 77,
        generation: 1,
    };
    assert_eq!(node.load(2, &[BlockMove { slot, block: 0 }])[0].failed, [0]);
}

#[test]
fn a_request_joins_a_save_in_flight() {
    let mut node = Node::new(8, 1, Eviction::S3Fifo);
    node.compute(0, 5);
    let plan = node.session.begin_save(&keys(0..1), 0, &[0]);
    node.workers[0].begin_step(vec![SaveJob {
        job: plan.job,
        moves: plan.moves,
    }]);
    let found = node.session.lookup(&keys(0..1));
    assert!(!found.complete);
    assert_eq!(found.lease.readiness(0), Readiness::Arriving(0));
    node.workers[0].end_step();
    assert!(node.session.drain(std::time::Duration::from_secs(10)));
    assert_eq!(found.lease.readiness(0), Readiness::Ready);
}

#[test]
fn a_block_that_is_still_read_is_named_before_it_is_overwritten() {
    let mut node = Node::new(8, 1, Eviction::S3Fifo);
    let plan = node.session.begin_save(&keys(0..2), 0, &[3, 4]);
    let job = plan.job;
    node.workers[0].begin_step(vec![SaveJob {
        job,
        moves: plan.moves,
    }]);
    assert_eq!(node.session.saves_reading(&[4, 9]), [job]);
    assert!(node.session.saves_reading(&[9]).is_empty());
    node.workers[0].end_step();
    node.workers[0].finish_saves(&[job]).expect("saved");
    let _ = node.session.poll();
    assert!(node.session.saves_reading(&[3, 4]).is_empty());
}

#[test]
fn dropping_a_worker_ends_what_it_accepted() {
    let mut node = Node::new(8, 1, Eviction::S3Fifo);
    (0..4u8).for_each(|i| node.compute(i.into(), i));
    let plan = node.session.begin_save(&keys(0..4), 0, &[0, 1, 2, 3]);
    node.workers[0].save_now(vec![SaveJob {
        job: plan.job,
        moves: plan.moves,
    }]);
    node.workers.clear();
    assert_eq!(node.session.poll(), 0);
    assert_eq!(node.session.lookup(&keys(0..4)).lease.len(), 4);
    assert_eq!(node.session.counters().saved_blocks, 4);
}

#[test]
fn loads_go_on_however_many_came_before_and_at_once() {
    let mut node = Node::new(8, 1, Eviction::S3Fifo);
    (0..4u8).for_each(|i| node.compute(i.into(), 10 + i));
    node.save(&keys(0..4), &[0, 1, 2, 3]);
    let found = node.session.lookup(&keys(0..4));
    for job in 0..8 {
        let outcome = node.load(job, &moves(found.lease.slots(), 8..12)).remove(0);
        assert!(outcome.failed.is_empty(), "load {job}");
    }
    let worker = &mut node.workers[0];
    for job in 100..150 {
        worker.load_async(job, 0, moves(found.lease.slots(), 8..12), true);
    }
    let mut ended = Vec::new();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while ended.len() < 50 && std::time::Instant::now() < deadline {
        ended.extend(worker.take_loads().into_iter().map(|(job, _)| job));
        std::thread::yield_now();
    }
    assert_eq!(ended.len(), 50);
}
