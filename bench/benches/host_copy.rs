//! The memcpy backend beside a plain memcpy of the same bytes.
//!
//! 128 blocks of the 8B shape (32 layers of 64 KiB): 256 MiB, far beyond any cache. "plain" copies
//! them as one piece; "pieces" copies the same scattered pieces in a bare loop, which is what the
//! backend can at best reach; "checksum" is the backend with its checksum fused in.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvtide_bench::Memory;
use kvtide_kernels::copy::{Batch, Device, Direction, HostCache, HostDevice, RowMove};
use std::sync::Arc;

const BLOCKS: u32 = 128;
const LAYERS: u32 = 32;
const LAYER_BYTES: usize = 64 << 10;

fn copies(c: &mut Criterion) {
    let bytes = BLOCKS as usize * LAYERS as usize * LAYER_BYTES;
    let memory = Memory::new(BLOCKS as usize, LAYERS, LAYER_BYTES);
    let cache = HostCache::new(LAYERS as usize, BLOCKS, LAYER_BYTES).expect("memory");
    for layer in 0..LAYERS as usize {
        (0..BLOCKS).for_each(|block| cache.write(layer, block, |i| u8::from(i % 3 == 0)));
    }
    let registration = Arc::new(
        cache
            .register(Arc::clone(&memory.segment), 0)
            .expect("geometry"),
    );
    let device = HostDevice::new(registration);
    let mut backend = device.backend(Direction::Save).expect("host memory");
    // The engine's blocks of one request are scattered; a stride coprime to their number is enough.
    let moves: Vec<RowMove> = (0..BLOCKS)
        .map(|row| RowMove {
            row,
            block: row * 37 % BLOCKS,
        })
        .collect();
    let source = vec![1u8; bytes];
    let mut target = vec![2u8; bytes];

    let mut group = c.benchmark_group("host_copy");
    group
        .throughput(Throughput::Bytes(bytes as u64))
        .sample_size(20);
    group.bench_function("plain", |b| b.iter(|| target.copy_from_slice(&source)));
    group.bench_function("pieces", |b| {
        b.iter(|| {
            for layer in 0..LAYERS as usize {
                for &RowMove { row, block } in &moves {
                    let from = (layer * BLOCKS as usize + block as usize) * LAYER_BYTES;
                    let to = (row as usize * LAYERS as usize + layer) * LAYER_BYTES;
                    target[to..to + LAYER_BYTES].copy_from_slice(&source[from..from + LAYER_BYTES]);
                }
            }
        });
    });
    let layers = 0..LAYERS as usize;
    for (name, direction) in [("save", Direction::Save), ("load", Direction::Load)] {
        for (suffix, digests) in [("", false), ("_checksum", true)] {
            let batch = Batch {
                direction,
                moves: &moves,
                digests,
            };
            group.bench_function(format!("{name}{suffix}"), |b| {
                b.iter(|| {
                    backend.begin(&batch).expect("blocks that there are");
                    backend.copy(layers.clone()).expect("a copy");
                    backend.finish().expect("a copy")
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, copies);
criterion_main!(benches);
