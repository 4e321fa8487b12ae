//! The pool against a plain model: whatever is done to it in whatever order, it holds what a map
//! would hold, and never loses a row.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;

use common::{Node, key, keys};
use kvtide_engine::{Eviction, Lease, PoolEvent, SaveJob};
use kvtide_model::BlockKey;
use proptest::prelude::*;

/// Of a chain; four chains fill neither pool twice.
const CHAIN: u32 = 24;

#[derive(Clone, Debug)]
enum Step {
    /// Save the chain of this number, from this block on, so many blocks.
    Save(u32, u32, u32),
    /// The chain of this number ends.
    Settle(u32),
    /// Let go of the worker for the oldest save.
    FinishSave,
    /// Match the chain of this number and keep the lease.
    Match(u32),
    /// Drop the oldest lease, which was used before or not.
    DropLease(bool),
    Damage(u32),
    Clear,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u32..4, 0..CHAIN, 1..CHAIN).prop_map(|(chain, from, blocks)| Step::Save(chain, from, blocks)),
        1 => (0u32..4).prop_map(Step::Settle),
        4 => Just(Step::FinishSave),
        3 => (0u32..4).prop_map(Step::Match),
        3 => any::<bool>().prop_map(Step::DropLease),
        1 => (0u32..4).prop_map(Step::Damage),
        1 => Just(Step::Clear),
    ];
    prop::collection::vec(step, 1..80)
}

fn chain(number: u32) -> Vec<BlockKey> {
    keys(number * 100..number * 100 + CHAIN)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_holds_what_its_events_say_and_loses_no_row(
        steps in steps(),
        lru in any::<bool>(),
        rows in prop_oneof![Just(6u32), Just(50)],
    ) {
        let node = Node::new(rows, 1, if lru { Eviction::Lru } else { Eviction::S3Fifo });
        let mut saves = Vec::new();
        let mut leases: Vec<Lease> = Vec::new();
        // What a consumer of the events believes.
        let mut held: BTreeMap<BlockKey, ()> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Settle(number) => node.session.settle(&chain(number)),
                Step::Save(number, from, blocks) => {
                    let blocks = vec![0; blocks as usize];
                    let plan = node.session.begin_save(&chain(number), from as usize, &blocks);
                    prop_assert_eq!(plan.job == 0, plan.moves.is_empty());
                    if plan.job != 0 {
                        saves.push(SaveJob { job: plan.job, moves: plan.moves });
                    }
                }
                Step::FinishSave => if !saves.is_empty() {
                    let job = saves.remove(0);
                    let id = job.job;
                    node.workers[0].save_now(vec![job]);
                    node.workers[0].finish_saves(&[id]).expect("saved");
                    let _ = node.session.poll();
                },
                Step::Match(number) => {
                    let found = node.session.lookup(&chain(number));
                    if !found.lease.is_empty() {
                        leases.push(found.lease);
                    }
                }
                Step::DropLease(used) => if !leases.is_empty() {
                    let lease = leases.remove(0);
                    if used {
                        node.session.mark_used(&lease);
                    }
                },
                Step::Damage(number) => {
                    let found = node.session.lookup(&chain(number)[..1]);
                    node.session.drop_damaged(found.lease.slots());
                }
                Step::Clear => assert!(node.session.clear()),
            }
            for event in node.session.take_events() {
                match event {
                    PoolEvent::Stored(key) => { held.insert(key, ()); }
                    PoolEvent::Removed(key) => { held.remove(&key); }
                    PoolEvent::Cleared => held.clear(),
                }
            }
            let gauges = node.session.gauges();
            prop_assert!(gauges.held <= rows as usize && gauges.free <= rows as usize);
            prop_assert!(gauges.free + gauges.held <= rows as usize);
            prop_assert!(held.len() <= gauges.held);
            for number in 0..4 {
                let keys = chain(number);
                let found = node.session.lookup(&keys);
                let run = keys.iter().take_while(|key| held.contains_key(key)).count();
                // Blocks being saved can be matched before they are stored.
                prop_assert!(found.lease.len() >= run);
                prop_assert!(!found.complete || found.lease.len() == run);
            }
        }
        // When everything has ended and is dropped, every row is free again.
        for job in saves {
            let id = job.job;
            node.workers[0].save_now(vec![job]);
            node.workers[0].finish_saves(&[id]).expect("saved");
        }
        node.session.clear();
        leases.clear();
        let _ = node.session.poll();
        prop_assert_eq!(node.session.gauges().free, rows as usize);
    }
}

