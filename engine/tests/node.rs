//! Engines on the pool of a node: they share it, they end, and the node begins another life.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{BLOCKS, LAYER_BYTES, LAYERS, device, flip_byte, keys, wait_load};
use kvtide_engine::{
    AttachError, AttachOptions, Attachment, Eviction, Limits, Node, NodeError, NodeOptions, Peer,
    SaveJob, SavePlan, Session, Which, Worker,
};
use kvtide_kernels::copy::HostCache;
use kvtide_model::wire::{FrameReader, Geometry, LONGEST_FRAME, ToDaemon};
use kvtide_model::{BlockKey, BlockMove, Namespace, NamespaceId};
use kvtide_segment::{Holder, HugePages, Numa, SharedSegment};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(10);
const EXTENT: usize = 64 << 10;

/// A daemon in this process: a node, and a thread that takes connections for it.
struct Daemon {
    node: Arc<Node>,
    directory: Arc<TempDir>,
}

fn options(directory: &Path, extents: usize) -> NodeOptions {
    NodeOptions {
        directory: directory.to_owned(),
        name: "test".into(),
        capacity_bytes: extents * EXTENT,
        capacity_is_chosen: true,
        extent_bytes: EXTENT,
        huge_pages: HugePages::Off,
        numa: Numa::AsTold,
        eviction: Eviction::Lru,
        sessions: NodeOptions::SESSIONS_MAX,
        limits: Limits::default(),
        scrub_bytes_per_second: 0,
        server: "kvtide test".into(),
    }
}

impl Daemon {
    fn new(extents: usize) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory on shared memory");
        Self::on(Arc::new(directory), extents)
    }

    fn on(directory: Arc<TempDir>, extents: usize) -> Self {
        let options = options(directory.path(), extents);
        Self::with(directory, &options)
    }

    fn limited(extents: usize, limits: Limits) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory on shared memory");
        let options = NodeOptions {
            limits,
            ..options(directory.path(), extents)
        };
        Self::with(Arc::new(directory), &options)
    }

    fn with(directory: Arc<TempDir>, options: &NodeOptions) -> Self {
        // What is left of an earlier one's threads gives the memory back within moments.
        let node = until("the memory is free", || {
            match Node::open(options.clone(), &|_, _| {}) {
                Err(NodeError::InUse { .. }) => None,
                opened => Some(Arc::new(opened.expect("memory"))),
            }
        });
        let daemon = Self { node, directory };
        let _ = std::fs::remove_file(daemon.socket());
        let listener = UnixListener::bind(daemon.socket()).expect("a socket");
        let node = Arc::downgrade(&daemon.node);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut reader = FrameReader::new(LONGEST_FRAME);
                let hello = loop {
                    let mut byte = [0];
                    if stream.read(&mut byte).unwrap_or(0) == 0 {
                        break None;
                    }
                    if let Some(frame) = reader.next_frame(&mut &byte[..]).unwrap() {
                        break ToDaemon::decode(frame).unwrap();
                    }
                };
                let Some(node) = node.upgrade() else { return };
                if let Some(ToDaemon::Hello(hello)) = hello {
                    node.attach(stream, Peer { pid: 1, uid: 2 }, hello).unwrap();
                }
            }
        });
        daemon
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("socket")
    }

    /// Ends this life as a kill would: nothing is said to anybody. The memory stays.
    fn kill(self) -> Arc<TempDir> {
        let _ = std::fs::remove_file(self.socket());
        let directory = Arc::clone(&self.directory);
        drop(self.node);
        directory
    }

    fn free_extents(&self) -> u32 {
        self.node.report().free_extents
    }

    /// Extents of a tenant's pools.
    fn extents_of(&self, tenant: &str) -> u32 {
        let models = self.node.report().models;
        let own = models.iter().filter(|model| model.tenant == tenant);
        own.map(|model| model.extents).sum()
    }
}

/// An engine of one rank, without vLLM.
struct Engine {
    session: Session,
    segment: Arc<SharedSegment>,
    cache: Arc<HostCache>,
    worker: Worker,
}

fn namespace(model: &str) -> NamespaceId {
    let model = model.to_owned();
    Namespace {
        model,
        ..Namespace::default()
    }
    .id()
}

fn attach_options(daemon: &Daemon, engine_id: &str, model: &str) -> AttachOptions {
    attach_options_at(&daemon.socket(), engine_id, model)
}

