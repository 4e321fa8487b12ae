//! A cancelled load copies no more than what is on the device, and is over only when that is.

mod common;

use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Node, keys, moves};
use kvtide_engine::{Eviction, LoadOutcome, Worker};
use kvtide_kernels::copy::{
    Batch, CopyBackend, CopyError, Device, Direction, HostDevice, LayeredLoad, Mark, Registration,
    RowMove,
};
use kvtide_kernels::cuda::ComputeStream;
use kvtide_model::BlockMove;
use kvtide_segment::LoadEnd;

const LIMIT: Duration = Duration::from_secs(20);

/// Host memory whose loads copy a block at a time, each when the test lets it.
#[derive(Debug)]
struct Gated {
    host: HostDevice,
    begun: Mutex<Sender<()>>,
    gate: Arc<Mutex<Receiver<()>>>,
}

struct GatedBackend {
    host: Box<dyn CopyBackend>,
    begun: Sender<()>,
    gate: Arc<Mutex<Receiver<()>>>,
}

impl CopyBackend for GatedBackend {
    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), CopyError> {
        self.host.begin(batch)
    }

    fn wait_for(&mut self, mark: &Mark) -> Result<(), CopyError> {
        self.host.wait_for(mark)
    }

    fn copy(&mut self, layers: Range<usize>) -> Result<(), CopyError> {
        let _ = self.begun.send(()); // The test may have ended.
        let _ = self.gate.lock().expect("gate").recv_timeout(LIMIT);
        self.host.copy(layers)
    }

    fn close(&mut self) -> Result<Mark, CopyError> {
        self.host.close()
    }

    fn finish(&mut self) -> Result<Vec<u64>, CopyError> {
        self.host.finish()
    }
}

impl fmt::Display for Gated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gated")
    }
}

impl Device for Gated {
    fn registration(&self) -> &Arc<Registration> {
        self.host.registration()
    }

    fn over(&self, registration: Registration) -> Result<Arc<dyn Device>, CopyError> {
        self.host.over(registration)
    }

    fn backend(&self, direction: Direction) -> Result<Box<dyn CopyBackend>, CopyError> {
        let host = self.host.backend(direction)?;
        Ok(match direction {
            Direction::Save => host,
            Direction::Load => Box::new(GatedBackend {
                host,
                begun: self.begun.lock().expect("sender").clone(),
                gate: Arc::clone(&self.gate),
            }),
        })
    }

    fn mark(&self, stream: ComputeStream) -> Result<Mark, CopyError> {
        self.host.mark(stream)
    }

    fn hold_back(&self, stream: ComputeStream, mark: &Mark) -> Result<(), CopyError> {
        self.host.hold_back(stream, mark)
    }

    fn begin_layered(
        &self,
        _moves: &[RowMove],
        _begin: &Mark,
    ) -> Option<Result<Box<dyn LayeredLoad>, CopyError>> {
        None
    }

    fn slice_blocks(&self) -> usize {
        1
    }
}

struct Rig {
    node: Node,
    worker: Worker,
    /// One for each block whose copy has begun.
    begun: Receiver<()>,
    gate: Sender<()>,
    moves: Vec<BlockMove>,
}

/// Four saved blocks, and a worker that loads them into blocks 8 to 11 when it is let.
fn rig() -> Rig {
    let node = Node::new(8, 1, Eviction::Lru);
    (0..4u8).for_each(|i| node.compute(i.into(), 10 + i));
    node.save(&keys(0..4), &[0, 1, 2, 3]);
    let found = node.session.lookup(&keys(0..4));
    let moves = moves(found.lease.slots(), 8..12);
    let registration = node.caches[0]
        .register(Arc::clone(&node.segment), 0)
        .expect("registration");
    let ((begin, begun), (gate, opened)) = (channel(), channel());
    let device = Gated {
        host: HostDevice::new(Arc::new(registration)),
        begun: Mutex::new(begin),
        gate: Arc::new(Mutex::new(opened)),
    };
    Rig {
        node,
        worker: Worker::start(Arc::new(device), "gated").expect("threads"),
        begun,
        gate,
        moves,
    }
}

/// How loads 1 to `count` ended.
fn wait_for_ends(worker: &mut Worker, count: usize) -> Vec<LoadOutcome> {
    let deadline = Instant::now() + LIMIT;
    let mut ended = Vec::new();
    while ended.len() < count {
        assert!(Instant::now() < deadline, "loads do not end");
        ended.extend(worker.take_loads());
        std::thread::yield_now();
    }
    ended.sort_by_key(|(job, _)| *job);
    ended.into_iter().map(|(_, outcome)| outcome).collect()
}

#[test]
fn a_cancelled_load_is_over_when_what_is_on_the_device_is_and_copies_no_more() {
    let mut rig = rig();
    rig.worker.load_async(1, 5, rig.moves.clone(), false);
    rig.begun.recv_timeout(LIMIT).expect("a copy begins");
    assert!(rig.worker.cancel_load(1), "its first block is being copied");
    assert!(rig.worker.take_loads().is_empty());
    assert_eq!(rig.node.segment.load_end(5, 0, 1), None);
    rig.gate.send(()).expect("the thread waits");
    assert_eq!(wait_for_ends(&mut rig.worker, 1)[0].failed, [1, 2, 3]);
    assert_eq!(rig.node.segment.load_end(5, 0, 1), Some(LoadEnd::Failed));
    assert!(rig.begun.try_recv().is_err(), "no other block was copied");
    assert!(!rig.worker.cancel_load(1), "its end was taken");
}

#[test]
fn a_load_behind_a_cancelled_one_gets_its_turn() {
    let mut rig = rig();
    rig.worker.load_async(1, 5, rig.moves.clone(), false);
    rig.begun.recv_timeout(LIMIT).expect("a copy begins");
    rig.worker.load_async(2, 6, rig.moves[..1].to_vec(), false);
    assert!(rig.worker.cancel_load(1));
    (0..2).for_each(|_| rig.gate.send(()).expect("the thread waits"));
    let ends = wait_for_ends(&mut rig.worker, 2);
    assert_eq!(ends[0].failed, [1, 2, 3]);
    assert!(ends[1].failed.is_empty());
}

#[test]
fn a_load_that_never_came_is_not_waited_for() {
    let rig = rig();
    assert!(!rig.worker.cancel_load(7));
}