#[test]
fn blocks_in_use_are_never_given_up() {
    let node = Node::new(3, 1, Eviction::S3Fifo);
    node.compute(0, 1);
    node.save(&keys(0..3), &[0, 0, 0]);
    let found = node.session.lookup(&keys(0..2));
    let plan = node.save(&keys(10..13), &[1, 2, 3]);
    assert_eq!(
        (plan.moves.len(), plan.covered),
        (1, 1),
        "two of three rows are leased"
    );
    assert_eq!(
        node.session.lookup(&keys(0..2)).lease.slots(),
        found.lease.slots()
    );
    drop(found);
    assert_eq!(node.save(&keys(11..13), &[2, 3]).moves.len(), 2);
}

#[test]
fn the_head_of_a_chain_outlives_its_tail() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let node = Node::new(4, 1, eviction);
        node.save(&keys(0..4), &[0, 1, 2, 3]);
        node.save(&[key(50)], &[4]);
        assert_eq!(
            node.session.lookup(&keys(0..4)).lease.len(),
            3,
            "{eviction:?}"
        );
    }
}

#[test]
fn the_head_of_a_chain_that_was_matched_outlives_its_tail() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let node = Node::new(4, 1, eviction);
        node.save(&keys(0..4), &[0, 1, 2, 3]);
        let found = node.session.lookup(&keys(0..4));
        node.session.mark_used(&found.lease);
        drop(found);
        node.save(&[key(50)], &[4]);
        assert_eq!(
            node.session.lookup(&keys(0..4)).lease.len(),
            3,
            "{eviction:?}"
        );
    }
}

/// Chats whose turns lie far apart, eight at a time, each of a prompt that is saved at once and an
/// answer that is saved block by block beside the others'. Returns the share of rows of a chat's
/// history that lie by themselves when its next turn loads it.
fn rows_apart_in_chats(eviction: Eviction) -> f64 {
    const CHATS: u32 = 24;
    let node = Node::new(2048, 1, eviction);
    let mut lengths = [0; CHATS as usize];
    let (mut apart, mut loaded) = (0, 0);
    for turn in 0..12 {
        for first in (0..CHATS).step_by(8) {
            let mut growing: Vec<(u32, u32)> = Vec::new();
            for chat in first..first + 8 {
                let length = &mut lengths[chat as usize];
                // A chat that has become long is begun anew, under other keys.
                let begin = chat * 100_000 + turn / 4 * 1000;
                if turn % 4 == 0 {
                    *length = 0;
                }
                let history = keys(begin..begin + *length);
                let found = node.session.lookup(&history);
                let mut slots: Vec<u32> = found.lease.slots().iter().map(|s| s.slot).collect();
                slots.sort_unstable();
                loaded += slots.len();
                apart += slots
                    .chunk_by(|a, b| a + 1 == *b)
                    .filter(|run| run.len() < 4)
                    .map(<[u32]>::len)
                    .sum::<usize>();
                let prompt = 10 + chat % 7;
                let after = *length + prompt;
                node.save(&keys(begin..begin + after), &vec![0; after as usize]);
                *length = after + 12 + chat % 5;
                growing.push((begin + after, begin + *length));
            }
            for step in 0..16 {
                for &(from, to) in growing.iter().filter(|(from, to)| from + step < *to) {
                    let begin = from / 1000 * 1000;
                    let chain = keys(begin..(from + step + 1).min(to));
                    node.save_from(&chain, (from + step - begin) as usize, &[0]);
                }
            }
            for &(_, to) in &growing {
                node.session.settle(&keys(to / 1000 * 1000..to));
            }
        }
    }
    assert!(
        node.session.counters().evicted_blocks > 1000,
        "the pool was never full"
    );
    assert!(loaded > 5000, "{loaded} rows were loaded");
    node.session.clear();
    assert_eq!(node.session.gauges().free, 2048, "rows were lost");
    f64::from(u32::try_from(apart).unwrap()) / f64::from(u32::try_from(loaded).unwrap())
}

#[test]
fn a_save_gives_up_nothing_that_it_continues() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let node = Node::new(640, 1, eviction);
        node.save(&keys(0..600), &[0; 600]);
        let plan = node.save(&keys(0..720), &[0; 720]);
        let held = node.session.lookup(&keys(0..720)).lease.len();
        assert_eq!((plan.covered, held), (640, 640), "{eviction:?}");
    }
}