fn attach_options_at(socket: &Path, engine_id: &str, model: &str) -> AttachOptions {
    AttachOptions {
        socket: socket.to_owned(),
        engine_id: engine_id.into(),
        client: "kvtide test".into(),
        namespace: namespace(model),
        model: model.into(),
        tenant: String::new(),
        geometry: Geometry {
            ranks: 1,
            layers: LAYERS,
            layer_bytes: LAYER_BYTES as u64,
            block_tokens: 16,
        },
        events: true,
        timeout: LIMIT,
    }
}

impl Engine {
    fn start(daemon: &Daemon, engine_id: &str, model: &str) -> Self {
        Self::try_start(daemon, engine_id, model).expect("attached")
    }

    fn try_start(daemon: &Daemon, engine_id: &str, model: &str) -> Result<Self, AttachError> {
        Self::attach(attach_options(daemon, engine_id, model))
    }

    fn of_tenant(daemon: &Daemon, tenant: &str, model: &str) -> Self {
        let options = attach_options(daemon, &format!("{tenant}-{model}"), model);
        let tenant = tenant.to_owned();
        Self::attach(AttachOptions { tenant, ..options }).expect("attached")
    }

    fn attach(options: AttachOptions) -> Result<Self, AttachError> {
        let engine_id = options.engine_id.clone();
        let worker = Attachment::new(options.clone(), Holder::Worker(0))?;
        let scheduler = Attachment::new(options, Holder::Scheduler)?;
        let segment = Arc::clone(worker.segment());
        let cache = HostCache::new(LAYERS as usize, BLOCKS, LAYER_BYTES).expect("memory");
        let registration = cache.register(Arc::clone(&segment), 0).expect("geometry");
        Ok(Self {
            session: Session::attached(scheduler, Duration::from_secs(60)),
            segment,
            worker: Worker::start(device(registration), &engine_id).expect("threads"),
            cache,
        })
    }

    fn compute(&self, block: u32, content: u8) {
        for layer in 0..LAYERS as usize {
            self.cache.write(layer, block, |_| content);
        }
    }

    fn has(&self, block: u32, content: u8) -> bool {
        (0..LAYERS as usize)
            .all(|layer| self.cache.read(layer, block).iter().all(|&b| b == content))
    }

    /// Hands out slots, tried again for as long as a loaded machine may need.
    fn begin(&self, keys: &[BlockKey], blocks: &[u32]) -> SavePlan {
        until("a place to save", || {
            let plan = self.session.begin_save(keys, 0, blocks);
            (plan.covered > 0).then_some(plan)
        })
    }

    fn copy(&self, plan: SavePlan) {
        if plan.job != 0 {
            self.worker.save_now(vec![SaveJob {
                job: plan.job,
                moves: plan.moves,
            }]);
        }
        assert!(self.session.drain(LIMIT));
    }

    /// Saves blocks one by one, as many as have been asked for, whether there is place for all or not.
    fn save_many(&self, keys: &[BlockKey]) {
        for key in keys {
            let plan = self.begin(std::slice::from_ref(key), &[0]);
            self.copy(plan);
        }
    }

    fn save(&self, keys: &[BlockKey], blocks: &[u32]) {
        let plan = self.begin(keys, blocks);
        assert_eq!(plan.covered, keys.len());
        self.copy(plan);
    }

