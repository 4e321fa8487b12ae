//! The device's side: one thread that saves and one that loads, for one rank.
//!
//! Methods are called on the thread that runs the model and return at once, except those that say
//! that they wait. A save follows the forward pass layer by layer; a layered load runs ahead of it;
//! an async load runs beside it and gives way to layered ones between slices.

mod in_flight;
mod load;
mod save;
mod step;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvtide_kernels::copy::{CopyBackend, MemcpyBackend, Registration};
use kvtide_model::{BlockMove, SlotRef};

use in_flight::InFlight;
use load::LoadThread;
use save::{SaveBatch, SaveThread};
use step::Layers;

/// A save of some blocks: the job's id from the pool, and what to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveJob {
    /// The id that the pool gave.
    pub job: u64,
    /// What to copy.
    pub moves: Vec<BlockMove>,
}

/// How a load ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadOutcome {
    /// Places in the plan of the blocks that must not be used.
    pub failed: Vec<usize>,
    /// Slots whose bytes did not have their checksum.
    pub damaged: Vec<SlotRef>,
    /// Bytes copied.
    pub bytes: u64,
    /// From acceptance to end.
    pub seconds: f64,
}

/// Totals since the worker was made.
#[derive(Debug, Default)]
struct Counters {
    saved_bytes: AtomicU64,
    refused_saves: AtomicU64,
}

/// A worker's totals at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerCounters {
    /// Bytes copied to the pool.
    pub saved_bytes: u64,
    /// Blocks whose save was refused because the queue was full.
    pub refused_saves: u64,
}

type Jobs = InFlight<Arc<Registration>, ()>;
type Loads = InFlight<Arc<Registration>, LoadOutcome>;

/// Carries out saves and loads for one rank.
#[derive(Debug)]
pub struct Worker {
    registration: Arc<Registration>,
    saves: Arc<Jobs>,
    loads: Arc<Loads>,
    counters: Arc<Counters>,
    save_thread: SaveThread,
    load_thread: LoadThread,
    /// The saves of the step that is running.
    step: Option<Arc<SaveBatch>>,
    /// The layered load of the step that is running.
    layered: Option<Arc<Layers>>,
}

impl Worker {
    /// Starts the threads `{device}-load` and `{device}-save`.
    ///
    /// # Errors
    /// When the operating system refuses another thread.
    pub fn start(registration: Arc<Registration>, device: &str) -> io::Result<Self> {
        let saves = Arc::new(Jobs::new());
        let loads = Arc::new(Loads::new());
        let counters = Arc::new(Counters::default());
        let backend =
            || -> Box<dyn CopyBackend> { Box::new(MemcpyBackend::new(Arc::clone(&registration))) };
        let save_thread = SaveThread::start(
            format!("{device}-save"),
            Arc::clone(&registration),
            backend(),
            Arc::clone(&saves),
            Arc::clone(&counters),
        )?;
        let load_thread = LoadThread::start(
            format!("{device}-load"),
            Arc::clone(&registration),
            backend(),
            Arc::clone(&loads),
        )?;
        Ok(Self {
            registration,
            saves,
            loads,
            counters,
            save_thread,
            load_thread,
            step: None,
            layered: None,
        })
    }

    /// Saves blocks whose layers are all computed.
    pub fn save_now(&self, jobs: Vec<SaveJob>) {
        if let Some(batch) = self.enqueue(jobs) {
            batch.layers.finish_all();
        }
    }

    /// Saves blocks that the step beginning now computes, each layer when [`Worker::layer_computed`]
    /// tells of it. A step that was not ended before has failed, and its blocks are not saved.
    pub fn begin_step(&mut self, jobs: Vec<SaveJob>) {
        if let Some(unfinished) = self.step.take() {
            unfinished.layers.abort();
        }
        self.step = self.enqueue(jobs);
    }

    /// The running step has computed `layer`.
    pub fn layer_computed(&self, layer: usize) {
        if let Some(step) = &self.step {
            step.layers.finish(layer);
        }
    }

    /// The running step has computed all layers.
    pub fn end_step(&mut self) {
        if let Some(step) = self.step.take() {
            step.layers.finish_all();
        }
        self.layered = None;
    }

    /// Waits until `jobs` do not read the engine's blocks any more.
    pub fn wait_saves(&self, jobs: &[u64]) {
        jobs.iter().for_each(|&job| self.saves.wait(job));
    }

    fn enqueue(&self, jobs: Vec<SaveJob>) -> Option<Arc<SaveBatch>> {
        if jobs.is_empty() {
            return None;
        }
        let layers = self.registration.layout().layers();
        let batch = Arc::new(SaveBatch {
            jobs,
            layers: Layers::new(layers),
        });
        for job in &batch.jobs {
            self.saves.begin(job.job, Arc::clone(&self.registration));
            // Nobody asks how a save ended: the segment says so.
            self.saves.detach(job.job);
        }
        if self.save_thread.send(Arc::clone(&batch)) {
            return Some(batch);
        }
        let refused: usize = batch.jobs.iter().map(|job| job.moves.len()).sum();
        self.counters
            .refused_saves
            .fetch_add(refused as u64, Ordering::Relaxed);
        for job in &batch.jobs {
            save::condemn(&self.registration, &job.moves);
            self.saves.complete(job.job, ());
        }
        None
    }

    /// Loads blocks for the step beginning now, layer by layer; see [`Worker::wait_layer`].
    pub fn load_layered(&mut self, job: u64, moves: Vec<BlockMove>) {
        let layers = Arc::new(Layers::new(self.registration.layout().layers()));
        self.loads.begin(job, Arc::clone(&self.registration));
        self.load_thread
            .load_layered(job, moves, Arc::clone(&layers));
        self.layered = Some(layers);
    }

    /// Waits until the running step's layered load, if there is one, has loaded `layer`; `false` if
    /// it never will, so that the step must not go on.
    #[must_use]
    pub fn wait_layer(&self, layer: usize) -> bool {
        self.layered
            .as_ref()
            .is_none_or(|layers| layers.wait(layer))
    }

    /// As [`Worker::wait_layer`], for every layer.
    #[must_use]
    pub fn wait_all_layers(&self) -> bool {
        (0..self.registration.layout().layers()).all(|layer| self.wait_layer(layer))
    }

    /// Loads blocks beside the steps. Full queues fail the load, which is then recomputed.
    pub fn load_async(&self, job: u64, moves: Vec<BlockMove>) {
        self.loads.begin(job, Arc::clone(&self.registration));
        self.load_thread.load_async(job, moves);
    }

    /// Loads that have ended since the last call, layered ones included.
    #[must_use]
    pub fn take_loads(&self) -> Vec<(u64, LoadOutcome)> {
        self.loads.take_done()
    }

    /// The layout of this rank's tensors.
    #[must_use]
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Totals so far.
    #[must_use]
    pub fn counters(&self) -> WorkerCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WorkerCounters {
            saved_bytes: read(&self.counters.saved_bytes),
            refused_saves: read(&self.counters.refused_saves),
        }
    }
}

impl Drop for Worker {
    /// Refuses new work, lets what was accepted end, and joins the threads.
    fn drop(&mut self) {
        if let Some(unfinished) = self.step.take() {
            unfinished.layers.abort();
        }
    }
}
