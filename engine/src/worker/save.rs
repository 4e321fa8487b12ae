//! The thread that copies computed blocks to the pool.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use kvtide_kernels::copy::{Batch, CopyBackend, CopyError, Direction, Mark, Registration, RowMove};
use kvtide_model::BlockMove;

use super::outcome::row_move;
use super::step::Layers;
use super::{Counters, Jobs, SaveJob};

/// Steps whose saves may wait. A step takes milliseconds and a copy keeps pace with it; a thread
/// this far behind is in trouble, and more waiting would only pile up.
const QUEUED_STEPS_MAX: usize = 1024;

/// The saves of one step.
#[derive(Debug)]
pub(super) struct SaveBatch {
    pub(super) jobs: Vec<SaveJob>,
    /// Layers that the forward pass has computed.
    pub(super) layers: Layers,
}

/// Runs batches in the order in which they were sent; ends when dropped, after what was accepted.
#[derive(Debug)]
pub(super) struct SaveThread {
    queue: Option<SyncSender<Queued>>,
    registration: Arc<Registration>,
    jobs: Arc<Jobs>,
    thread: Option<JoinHandle<()>>,
}

impl SaveThread {
    pub(super) fn start(
        name: String,
        registration: Arc<Registration>,
        backend: Box<dyn CopyBackend>,
        jobs: Arc<Jobs>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let (queue, batches) = sync_channel(QUEUED_STEPS_MAX);
        let runner = Runner {
            registration: Arc::clone(&registration),
            backend,
            counters,
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || runner.run(&batches))?;
        Ok(Self {
            queue: Some(queue),
            registration,
            jobs,
            thread: Some(thread),
        })
    }

    /// Whether there was room for `batch`; if not, its jobs have failed.
    pub(super) fn send(&self, batch: Arc<SaveBatch>) -> bool {
        let queued = Queued {
            batch,
            saved: 0,
            registration: Arc::clone(&self.registration),
            jobs: Arc::clone(&self.jobs),
        };
        self.queue
            .as_ref()
            .is_some_and(|queue| queue.try_send(queued).is_ok())
    }
}

impl Drop for SaveThread {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // A panic has been printed; shutdown goes on.
        }
    }
}

struct Runner {
    registration: Arc<Registration>,
    backend: Box<dyn CopyBackend>,
    counters: Arc<Counters>,
}

impl Runner {
    fn run(mut self, batches: &Receiver<Queued>) {
        for mut queued in batches {
            let Some(digests) = self.copy(&queued) else {
                continue; // The step was aborted, or the device failed.
            };
            let mut digests = digests.as_slice();
            while let Some(job) = queued.next() {
                let (own, others) = digests.split_at(job.moves.len().min(digests.len()));
                self.publish(&job.moves, own);
                digests = others;
                queued.complete();
            }
        }
    }

    /// Copies all layers as they become ready; the checksums of all jobs' blocks, or `None` if they
    /// were not saved. On return nothing is read any more.
    fn copy(&mut self, queued: &Queued) -> Option<Vec<u64>> {
        let batch = &queued.batch;
        let (segment, rank) = (self.registration.segment(), self.registration.rank());
        let planned = || batch.jobs.iter().flat_map(|job| &job.moves);
        let mut slots = planned().map(|planned| planned.slot);
        if !slots.all(|slot| segment.begin_shard(slot.slot, rank, slot.generation)) {
            return None; // The pool has given up this engine's saves: the rows are others' now.
        }
        let moves: Vec<RowMove> = planned().map(row_move).collect();
        let copied = self.copy_layers(batch, &moves);
        if let Ok(true) = copied
            && let Ok(end) = self.backend.close()
        {
            queued.enqueued(end);
        }
        let finished = self.backend.finish();
        match (copied, finished) {
            (Ok(true), Ok(digests)) => Some(digests),
            (Err(error), _) | (Ok(_), Err(error)) => {
                self.counters.note_error(error);
                None
            }
            (Ok(false), Ok(_)) => None,
        }
    }

    /// Whether all layers were copied, rather than the step aborted.
    fn copy_layers(&mut self, batch: &SaveBatch, moves: &[RowMove]) -> Result<bool, CopyError> {
        self.backend.begin(&Batch {
            direction: Direction::Save,
            moves,
            digests: true,
        })?;
        let mut taken = vec![false; self.registration.layout().layers()];
        let at_once = self.backend.layers_at_once();
        while let Some(done) = batch.layers.next(&taken, at_once) {
            for mark in &done.marks {
                self.backend.wait_for(mark)?;
            }
            taken[done.layers.clone()].fill(true);
            self.backend.copy(done.layers)?;
        }
        Ok(!taken.contains(&false))
    }

    fn publish(&self, moves: &[BlockMove], digests: &[u64]) {
        let (segment, rank) = (self.registration.segment(), self.registration.rank());
        for (BlockMove { slot, .. }, &checksum) in moves.iter().zip(digests) {
            segment.seal_shard(slot.slot, rank, slot.generation, checksum);
        }
        let bytes = moves.len() * self.registration.layout().shard_bytes();
        self.counters
            .saved_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A batch on its way through the thread. Whatever becomes of it, also when the thread ends early
/// with batches in its queue, jobs that were not completed have failed when it is dropped, so that
/// nobody waits for them.
#[derive(Debug)]
struct Queued {
    batch: Arc<SaveBatch>,
    /// Jobs that are complete.
    saved: usize,
    registration: Arc<Registration>,
    jobs: Arc<Jobs>,
}

impl Queued {
    /// Behind `end`, no job of the batch reads the engine's blocks any more.
    fn enqueued(&self, end: Mark) {
        let end = Arc::new(end);
        for job in &self.batch.jobs {
            self.jobs.enqueued(job.job, Arc::clone(&end));
        }
    }

    /// The first job that is not complete.
    fn next(&self) -> Option<&SaveJob> {
        self.batch.jobs.get(self.saved)
    }

    /// That job is complete.
    fn complete(&mut self) {
        if let Some(job) = self.next() {
            self.jobs.complete(job.job, ());
        }
        self.saved += 1;
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        for job in self.batch.jobs.iter().skip(self.saved) {
            condemn(&self.registration, &job.moves);
            self.jobs.complete(job.job, ());
        }
    }
}

/// Tells the pool that these blocks were not saved.
fn condemn(registration: &Registration, moves: &[BlockMove]) {
    for BlockMove { slot, .. } in moves {
        registration
            .segment()
            .condemn_shard(slot.slot, registration.rank(), slot.generation);
    }
}