    /// Loads what matches of `keys` into blocks from `first` on; how many, and how many failed.
    fn load(&mut self, keys: &[BlockKey], first: u32) -> (usize, usize) {
        let found = self.session.lookup(keys);
        let slots = found.lease.slots().iter();
        let moves: Vec<_> = slots
            .zip(first..)
            .map(|(&slot, block)| BlockMove { slot, block })
            .collect();
        let count = moves.len();
        self.worker.load_async(1, 0, moves, true);
        (count, wait_load(&mut self.worker, 1).failed.len())
    }
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_one_engine_saves_another_of_the_same_model_loads() {
    let daemon = Daemon::new(4);
    let first = Engine::start(&daemon, "a", "m");
    let mut second = Engine::start(&daemon, "b", "m");
    (0..4).for_each(|block| first.compute(block, 40 + u8::try_from(block).unwrap()));
    first.save(&keys(0..4), &[0, 1, 2, 3]);
    assert_eq!(second.load(&keys(0..4), 8), (4, 0));
    assert!((0..4u8).all(|block| second.has(8 + u32::from(block), 40 + block)));
    let plan = second.begin(&keys(0..4), &[0, 1, 2, 3]);
    assert_eq!((plan.job, plan.covered), (0, 4), "nothing is saved twice");
    let other = Engine::start(&daemon, "c", "another model");
    assert!(other.session.lookup(&keys(0..4)).lease.is_empty());
}

#[test]
fn a_block_is_found_while_another_engine_is_still_saving_it() {
    let daemon = Daemon::new(4);
    let producer = Engine::start(&daemon, "p", "m");
    let mut consumer = Engine::start(&daemon, "d", "m");
    producer.compute(0, 7);
    let plan = producer.begin(&keys(0..1), &[0]);
    let found = consumer.session.lookup(&keys(0..1));
    assert_eq!((found.lease.len(), found.complete), (1, false));
    producer.copy(plan);
    assert_eq!(found.lease.readiness(0), kvtide_engine::Readiness::Ready);
    assert_eq!(consumer.load(&keys(0..1), 5), (1, 0));
    assert!(consumer.has(5, 7));
}

#[test]
fn an_engine_that_ends_gives_back_its_pins_and_hides_what_it_was_saving() {
    let daemon = Daemon::new(1);
    let first = Engine::start(&daemon, "a", "m");
    let second = Engine::start(&daemon, "b", "m");
    first.save(&keys(0..2), &[0, 1]);
    let pinned = second.session.lookup(&keys(0..2));
    let unfinished = second.begin(&keys(10..12), &[0, 1]);
    assert_ne!(unfinished.job, 0);
    assert_eq!(first.session.lookup(&keys(10..12)).lease.len(), 2);
    let report = daemon.node.report();
    assert_eq!(report.engines.len(), 2);
    assert_eq!(report.engines[1].pinned_blocks, 2);
    drop((pinned, second));
    until("it is forgotten", || {
        (daemon.node.report().engines.len() == 1).then_some(())
    });
    assert!(first.session.lookup(&keys(10..12)).lease.is_empty());
    let report = daemon.node.report();
    assert_eq!(
        (
            report.models[0].pinned_blocks,
            report.models[0].gauges.saving
        ),
        (0, 0)
    );
    assert_eq!(
        first.session.lookup(&keys(0..2)).lease.len(),
        2,
        "what was saved stays"
    );
}

#[test]
fn the_next_life_of_a_node_has_what_the_last_one_had_and_engines_go_on() {
    let daemon = Daemon::new(4);
    let mut engine = Engine::start(&daemon, "a", "m");
    (0..4).for_each(|block| engine.compute(block, 90 + u8::try_from(block).unwrap()));
    engine.save(&keys(0..4), &[0, 1, 2, 3]);
    until("the pool knows", || {
        let report = daemon.node.report();
        (report.models[0].gauges.saving == 0).then_some(())
    });
    let held = engine.session.lookup(&keys(0..1));
    let directory = daemon.kill();
    until("the loss is noticed", || {
        let _ = engine.session.poll();
        engine
            .session
            .lookup(&keys(0..4))
            .lease
            .is_empty()
            .then_some(())
    });
    assert_eq!(engine.session.begin_save(&keys(20..21), 0, &[0]).covered, 0);

    let daemon = Daemon::on(directory, 4);
    assert_eq!(daemon.node.report().models[0].gauges.held, 4);
    let pinned = daemon.node.report().models[0].pinned_blocks;
    assert_eq!(pinned, 1, "the pin of an engine that lives is kept");
    until("it is attached again", || {
        let _ = engine.session.poll();
        (engine.session.lookup(&keys(0..4)).lease.len() == 4).then_some(())
    });
    // Nobody has compared them in this life: they are not offered for a load that cannot fail.
    assert!(!engine.session.lookup(&keys(0..4)).complete);
    drop(held);
    assert_eq!(engine.load(&keys(0..4), 8), (4, 0));
    assert!((0..4u8).all(|block| engine.has(8 + u32::from(block), 90 + block)));
    engine.save(&keys(20..21), &[0]);
    let mut new = Engine::start(&daemon, "b", "m");
    assert_eq!(new.load(&keys(0..4), 8), (4, 0));
}

#[test]
fn what_was_damaged_between_two_lives_is_not_served() {
    let daemon = Daemon::new(2);
    let engine = Engine::start(&daemon, "a", "m");
    engine.save(&keys(0..3), &[0, 1, 2]);
    let slot = engine.session.lookup(&keys(0..3)).lease.slots()[1].slot;
    let at = engine.segment.geometry().shard_offset(slot, 0).unwrap();
    drop(engine);
    let directory = daemon.kill();
    flip_byte(&directory.path().join("kvtide-pool-test/memory"), at + 5);
    let daemon = Daemon::on(directory, 2);
    let mut engine = Engine::start(&daemon, "a", "m");
    assert_eq!(engine.load(&keys(0..3), 8), (3, 1));
}

#[test]
fn memory_of_another_size_begins_anew() {
    let daemon = Daemon::new(2);
    let engine = Engine::start(&daemon, "a", "m");
    engine.save(&keys(0..3), &[0, 1, 2]);
    drop(engine);
    let directory = daemon.kill();
    let daemon = Daemon::on(directory, 3);
    assert_eq!(daemon.free_extents(), 3);
    let engine = Engine::start(&daemon, "a", "m");
    assert!(engine.session.lookup(&keys(0..3)).lease.is_empty());
}

impl Engine {
    /// Hands out a slot for the engine's `block`, under a key from `first` on: one for which a loaded
    /// machine answers too late is not asked again.
    fn begin_new(&self, first: u32, block: u32) -> (u32, SavePlan) {
        let mut key = first;
        until("a place to save", || {
            key += 1;
            let plan = self.session.begin_save(&keys(key..key + 1), 0, &[block]);
            (plan.job != 0).then_some((key, plan))
        })
    }

