//! The thread that copies blocks of the pool into the engine's KV cache.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use kvtide_kernels::copy::{
    Batch, CopyBackend, CopyError, Device, Direction, Mark, Registration, RowMove,
};
use kvtide_segment::LoadEnd;

use super::outcome::{LoadOutcome, Progress};
use super::step::Layers;
use super::turns::Turns;
use super::{Counters, Loads};

/// Loads that may wait, of each kind. The scheduler has fewer async loads than this at once, and a
/// step has one layered load.
const QUEUED_LOADS_MAX: usize = 4096;
/// Slices that are on the device at once: while the end of one is waited for, the next is copied.
const SLICES_IN_FLIGHT: usize = 2;

/// A load on its way through the thread. Whatever becomes of it, also when the thread ends early, it
/// has ended when it is dropped, so that nobody waits for it.
#[derive(Debug)]
struct Load {
    job: u64,
    /// None once it has ended.
    progress: Option<Progress>,
    how: How,
    loads: Arc<Loads>,
    registration: Arc<Registration>,
}

impl Load {
    fn moves(&self) -> &[RowMove] {
        self.progress.as_ref().map_or(&[], Progress::moves)
    }

    /// Ends the load.
    fn end(mut self, outcome: impl FnOnce(Progress, &Registration) -> LoadOutcome) {
        if let Some(progress) = self.progress.take() {
            let outcome = outcome(progress, &self.registration);
            self.tell(outcome);
        }
    }

    fn tell(&self, outcome: LoadOutcome) {
        let end = if outcome.failed.is_empty() {
            LoadEnd::Whole
        } else {
            LoadEnd::Failed
        };
        if let How::Async { place, .. } = self.how {
            let (segment, rank) = (self.registration.segment(), self.registration.rank());
            segment.tell_load_end(place, rank, self.job, end);
        }
        self.loads.complete(self.job, outcome);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(progress) = self.progress.take() {
            self.tell(progress.into_failure());
        }
        if let How::Layered(layers) = &self.how {
            layers.abort(); // Layers that are done by now stay so.
        }
    }
}

#[derive(Debug)]
enum How {
    /// Told of every layer.
    Layered(Arc<Layers>),
    /// Beside the steps, when what the engine did with the blocks before is done.
    Async {
        /// `None` if that cannot be known: then nothing is copied.
        begin: Option<Arc<Mark>>,
        /// Of the segment's board.
        place: u32,
    },
}

/// Runs loads; ends when dropped, after what was accepted.
#[derive(Debug)]
pub(super) struct LoadThread {
    queues: Option<Queues>,
    thread: Option<JoinHandle<()>>,
    loads: Arc<Loads>,
    registration: Arc<Registration>,
}

#[derive(Debug)]
struct Queues {
    layered: SyncSender<Load>,
    beside: SyncSender<Load>,
    /// Wakes the thread; one token stands for any number of loads.
    wake: SyncSender<()>,
}

impl LoadThread {
    pub(super) fn start(
        name: String,
        device: Arc<dyn Device>,
        loads: Arc<Loads>,
        counters: Arc<Counters>,
    ) -> Result<Self, super::StartError> {
        let (layered, layered_loads) = sync_channel(QUEUED_LOADS_MAX);
        let (beside, beside_loads) = sync_channel(QUEUED_LOADS_MAX);
        let (wake, woken) = sync_channel(1);
        let backends: Result<Vec<_>, CopyError> = (0..SLICES_IN_FLIGHT)
            .map(|_| device.backend(Direction::Load))
            .collect();
        let runner = Runner {
            in_flight: VecDeque::new(),
            idle: backends?,
            active: HashMap::new(),
            turns: Turns::default(),
            device: Arc::clone(&device),
            counters,
        };
        let work = move || runner.run(&layered_loads, &beside_loads, &woken);
        let thread: io::Result<_> = std::thread::Builder::new().name(name).spawn(work);
        let queues = Some(Queues {
            layered,
            beside,
            wake,
        });
        Ok(Self {
            queues,
            thread: Some(thread?),
            loads,
            registration: Arc::clone(device.registration()),
        })
    }

    /// Loads layer by layer, telling `layers`.
    pub(super) fn load_layered(&self, job: u64, progress: Progress, layers: Arc<Layers>) {
        self.send(job, progress, How::Layered(layers), |queues| {
            &queues.layered
        });
    }

    /// Loads beside the steps, behind `begin`, without which the load has failed; how it ended is
    /// told at `place` of the board too.
    pub(super) fn load_async(
        &self,
        job: u64,
        place: u32,
        progress: Progress,
        begin: Option<Arc<Mark>>,
    ) {
        let how = How::Async { begin, place };
        self.send(job, progress, how, |queues| &queues.beside);
    }

    /// Queues a load; without room for it, it is dropped, and so has failed.
    fn send(
        &self,
        job: u64,
        progress: Progress,
        how: How,
        queue: fn(&Queues) -> &SyncSender<Load>,
    ) {
        let load = Load {
            job,
            progress: Some(progress),
            how,
            loads: Arc::clone(&self.loads),
            registration: Arc::clone(&self.registration),
        };
        let Some(queues) = &self.queues else {
            return;
        };
        if let How::Async { begin: None, .. } = load.how {
            return;
        }
        if queue(queues).try_send(load).is_ok() {
            // A full channel holds a token already.
            let _ = queues.wake.try_send(());
        }
    }
}