#[test]
fn a_chain_that_grows_beyond_the_pool_keeps_its_head() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let node = Node::new(640, 1, eviction);
        let mut saved = 0;
        for end in (30..900).step_by(30) {
            let blocks = vec![0; end as usize - saved];
            saved += node.save_from(&keys(0..end), saved, &blocks).covered;
        }
        let held = node.session.lookup(&keys(0..900)).lease.len();
        assert_eq!((saved, held), (640, 640), "{eviction:?}");
    }
}

#[test]
fn what_lost_its_head_is_not_put_before_what_has_one() {
    let node = Node::new(16, 1, Eviction::Lru);
    node.save_from(&keys(0..8), 0, &[0; 4]);
    node.save_from(&keys(0..8), 4, &[0; 4]);
    node.save(&keys(100..108), &[0; 8]);
    // Takes the rows of the first chain's head, which is the oldest.
    node.save(&keys(200..204), &[0; 4]);
    assert_eq!(node.session.lookup(&keys(0..8)).lease.len(), 0);
    node.session.settle(&keys(0..8));
    node.save(&keys(300..304), &[0; 4]);
    assert_eq!(node.session.lookup(&keys(200..204)).lease.len(), 4);
    assert_eq!(node.session.lookup(&keys(100..108)).lease.len(), 8);
}

#[test]
fn what_was_saved_first_of_a_chain_is_given_up_last() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let node = Node::new(4, 1, eviction);
        for i in 0..4 {
            node.save_from(&keys(0..4), i, &[0]);
        }
        node.session.settle(&keys(0..4));
        node.save(&[key(50)], &[4]);
        assert_eq!(
            node.session.lookup(&keys(0..4)).lease.len(),
            3,
            "{eviction:?}"
        );
    }
}

#[test]
fn what_chats_load_lies_together_also_in_a_full_pool() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let apart = rows_apart_in_chats(eviction);
        eprintln!("{eviction:?}: {:.1} % of the rows lie apart", apart * 100.0);
        assert!(apart < 0.1, "{eviction:?}: {apart}");
    }
}

#[test]
fn a_full_pool_saves_the_head_of_what_it_cannot_hold() {
    let node = Node::new(2, 1, Eviction::Lru);
    let plan = node.session.begin_save(&keys(0..4), 0, &[0, 1, 2, 3]);
    assert_eq!((plan.moves.len(), plan.covered), (2, 2));
    assert_eq!(node.session.counters().throttled_blocks, 2);
    assert_eq!(node.session.lookup(&keys(0..4)).lease.len(), 2);
}

#[test]
fn a_reset_during_a_save_serves_nothing_of_it() {
    let node = Node::new(4, 1, Eviction::Lru);
    let plan = node.session.begin_save(&keys(0..2), 0, &[0, 1]);
    let found = node.session.lookup(&keys(0..2));
    node.session.clear();
    assert!(node.session.lookup(&keys(0..2)).lease.is_empty());
    node.workers[0].save_now(vec![SaveJob {
        job: plan.job,
        moves: plan.moves,
    }]);
    assert!(node.session.drain(std::time::Duration::from_secs(10)));
    assert!(node.session.lookup(&keys(0..2)).lease.is_empty());
    drop(found);
    assert_eq!(node.session.gauges().free, 4);
}

#[test]
fn the_scrub_finds_damage_before_anyone_reads_it() {
    let node = Node::new(4, 2, Eviction::Lru);
    node.compute(0, 1);
    let plan = node.save(&keys(0..2), &[0, 1]);
    node.damage(plan.moves[1].slot.slot, 1, 17);
    let scrubber = kvtide_engine::Scrubber::start(&node.pool, 1 << 30)
        .unwrap()
        .expect("a rate");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while node.session.counters().damaged_blocks == 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "the scrub found nothing"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(scrubber);
    assert_eq!(node.session.lookup(&keys(0..2)).lease.len(), 1);
    assert!(
        kvtide_engine::Scrubber::start(&node.pool, 0)
            .unwrap()
            .is_none()
    );
}

#[test]
fn the_index_costs_at_most_160_bytes_a_block() {
    let node = Node::new(1 << 16, 1, Eviction::S3Fifo);
    let gauges = node.session.gauges();
    let bytes = gauges.index_bytes as f64 / gauges.slots as f64;
    assert!((40.0..=160.0).contains(&bytes), "{bytes} bytes a block");
}