    /// As the engine's worker does when it hears that its scheduler has other memory.
    fn follow(&mut self, daemon: &Daemon, engine_id: &str) {
        let options = attach_options(daemon, engine_id, "m");
        let place = Attachment::new(options, Holder::Worker(0)).expect("the new memory");
        self.segment = Arc::clone(place.segment());
        let registration = self
            .worker
            .registration()
            .over(Arc::clone(&self.segment), 0);
        let device = device(registration.expect("geometry"));
        self.worker = Worker::start(device, engine_id).expect("threads");
        self.session.admit(true);
    }
}

#[test]
fn an_engine_goes_over_to_memory_made_anew_when_nothing_of_the_last_is_in_use() {
    let daemon = Daemon::new(2);
    let mut engine = Engine::start(&daemon, "a", "m");
    engine.compute(0, 7);
    let (saved, plan) = engine.begin_new(0, 0);
    engine.copy(plan);
    let held = engine.session.lookup(&keys(saved..saved + 1)).lease;
    assert_eq!(held.len(), 1);
    let (_, saving) = engine.begin_new(10_000, 1);
    let directory = daemon.kill();
    let daemon = Daemon::on(directory, 3);
    until("the new memory is found", || {
        let _ = engine.session.poll();
        engine.session.has_new_memory().then_some(())
    });
    assert!(
        engine
            .session
            .lookup(&keys(saved..saved + 1))
            .lease
            .is_empty()
    );
    assert!(engine.session.change_memory().is_none(), "a lease is held");
    drop(held);
    assert!(
        engine.session.change_memory().is_none(),
        "a save is in flight"
    );
    engine.copy(saving);
    let segment = engine.session.change_memory().expect("nothing is in use");
    assert!(!segment.has_all_workers());
    assert!(!engine.session.is_usable());
    assert_eq!(engine.session.begin_save(&keys(0..1), 0, &[0]).covered, 0);
    engine.follow(&daemon, "a");
    assert!(segment.has_all_workers() && engine.session.is_usable());
    let found = engine.session.lookup(&keys(saved..saved + 1));
    assert!(found.lease.is_empty(), "it is empty");
    let (saved, plan) = engine.begin_new(0, 0);
    engine.copy(plan);
    assert_eq!(engine.load(&keys(saved..saved + 1), 8), (1, 0));
    assert!(engine.has(8, 7));
}

#[test]
fn a_session_that_came_before_its_daemon_attaches_when_there_is_one() {
    let directory = Arc::new(tempfile::tempdir_in("/dev/shm").expect("a directory"));
    let mut options = attach_options_at(&directory.path().join("socket"), "a", "m");
    options.timeout = Duration::ZERO;
    let session = Session::waiting(options, LIMIT);
    assert!(session.lookup(&keys(0..1)).lease.is_empty() && !session.is_usable());
    assert_eq!(session.begin_save(&keys(0..1), 0, &[0]).covered, 0);
    assert!(session.clear() || !session.is_usable());
    let daemon = Daemon::on(directory, 2);
    until("it is attached", || {
        session
            .has_new_memory()
            .then(|| session.change_memory())
            .flatten()
    });
    let place = Attachment::new(attach_options(&daemon, "a", "m"), Holder::Worker(0));
    assert!(place.expect("the same engine").segment().has_all_workers());
    session.admit(true);
    until("the reset of before is done", || {
        let _ = session.poll();
        session.is_usable().then_some(())
    });
    assert_eq!(daemon.node.report().engines.len(), 1);
}

#[test]
fn memory_has_no_name_before_all_of_it_is_there() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let made = options(directory.path(), 2);
    let own = directory.path().join("kvtide-pool-test");
    let seen = std::cell::RefCell::new(Vec::new());
    let node = Node::open(made, &|done, total| {
        let memory_is_named = own.join("memory").exists();
        seen.borrow_mut().push((done, total, memory_is_named));
    });
    assert_eq!(seen.into_inner(), [(2 * EXTENT, 2 * EXTENT, false)]);
    assert!(own.join("memory").exists());
    drop(node);
    let impossible = NodeOptions {
        capacity_bytes: 1 << 50,
        ..options(directory.path(), 1)
    };
    let error = Node::open(impossible, &|_, _| {}).err().unwrap();
    assert!(matches!(error, NodeError::NoRoom { .. }), "{error}");
    let left: Vec<_> = std::fs::read_dir(&own).unwrap().collect();
    assert_eq!(left.len(), 1, "the lock: {left:?}");
}