impl Drop for LoadThread {
    fn drop(&mut self) {
        drop(self.queues.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // A panic has been printed; shutdown goes on.
        }
    }
}

/// An async load that has begun.
struct Active {
    load: Load,
    /// The first of the load's moves that is in no slice yet.
    next: usize,
    /// Slices on the device.
    slices: usize,
}

/// Some moves of a load, on the device.
struct Slice {
    job: u64,
    places: Range<usize>,
    backend: Box<dyn CopyBackend>,
    begun: Result<(), CopyError>,
}

/// Fields are dropped in this order: backends wait for what they have started before a load that was
/// not ended is reported as failed, and its blocks are used again.
struct Runner {
    in_flight: VecDeque<Slice>,
    /// Backends that no slice uses.
    idle: Vec<Box<dyn CopyBackend>>,
    active: HashMap<u64, Active>,
    turns: Turns,
    device: Arc<dyn Device>,
    counters: Arc<Counters>,
}

impl Runner {
    fn run(mut self, layered: &Receiver<Load>, beside: &Receiver<Load>, woken: &Receiver<()>) {
        let mut open = true;
        loop {
            self.run_layered(layered);
            while self.active.len() < QUEUED_LOADS_MAX {
                match beside.try_recv() {
                    Ok(load) => self.accept(load),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        open = false;
                        break;
                    }
                }
            }
            if !self.idle.is_empty()
                && let Some(job) = self.turns.next(self.device.slice_blocks())
            {
                self.begin_slice(job);
            } else if let Some(slice) = self.in_flight.pop_front() {
                self.end_slice(slice);
            } else if open {
                // Failing means that the queues are closed: the next round ends.
                let _ = woken.recv();
            } else {
                return self.run_layered(layered);
            }
        }
    }

    /// Runs all layered loads there are.
    fn run_layered(&mut self, layered: &Receiver<Load>) {
        while let Ok(load) = layered.try_recv() {
            while let Some(slice) = self.in_flight.pop_front() {
                self.end_slice(slice);
            }
            let copied = self.copy_layered(&load);
            let counters = &self.counters;
            load.end(|progress, registration| match copied {
                Ok(digests) => progress.outcome(registration, &digests),
                Err(error) => {
                    counters.note_error(error);
                    progress.into_failure()
                }
            });
        }
    }

    fn copy_layered(&mut self, load: &Load) -> Result<Vec<u64>, CopyError> {
        let count = self.device.registration().layout().layers();
        let Some(backend) = self.idle.first_mut() else {
            return Ok(Vec::new()); // All are idle when nothing is in flight.
        };
        backend.begin(&load_of(load.moves()))?;
        for layer in 0..count {
            backend.copy(layer..layer + 1)?;
            if let How::Layered(layers) = &load.how {
                layers.finish(layer, Mark::passed());
            }
        }
        backend.finish()
    }

    fn accept(&mut self, load: Load) {
        let job = load.job;
        if load.moves().is_empty() {
            load.end(|progress, registration| progress.outcome(registration, &[]));
            return;
        }
        let active = Active {
            load,
            next: 0,
            slices: 0,
        };
        self.turns.push(job, active.load.moves().len());
        self.active.insert(job, active);
    }

    /// Puts the next slice of a load on the device.
    fn begin_slice(&mut self, job: u64) {
        let Some(active) = self.active.get_mut(&job) else {
            return;
        };
        let Some(mut backend) = self.idle.pop() else {
            return;
        };
        let moves = active.load.moves();
        let end = moves.len().min(active.next + self.device.slice_blocks());
        let places = active.next..end;
        active.next = end;
        active.slices += 1;
        let layers = self.device.registration().layout().layers();
        let begun = backend
            .begin(&load_of(&moves[places.clone()]))
            .and_then(|()| {
                if let How::Async {
                    begin: Some(mark), ..
                } = &active.load.how
                {
                    backend.wait_for(mark)?;
                }
                backend.copy(0..layers)
            });
        self.in_flight.push_back(Slice {
            job,
            places,
            backend,
            begun,
        });
    }

    /// Waits for a slice, and ends its load if it was the last.
    fn end_slice(&mut self, slice: Slice) {
        let Slice {
            job,
            places,
            mut backend,
            begun,
        } = slice;
        let digests = backend.finish();
        self.idle.push(backend);
        let Some(active) = self.active.get_mut(&job) else {
            return;
        };
        active.slices -= 1;
        if let Some(progress) = &mut active.load.progress {
            match begun.and(digests) {
                Ok(digests) => progress.copied(places, &digests),
                Err(error) => {
                    self.counters.note_error(error);
                    progress.fail(places);
                }
            }
        }
        let ended = active.slices == 0 && active.next == active.load.moves().len();
        if ended && let Some(active) = self.active.remove(&job) {
            active.load.end(Progress::end);
        }
    }
}

fn load_of(moves: &[RowMove]) -> Batch<'_> {
    Batch {
        direction: Direction::Load,
        moves,
        digests: true,
    }
}
