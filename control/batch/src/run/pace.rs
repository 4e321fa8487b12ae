//! How many requests are sent at once, so that a batch takes what is left over and interactive
//! traffic is not disturbed.
//!
//! Two limits hold at once. How long answers take moves that of the model: it grows while they come
//! as fast as ever, and is cut by a tenth when they take longer ([`latency`]). Whatever goes wrong
//! moves that of the tenant whose request it was, and pauses this tenant alone ([`presence`],
//! [`backoff`]): one tenant's sick requests hold up nobody else's. An engine that is full, or away,
//! says so to each tenant, whose limits then add up to what it can do.

mod backoff;
mod engine;
mod gate;
mod latency;
mod presence;
mod standing;

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

use crate::run::retry::Verdict;
use crate::state::Usage;
use crate::store::Share;

use backoff::Backoff;
use engine::Engine;
use gate::{Gate, Pass};
use presence::Presence;

pub(super) use presence::Absence;
pub use standing::{Condition, Standing};

/// Bounds, and what counts as slow.
#[derive(Clone, Copy, Debug)]
pub struct PaceOptions {
    /// Requests at once when a model is first used.
    pub initial: usize,
    /// Requests at once that are never exceeded.
    pub most: usize,
    /// How many times longer than at its best an answer may take, for each unit of its work, before
    /// the limit is cut. At half of that it no longer grows.
    pub latency_tolerance: f64,
    /// How long it is waited for an upstream that refuses this server's key to everybody.
    pub refused_for: Duration,
}

/// A pause that lasts so long is one that others may use the job slot for.
const STALLED: Duration = Duration::from_secs(2);
/// Models that metrics tell apart. Clients choose the names, and each label is kept for ever.
const LABELS_MAX: usize = 64;
/// The label of all others.
const OTHER: &str = "other";
/// Paces that are remembered without being used, because they are paused.
const REMEMBERED_MAX: usize = 1024;

/// The paces of all models and tenants.
#[derive(Debug)]
pub(super) struct Paces {
    options: PaceOptions,
    /// Units of memory that the requests for one model may take.
    memory: usize,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    engines: HashMap<String, Arc<Engine>>,
    paces: HashMap<(String, String), Arc<Pace>>,
    /// Models that have a label of their own.
    labels: HashSet<String>,
}

impl Known {
    fn label(&mut self, model: &str) -> String {
        if self.labels.len() < LABELS_MAX {
            self.labels.insert(model.to_owned());
        }
        let known = self.labels.contains(model);
        (if known { model } else { OTHER }).to_owned()
    }

    /// Forgets what no job uses, so that the number of paces stays bounded by that of the jobs; what is
    /// paused is remembered until the pause is over, and for how long a key was refused for as long
    /// again as that is waited for: also of a batch that makes way in between.
    fn forget_unused(&mut self) {
        let mut remembered = 0;
        self.paces.retain(|_, pace| {
            if Arc::strong_count(pace) > 1 {
                return true;
            }
            remembered += 1;
            (pace.paused_for().is_some() || pace.is_refused()) && remembered <= REMEMBERED_MAX
        });
        self.engines
            .retain(|_, engine| Arc::strong_count(engine) > 1);
    }
}

impl Paces {
    /// None used yet. The requests for one model may take `memory` units of the memory for all.
    pub(super) fn new(options: PaceOptions, memory: usize) -> Paces {
        Paces {
            options,
            memory,
            known: Mutex::default(),
        }
    }

    /// The pace of a tenant's requests for a model.
    pub(super) fn of(&self, model: &str, tenant: &str) -> Arc<Pace> {
        let mut known = self.lock();
        let key = (model.to_owned(), tenant.to_owned());
        if let Some(pace) = known.paces.get(&key) {
            return Arc::clone(pace);
        }
        known.forget_unused();
        let engine = match known.engines.get(model) {
            Some(engine) => Arc::clone(engine),
            None => {
                let label = known.label(model);
                let engine = Engine::new(model.to_owned(), label, self.options, self.memory);
                let engine = Arc::new(engine);
                known.engines.insert(model.to_owned(), Arc::clone(&engine));
                engine
            }
        };
        let pace = Arc::new(Pace::new(engine, self.options));
        known.paces.insert(key, Arc::clone(&pace));
        pace
    }

    /// Those who would only wait if they had a job slot.
    pub(super) fn stalled(&self) -> Vec<Share> {
        self.lock()
            .paces
            .iter()
            .filter(|(_, pace)| pace.paused_for().is_some_and(|pause| pause >= STALLED))
            .map(|((model, tenant), _)| Share {
                tenant: tenant.clone(),
                model: Some(model.clone()),
            })
            .collect()
    }