#[test]
fn memory_goes_from_a_model_that_is_out_of_use_to_one_that_needs_it() {
    let daemon = Daemon::new(3);
    let first = Engine::start(&daemon, "a", "m");
    let rows = u32::try_from(EXTENT / 4096 * 3).unwrap();
    // A row that reaches into the next extent is none.
    for chain in 0..rows - 4 {
        first.save(&keys(chain..chain + 1), &[0]);
    }
    assert_eq!(daemon.free_extents(), 0);
    let second = Engine::start(&daemon, "b", "another");
    assert_eq!(second.begin(&keys(0..1), &[0]).covered, 1);
    let report = daemon.node.report();
    let extents = |model: &str| {
        report
            .models
            .iter()
            .find(|m| m.model == model)
            .unwrap()
            .extents
    };
    assert_eq!((extents("m"), extents("another")), (2, 1));
    let held = report.models.iter().map(|m| m.gauges.held).max().unwrap();
    let left = (0..rows - 4)
        .filter(|&n| first.session.holds(common::key(n), false))
        .count();
    assert_eq!(left, held);
}

#[test]
fn a_reset_is_done_when_it_returns_however_late_the_daemon_is() {
    let daemon = Daemon::new(2);
    let first = Engine::start(&daemon, "a", "m");
    let second = Engine::start(&daemon, "b", "m");
    first.save(&keys(0..3), &[0, 1, 2]);
    assert!(first.session.clear());
    assert!(first.session.lookup(&keys(0..3)).lease.is_empty());
    until("everybody's are gone", || {
        second
            .session
            .lookup(&keys(0..3))
            .lease
            .is_empty()
            .then_some(())
    });
    until("it may look again", || {
        let plan = first.session.begin_save(&keys(5..6), 0, &[0]);
        (plan.covered == 1 || first.session.holds(common::key(5), false)).then_some(())
    });
}

#[test]
fn what_was_matched_before_a_reset_is_not_matched_after_it_however_late_the_daemon_is() {
    let daemon = Daemon::new(2);
    let engine = Engine::start(&daemon, "a", "m");
    let root = Namespace::default().root(&kvtide_model::Scope::default());
    let mut request = kvtide_engine::Sequence::new(root, 4, vec![]);
    request.extend(&(0..12).collect::<Vec<u32>>());
    engine.save(request.keys(), &[0, 1, 2]);
    assert_eq!(request.match_blocks(&engine.session, 0, 3, false).blocks, 3);
    // The daemon is gone, and its word with it.
    let directory = daemon.kill();
    // Whether it has noticed already or not.
    let _ = engine.session.clear();
    assert_eq!(request.match_blocks(&engine.session, 0, 3, false).blocks, 0);
    let daemon = Daemon::on(directory, 2);
    until("the next daemon has heard of it", || {
        let _ = engine.session.poll();
        (daemon.node.report().models[0].gauges.held == 0).then_some(())
    });
    let said = engine.session.take_notices();
    assert!(
        said[0].contains("is lost") && said[1].contains("attached"),
        "{said:?}"
    );
}

