//! The thread that copies blocks of the pool into the engine's KV cache.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use kvtide_kernels::copy::{CopyBackend, CopyPlan, Direction, Registration};
use kvtide_kernels::segment::ShardStatus;
use kvtide_model::BlockMove;

use super::step::Layers;
use super::{LoadOutcome, Loads};

/// Loads that may wait. The scheduler admits fewer requests than this at once.
const QUEUED_LOADS_MAX: usize = 4096;
/// Blocks of an async load that are copied before layered loads are looked for.
const SLICE_BLOCKS: usize = 32;

#[derive(Debug)]
struct Load {
    job: u64,
    moves: Vec<BlockMove>,
    accepted: Instant,
    /// Told of every layer, if the load is layered.
    layers: Option<Arc<Layers>>,
}

/// Runs loads; ends when dropped, after what was accepted.
#[derive(Debug)]
pub(super) struct LoadThread {
    queues: Option<Queues>,
    thread: Option<JoinHandle<()>>,
    loads: Arc<Loads>,
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
        registration: Arc<Registration>,
        backend: Box<dyn CopyBackend>,
        loads: Arc<Loads>,
    ) -> io::Result<Self> {
        let (layered, layered_loads) = sync_channel(QUEUED_LOADS_MAX);
        let (beside, beside_loads) = sync_channel(QUEUED_LOADS_MAX);
        let (wake, woken) = sync_channel(1);
        let runner = Runner {
            registration,
            backend,
            loads: Arc::clone(&loads),
        };
        let work = move || runner.run(&layered_loads, &beside_loads, &woken);
        let thread = std::thread::Builder::new().name(name).spawn(work)?;
        let queues = Some(Queues {
            layered,
            beside,
            wake,
        });
        Ok(Self {
            queues,
            thread: Some(thread),
            loads,
        })
    }

    pub(super) fn load_layered(&self, job: u64, moves: Vec<BlockMove>, layers: Arc<Layers>) {
        let load = Load {
            job,
            moves,
            accepted: Instant::now(),
            layers: Some(Arc::clone(&layers)),
        };
        if !self.send(load, |queues| &queues.layered) {
            layers.abort();
        }
    }

    pub(super) fn load_async(&self, job: u64, moves: Vec<BlockMove>) {
        let load = Load {
            job,
            moves,
            accepted: Instant::now(),
            layers: None,
        };
        self.send(load, |queues| &queues.beside);
    }

    /// Queues a load, or fails it if there is no room.
    fn send(&self, load: Load, queue: fn(&Queues) -> &SyncSender<Load>) -> bool {
        let (job, blocks) = (load.job, load.moves.len());
        let Some(queues) = &self.queues else {
            return false;
        };
        let sent = queue(queues).try_send(load).is_ok();
        if sent {
            // A full channel holds a token already.
            let _ = queues.wake.try_send(());
        } else {
            let failed = (0..blocks).collect();
            self.loads.complete(
                job,
                LoadOutcome {
                    failed,
                    ..LoadOutcome::default()
                },
            );
        }
        sent
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

struct Runner {
    registration: Arc<Registration>,
    backend: Box<dyn CopyBackend>,
    loads: Arc<Loads>,
}

/// Checksums of a load's blocks as far as they have been copied, and the blocks that failed.
struct Progress {
    digests: Vec<u64>,
    failed: Vec<bool>,
}

impl Runner {
    fn run(mut self, layered: &Receiver<Load>, beside: &Receiver<Load>, woken: &Receiver<()>) {
        loop {
            self.run_layered(layered);
            match beside.try_recv() {
                Ok(load) => self.run_async(load, layered),
                Err(TryRecvError::Disconnected) => return self.run_layered(layered),
                Err(TryRecvError::Empty) => {
                    // Failing means that the queues are closed: the next round ends.
                    let _ = woken.recv();
                }
            }
        }
    }

    /// Runs all layered loads there are.
    fn run_layered(&mut self, layered: &Receiver<Load>) {
        while let Ok(load) = layered.try_recv() {
            let _abort = load.layers.as_ref().map(Layers::abort_on_drop);
            let mut progress = self.begin(&load);
            for layer in 0..self.registration.layout().layers() {
                self.copy(&load, 0..load.moves.len(), layer..layer + 1, &mut progress);
                if let Some(layers) = &load.layers {
                    layers.finish(layer);
                }
            }
            self.end(load, progress);
        }
    }

    /// Runs one async load, block by block, letting layered loads pass between slices.
    fn run_async(&mut self, load: Load, layered: &Receiver<Load>) {
        let mut progress = self.begin(&load);
        let layers = self.registration.layout().layers();
        for start in (0..load.moves.len()).step_by(SLICE_BLOCKS) {
            self.run_layered(layered);
            let end = load.moves.len().min(start + SLICE_BLOCKS);
            self.copy(&load, start..end, 0..layers, &mut progress);
        }
        self.end(load, progress);
    }

    /// Marks the blocks whose slots do not hold what the plan means.
    fn begin(&self, load: &Load) -> Progress {
        let (segment, rank) = (self.registration.segment(), self.registration.rank());
        let holds = |step: &BlockMove| {
            segment
                .shard_state(step.slot.slot, rank)
                .is_some_and(|state| {
                    state.status == ShardStatus::Sealed && state.generation == step.slot.generation
                })
        };
        Progress {
            digests: vec![0; load.moves.len()],
            failed: load.moves.iter().map(|step| !holds(step)).collect(),
        }
    }

    fn copy(
        &mut self,
        load: &Load,
        moves: std::ops::Range<usize>,
        layers: std::ops::Range<usize>,
        progress: &mut Progress,
    ) {
        for place in moves {
            let Some(step) = load
                .moves
                .get(place..=place)
                .filter(|_| !progress.failed[place])
            else {
                continue;
            };
            let plan = CopyPlan {
                direction: Direction::Load,
                moves: step,
                layers: layers.clone(),
            };
            let sums = &mut progress.digests[place..=place];
            progress.failed[place] = self.backend.copy(&plan, Some(sums)).is_err();
        }
    }

    fn end(&self, load: Load, progress: Progress) {
        let (segment, rank) = (self.registration.segment(), self.registration.rank());
        let mut outcome = LoadOutcome::default();
        let checks = load
            .moves
            .iter()
            .zip(&progress.digests)
            .zip(&progress.failed)
            .enumerate();
        for (place, ((step, &digest), &failed)) in checks {
            let expected = segment
                .shard_state(step.slot.slot, rank)
                .map(|state| state.checksum);
            if failed {
                outcome.failed.push(place);
            } else if expected != Some(digest) {
                outcome.failed.push(place);
                outcome.damaged.push(step.slot);
            } else {
                outcome.bytes += self.registration.layout().shard_bytes() as u64;
            }
        }
        outcome.seconds = load.accepted.elapsed().as_secs_f64();
        self.loads.complete(load.job, outcome);
    }
}
