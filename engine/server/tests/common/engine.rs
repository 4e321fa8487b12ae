//! An engine of one rank, without vLLM. What a block holds follows from its key, so that whoever loads
//! it knows what is right.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtide_engine::{
    AttachError, AttachOptions, Attachment, Lease, SaveJob, SavePlan, Session, Worker,
};
use kvtide_kernels::copy::{HostCache, HostDevice};
use kvtide_model::wire::Geometry;
use kvtide_model::{BlockKey, BlockMove, Namespace, NamespaceId};
use kvtide_segment::{Holder, SharedSegment};

/// How long a loaded machine may need for something.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A model, and the cache of an engine that runs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) model: &'static str,
    pub(crate) layers: u32,
    pub(crate) layer_bytes: usize,
    /// Blocks of the engine's own cache: one half to save from, the other to load into.
    pub(crate) blocks: u32,
}

/// Small, and enough for most.
pub(crate) const SMALL: Shape = Shape {
    model: "m",
    layers: 2,
    layer_bytes: 4096,
    blocks: 64,
};

/// See the module's documentation.
pub(crate) struct Engine {
    /// Dropped first: what it copies ends before the daemon hears that nothing is copied.
    pub(crate) worker: Worker,
    pub(crate) session: Session,
    pub(crate) segment: Arc<SharedSegment>,
    pub(crate) shape: Shape,
    cache: Arc<HostCache>,
    jobs: u64,
}

/// What became of a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Blocks that were found and are right.
    pub(crate) right: usize,
    /// Blocks of which the worker said that they are not there.
    pub(crate) failed: usize,
    /// Blocks of which it said that they are, and which hold something else.
    pub(crate) wrong: usize,
}

impl Engine {
    pub(crate) fn start(socket: &Path, engine_id: &str, shape: Shape) -> Self {
        Self::attach(socket, engine_id, shape, LIMIT).unwrap()
    }

    pub(crate) fn attach(
        socket: &Path,
        engine_id: &str,
        shape: Shape,
        timeout: Duration,
    ) -> Result<Self, AttachError> {
        let options = AttachOptions {
            socket: socket.to_owned(),
            engine_id: engine_id.into(),
            client: "kvtide test".into(),
            namespace: namespace(shape.model),
            model: shape.model.into(),
            tenant: "team-a".into(),
            geometry: shape.geometry(),
            events: false,
            timeout,
        };
        let worker = Attachment::new(options.clone(), Holder::Worker(0))?;
        let scheduler = Attachment::new(options, Holder::Scheduler)?;
        let segment = Arc::clone(worker.segment());
        let layers = shape.layers as usize;
        let cache = HostCache::new(layers, shape.blocks, shape.layer_bytes).unwrap();
        let registration = cache.register(Arc::clone(&segment), 0).unwrap();
        let device = Arc::new(HostDevice::new(Arc::new(registration)));
        Ok(Self {
            session: Session::attached(scheduler, Duration::from_secs(60)),
            worker: Worker::start(device, engine_id).unwrap(),
            segment,
            shape,
            cache,
            jobs: 0,
        })
    }

    /// The engine has computed these blocks, from its own block 0 on; they hold what their keys say.
    pub(crate) fn compute(&self, keys: &[BlockKey]) -> Vec<u32> {
        let blocks: Vec<u32> = (0..self.shape.blocks / 2).take(keys.len()).collect();
        assert_eq!(blocks.len(), keys.len(), "the engine's cache is too small");
        // As vLLM does before it computes: what is still being copied is not overwritten.
        let reading = self.session.saves_reading(&blocks);
        self.worker.wait_saves(&reading).unwrap();
        for (key, &block) in keys.iter().zip(&blocks) {
            for layer in 0..self.shape.layers as usize {
                self.cache.write(layer, block, |i| byte(key, layer, i));
            }
        }
        blocks
    }

