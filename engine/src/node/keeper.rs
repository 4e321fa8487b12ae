//! The thread that looks after a node: what was saved, who has gone, what engines are to hear.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use kvtide_model::wire::{Count, Counts, Event, Events, ToEngine};

use super::error::NodeError;
use super::{Inner, State, memory};
use crate::pool::{PoolCounters, PoolEvent, PoolGauges};
use crate::sync::lock;

/// While blocks are being saved, or an engine is about to go.
const BUSY: Duration = Duration::from_millis(20);
/// Otherwise. An engine that goes wakes the thread by its connection's end, if it had one.
const IDLE: Duration = Duration::from_millis(200);
/// Rounds between two reports of counts to an engine.
const COUNTS_EVERY: u32 = 5;
/// Rounds between two looks at what nobody needs any more.
const TIDY_EVERY: u32 = 5;
/// Events in one message.
const EVENTS_AT_ONCE: usize = 1 << 16;

/// It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Keeper {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(super) fn start(inner: &Arc<Inner>) -> Result<Self, NodeError> {
        let (stop, stopped) = sync_channel(1);
        let inner: Weak<Inner> = Arc::downgrade(inner);
        let thread = std::thread::Builder::new().name("kvtide-keeper".into());
        let thread = thread.spawn(move || {
            let (mut wait, mut round) = (BUSY, 0u32);
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                let Some(inner) = inner.upgrade() else { return };
                round = round.wrapping_add(1);
                wait = if inner.keep(round) { BUSY } else { IDLE };
            }
        });
        let what = "a thread";
        let thread = thread.map_err(|source| NodeError::System { what, source })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed already.
            let _ = thread.join();
        }
    }
}

impl Inner {
    /// One round; whether the next is to be soon.
    fn keep(&self, round: u32) -> bool {
        if round.is_multiple_of(TIDY_EVERY) {
            // What it could not do now it finds again.
            if let Err(error) = self.take_excess() {
                tracing::warn!(%error, "what a tenant has beyond its quota is not taken back");
            }
            self.close_unused(&mut lock(&self.state));
        }
        let mut state = lock(&self.state);
        let mut busy = false;
        for model in state.models.values() {
            model.pool.poll();
            busy |= model.pool.gauges().saving > 0;
        }
        let numbers: Vec<u8> = state.engines.keys().copied().collect();
        for number in numbers {
            busy |= self.look_after(&mut state, number, round);
        }
        busy
    }

    /// Whether this engine is to be looked at again soon.
    fn look_after(&self, state: &mut State, number: u8, round: u32) -> bool {
        let State {
            engines, models, ..
        } = state;
        let Some(engine) = engines.get_mut(&number) else {
            return false;
        };
        let pool = models.get(&engine.namespace()).map(|model| &model.pool);
        let Some(pool) = pool else {
            return false;
        };
        if let Some(link) = engine.link.clone() {
            let mut sent = link.flush();
            // What an idle engine does not read stays where it is bounded.
            let events = match link.is_idle() {
                true => pool.take_events(engine.session),
                false => Vec::new(),
            };
            for events in events.chunks(EVENTS_AT_ONCE) {
                let events: Vec<Event> = events.iter().map(event).collect();
                let events = events.into();
                sent = sent.and_then(|()| link.send(&ToEngine::Events(Events { events })));
            }
            if round.is_multiple_of(COUNTS_EVERY) && link.is_idle() {
                let counts = counts(&pool.counters(), &pool.gauges());
                sent = sent.and_then(|()| link.send(&ToEngine::Counts(counts)));
            }
            if sent.is_err() {
                // Whoever reads from it sees its end and takes the rest of it away.
                link.close();
            }
            return false;
        }
        if engine.is_long_gone() {
            self.remove_engine(state, number);
            return false;
        }
        if !engine.abandoned {
            engine.abandoned = true;
            pool.abandon_saves(engine.session);
        }
        // Its scheduler has gone, and soon the others will have.
        engine.processes.is_empty()
    }

    /// Takes the memory of pools that hold nothing and that no engine uses, and forgets them: each
    /// has tables for as many rows as there are, and their number is bounded by nothing else.
    fn close_unused(&self, state: &mut State) {
        let State {
            ledger,
            models,
            engines,
            ages,
            denied,
            ..
        } = state;
        let now = super::unix_seconds();
        let mut closed = Vec::new();
        for entry in &mut ledger.pools {
            let namespace = entry.namespace();
            let is_used = engines.values().any(|e| e.namespace() == namespace);
            let Some(model) = models.get(&namespace) else {
                continue;
            };
            let holds = model.pool.gauges().held > 0;
            if is_used || holds || entry.pinned_until_unix_s > now {
                continue;
            }
            entry.extents.retain(|extent| {
                ages.forget(*extent);
                !model.pool.give_up(&model.rows_of(*extent))
            });
            if entry.extents.is_empty() {
                closed.push(namespace);
            }
        }
        if closed.is_empty() {
            return;
        }
        ledger.pools.retain(|e| !closed.contains(&e.namespace()));
        denied.retain(|tenant, _| ledger.pools.iter().any(|e| e.tenant == *tenant));
        if let Err(error) = self.memory.note(ledger) {
            // The next life begins with an empty pool of that name, and closes it again.
            tracing::warn!(%error, "it is not written down that a pool is closed");
        }
        for namespace in closed {
            models.remove(&namespace);
            // Where it fails, the next pool of that name uses the file again.
            let _ = self.memory.remove_tables(namespace);
            tracing::info!(%namespace, "a pool that holds nothing and has no engine is closed");
        }
    }

    /// Forgets an engine of which nothing is left.
    pub(super) fn remove_engine(&self, state: &mut State, number: u8) {
        let Some(engine) = state.engines.remove(&number) else {
            return;
        };
        if let Some(model) = state.models.get(&engine.namespace()) {
            model.pool.close_session_elsewhere(engine.session);
        }
        tracing::info!(
            engine = engine.entry.engine_id,
            tenant = engine.entry.tenant,
            number,
            seconds = super::unix_seconds().saturating_sub(engine.entry.since_unix_s),
            "an engine has gone"
        );
        state.ledger.engines.retain(|each| each.number != number);
        // Where either fails, the next life finds an engine that nobody holds, and drops it.
        let _ = memory::remove(engine.own());
        let _ = self.memory.note(&state.ledger);
    }
}

fn event(event: &PoolEvent) -> Event {
    match *event {
        PoolEvent::Stored(key) => Event::Stored(key),
        PoolEvent::Removed(key) => Event::Removed(key),
        PoolEvent::Cleared => Event::Cleared,
    }
}

fn counts(counters: &PoolCounters, gauges: &PoolGauges) -> Counts<'static> {
    let count = |(name, value): (&'static str, u64)| Count {
        name: name.into(),
        value,
    };
    let counts = counters.named().into_iter().chain(gauges.named());
    Counts {
        counts: counts.map(count).collect(),
    }
}
