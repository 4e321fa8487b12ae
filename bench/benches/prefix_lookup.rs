//! Hashing and looking up warm prompts, as the scheduler does for every request.
//!
//! The pool holds 65,536 blocks, eight times the longest prompt, so that tables do not fit in the
//! core's own cache merely because the benchmark is small.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kvtide_bench::{BLOCK_TOKENS, Memory, prompt, sequence};
use kvtide_engine::Verify;

const ROWS: usize = 65_536;

fn lookup(c: &mut Criterion) {
    let memory = Memory::new(ROWS, 1, 64);
    let session = memory.session();
    let pool = session.pool();
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
                let matched = hashed.match_blocks(pool, 0, blocks, Verify::Load, false);
                assert_eq!(matched.blocks, blocks);
            });
        });
        group.bench_with_input(
            BenchmarkId::new("from_tokens", tokens),
            &tokens_of_prompt,
            |b, tokens| {
                b.iter(|| {
                    let matched = sequence(black_box(tokens)).match_blocks(
                        pool,
                        0,
                        blocks,
                        Verify::Load,
                        false,
                    );
                    assert_eq!(matched.blocks, blocks);
                });
            },
        );
    }
    group.finish();
}

criterion_group!(benches, lookup);
criterion_main!(benches);
