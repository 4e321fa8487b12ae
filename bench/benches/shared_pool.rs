//! What a scheduler's thread pays for a pool in another process: looking up a warm prompt, alone and
//! beside eight other engines that together look up for half a core's time, and asking where a step's
//! blocks go. The embedded pool is measured beside it.

#![allow(clippy::expect_used, reason = "a benchmark")]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kvtide_bench::{BLOCK_TOKENS, Daemon, Engine, Memory, prompt, sequence};
use kvtide_engine::{Save, Sequence, Session};

const ROWS: usize = 65_536;
const TOKENS: u32 = 131_072;
const BLOCKS: usize = (TOKENS / BLOCK_TOKENS) as usize;
/// Of this prompt, engines beside look up at once.
const BESIDE_TOKENS: u32 = 2_048;

fn look_up(session: &Session, hashed: &mut Sequence, blocks: usize) {
    hashed.release(); // Or what was matched before would be kept.
    let matched = hashed.match_blocks(session, 0, blocks, false);
    assert_eq!(matched.blocks, blocks);
}

fn lookups(c: &mut Criterion) {
    let memory = Memory::new(ROWS, 1, 64);
    let embedded = memory.session();
    let daemon = Daemon::new(ROWS, 64);
    let engine = daemon.engine("first");
    for seed in 0..7 {
        let chain = sequence(&prompt(seed, TOKENS));
        memory.save(&embedded, chain.keys());
        engine.save(chain.keys());
    }
    let mut hashed = sequence(&prompt(3, TOKENS));
    let mut group = c.benchmark_group("shared_pool");
    group.bench_function("lookup_131072_embedded", |b| {
        b.iter(|| look_up(&embedded, &mut hashed, BLOCKS));
    });
    hashed.release();
    group.bench_function("lookup_131072_through_the_daemon", |b| {
        b.iter(|| look_up(&engine.session, &mut hashed, BLOCKS));
    });
    hashed.release();
    let others: Vec<Engine> = (0..8)
        .map(|n| daemon.engine(&format!("other{n}")))
        .collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (n, other) in others.iter().enumerate() {
            let done = &done;
            scope.spawn(move || {
                let seed = u32::try_from(n % 7).expect("below 7");
                let blocks = (BESIDE_TOKENS / BLOCK_TOKENS) as usize;
                let mut hashed = sequence(&prompt(seed, BESIDE_TOKENS));
                while !done.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    look_up(&other.session, &mut hashed, blocks);
                    // A sixteenth of a core each.
                    std::thread::sleep(began.elapsed() * 15);
                }
            });
        }
        group.bench_function("lookup_131072_beside_8_engines", |b| {
            b.iter(|| look_up(&engine.session, &mut hashed, BLOCKS));
        });
        done.store(true, Ordering::Relaxed);
    });
    let mut short = sequence(&prompt(3, BESIDE_TOKENS));
    group.bench_function("lookup_of_128_blocks", |b| {
        b.iter(|| look_up(&engine.session, &mut short, 128));
    });
    group.finish();
}

/// A step in which four of 64 answers complete a block, as it is asked: once for all of them.
fn steps(c: &mut Criterion) {
    const ANSWERS: usize = 4;
    let mut group = c.benchmark_group("shared_pool");
    let daemon = Daemon::new(ROWS, 64);
    let engine = daemon.engine("first");
    let mut seed = 100;
    group.bench_function("where_4_blocks_go", |b| {
        b.iter_custom(|times| {
            let mut taken = Duration::ZERO;
            for _ in 0..times {
                seed += 1;
                let chains: Vec<Sequence> = (0..ANSWERS)
                    .map(|n| sequence(&prompt(seed * 8 + u32::try_from(n).expect("few"), 16)))
                    .collect();
                let save = |chain| Save {
                    chain,
                    from: 0,
                    blocks: &[0],
                };
                let saves: Vec<Save<'_>> = chains.iter().map(|s| save(s.keys())).collect();
                let began = Instant::now();
                let plans = black_box(engine.session.begin_saves(&saves));
                taken += began.elapsed();
                for each in plans.iter().flat_map(|plan| &plan.moves) {
                    let (row, generation) = (each.slot.slot, each.slot.generation);
                    let begun = engine.segment.begin_shard(row, 0, generation);
                    let sealed = engine.segment.seal_shard(row, 0, generation, 0);
                    assert!(begun && sealed);
                }
            }
            taken
        });
    });
    group.finish();
}

criterion_group!(benches, lookups, steps);
criterion_main!(benches);
