//! What a pool that is full costs the scheduler's thread: planning the save of a prompt's step and
//! of an answer's block, for which others are given up.

#![allow(clippy::expect_used, reason = "a benchmark")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kvtide_bench::{BLOCK_TOKENS, Memory, Saver, prompt, sequence};
use kvtide_engine::Sequence;

const ROWS: usize = 1 << 16;
const ANSWERS: usize = 32;

fn plans(c: &mut Criterion) {
    let memory = Memory::new(ROWS, 1, 64);
    let session = memory.session();
    let saver = Saver::new(&memory);
    let mut seed = 0;
    let mut fresh = |tokens: u32| {
        seed += 1;
        sequence(&prompt(seed, tokens))
    };
    for _ in 0..ROWS / 4096 + 1 {
        let chain = fresh(65_536);
        saver.save(&session, &[session.begin_save(chain.keys(), 0, &[0; 4096])]);
        session.settle(chain.keys());
    }
    let mut group = c.benchmark_group("full_pool");
    // What is not timed, the saves themselves, takes ten times as long.
    group.measurement_time(Duration::from_secs(1));
    group.sample_size(20);
    group.bench_function("prompt_of_128_blocks", |b| {
        b.iter_custom(|times| {
            let mut taken = Duration::ZERO;
            for _ in 0..times {
                let chain = fresh(128 * BLOCK_TOKENS);
                let start = Instant::now();
                let plan = session.begin_save(black_box(chain.keys()), 0, &[0; 128]);
                taken += start.elapsed();
                saver.save(&session, &[plan]);
            }
            taken
        });
    });
    // Answers that grow beside each other, behind prompts of 8,192 tokens.
    let begin = |fresh: &mut dyn FnMut(u32) -> Sequence| -> Vec<Sequence> {
        let chains: Vec<_> = (0..ANSWERS).map(|_| fresh(16_384)).collect();
        for chain in &chains {
            saver.save(&session, &[session.begin_save(chain.keys(), 0, &[0; 512])]);
        }
        chains
    };
    let (mut answers, mut grown) = (begin(&mut fresh), 0);
    group.bench_function("a_block_of_each_of_32_answers", |b| {
        b.iter_custom(|times| {
            let mut taken = Duration::ZERO;
            for _ in 0..times {
                if grown == 512 {
                    answers = begin(&mut fresh);
                    grown = 0;
                }
                let start = Instant::now();
                let plans: Vec<_> = (answers.iter())
                    .map(|chain| session.begin_save(black_box(chain.keys()), 512 + grown, &[0]))
                    .collect();
                taken += start.elapsed();
                assert!(plans.iter().all(|plan| plan.moves.len() == 1));
                saver.save(&session, &plans);
                grown += 1;
            }
            taken
        });
    });
    group.bench_function("settle_of_512_blocks", |b| {
        b.iter(|| session.settle(black_box(&answers[0].keys()[..512])));
    });
    group.finish();
}

criterion_group!(benches, plans);
criterion_main!(benches);
