//! The pool: which blocks are held, where, and who is using them.
//!
//! One pool serves all ranks of an engine, and any number of engines, each with a
//! [`crate::Session`]. It lives in the process of vLLM's scheduler and is called on its thread,
//! without the GIL; leases are dropped and rows are scrubbed from other threads. All
//! structure is behind one lock that is held for microseconds, some hundred for the longest prompts;
//! what a worker or a lease changes is atomic (`slot_table`) or lies in the shared segment.
//!
//! A block enters with [`crate::Session::begin_save`], which hands out a slot and a plan for the workers; it
//! can be matched from that moment on ([`Pool::lookup`]), is known complete as soon as every rank
//! has published its shard ([`Pool::poll`]), and leaves when it is evicted, found damaged
//! ([`Pool::drop_damaged`]) or cleared ([`crate::Session::clear`]). Every count here is bounded by the number of slots.

mod counters;
mod eviction;
mod free_slots;
mod index;
mod lease;
mod saves;
pub(crate) mod scrub;
mod sessions;
pub(crate) mod slot_table;
mod state;

use std::sync::Arc;
use std::time::Duration;

use kvtide_model::{BlockKey, BlockMove, NamespaceId, SlotRef};
use kvtide_segment::{ShardStatus, SharedSegment};

use crate::config::Eviction;
use crate::session::{SessionError, SessionId};
use crate::sync::{Mutex, lock};
use saves::InFlightSaves;
use slot_table::{FillingSlot, SealedSlot, SlotTable};
use state::State;

pub use counters::{PoolCounters, PoolGauges};
pub use lease::{Lease, Readiness};

/// What happened to a block of a session's namespace, for those who mirror what the pool has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolEvent {
    /// The block is held and complete.
    Stored(BlockKey),
    /// The block is no longer held.
    Removed(BlockKey),
    /// No block of the namespace is held any more.
    Cleared,
}

/// A run of matched blocks.
#[derive(Debug)]
pub struct Match {
    /// Pins on them.
    pub lease: Lease,
    /// Whether all of them are complete; otherwise some are still being saved.
    pub complete: bool,
}

/// A save that workers are to carry out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavePlan {
    /// The job's id; 0 when there is nothing to do.
    pub job: u64,
    /// What to copy.
    pub moves: Vec<BlockMove>,
    /// Leading blocks that the pool holds or is now saving; the rest was not accepted, because too
    /// much is in flight or pinned.
    pub covered: usize,
}

/// How a pool behaves.
#[derive(Clone, Copy, Debug)]
pub struct PoolOptions {
    /// Eviction policy.
    pub eviction: Eviction,
    /// How long a match is held for a request that is not scheduled.
    pub lease_ttl: Duration,
}

/// Everything that a lease needs to outlive the pool's handle.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) slots: SlotTable,
    pub(crate) segment: Arc<SharedSegment>,
    state: Mutex<State>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    lease_ttl: Duration,
}

impl Pool {
    /// An empty pool over all rows of `segment`.
    #[must_use]
    pub fn new(segment: Arc<SharedSegment>, options: PoolOptions) -> Self {
        let rows = segment.geometry().rows();
        let (slots, every_slot) = SlotTable::new(rows);
        let state = State::new(rows, every_slot, options);
        let shared = Arc::new(Shared {
            slots,
            segment,
            state: Mutex::new(state),
        });
        Self {
            shared,
            lease_ttl: options.lease_ttl,
        }
    }

    /// Pins the longest run of `keys`, from the first on, that the pool holds or is saving.
    ///
    /// The run ends at the first block that is missing, because what follows cannot be used
    /// without it.
    #[must_use]
    pub fn lookup(&self, keys: &[BlockKey]) -> Match {
        let mut pinned = Vec::with_capacity(keys.len());
        let mut complete = true;
        {
            let mut state = lock(&self.shared.state);
            // What has been saved meanwhile is complete now.
            state.poll(&self.shared);
            for &key in keys {
                let Some(slot) = state.index.find(key) else {
                    break;
                };
                let Some((slot, sealed)) = self.shared.slots.pin_current(slot) else {
                    break;
                };
                complete &= sealed;
                pinned.push(slot);
            }
            let slots: Vec<u32> = pinned.iter().map(|slot| slot.slot).collect();
            state.used(&slots);
        }
        let lease = Lease::new(Arc::clone(&self.shared), pinned, self.lease_ttl);
        Match { lease, complete }
    }

    pub(crate) fn open_session(
        &self,
        namespace: NamespaceId,
        events: bool,
    ) -> Result<SessionId, SessionError> {
        let mut state = lock(&self.shared.state);
        state.sessions.open(namespace, events)
    }

    pub(crate) fn close_session(&self, session: SessionId) {
        lock(&self.shared.state).close(&self.shared, session);
    }

    /// See [`crate::Session::begin_save`].
    pub(crate) fn begin_save(
        &self,
        session: SessionId,
        chain: &[BlockKey],
        from: usize,
        blocks: &[u32],
    ) -> SavePlan {
        let mut state = lock(&self.shared.state);
        let Some(namespace) = state.sessions.namespace(session) else {
            return SavePlan::default();
        };
        let end = chain.len().min(from + blocks.len());
        let (held, missing) = state.divide(chain, from, blocks);
        state.used(&held);
        let earlier = &chain[..from.min(end)];
        let filling = state.fill(&self.shared.slots, namespace, earlier, &held, &missing);
        state.counters.throttled_blocks += (missing.len() - filling.len()) as u64;
        let refused = missing.get(filling.len()).map(|missing| missing.at);
        let move_into = |(slot, block): &(FillingSlot, u32)| BlockMove {
            slot: slot.slot_ref(),
            block: *block,
        };
        SavePlan {
            moves: filling.iter().map(move_into).collect(),
            covered: refused.unwrap_or(end).saturating_sub(from),
            job: match state.sessions.saves_mut(session) {
                Some(saves) if !filling.is_empty() => saves.begin(filling),
                _ => 0,
            },
        }
    }

