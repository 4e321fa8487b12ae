//! A small engine on plain memory: segment, pool, and a worker for every rank.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test file uses its own part of this"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtide_engine::{
    Eviction, LoadOutcome, Pool, PoolOptions, SaveJob, SavePlan, Session, SessionError,
    SessionOptions, Worker,
};
use kvtide_kernels::copy::{Device, HostCache, HostDevice, Registration};
use kvtide_model::{BlockKey, BlockMove, SlotRef};
use kvtide_segment::{Holder, HugePages, RowGeometry, SegmentOptions, SharedSegment};
use tempfile::TempDir;

pub const LAYERS: u32 = 3;
pub const LAYER_BYTES: usize = 1000;
pub const BLOCKS: u32 = 16;

pub struct Node {
    pub pool: Arc<Pool>,
    pub session: Session,
    pub segment: Arc<SharedSegment>,
    pub caches: Vec<Arc<HostCache>>,
    pub workers: Vec<Worker>,
    directory: TempDir,
}

pub fn key(n: u32) -> BlockKey {
    let mut bytes = [7; 16];
    bytes[..4].copy_from_slice(&n.wrapping_mul(0x9E37_79B9).to_le_bytes());
    bytes[4..8].copy_from_slice(&n.to_le_bytes());
    BlockKey::from_bytes(bytes)
}

/// A session that is told everything.
pub fn open_session(pool: &Arc<Pool>) -> Session {
    try_open_session(pool).expect("room for a session")
}

pub fn try_open_session(pool: &Arc<Pool>) -> Result<Session, SessionError> {
    let options = SessionOptions {
        events: true,
        lease_ttl: Duration::from_secs(60),
    };
    Session::open(pool, options)
}

pub fn keys(range: std::ops::Range<u32>) -> Vec<BlockKey> {
    range.map(key).collect()
}

pub fn moves(slots: &[SlotRef], blocks: std::ops::Range<u32>) -> Vec<BlockMove> {
    slots
        .iter()
        .zip(blocks)
        .map(|(&slot, block)| BlockMove { slot, block })
        .collect()
}

impl Node {
    /// A pool of exactly `rows` rows over `ranks` ranks.
    pub fn new(rows: u32, ranks: u32, eviction: Eviction) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory on shared memory");
        let many = RowGeometry::fit(ranks, LAYERS, LAYER_BYTES, 1 << 30).expect("geometry");
        let geometry = many.with_rows(rows).expect("so many rows");
        assert_eq!(geometry.rows(), rows);
        let options = SegmentOptions {
            directory: directory.path().to_owned(),
            instance: "test".into(),
            huge_pages: HugePages::Off,
            holder: Holder::Worker(0),
            available_bytes: u64::MAX,
        };
        let segment = Arc::new(
            SharedSegment::create_or_attach(&options, geometry, &|_, _| {}).expect("segment"),
        );
        let options = PoolOptions { eviction };
        let pool = Arc::new(Pool::new(Arc::clone(&segment), options));
        let session = open_session(&pool);
        let mut caches = Vec::new();
        let mut workers = Vec::new();
        for rank in 0..ranks {
            let cache = HostCache::new(LAYERS as usize, BLOCKS, LAYER_BYTES).expect("memory");
            let registration = cache
                .register(Arc::clone(&segment), rank)
                .expect("registration");
            workers.push(
                Worker::start(device(registration), &format!("test{rank}")).expect("threads"),
            );
            caches.push(cache);
        }
        Self {
            pool,
            session,
            segment,
            caches,
            workers,
            directory,
        }
    }

    /// Writes recognisable bytes into the engine's block on every rank.
    pub fn compute(&self, block: u32, content: u8) {
        for (rank, cache) in self.caches.iter().enumerate() {
            for layer in 0..LAYERS as usize {
                cache.write(layer, block, |i| byte(content, rank, layer, i));
            }
        }
    }

    /// Whether the engine's block holds what `compute` wrote for `content`.
    pub fn holds(&self, block: u32, content: u8) -> bool {
        self.caches.iter().enumerate().all(|(rank, cache)| {
            (0..LAYERS as usize).all(|layer| {
                let bytes = cache.read(layer, block);
                bytes
                    .iter()
                    .enumerate()
                    .all(|(i, &b)| b == byte(content, rank, layer, i))
            })
        })
    }

    /// Saves the engine's `blocks` under `keys` and waits for it.
    pub fn save(&self, keys: &[BlockKey], blocks: &[u32]) -> SavePlan {
        self.save_from(keys, 0, blocks)
    }

    /// Saves the engine's `blocks`, which are those of `chain` from `from` on, and waits for it.
    pub fn save_from(&self, chain: &[BlockKey], from: usize, blocks: &[u32]) -> SavePlan {
        let plan = self.session.begin_save(chain, from, blocks);
        for worker in &self.workers {
            if plan.job != 0 {
                worker.save_now(vec![SaveJob {
                    job: plan.job,
                    moves: plan.moves.clone(),
                }]);
            }
        }
        assert!(self.session.drain(Duration::from_secs(10)));
        plan
    }

    /// Runs an async load on every rank; their outcomes.
    pub fn load(&mut self, job: u64, moves: &[BlockMove]) -> Vec<LoadOutcome> {
        self.workers
            .iter()
            .for_each(|worker| worker.load_async(job, 0, moves.to_vec(), true));
        self.workers
            .iter_mut()
            .map(|worker| wait_load(worker, job))
            .collect()
    }

    /// Flips one byte of a row, as failing memory or a stray write would.
    pub fn damage(&self, row: u32, rank: u32, at: usize) {
        let offset = self
            .segment
            .geometry()
            .shard_offset(row, rank)
            .expect("row")
            + self.segment.data_offset()
            + at;
        flip_byte(self.segment.path(), offset);
    }
}

fn byte(content: u8, rank: usize, layer: usize, i: usize) -> u8 {
    content ^ u8::try_from((rank * 91 + layer * 17 + i) % 251).expect("below 251")
}

pub fn flip_byte(path: &std::path::Path, offset: usize) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("segment file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset as u64).expect("read");
    byte[0] ^= 0x40;
    file.write_all_at(&byte, offset as u64).expect("write");
}

pub fn wait_load(worker: &mut Worker, job: u64) -> LoadOutcome {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some((id, outcome)) = worker.take_loads().pop() {
            assert_eq!(id, job);
            return outcome;
        }
        assert!(Instant::now() < deadline, "load {job} did not end");
        std::thread::sleep(Duration::from_micros(100));
    }
}

pub fn device(registration: Registration) -> Arc<dyn Device> {
    Arc::new(HostDevice::new(Arc::new(registration)))
}
