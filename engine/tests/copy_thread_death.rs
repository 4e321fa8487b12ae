//! A copy thread that panics leaves nobody waiting: not for what it was doing, nor for what was
//! queued behind that.

mod common;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Node, keys};
use kvtide_engine::{Eviction, SaveJob, Worker};
use kvtide_kernels::copy::{
    Batch, CopyBackend, CopyError, Device, Direction, HostDevice, LayeredLoad, Mark, Registration,
    RowMove,
};
use kvtide_kernels::cuda::ComputeStream;
use kvtide_model::BlockMove;
use kvtide_segment::LoadEnd;

/// A device whose backends panic as soon as they copy, after a while in which others queue up.
#[derive(Debug)]
struct Faulty(HostDevice);

struct FaultyBackend;

impl CopyBackend for FaultyBackend {
    fn begin(&mut self, _batch: &Batch<'_>) -> Result<(), CopyError> {
        std::thread::sleep(Duration::from_millis(50));
        panic!("a fault on purpose");
    }

    fn wait_for(&mut self, _mark: &Mark) -> Result<(), CopyError> {
        Ok(())
    }

    fn copy(&mut self, _layers: Range<usize>) -> Result<(), CopyError> {
        Ok(())
    }

    fn close(&mut self) -> Result<Mark, CopyError> {
        Ok(Mark::passed())
    }

    fn finish(&mut self) -> Result<Vec<u64>, CopyError> {
        Ok(Vec::new())
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty")
    }
}

impl Device for Faulty {
    fn registration(&self) -> &Arc<Registration> {
        self.0.registration()
    }

    fn over(&self, registration: Registration) -> Result<Arc<dyn Device>, CopyError> {
        self.0.over(registration)
    }

    fn backend(&self, _direction: Direction) -> Result<Box<dyn CopyBackend>, CopyError> {
        Ok(Box::new(FaultyBackend))
    }

    fn mark(&self, stream: ComputeStream) -> Result<Mark, CopyError> {
        self.0.mark(stream)
    }

    fn hold_back(&self, stream: ComputeStream, mark: &Mark) -> Result<(), CopyError> {
        self.0.hold_back(stream, mark)
    }

    fn begin_layered(
        &self,
        _moves: &[RowMove],
        _begin: &Mark,
    ) -> Option<Result<Box<dyn LayeredLoad>, CopyError>> {
        None
    }

    fn slice_blocks(&self) -> usize {
        self.0.slice_blocks()
    }
}

/// A pool with one sealed block, and a worker over the same segment whose threads will die.
fn faulty(node: &mut Node) -> (Worker, BlockMove) {
    node.compute(0, 10);
    let plan = node.save(&keys(0..1), &[0]);
    let registration = node.caches[0]
        .register(Arc::clone(&node.segment), 0)
        .expect("registration");
    let device = Faulty(HostDevice::new(Arc::new(registration)));
    let worker = Worker::start(Arc::new(device), "faulty").expect("threads");
    (worker, plan.moves[0])
}

#[test]
fn saves_behind_a_panic_have_failed_and_nobody_waits_for_them() {
    let mut node = Node::new(8, 1, Eviction::Lru);
    let (worker, _) = faulty(&mut node);
    let mut jobs = Vec::new();
    for i in 1..4 {
        let plan = node.session.begin_save(&keys(i..i + 1), 0, &[i]);
        jobs.push(plan.job);
        worker.save_now(vec![SaveJob {
            job: plan.job,
            moves: plan.moves,
        }]);
    }
    let (ended, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        worker.finish_saves(&jobs).expect("they end");
        let _ = ended.send(()); // Nobody listens if it was too late.
    });
    let waited = told.recv_timeout(Duration::from_secs(10));
    assert!(waited.is_ok(), "a save behind a panic is waited for");
    assert!(
        node.session.drain(Duration::from_secs(10)),
        "slots are free again"
    );
    assert_eq!(node.session.lookup(&keys(1..2)).lease.len(), 0);
}

#[test]
fn loads_behind_a_panic_have_failed_and_a_layered_one_tells_so() {
    let mut node = Node::new(8, 1, Eviction::Lru);
    let (mut worker, step) = faulty(&mut node);
    for job in 1..4 {
        worker.load_async(job, u32::try_from(job).unwrap(), vec![step], true);
    }
    worker.load_layered(4, vec![step], true);
    assert!(worker.wait_layer(0).is_err());
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut ended = Vec::new();
    while ended.len() < 4 {
        assert!(
            Instant::now() < deadline,
            "only {} loads ended",
            ended.len()
        );
        ended.extend(worker.take_loads());
    }
    assert!(ended.iter().all(|(_, outcome)| outcome.failed == [0]));
    for job in 1..4 {
        let told = node.segment.load_end(u32::try_from(job).unwrap(), 0, job);
        assert_eq!(told, Some(LoadEnd::Failed), "job {job}");
    }
}