    /// Nothing follows in `chain` for now: its tail goes before its head, although the head was
    /// saved first.
    pub fn settle(&self, chain: &[BlockKey]) {
        lock(&self.shared.state).settle(chain);
    }

    /// See [`crate::Session::saves_reading`].
    pub(crate) fn saves_reading(&self, session: SessionId, blocks: &[u32]) -> Vec<u64> {
        let state = lock(&self.shared.state);
        let saves = state.sessions.saves(session);
        saves.map_or_else(Vec::new, |saves| saves.reading(blocks))
    }

    /// Takes note of the saves that workers have finished since the last call.
    pub fn poll(&self) {
        lock(&self.shared.state).poll(&self.shared);
    }

    /// See [`crate::Session::poll`].
    pub(crate) fn poll_session(&self, session: SessionId) -> usize {
        let mut state = lock(&self.shared.state);
        state.poll(&self.shared);
        state
            .sessions
            .saves(session)
            .map_or(0, InFlightSaves::blocks)
    }

    /// Drops blocks whose bytes were found damaged. Stale references are ignored.
    ///
    /// Requests that hold such a block already find the damage when they load it.
    pub fn drop_damaged(&self, damaged: &[SlotRef]) {
        let mut state = lock(&self.shared.state);
        for &slot in damaged {
            if self.shared.slots.doom(slot) {
                state.forget(slot.slot);
                state.counters.damaged_blocks += 1;
                state.release(&self.shared.slots, slot);
            }
        }
    }

    /// Drops a damaged block unless somebody has pinned it: a match that vLLM was told of cannot be
    /// taken back. Its load will find the damage, or the next scrub.
    pub(crate) fn drop_if_unused(&self, slot: SealedSlot) {
        let mut state = lock(&self.shared.state);
        if let Some(free) = self.shared.slots.evict(slot) {
            state.forget(slot.slot_ref().slot);
            state.counters.damaged_blocks += 1;
            state.free.put(free);
        }
    }

    /// Place of the first leased block whose bytes do not have their checksum.
    ///
    /// The block is dropped, unless a match that vLLM was told of holds it as well and cannot be
    /// taken back.
    #[must_use]
    pub fn first_damaged(&self, lease: &Lease) -> Option<usize> {
        let at = lease
            .slots()
            .iter()
            .position(|&slot| !self.shared.bytes_match(slot))?;
        let slot = lease.slots()[at];
        let mut state = lock(&self.shared.state);
        if self.shared.slots.doom_if_pinned_once(slot) {
            state.forget(slot.slot);
            state.counters.damaged_blocks += 1;
        }
        Some(at)
    }

    /// See [`crate::Session::clear`].
    pub(crate) fn clear_namespace_of(&self, session: SessionId) {
        let mut state = lock(&self.shared.state);
        if let Some(namespace) = state.sessions.namespace(session) {
            state.clear(&self.shared, namespace);
        }
    }

    /// See [`crate::Session::take_events`].
    pub(crate) fn take_events(&self, session: SessionId) -> Vec<PoolEvent> {
        lock(&self.shared.state).sessions.take_events(session)
    }

    /// Totals since the pool was made.
    #[must_use]
    pub fn counters(&self) -> PoolCounters {
        lock(&self.shared.state).counters
    }

    /// What the pool holds now.
    #[must_use]
    pub fn gauges(&self) -> PoolGauges {
        let state = lock(&self.shared.state);
        PoolGauges {
            slots: self.shared.slots.len(),
            free: state.free.len(),
            saving: state.sessions.saving_blocks(),
            held: state.index.len(),
            index_bytes: state.index.allocated_bytes()
                + state.policy.allocated_bytes()
                + state.free.allocated_bytes()
                + self.shared.slots.allocated_bytes()
                + self.shared.segment.geometry().table_bytes(),
        }
    }

    /// The segment behind the pool.
    #[must_use]
    pub fn segment(&self) -> &Arc<SharedSegment> {
        &self.shared.segment
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Shared {
    /// Returns pins; frees the doomed slots that lost their last one.
    fn unpin(&self, slots: &[SlotRef]) {
        for &slot in slots {
            if self.slots.unpin(slot) {
                let mut state = lock(&self.state);
                state.release(&self.slots, slot);
            }
        }
    }

    /// Whether every shard of `slot` was completely written and not found damaged.
    fn is_intact(&self, slot: SlotRef) -> bool {
        (0..self.segment.geometry().ranks()).all(|rank| {
            self.segment
                .shard_state(slot.slot, rank)
                .is_some_and(|state| {
                    state.generation == slot.generation && state.status == ShardStatus::Sealed
                })
        })
    }

    /// Whether the bytes of `slot`, which the caller has pinned, have their checksums.
    pub(crate) fn bytes_match(&self, slot: SlotRef) -> bool {
        (0..self.segment.geometry().ranks()).all(|rank| {
            let state = self.segment.shard_state(slot.slot, rank);
            state.is_some_and(|state| {
                state.generation == slot.generation
                    && state.status == ShardStatus::Sealed
                    && self.segment.compute_checksum(slot.slot, rank) == Some(state.checksum)
            })
        })
    }
}
