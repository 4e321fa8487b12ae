//! Runs batches: takes what waits from the database, as many at once as there is room for, and gives
//! back what it cannot finish.

mod answer;
mod assemble;
mod bell;
mod body;
mod fair;
mod flight;
mod job;
mod lane;
mod lease;
mod lenient;
mod line_ends;
mod memory;
mod outcome;
mod pace;
mod queue;
mod recorder;
mod remembered;
mod retry;
mod shortage;
mod sorter;
mod sweep;
mod upstream;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::blobs::Blobs;
use crate::error::Failure;
use crate::state::Batch;
use crate::store::{Fence, Metadata, Share, Stage};

use fair::{Holder, who_makes_way};
use flight::Traffic;
use job::Job;
use lease::Lease;
use pace::Paces;
use remembered::Remembered;
use shortage::Shortage;

pub use assemble::LineOrder;
pub use bell::Bell;
pub use job::JobOptions;
pub use pace::{Condition, PaceOptions, Standing};
pub use retry::RetryPolicy;
pub use sweep::{remove_file, sweep_for_ever};
pub use upstream::{NoAnswer, Upstream, UpstreamError};

/// How often the database is asked for work that nobody has announced: what other servers have left.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long a batch rests after something went wrong with it here.
const REST: Duration = Duration::from_secs(3);
/// Input files validated at once. It is work for the processor, and done quickly.
const VALIDATIONS_AT_ONCE: usize = 1;
/// Batches that are ended at once without sending anything: work for the disk.
const ENDINGS_AT_ONCE: usize = 2;
/// How long a batch that has made way for another waits for a slot at the least.
const MADE_WAY: Duration = Duration::from_secs(5);
/// Shares looked at when job slots are shared out anew.
const SHARES_MAX: u32 = 64;

/// What an operator can set.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    /// Batches whose requests are sent at once.
    pub jobs: usize,
    /// Each of them.
    pub job: JobOptions,
    /// Requests at once for each model.
    pub pace: PaceOptions,
    /// Repetitions.
    pub retry: RetryPolicy,
    /// How long one request may take.
    pub request_timeout: Duration,
    /// The priority that requests are given, for upstreams that have priorities.
    pub priority: Option<i64>,
    /// Bytes of requests and answers in memory.
    pub memory_bytes: u64,
    /// How long a batch belongs to a server that is silent.
    pub lease: Duration,
}

/// See the module's documentation.
pub struct Runner {
    metadata: Arc<dyn Metadata>,
    blobs: Arc<dyn Blobs>,
    traffic: Arc<Traffic>,
    bell: Arc<Bell>,
    options: RunOptions,
    server: String,
    jobs: Arc<Semaphore>,
    validations: Arc<Semaphore>,
    endings: Arc<Semaphore>,
    /// Who has a job slot, by batch.
    holders: Mutex<HashMap<String, Held>>,
    shutdown: CancellationToken,
    /// The time that shutting down may take is over.
    drained: CancellationToken,
}

/// What can be seen of a runner at work.
pub struct View(Arc<Traffic>);

impl View {
    /// How the requests fare for each model that is in use.
    #[must_use]
    pub fn standings(&self) -> Vec<Standing> {
        self.0.paces.standings()
    }
}

/// A job slot that is taken.
struct Held {
    share: Share,
    since: Instant,
    make_way: CancellationToken,
}

/// A batch that was taken, and the place that it takes.
struct Taken {
    batch: Batch,
    fence: Fence,
    since: Instant,
    stage: Stage,
    place: OwnedSemaphorePermit,
}

impl Runner {
    /// A runner that goes by the name `server`.
    #[must_use]
    pub fn new(
        metadata: Arc<dyn Metadata>,
        blobs: Arc<dyn Blobs>,
        upstream: Arc<Upstream>,
        bell: Arc<Bell>,
        options: RunOptions,
        server: String,
        shutdown: CancellationToken,
    ) -> Runner {
        let traffic = Traffic {
            upstream,
            blobs: Arc::clone(&blobs),
            paces: Paces::new(options.pace, memory::of_a_model(options.memory_bytes)),
            shortage: Shortage::default(),
            remembered: Remembered::default(),
            memory: Arc::new(Semaphore::new(memory::units(options.memory_bytes) as usize)),
            retry: options.retry,
            timeout: options.request_timeout,
            priority: options.priority,
        };
        Runner {
            metadata,
            blobs,
            traffic: Arc::new(traffic),
            bell,
            options,
            server,
            jobs: Arc::new(Semaphore::new(options.jobs)),
            validations: Arc::new(Semaphore::new(VALIDATIONS_AT_ONCE)),
            endings: Arc::new(Semaphore::new(ENDINGS_AT_ONCE)),
            holders: Mutex::default(),
            shutdown,
            drained: CancellationToken::new(),
        }
    }

    /// Tells how the requests fare.
    #[must_use]
    pub fn view(&self) -> View {
        View(Arc::clone(&self.traffic))
    }

    /// Works until shut down; then lets requests in flight end and gives its batches back.
    pub async fn run(self: Arc<Runner>) {
        let mut working = JoinSet::new();
        while !self.shutdown.is_cancelled() {
            for stage in [Stage::End, Stage::Validate, Stage::Run] {
                self.take(stage, &mut working).await;
            }
            self.share_out().await;
            tokio::select! {
                () = self.shutdown.cancelled() => {}
                () = self.bell.rung() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                Some(ended) = working.join_next() => report_panic(ended),
            }
        }
        let draining = tokio::time::sleep(self.options.job.drain);
        tokio::pin!(draining);
        loop {
            tokio::select! {
                () = &mut draining, if !self.drained.is_cancelled() => self.drained.cancel(),
                ended = working.join_next() => match ended {
                    Some(ended) => report_panic(ended),
                    None => return,
                },
            }
        }
    }

