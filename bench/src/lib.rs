//! What the benchmarks have in common: an engine on plain memory.

mod daemon;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvtide_engine::{
    Eviction, Pool, PoolOptions, SaveJob, SavePlan, Sequence, Session, SessionOptions, Worker,
};
use kvtide_kernels::copy::{HostCache, HostDevice};
use kvtide_model::{BlockKey, ChainRoot, Namespace, Scope};
use kvtide_segment::{Holder, HugePages, RowGeometry, SegmentOptions, SharedSegment};
use tempfile::TempDir;

pub use daemon::{Daemon, Engine};

/// A segment on shared memory that is removed with this.
pub struct Memory {
    /// The segment.
    pub segment: Arc<SharedSegment>,
    /// Holds the directory until the segment is gone.
    _directory: TempDir,
}

impl Memory {
    /// A populated segment for one rank with `rows` rows.
    ///
    /// # Panics
    /// When the machine has not got the memory.
    #[must_use]
    pub fn new(rows: usize, layers: u32, layer_bytes: usize) -> Self {
        let shared = Path::new("/dev/shm");
        let directory = tempfile::tempdir_in(shared).expect("a directory on shared memory");
        let many = RowGeometry::fit(1, layers, layer_bytes, usize::MAX / 8).expect("geometry");
        let rows = u32::try_from(rows).expect("few enough");
        let geometry = many.with_rows(rows).expect("few enough");
        let options = SegmentOptions {
            directory: directory.path().to_owned(),
            instance: "bench".into(),
            huge_pages: HugePages::Off,
            holder: Holder::Worker(0),
            available_bytes: u64::MAX,
        };
        let segment =
            SharedSegment::create_or_attach(&options, geometry, &|_, _| {}).expect("memory");
        segment.populate(&|_, _| {}).expect("memory");
        Self {
            segment: Arc::new(segment),
            _directory: directory,
        }
    }

    /// An engine's session with a pool over the segment.
    ///
    /// # Panics
    /// Never: it is the pool's first.
    #[must_use]
    pub fn session(&self) -> Session {
        let options = PoolOptions {
            eviction: Eviction::S3Fifo,
        };
        let pool = Arc::new(Pool::new(Arc::clone(&self.segment), options));
        let options = SessionOptions {
            events: false,
            lease_ttl: Duration::from_secs(600),
        };
        Session::open(&pool, options).expect("the first session")
    }

    /// Saves `keys`, all from the engine's block 0.
    ///
    /// # Panics
    /// When the machine has not got the memory.
    pub fn save(&self, session: &Session, keys: &[BlockKey]) {
        let plan = session.begin_save(keys, 0, &vec![0; keys.len()]);
        assert_eq!(plan.moves.len(), keys.len(), "the pool is too small");
        Saver::new(self).save(session, &[plan]);
    }
}

/// A worker over a segment, whose engine has one block.
pub struct Saver(Worker);

impl Saver {
    /// # Panics
    /// When the machine has not got the memory.
    #[must_use]
    pub fn new(memory: &Memory) -> Self {
        let geometry = memory.segment.geometry();
        let cache = HostCache::new(geometry.layers() as usize, 1, geometry.layer_bytes());
        let registration = cache
            .expect("memory")
            .register(Arc::clone(&memory.segment), 0);
        let worker = Worker::start(
            Arc::new(HostDevice::new(Arc::new(registration.expect("geometry")))),
            "bench",
        );
        Self(worker.expect("threads"))
    }

    /// Carries out all plans of `session` and waits for them.
    ///
    /// # Panics
    /// When they do not end.
    pub fn save(&self, session: &Session, plans: &[SavePlan]) {
        for plan in plans.iter().filter(|plan| plan.job != 0) {
            self.0.save_now(vec![SaveJob {
                job: plan.job,
                moves: plan.moves.clone(),
            }]);
            self.0.finish_saves(&[plan.job]).expect("saved");
        }
        let drained = session.drain(Duration::from_secs(60));
        assert!(drained, "saves did not end");
    }
}

/// The root of all chains in the benchmarks.
#[must_use]
pub fn root() -> ChainRoot {
    Namespace {
        model: "bench".into(),
        ..Namespace::default()
    }
    .root(&Scope::default())
}

/// Tokens of a block.
pub const BLOCK_TOKENS: u32 = 16;

/// A prompt with all its keys.
#[must_use]
pub fn sequence(tokens: &[u32]) -> Sequence {
    let mut sequence = Sequence::new(root(), BLOCK_TOKENS, vec![]);
    sequence.extend(tokens);
    sequence
}

/// A prompt of `count` tokens; `seed` tells prompts apart.
#[must_use]
pub fn prompt(seed: u32, count: u32) -> Vec<u32> {
    (0..count)
        .map(|i| i.wrapping_add(seed).wrapping_mul(2_654_435_761) % 128_000)
        .collect()
}
