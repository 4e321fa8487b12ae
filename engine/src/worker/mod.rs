//! The device's side: one thread that saves and one that loads, for one rank.
//!
//! Methods are called on the thread that runs the model and return at once, except those that say
//! that they wait. A save follows the forward pass layer by layer; a layered load runs ahead of it;
//! an async load runs beside it, in slices. On a GPU the model's stream waits for layers, not the
//! thread; layered loads are put on a stream of their own, and threads only for what runs beside.

mod in_flight;
mod load;
mod outcome;
mod save;
mod step;
mod turns;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvtide_kernels::copy::{CopyError, Device, Direction, LayeredLoad, Mark, Registration};
use kvtide_kernels::cuda::ComputeStream;
use kvtide_model::BlockMove;

use in_flight::InFlight;
use load::LoadThread;
use outcome::Progress;
use save::{SaveBatch, SaveThread};
use step::Layers;

pub use outcome::LoadOutcome;

/// A save of some blocks: the job's id from the pool, and what to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveJob {
    /// The id that the pool gave.
    pub job: u64,
    /// What to copy.
    pub moves: Vec<BlockMove>,
}

/// Totals since the worker was made.
#[derive(Debug, Default)]
struct Counters {
    saved_bytes: AtomicU64,
    refused_saves: AtomicU64,
    copy_errors: AtomicU64,
    /// The newest error that nobody has taken.
    error: Mutex<Option<CopyError>>,
}