    /// Takes as many batches as there are places for.
    async fn take(self: &Arc<Runner>, stage: Stage, working: &mut JoinSet<()>) {
        let places = match stage {
            Stage::Validate => &self.validations,
            Stage::Run => &self.jobs,
            Stage::End => &self.endings,
        };
        while let Ok(place) = Arc::clone(places).try_acquire_owned() {
            let since = Instant::now();
            let lease_ms = i64::try_from(self.options.lease.as_millis()).unwrap_or(i64::MAX);
            let last = self.traffic.paces.stalled();
            let acquired = self
                .metadata
                .acquire(&self.server, stage, &last, lease_ms, 1)
                .await;
            let (batch, fence) = match acquired {
                Ok(mut acquired) => match acquired.pop() {
                    Some(acquired) => acquired,
                    None => return,
                },
                Err(error) => {
                    tracing::error!(%error, "the database gives no work");
                    return;
                }
            };
            let taken = Taken {
                batch,
                fence,
                since,
                stage,
                place,
            };
            working.spawn(Arc::clone(self).work(taken));
        }
    }

    /// Where all job slots are taken and others wait, sees to it that each gets its share.
    async fn share_out(&self) {
        if self.jobs.available_permits() > 0 {
            return;
        }
        let waiting = match self.metadata.waiting(SHARES_MAX).await {
            Ok(waiting) => waiting,
            Err(error) => {
                tracing::warn!(%error, "job slots are not shared out anew");
                return;
            }
        };
        let stalled = self.traffic.paces.stalled();
        let held = self.lock_holders();
        if held.values().any(|held| held.make_way.is_cancelled()) {
            return;
        }
        let (ids, holders): (Vec<&String>, Vec<Holder>) = held
            .iter()
            .map(|(id, held)| {
                let holder = Holder {
                    share: held.share.clone(),
                    held: held.since.elapsed(),
                };
                (id, holder)
            })
            .unzip();
        if let Some(position) = who_makes_way(&holders, &waiting, &stalled) {
            let id = ids[position];
            tracing::info!(batch = id, "a batch makes way for another");
            held[id].make_way.cancel();
        }
    }

    fn lock_holders(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn work(self: Arc<Runner>, taken: Taken) {
        let id = taken.batch.id.clone();
        let lease = Arc::new(Lease::new(
            Arc::clone(&self.metadata),
            taken.fence.clone(),
            taken.batch,
            self.options.lease,
            taken.since,
        ));
        let nudge = self.bell.listen(&id);
        let job = Job {
            metadata: Arc::clone(&self.metadata),
            blobs: Arc::clone(&self.blobs),
            traffic: Arc::clone(&self.traffic),
            lease: Arc::clone(&lease),
            options: self.options.job,
            make_way: CancellationToken::new(),
            shutdown: self.shutdown.clone(),
            drained: self.drained.clone(),
        };
        let result = tokio::select! {
            result = self.proceed(&job, taken.stage, taken.place) => result,
            () = async {
                lease.keep(&nudge).await;
                // Lost: the job sees it too, and ends in its own way.
                std::future::pending::<()>().await;
            } => Ok(()),
        };
        let rest = match result {
            Ok(()) => Duration::ZERO,
            Err(Failure::Stopped) if self.shutdown.is_cancelled() => Duration::ZERO,
            Err(Failure::Stopped) if job.make_way.is_cancelled() => MADE_WAY,
            Err(Failure::Fenced { .. }) => {
                tracing::warn!(batch = id, "another server has taken the batch over");
                return;
            }
            Err(error) => {
                tracing::error!(batch = id, %error, "a batch could not go on; trying again later");
                REST
            }
        };
        let rest_ms = i64::try_from(rest.as_millis()).unwrap_or(i64::MAX);
        if let Err(error) = self.metadata.release(&taken.fence, rest_ms).await {
            tracing::warn!(batch = id, %error, "a lease was left to run out");
        }
    }

    async fn proceed(
        &self,
        job: &Job,
        stage: Stage,
        place: OwnedSemaphorePermit,
    ) -> Result<(), Failure> {
        let Some(plan) = job.validate().await? else {
            return Ok(());
        };
        let place = match stage {
            Stage::Run | Stage::End => place,
            Stage::Validate => {
                drop(place);
                match Arc::clone(&self.jobs).try_acquire_owned() {
                    Ok(place) => place,
                    // It waits in the database, not here, for whoever has room first.
                    Err(_) => return Ok(()),
                }
            }
        };
        // The next file can be validated.
        self.bell.ring();
        let _holding = (stage != Stage::End).then(|| self.hold(job));
        let result = job.run(plan, stage).await;
        drop(place);
        self.bell.ring();
        result
    }

    /// Notes who has a job slot, for as long as what is given back lives.
    fn hold(&self, job: &Job) -> Holding<'_> {
        let batch = job.lease.batch();
        let held = Held {
            share: Share::of(&batch),
            since: Instant::now(),
            make_way: job.make_way.clone(),
        };
        self.lock_holders().insert(batch.id.clone(), held);
        Holding {
            runner: self,
            batch: batch.id,
        }
    }
}

struct Holding<'a> {
    runner: &'a Runner,
    batch: String,
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.runner.lock_holders().remove(&self.batch);
    }
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a job has panicked; its lease will run out");
    }
}

#[cfg(test)]
mod tests;
