//! An inference engine without the inference: continuous batching, chunked prefill, scheduling by
//! priority, preemption; only that the tokens mean nothing. Times are real.
//!
//! A step takes `base` and so much more for every prompt token and every running sequence in it:
//! weights are read once a step, prompts are computed, caches are read. In a step, each running
//! sequence gets its next token first; what is left of the step's budget of tokens goes to prompts,
//! in pieces, those of higher priority first (a lower number), then the older. Seats and the pool of
//! cache are bounded; where either is full and somebody waits whose priority is higher than that of
//! a running sequence, the last of the lowest priority is preempted: it waits again, and its tokens
//! so far are computed anew when it goes on.
//!
//! The step that runs is never interrupted: whoever arrives waits for its end.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::sync::mpsc;

/// What the engine can do.
#[derive(Clone, Debug, Args)]
pub(crate) struct Capacity {
    /// Answer token by token, as an engine with these times does. What a step takes at the least, in
    /// microseconds; 0 is no such engine.
    #[arg(long, default_value_t = 0)]
    pub(crate) step_us: u64,
    /// Microseconds that each prompt token adds to a step.
    #[arg(long, default_value_t = 30.0)]
    pub(crate) prompt_token_us: f64,
    /// Microseconds that each sequence that gets its next token adds to a step.
    #[arg(long, default_value_t = 20.0)]
    pub(crate) sequence_us: f64,
    /// Tokens of one step.
    #[arg(long, default_value_t = 1024)]
    pub(crate) step_tokens: usize,
    /// Sequences at once.
    #[arg(long, default_value_t = 128)]
    pub(crate) seats: usize,
    /// Tokens that the cache has room for.
    #[arg(long, default_value_t = 65_536)]
    pub(crate) cache_tokens: usize,
    /// First come, first served, whatever the priorities.
    #[arg(long)]
    pub(crate) fcfs: bool,
}

struct Sequence {
    priority: i64,
    arrived: u64,
    prompt: usize,
    output: usize,
    /// Tokens, of the prompt and generated, that are in the cache.
    computed: usize,
    generated: usize,
    tokens: mpsc::Sender<()>,
    /// Tokens that this step computes.
    now: usize,
}

impl Sequence {
    fn rank(&self) -> (i64, u64) {
        (self.priority, self.arrived)
    }

    /// Tokens that have to be computed before the next one comes.
    fn missing(&self) -> usize {
        (self.prompt + self.generated).saturating_sub(self.computed)
    }
}

#[derive(Default)]
struct Queue {
    arrived: u64,
    waiting: Vec<Sequence>,
}

/// See the module's documentation.
pub(crate) struct Engine {
    capacity: Capacity,
    queue: Mutex<Queue>,
    arrival: Condvar,
}

impl Engine {
    /// Starts the engine on a thread of its own, which ends with the process.
    pub(crate) fn start(capacity: Capacity) -> std::io::Result<Arc<Engine>> {
        let engine = Arc::new(Engine {
            capacity,
            queue: Mutex::default(),
            arrival: Condvar::new(),
        });
        let running = Arc::clone(&engine);
        thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || running.run())?;
        Ok(engine)
    }

    /// Asks for so many tokens after a prompt of so many; each arrives when it is computed. Dropping the
    /// receiver gives the request up.
    pub(crate) fn ask(&self, priority: i64, prompt: usize, output: usize) -> mpsc::Receiver<()> {
        let (tokens, arriving) = mpsc::channel(output.max(1));
        let mut queue = self.lock();
        queue.arrived += 1;
        let arrived = queue.arrived;
        queue.waiting.push(Sequence {
            priority: if self.capacity.fcfs { 0 } else { priority },
            arrived,
            prompt: prompt.max(1),
            output: output.max(1),
            computed: 0,
            generated: 0,
            tokens,
            now: 0,
        });
        self.arrival.notify_one();
        arriving
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut running: Vec<Sequence> = Vec::new();
        let mut due = Instant::now();
        loop {
            self.schedule(&mut running);
            due = due.max(Instant::now()) + self.time_of(&running);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            running.retain_mut(|sequence| {
                sequence.computed += std::mem::take(&mut sequence.now);
                if sequence.missing() > 0 {
                    return true;
                }
                sequence.generated += 1;
                // The channel has room for all; who has gone away needs no more.
                let taken = sequence.tokens.try_send(()).is_ok();
                taken && sequence.generated < sequence.output
            });
        }
    }

    /// Chooses what the next step computes; waits if there is nothing.
    fn schedule(&self, running: &mut Vec<Sequence>) {
        let mut queue = self.lock();
        loop {
            queue.waiting.retain(|waiting| !waiting.tokens.is_closed());
            running.retain(|sequence| !sequence.tokens.is_closed());
            if !running.is_empty() || !queue.waiting.is_empty() {
                break;
            }
            queue = self
                .arrival
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.waiting.sort_by_key(Sequence::rank);
        running.sort_by_key(Sequence::rank);
        self.make_room(running, &mut queue.waiting);
        let mut budget = self.capacity.step_tokens;
        // Next tokens first, then prompts.
        for decodes in [true, false] {
            for sequence in running.iter_mut() {
                if (sequence.missing() == 1) == decodes {
                    sequence.now = sequence.missing().min(budget);
                    budget -= sequence.now;
                }
            }
        }
    }

    /// Gives seats and cache to those who wait, of others if need be.
    fn make_room(&self, running: &mut Vec<Sequence>, waiting: &mut Vec<Sequence>) {
        let needs = |sequence: &Sequence| sequence.prompt + sequence.output;
        while let Some(first) = waiting.first() {
            let taken: usize = running.iter().map(needs).sum();
            let fits = running.len() < self.capacity.seats
                && taken + needs(first) <= self.capacity.cache_tokens;
            if fits || running.is_empty() {
                running.push(waiting.remove(0));
                continue;
            }
            let last = running
                .iter()
                .enumerate()
                .max_by_key(|(_, sequence)| sequence.rank());
            let Some((position, _)) = last.filter(|(_, last)| last.priority > first.priority)
            else {
                return;
            };
            let mut preempted = running.remove(position);
            preempted.computed = 0;
            let rank = preempted.rank();
            let place = waiting.partition_point(|other| other.rank() < rank);
            waiting.insert(place, preempted);
        }
    }

    fn time_of(&self, running: &[Sequence]) -> Duration {
        let mut time = Duration::from_micros(self.capacity.step_us);
        for sequence in running.iter().filter(|sequence| sequence.now > 0) {
            let us = if sequence.missing() == 1 {
                self.capacity.sequence_us
            } else {
                #[expect(clippy::cast_precision_loss, reason = "a step has few tokens")]
                let tokens = sequence.now as f64;
                self.capacity.prompt_token_us * tokens
            };
            time += Duration::from_secs_f64(us / 1e6);
        }
        time
    }
}