    /// How the requests for each model fare.
    pub(super) fn standings(&self) -> Vec<Standing> {
        let known = self.lock();
        let paces = known.paces.iter();
        let in_use = paces.filter(|(_, pace)| Arc::strong_count(pace) > 1);
        let each = in_use.map(|((model, _), pace)| Standing {
            model: model.clone(),
            condition: pace.condition(),
            tenants: 1,
            in_flight: pace.load.in_flight.load(Ordering::Relaxed),
            to_repeat: pace.load.to_repeat.load(Ordering::Relaxed),
            paused_for_s: pace.paused_for().map(|pause| pause.as_secs()),
        });
        Standing::together(each)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pace of one tenant's requests for one model.
#[derive(Debug)]
pub(super) struct Pace {
    engine: Arc<Engine>,
    gate: Arc<Gate>,
    refused_for: Duration,
    mood: Mutex<Mood>,
    /// What of the sum of limits is this one's.
    counted: AtomicUsize,
    /// Requests that are being sent, and those that wait to be sent again.
    pub(super) load: Load,
}

/// What is known of the upstream by how this tenant's requests fare.
#[derive(Debug, Default)]
struct Mood {
    presence: Presence,
    backoff: Backoff,
    /// Why nothing was asked for a while, until something is answered.
    condition: Option<Condition>,
}

/// Requests under way.
#[derive(Debug, Default)]
pub(super) struct Load {
    in_flight: AtomicUsize,
    to_repeat: AtomicUsize,
}

impl Load {
    /// So many more wait to be sent again.
    pub(super) fn to_repeat(&self, count: usize) {
        self.to_repeat.fetch_add(count, Ordering::Relaxed);
        metrics::gauge!("kvtide_batch_requests_to_repeat").increment(small(count));
    }

    /// So many of these wait no more.
    pub(super) fn repeated(&self, count: usize) {
        self.to_repeat.fetch_sub(count, Ordering::Relaxed);
        metrics::gauge!("kvtide_batch_requests_to_repeat").decrement(small(count));
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge of a small count")]
fn small(count: usize) -> f64 {
    count as f64
}

/// What a failure speaks against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Against {
    /// The request was not known to fail, or nobody knows any more.
    Upstream,
    /// It has failed before, while others were answered; where they were not, a 429 speaks against the
    /// upstream all the same.
    Request,
}

/// The right to ask once.
#[derive(Debug)]
pub(super) struct Turn {
    pace: Arc<Pace>,
    began: Instant,
    _passes: [Pass; 2],
}

impl Pace {
    fn new(engine: Arc<Engine>, options: PaceOptions) -> Pace {
        let pace = Pace {
            engine,
            gate: Arc::new(Gate::new(options.initial, options.most)),
            refused_for: options.refused_for,
            mood: Mutex::default(),
            counted: AtomicUsize::new(0),
            load: Load::default(),
        };
        pace.count(pace.gate.limit());
        pace
    }

    /// Waits until the model may be asked. First come, first served. Safe to drop while waiting.
    pub(super) async fn turn(self: &Arc<Pace>) -> Turn {
        loop {
            // The tenant's own first: who may not ask takes nobody's place.
            let mine = self.gate.enter().await;
            let shared = self.engine.gate.enter().await;
            if self.gate.closed_until().is_none() {
                // A timer takes a millisecond also for what is due now.
                if let Some(start) = self.engine.start() {
                    sleep_until(start).await;
                }
                self.load.in_flight.fetch_add(1, Ordering::Relaxed);
                return Turn {
                    pace: Arc::clone(self),
                    began: Instant::now(),
                    _passes: [mine, shared],
                };
            }
        }
    }

    /// The memory that all requests for this model share.
    pub(super) fn memory(&self) -> &Arc<Semaphore> {
        &self.engine.memory
    }

    /// The model that is asked.
    pub(super) fn model(&self) -> &str {
        &self.engine.model
    }

    /// How many requests for the model were answered, whosever they were. While it stands still, that
    /// one of them found nobody is not that request's doing.
    pub(super) fn answers(&self) -> u64 {
        self.engine.answers()
    }

    /// Whether nobody is there for this tenant, as far as is known.
    pub(super) fn is_down(&self) -> bool {
        self.lock().presence.is_down()
    }

    /// Whether the key was refused to everybody for longer than anybody waits.
    pub(super) fn gave_up(&self) -> bool {
        self.refused_for()
            .is_some_and(|refused_for| refused_for >= self.refused_for)
    }

    /// Whether the key was refused to everybody, and not too long ago for that to matter.
    fn is_refused(&self) -> bool {
        self.refused_for()
            .is_some_and(|refused_for| refused_for < 2 * self.refused_for)
    }

    fn refused_for(&self) -> Option<Duration> {
        self.lock().presence.refused_for(Instant::now())
    }

    /// For how long nothing will be asked, if that is so.
    fn paused_for(&self) -> Option<Duration> {
        let until = self.gate.closed_until()?;
        Some(until.duration_since(Instant::now()))
    }

    /// Why nothing is asked, or next to nothing.
    fn condition(&self) -> Option<Condition> {
        self.lock().condition
    }

    /// The upstream has answered.
    fn answered(&self) {
        let mut mood = self.lock();
        let ends_search = mood.presence.answered();
        mood.backoff.answered();
        if ends_search && mood.condition != Some(Condition::RateLimited) {
            self.gate.open();
        }
        mood.condition = None;
    }

    /// The upstream asks for less. What was refused together counts once.
    fn overloaded(&self, against: Against, began: Instant, asked: Option<Duration>) {
        let mut mood = self.lock();
        if against == Against::Request && mood.backoff.is_for_one_alone() {
            return;
        }
        let is_news = self.gate.cut(began, 0.5);
        let pause = if is_news {
            let [random, ..] = RandomState::new().hash_one(began).to_le_bytes();
            mood.backoff.refused(asked, random)
        } else {
            asked.unwrap_or_default()
        };
        mood.condition = Some(Condition::RateLimited);
        self.gate.close(Instant::now() + pause);
    }

    /// A request that is not known to fail was not answered. Gives back the pause that begins with it.
    fn missed(
        &self,
        absence: Absence,
        began: Instant,
        asked: Option<Duration>,
    ) -> Option<Duration> {
        // What is refused for good now need not be refused slowly.
        if absence == Absence::Refused && self.gave_up() {
            return None;
        }
        let now = Instant::now();
        let mut mood = self.lock();
        // While one at a time asks, there is nothing to cut.
        if !mood.presence.is_down() {
            self.gate.cut(began, 0.5);
        }
        let pause = mood.presence.missed(absence, began, now, asked);
        if let Some(pause) = pause {
            mood.condition = Some(match absence {
                Absence::Unavailable => Condition::Unavailable,
                Absence::Refused => Condition::Refused,
            });
            // One asks for all.
            self.gate.set_limit(1);
            self.gate.close(now + pause);
        }
        pause
    }

    fn count(&self, limit: usize) {
        let before = self.counted.swap(limit, Ordering::Relaxed);
        self.engine.tenants.fetch_add(limit, Ordering::Relaxed);
        self.engine.tenants.fetch_sub(before, Ordering::Relaxed);
    }

    fn show(&self) {
        self.count(self.gate.limit());
        let tenants = self.engine.tenants.load(Ordering::Relaxed);
        let limit = self.engine.gate.limit().min(tenants);
        metrics::gauge!("kvtide_batch_concurrency_limit", "model" => self.engine.label.clone())
            .set(small(limit));
    }

    fn lock(&self) -> MutexGuard<'_, Mood> {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.count(0);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.pace.load.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Turn {
    /// The request is sent now: what it waited for since it got its turn is not the model's doing.
    pub(super) fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// This server had nothing left for a connection: the limit is more than it has room for. Of the
    /// model nothing is learnt, and it is not paused.
    pub(super) fn could_not_begin(&self) {
        self.pace.engine.gate.cut(self.began, 0.5);
        self.pace.show();
    }

    /// Says how it went, and whom a failure speaks `against`. `asked` is how long the upstream wants to
    /// be left alone. Gives back for how long nothing is asked for this tenant, if that begins now
    /// because nobody answers.
    pub(super) fn end(
        self,
        verdict: Verdict,
        against: Against,
        asked: Option<Duration>,
        usage: &Usage,
    ) -> Option<Duration> {
        let (pace, engine) = (&self.pace, &self.pace.engine);
        let mut begins = None;
        match verdict {
            Verdict::Success => {
                engine.succeeded(self.began, usage);
                pace.answered();
                pace.gate.grow();
            }
            // The upstream has answered; that it did not like the request is no sign of load.
            Verdict::Permanent => {
                engine.refused();
                pace.answered();
            }
            Verdict::Overloaded => pace.overloaded(against, self.began, asked),
            Verdict::Absent(absence) => match against {
                Against::Upstream => begins = pace.missed(absence, self.began, asked),
                Against::Request => {}
            },
            Verdict::Transient => match against {
                Against::Upstream => {
                    pace.gate.cut(self.began, 0.5);
                }
                Against::Request => {}
            },
        }
        pace.show();
        begins
    }
}

#[cfg(test)]
mod tests;