#[test]
fn a_save_that_its_engine_never_heard_of_hides_no_other_and_ends() {
    let daemon = Daemon::new(2);
    let engine = Engine::start(&daemon, "a", "m");
    let never_begun = engine.begin(&keys(100..102), &[0, 1]);
    assert_eq!(never_begun.moves.len(), 2);
    let plan = engine.begin(&keys(0..2), &[2, 3]);
    engine.worker.save_now(vec![SaveJob {
        job: plan.job,
        moves: plan.moves,
    }]);
    engine.worker.finish_saves(&[plan.job]).expect("saved");
    until("the others are held", || {
        let pool = daemon.node.report().models[0].gauges;
        (pool.saving == 2 && pool.held == 4).then_some(())
    });
    let deadline = Instant::now() + Duration::from_secs(30);
    while daemon.node.report().models[0].gauges.saving > 0 {
        assert!(Instant::now() < deadline, "it is waited for without an end");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(engine.session.lookup(&keys(100..102)).lease.is_empty());
    assert_eq!(engine.session.lookup(&keys(0..2)).lease.len(), 2);
}

#[test]
fn counters_of_a_pool_begin_with_the_engine_and_never_fall() {
    let daemon = Daemon::new(2);
    let first = Engine::start(&daemon, "a", "m");
    first.save(&keys(0..3), &[0, 1, 2]);
    let second = Engine::start(&daemon, "b", "m");
    let saved = |engine: &Engine| {
        let _ = engine.session.poll();
        engine.session.counters().saved_blocks
    };
    until("it has heard of the pool", || {
        let _ = second.session.poll();
        (second.session.gauges().held == 3).then_some(())
    });
    assert_eq!(
        saved(&second),
        0,
        "what was before it is nothing of its own"
    );
    first.save(&keys(10..12), &[0, 1]);
    until("it counts what is saved now", || {
        (saved(&second) == 2).then_some(())
    });
    let daemon = Daemon::on(daemon.kill(), 2);
    first.save(&keys(20..21), &[0]);
    until("it counts on with the next daemon", || {
        (saved(&second) >= 2 && second.session.gauges().held == 6).then_some(())
    });
    drop(daemon);
}

#[test]
fn an_engine_that_comes_while_the_daemon_is_about_to_end_waits_for_the_next() {
    let daemon = Daemon::new(1);
    daemon.node.close(Instant::now());
    let mut options = attach_options(&daemon, "a", "m");
    options.timeout = Duration::from_millis(300);
    let error = Attachment::new(options, Holder::Worker(0)).err().unwrap();
    assert!(matches!(error, AttachError::Busy { .. }), "{error}");
}

#[test]
fn an_engine_id_is_one_engines() {
    let daemon = Daemon::new(2);
    let _first = Engine::start(&daemon, "same", "m");
    let error = Engine::try_start(&daemon, "same", "m").err().unwrap();
    assert!(error.to_string().contains("engine_id"), "{error}");
    let error = Engine::try_start(&daemon, "same", "other").err().unwrap();
    assert!(matches!(error, AttachError::Refused { .. }), "{error}");
    drop(_first);
    until("it may be used again", || {
        Engine::try_start(&daemon, "same", "m").ok()
    });
}

#[test]
fn a_memory_is_one_daemons() {
    let daemon = Daemon::new(1);
    let second = Node::open(options(daemon.directory.path(), 1), &|_, _| {});
    assert!(matches!(second, Err(NodeError::InUse { .. })));
}

#[test]
fn without_a_daemon_the_error_says_what_to_do() {
    let daemon = Daemon::new(1);
    let mut options = attach_options(&daemon, "a", "m");
    options.socket = "/no/such/socket".into();
    options.timeout = Duration::from_millis(50);
    let error = Attachment::new(options, Holder::Worker(0)).err().unwrap();
    assert!(error.to_string().contains("start kvtide serve"), "{error}");
}

/// Blocks that fill more than all extents of a small node.
const MANY: u32 = 60;

fn quotas(quotas: &[(&str, usize)]) -> Limits {
    let quota = |&(tenant, extents): &(&str, usize)| (tenant.to_owned(), (extents * EXTENT) as u64);
    Limits {
        quotas: quotas.iter().map(quota).collect(),
        ..Limits::default()
    }
}

#[test]
fn a_tenant_fills_its_quota_and_nothing_beyond_and_goes_on_with_its_latest_blocks() {
    let daemon = Daemon::limited(6, quotas(&[("acme", 2)]));
    let acme = Engine::of_tenant(&daemon, "acme", "m");
    let other = Engine::of_tenant(&daemon, "other", "m");
    acme.save_many(&keys(0..MANY));
    other.save_many(&keys(0..MANY));
    assert_eq!(
        (daemon.extents_of("acme"), daemon.extents_of("other")),
        (2, 4)
    );
    assert!(acme.session.holds(common::key(MANY - 1), false));
    assert!(!acme.session.holds(common::key(0), false), "it is evicted");
    let report = daemon.node.report();
    let [acme, other] = &report.tenants[..] else {
        panic!("{:?}", report.tenants);
    };
    assert_eq!(
        (acme.tenant.as_str(), acme.quota_bytes),
        ("acme", Some(2 * EXTENT as u64))
    );
    assert_eq!(
        (acme.bytes, other.bytes),
        (2 * EXTENT as u64, 4 * EXTENT as u64)
    );
    assert!(acme.denied.quota > 0 && acme.denied.capacity == 0);
    assert_eq!((other.quota_bytes, other.denied.quota), (None, 0));
    assert!(acme.held_blocks > 0);
}

#[test]
fn a_quota_is_that_of_all_models_of_a_tenant_together() {
    let daemon = Daemon::limited(6, quotas(&[("acme", 2)]));
    let first = Engine::of_tenant(&daemon, "acme", "m");
    let second = Engine::of_tenant(&daemon, "acme", "n");
    first.save_many(&keys(0..MANY));
    // Nothing of the other tenants', but one of its own.
    second.save_many(&keys(0..MANY));
    assert_eq!((daemon.extents_of("acme"), daemon.free_extents()), (2, 4));
    let models = daemon.node.report().models;
    assert!(models.iter().all(|model| model.extents == 1), "{models:?}");
}

#[test]
fn tenants_find_nothing_of_each_other_and_a_reset_of_one_clears_its_own_alone() {
    let daemon = Daemon::new(4);
    let a = Engine::of_tenant(&daemon, "a", "m");
    let b = Engine::of_tenant(&daemon, "b", "m");
    a.save(&keys(0..2), &[0, 1]);
    assert!(b.session.lookup(&keys(0..2)).lease.is_empty());
    b.save(&keys(0..2), &[0, 1]);
    assert!(a.session.clear());
    assert_eq!(b.session.lookup(&keys(0..2)).lease.len(), 2);
}

#[test]
fn what_a_tenant_has_is_purged_by_its_name() {
    let daemon = Daemon::new(4);
    let engines = [("a", "m"), ("a", "n"), ("b", "m")].map(|(tenant, model)| {
        let engine = Engine::of_tenant(&daemon, tenant, model);
        engine.save(&keys(0..2), &[0, 1]);
        engine
    });
    let purged = daemon.node.purge(&Which::Tenant("a".into())).unwrap();
    assert_eq!(purged.blocks, 4);
    let left = engines.map(|engine| engine.session.lookup(&keys(0..2)).lease.len());
    assert_eq!(left, [0, 0, 2]);
    assert!(daemon.node.purge(&Which::Tenant("nobody".into())).is_none());
}

#[test]
fn a_model_below_its_minimum_gets_what_others_use_and_keeps_it() {
    let minimums = [("small".to_owned(), 2 * EXTENT as u64)].into();
    let limits = Limits {
        minimums,
        ..Limits::default()
    };
    let daemon = Daemon::limited(4, limits);
    let large = Engine::start(&daemon, "l", "large");
    large.save_many(&keys(0..MANY));
    assert_eq!(daemon.free_extents(), 0);
    let small = Engine::start(&daemon, "s", "small");
    small.save_many(&keys(0..MANY));
    let extents = |model: &str| {
        let models = daemon.node.report().models;
        models.iter().find(|m| m.model == model).unwrap().extents
    };
    assert_eq!((extents("large"), extents("small")), (2, 2));
    large.save_many(&keys(MANY..2 * MANY));
    assert_eq!((extents("large"), extents("small")), (2, 2));
}

#[test]
fn a_quota_that_is_lowered_is_kept_by_the_next_life() {
    let daemon = Daemon::limited(4, quotas(&[("acme", 4)]));
    let acme = Engine::of_tenant(&daemon, "acme", "m");
    acme.save_many(&keys(0..MANY));
    assert_eq!(daemon.extents_of("acme"), 4);
    drop(acme);
    let directory = daemon.kill();
    let options = NodeOptions {
        limits: quotas(&[("acme", 1)]),
        ..options(directory.path(), 4)
    };
    let daemon = Daemon::with(directory, &options);
    until("it has what it may have", || {
        (daemon.extents_of("acme") == 1).then_some(())
    });
    assert!(daemon.node.report().models[0].gauges.held > 0);
}

#[test]
fn a_pool_that_holds_nothing_is_closed_when_its_last_engine_has_gone() {
    let daemon = Daemon::new(4);
    let used = Engine::start(&daemon, "a", "used");
    used.save(&keys(0..2), &[0, 1]);
    let cleared = Engine::start(&daemon, "b", "cleared");
    cleared.save(&keys(0..2), &[0, 1]);
    let _unused = Engine::start(&daemon, "c", "unused");
    assert!(cleared.session.clear());
    drop((used, cleared));
    let models = until("it is closed", || {
        let models = daemon.node.report().models;
        let names: Vec<_> = models.into_iter().map(|model| model.model).collect();
        (names.len() < 3).then_some(names)
    });
    assert_eq!(
        models,
        ["used", "unused"],
        "one has blocks, one has an engine"
    );
    assert_eq!(daemon.free_extents(), 3);
    let files = std::fs::read_dir(daemon.directory.path().join("kvtide-pool-test")).unwrap();
    let tables = files.filter(|file| file.as_ref().unwrap().file_name().len() == 32);
    assert_eq!(tables.count(), 2);
}

#[test]
fn an_operators_pin_holds_over_lives_until_its_time() {
    let daemon = Daemon::new(1);
    let engine = Engine::start(&daemon, "a", "m");
    engine.save(&keys(0..3), &[0, 1, 2]);
    let until_unix_s = 4_000_000_000;
    let pinned = daemon
        .node
        .pin(namespace("m"), until_unix_s)
        .unwrap()
        .unwrap();
    assert_eq!((pinned.blocks, pinned.earlier_unix_s), (3, 0));
    assert!(
        daemon
            .node
            .pin(namespace("n"), until_unix_s)
            .unwrap()
            .is_none()
    );
    drop(engine);
    let daemon = Daemon::on(daemon.kill(), 1);
    let models = daemon.node.report().models;
    assert_eq!(models[0].pinned_until_unix_s, Some(until_unix_s));
    let engine = Engine::start(&daemon, "b", "m");
    // What fits is saved, and nothing given up for the rest.
    for chain in 10..10 + MANY {
        let plan = engine.session.begin_save(&keys(chain..chain + 1), 0, &[0]);
        engine.copy(plan);
    }
    assert!((0..3).all(|n| engine.session.holds(common::key(n), false)));
    let unpinned = daemon.node.pin(namespace("m"), 0).unwrap().unwrap();
    assert_eq!(unpinned.earlier_unix_s, until_unix_s);
    assert_eq!(daemon.node.report().models[0].pinned_until_unix_s, None);
}

#[test]
fn one_scrub_goes_through_all_pools() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let options = NodeOptions {
        scrub_bytes_per_second: 4 << 20,
        ..options(directory.path(), 4)
    };
    let daemon = Daemon::with(Arc::new(directory), &options);
    let engines = ["m", "n", "o"].map(|model| {
        let engine = Engine::start(&daemon, model, model);
        engine.save(&keys(0..3), &[0, 1, 2]);
        engine
    });
    until("every block was looked at", || {
        let models = daemon.node.report().models;
        let all = models.iter().all(|m| m.counters.scrubbed_blocks >= 3);
        all.then_some(())
    });
    let slot = engines[1].session.lookup(&keys(0..3)).lease.slots()[1].slot;
    let at = engines[1].segment.geometry().shard_offset(slot, 0).unwrap();
    flip_byte(
        &daemon.directory.path().join("kvtide-pool-test/memory"),
        at + 5,
    );
    until("the damage is found", || {
        let models = daemon.node.report().models;
        let damaged = models.iter().map(|m| m.counters.damaged_blocks);
        (damaged.sum::<u64>() == 1).then_some(())
    });
}