impl Counters {
    /// The device refused or failed a copy; what becomes of its blocks, others see to.
    fn note_error(&self, error: CopyError) {
        self.copy_errors.fetch_add(1, Ordering::Relaxed);
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// A worker's totals at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerCounters {
    /// Bytes copied to the pool.
    pub saved_bytes: u64,
    /// Blocks whose save was refused because the queue was full.
    pub refused_saves: u64,
    /// Copies that the device refused or failed.
    pub copy_errors: u64,
}

type Jobs = InFlight<Arc<Registration>, (), Arc<Mark>>;
type Loads = InFlight<Arc<Registration>, LoadOutcome>;

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The operating system refused a thread.
    #[error("cannot start a copy thread: {0}")]
    Thread(#[from] io::Error),
    /// The device refused a backend.
    #[error(transparent)]
    Device(#[from] CopyError),
}

/// Why the step must not go on: the model would compute with bytes that were not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The thread that copies has stopped.
    #[error("a layered load ended early: the thread that copies has stopped")]
    Stopped,
    /// The device failed.
    #[error("a layered load failed: {0}")]
    Device(#[from] CopyError),
}

/// The layered load of the step that is running.
#[derive(Debug)]
enum Layered {
    /// A thread copies.
    Thread(Arc<Layers>),
    /// The device's streams copy; the last entry of [`Worker::streaming`].
    Stream,
    /// It could not be started.
    Failed(CopyError),
}

/// A layered load on the device's streams, of this or an earlier step.
struct Streaming {
    job: u64,
    progress: Progress,
    load: Box<dyn LayeredLoad>,
}

/// Carries out saves and loads for one rank.
pub struct Worker {
    device: Arc<dyn Device>,
    /// Where the engine computes.
    stream: ComputeStream,
    saves: Arc<Jobs>,
    loads: Arc<Loads>,
    counters: Arc<Counters>,
    save_thread: SaveThread,
    load_thread: LoadThread,
    /// The saves of the step that is running.
    step: Option<Arc<SaveBatch>>,
    layered: Option<Layered>,
    streaming: Vec<Streaming>,
    /// Behind the steps before the one that begins now, and all that those wait for.
    earlier_steps: Option<Arc<Mark>>,
}

impl Worker {
    /// Starts the threads `{name}-load` and `{name}-save`.
    ///
    /// # Errors
    /// [`StartError`] when the operating system or the device refuses what is needed.
    pub fn start(device: Arc<dyn Device>, name: &str) -> Result<Self, StartError> {
        let saves = Arc::new(Jobs::new());
        let loads = Arc::new(Loads::new());
        let counters = Arc::new(Counters::default());
        let save_thread = SaveThread::start(
            format!("{name}-save"),
            Arc::clone(device.registration()),
            device.backend(Direction::Save)?,
            Arc::clone(&saves),
            Arc::clone(&counters),
        )?;
        let load_thread = LoadThread::start(
            format!("{name}-load"),
            Arc::clone(&device),
            Arc::clone(&loads),
            Arc::clone(&counters),
        )?;
        Ok(Self {
            device,
            stream: ComputeStream::default(),
            saves,
            loads,
            counters,
            save_thread,
            load_thread,
            step: None,
            layered: None,
            streaming: Vec::new(),
            earlier_steps: None,
        })
    }

    /// The engine computes the next step on `stream`.
    pub fn use_stream(&mut self, stream: ComputeStream) {
        self.stream = stream;
        self.earlier_steps = None;
        for streaming in &self.streaming {
            // The step may overwrite blocks whose digests are still being computed. A device that
            // cannot even wait tells so at the next call that matters.
            let _ = streaming.load.hold_back_until_end(stream);
        }
    }

    /// All that the next step is held back by has been told, and nothing of it is on the stream yet:
    /// what is loaded behind earlier steps need not wait for it.
    pub fn step_held_back(&mut self) {
        let mark = self.device.mark(self.stream);
        // Without a mark, loads take one themselves, and that fails them.
        self.earlier_steps = mark.ok().map(Arc::new);
    }

    /// Saves blocks whose layers are all computed, or at least begun.
    pub fn save_now(&self, jobs: Vec<SaveJob>) {
        if let Some(batch) = self.enqueue(jobs) {
            self.finish_all(&batch);
        }
    }

    /// Saves blocks that the step beginning now computes, each layer when [`Worker::layer_computed`]
    /// tells of it.
    pub fn begin_step(&mut self, jobs: Vec<SaveJob>) {
        self.abort_step();
        self.step = self.enqueue(jobs);
    }

    /// The running step, if there is one, has failed: its blocks are not saved.
    pub fn abort_step(&mut self) {
        if let Some(unfinished) = self.step.take() {
            unfinished.layers.abort();
        }
        self.layered = None;
    }

    /// The running step has computed `layer`, or at least begun to.
    pub fn layer_computed(&self, layer: usize) {
        if let Some(step) = &self.step {
            match self.device.mark(self.stream) {
                Ok(mark) => step.layers.finish(layer, mark),
                Err(error) => {
                    self.counters.note_error(error);
                    step.layers.abort();
                }
            }
        }
    }

    /// The running step has computed all layers, or at least begun to.
    pub fn end_step(&mut self) {
        if let Some(step) = self.step.take() {
            self.finish_all(&step);
        }
        self.layered = None;
    }

    /// What is to be saved may be read behind what the engine has put on its stream by now. If the
    /// device cannot even mark that, its blocks are not saved; the engine will notice by itself.
    fn finish_all(&self, batch: &SaveBatch) {
        match self.device.mark(self.stream) {
            Ok(mark) => batch.layers.finish_all(mark),
            Err(error) => {
                self.counters.note_error(error);
                batch.layers.abort();
            }
        }
    }

    /// Holds back the engine until `jobs` do not read its blocks any more: this thread in host
    /// memory; the engine's stream on a GPU, and this thread only until the jobs are enqueued.
    pub fn wait_saves(&self, jobs: &[u64]) {
        let mut held: Option<Arc<Mark>> = None;
        for &job in jobs {
            let Some(end) = self.saves.wait_enqueued(job) else {
                continue;
            };
            if held.as_ref().is_some_and(|held| Arc::ptr_eq(held, &end)) {
                continue; // The jobs of one step end together.
            }
            if let Err(error) = self.device.hold_back(self.stream, &end) {
                self.counters.note_error(error);
                self.saves.wait(job);
            }
            held = Some(end);
        }
    }

    /// Waits until `jobs` have ended, and the segment says how.
    pub fn finish_saves(&self, jobs: &[u64]) {
        jobs.iter().for_each(|&job| self.saves.wait(job));
    }

    fn enqueue(&self, jobs: Vec<SaveJob>) -> Option<Arc<SaveBatch>> {
        if jobs.is_empty() {
            return None;
        }
        let layers = self.registration().layout().layers();
        let batch = Arc::new(SaveBatch {
            jobs,
            layers: Layers::new(layers),
        });
        for job in &batch.jobs {
            self.saves
                .begin(job.job, Arc::clone(self.device.registration()));
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
        None
    }

    /// Loads blocks for the step beginning now, layer by layer; see [`Worker::wait_layer`].
    /// `behind_steps` as in [`Worker::load_async`].
    pub fn load_layered(&mut self, job: u64, moves: Vec<BlockMove>, behind_steps: bool) {
        let progress = Progress::new(self.registration(), &moves);
        self.loads
            .begin(job, Arc::clone(self.device.registration()));
        let begin = if behind_steps {
            self.device.mark(self.stream)
        } else {
            Ok(Mark::passed())
        };
        let begun = match begin {
            Ok(begin) => self.device.begin_layered(progress.moves(), &begin),
            Err(error) => Some(Err(error)),
        };
        self.layered = Some(match begun {
            None => {
                let layers = Arc::new(Layers::new(self.registration().layout().layers()));
                self.load_thread
                    .load_layered(job, progress, Arc::clone(&layers));
                Layered::Thread(layers)
            }
            Some(Ok(load)) => {
                self.streaming.push(Streaming {
                    job,
                    progress,
                    load,
                });
                Layered::Stream
            }
            Some(Err(error)) => {
                self.loads.complete(job, progress.into_failure());
                Layered::Failed(error)
            }
        });
    }

    /// Holds back the engine until the running step's layered load, if there is one, has loaded
    /// `layer`: this thread in host memory, the engine's stream on a GPU.
    ///
    /// # Errors
    /// [`LayerError`] if the layer never will be loaded.
    pub fn wait_layer(&self, layer: usize) -> Result<(), LayerError> {
        match &self.layered {
            None => Ok(()),
            Some(Layered::Thread(layers)) => {
                layers.wait(layer).then_some(()).ok_or(LayerError::Stopped)
            }
            Some(Layered::Stream) => {
                let streaming = self.streaming.last().ok_or(LayerError::Stopped)?;
                Ok(streaming.load.hold_back(self.stream, layer)?)
            }
            Some(Layered::Failed(error)) => Err(error.clone().into()),
        }
    }

    /// As [`Worker::wait_layer`], for every layer.
    ///
    /// # Errors
    /// As there.
    pub fn wait_all_layers(&self) -> Result<(), LayerError> {
        (0..self.registration().layout().layers()).try_for_each(|layer| self.wait_layer(layer))
    }

    /// Waits, on this thread also on a GPU, until the running step's layered load has all its layers.
    ///
    /// # Errors
    /// As for [`Worker::wait_layer`].
    pub fn finish_layers(&self) -> Result<(), LayerError> {
        match (&self.layered, self.streaming.last()) {
            (Some(Layered::Stream), Some(streaming)) => Ok(streaming.load.wait()?),
            _ => self.wait_all_layers(),
        }
    }

    /// Loads blocks beside the steps; `behind_steps` if earlier ones, or what they wait for, may still
    /// use the blocks. How that ends is also told at `place` of the segment's board
    /// ([`kvtide_segment::SharedSegment::load_end`]). Full queues fail the load, which is
    /// then recomputed.
    pub fn load_async(&self, job: u64, place: u32, moves: Vec<BlockMove>, behind_steps: bool) {
        let progress = Progress::new(self.registration(), &moves);
        self.loads
            .begin(job, Arc::clone(self.device.registration()));
        let begin = match &self.earlier_steps {
            _ if !behind_steps => Ok(Arc::new(Mark::passed())),
            Some(mark) => Ok(Arc::clone(mark)),
            None => self.device.mark(self.stream).map(Arc::new),
        };
        let begin = begin.map_err(|error| self.counters.note_error(error)).ok();
        self.load_thread.load_async(job, place, progress, begin);
    }

    /// Loads that have ended since the last call, layered ones included.
    #[must_use]
    pub fn take_loads(&mut self) -> Vec<(u64, LoadOutcome)> {
        let registration = Arc::clone(self.device.registration());
        let mut running = Vec::new();
        for mut streaming in self.streaming.drain(..) {
            let Some(ended) = streaming.load.poll() else {
                running.push(streaming);
                continue;
            };
            let outcome = match ended {
                Ok(digests) => streaming.progress.outcome(&registration, &digests),
                Err(error) => {
                    self.counters.note_error(error);
                    streaming.progress.into_failure()
                }
            };
            self.loads.complete(streaming.job, outcome);
        }
        self.streaming = running;
        self.loads.take_done()
    }

    /// The layout of this rank's tensors.
    #[must_use]
    pub fn registration(&self) -> &Registration {
        self.device.registration()
    }

    /// Totals so far.
    #[must_use]
    pub fn counters(&self) -> WorkerCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WorkerCounters {
            saved_bytes: read(&self.counters.saved_bytes),
            refused_saves: read(&self.counters.refused_saves),
            copy_errors: read(&self.counters.copy_errors),
        }
    }

    /// The newest copy error since the last call.
    pub fn take_error(&mut self) -> Option<CopyError> {
        let mut error = self
            .counters
            .error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        error.take()
    }
}

impl Drop for Worker {
    /// Refuses new work, lets what was accepted end, and joins the threads.
    fn drop(&mut self) {
        self.abort_step();
    }
}
