//! Hashing and looking up warm prompts, as the scheduler does for every request.
//!
//! The pool holds 65,536 blocks, eight times the longest prompt, so that tables do not fit in the
//! core's own cache merely because the benchmark is small.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kvtide_bench::{BLOCK_TOKENS, Memory, prompt, sequence};

const ROWS: usize = 65_536;

fn lookup(c: &mut Criterion) {
    let memory = Memory::new(ROWS, 1, 64);
    let session = memory.session();
    for seed in 0..8 {
        memory.save(&session, sequence(&prompt(seed, 131_072)).keys());
    }
    let mut group = c.benchmark_group("prefix_lookup");
    for tokens in [8_192u32, 32_768, 131_072] {
        let tokens_of_prompt = prompt(3, tokens);
        let blocks = (tokens / BLOCK_TOKENS) as usize;
        group.bench_with_input(
            BenchmarkId::new("hash", tokens),
            &tokens_of_prompt,
            |b, tokens| {
                b.iter(|| black_box(sequence(black_box(tokens)).keys().len()));
            },
        );
        let mut hashed = sequence(&tokens_of_prompt);
        group.bench_function(BenchmarkId::new("hashed_before", tokens), |b| {
            b.iter(|| {
                hashed.release(); // Or what was matched before would be kept.
                let matched = hashed.match_blocks(&session, 0, blocks, false);
                assert_eq!(matched.blocks, blocks);
            });
        });
        group.bench_with_input(
            BenchmarkId::new("from_tokens", tokens),
            &tokens_of_prompt,
            |b, tokens| {
                b.iter(|| {
                    let mut fresh = sequence(black_box(tokens));
                    let matched = fresh.match_blocks(&session, 0, blocks, false);
                    assert_eq!(matched.blocks, blocks);
                });
            },
        );
    }
    group.finish();
}

/// A request of 4,000 matched tokens that waits at the head of the queue for 100 steps, in rows of
/// 256 KiB: as vLLM asks about it when nothing may turn out to be damaged that was offered.
fn waiting(c: &mut Criterion) {
    const TOKENS: u32 = 4_000;
    let blocks = (TOKENS / BLOCK_TOKENS) as usize;
    let memory = Memory::new(blocks, 1, 256 << 10);
    let session = memory.session();
    let mut request = sequence(&prompt(1, TOKENS));
    memory.save(&session, request.keys());
    let mut ask = |verify: bool| {
        request.release();
        for _ in 0..100 {
            let matched = request.match_blocks(&session, 0, blocks, verify);
            assert_eq!((matched.blocks, matched.complete), (blocks, true));
            if verify {
                assert_eq!(request.verify(&session, blocks), blocks);
            }
        }
    };
    let mut group = c.benchmark_group("waiting_100_steps");
    group.bench_function("unverified", |b| b.iter(|| ask(false)));
    group.bench_function("verified", |b| b.iter(|| ask(true)));
    group.finish();
}

criterion_group!(benches, lookup, waiting);
criterion_main!(benches);