    /// Whether one of the engine's blocks holds what `key` says.
    pub(crate) fn holds(&self, block: u32, key: &BlockKey) -> bool {
        (0..self.shape.layers as usize).all(|layer| {
            let bytes = self.cache.read(layer, block);
            let mut bytes = bytes.iter().enumerate();
            bytes.all(|(i, &found)| found == byte(key, layer, i))
        })
    }

    /// Where blocks go that are `keys`, of which the first `from` are held already; asked again until
    /// there is a place for all.
    pub(crate) fn begin(&self, keys: &[BlockKey], blocks: &[u32]) -> SavePlan {
        let begun = Instant::now();
        loop {
            let plan = self.session.begin_save(keys, 0, blocks);
            if plan.covered == keys.len() {
                return plan;
            }
            assert!(begun.elapsed() < LIMIT, "there is no place to save");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Computes and saves, and waits for it.
    pub(crate) fn save(&self, keys: &[BlockKey]) {
        let blocks = self.compute(keys);
        let plan = self.begin(keys, &blocks);
        if plan.job != 0 {
            let (job, moves) = (plan.job, plan.moves);
            self.worker.save_now(vec![SaveJob { job, moves }]);
        }
        assert!(self.session.drain(LIMIT), "the save does not end");
    }

    /// Loads what is found of `keys`, and compares it.
    pub(crate) fn load(&mut self, keys: &[BlockKey]) -> Loaded {
        let found = self.session.lookup(keys);
        self.load_leased(&found.lease, keys)
    }

    /// Loads what is leased, which is `keys`, and compares it.
    pub(crate) fn load_leased(&mut self, lease: &Lease, keys: &[BlockKey]) -> Loaded {
        let mut loaded = Loaded::default();
        if lease.is_empty() {
            return loaded;
        }
        let first = self.shape.blocks / 2;
        let blocks = first..self.shape.blocks;
        let slots = lease.slots().iter().zip(blocks);
        let moves: Vec<_> = slots
            .map(|(&slot, block)| BlockMove { slot, block })
            .collect();
        assert_eq!(moves.len(), lease.len(), "the engine's cache is too small");
        self.jobs += 1;
        self.worker.load_async(self.jobs, 0, moves.clone(), true);
        let begun = Instant::now();
        let outcome = loop {
            if let Some((_, outcome)) = self.worker.take_loads().pop() {
                break outcome;
            }
            assert!(begun.elapsed() < LIMIT, "the load does not end");
            std::thread::sleep(Duration::from_micros(200));
        };
        if !outcome.damaged.is_empty() {
            self.session.drop_damaged(&outcome.damaged);
        }
        for (place, (each, key)) in moves.iter().zip(keys).enumerate() {
            if outcome.failed.contains(&place) {
                loaded.failed += 1;
            } else if self.holds(each.block, key) {
                loaded.right += 1;
            } else {
                loaded.wrong += 1;
            }
        }
        loaded
    }

    /// Whether all of `keys` are found and right.
    pub(crate) fn loads(&mut self, keys: &[BlockKey]) -> bool {
        self.load(keys).right == keys.len()
    }
}

impl Shape {
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            ranks: 1,
            layers: self.layers,
            layer_bytes: self.layer_bytes as u64,
            block_tokens: 16,
        }
    }
}

/// What a block holds at a place.
fn byte(key: &BlockKey, layer: usize, i: usize) -> u8 {
    let turn = u8::try_from((i / 16 * 31 + layer * 17) % 251).unwrap();
    key.as_bytes()[i % 16] ^ turn
}

pub(crate) fn namespace(model: &str) -> NamespaceId {
    let model = model.to_owned();
    Namespace {
        model,
        ..Namespace::default()
    }
    .id()
}

pub(crate) fn keys(range: std::ops::Range<u32>) -> Vec<BlockKey> {
    let key = |n: u32| {
        let mut bytes = [7; 16];
        bytes[..4].copy_from_slice(&n.wrapping_mul(0x9E37_79B9).to_le_bytes());
        bytes[8..12].copy_from_slice(&n.wrapping_mul(0x85EB_CA6B).to_le_bytes());
        BlockKey::from_bytes(bytes)
    };
    range.map(key).collect()
}
