//! The pool: which blocks are held, where, and who is using them.
//!
//! One pool serves all ranks of an engine, and any number of engines of one model, each with a
//! [`crate::Session`]. What is in it lies in the shared segment, where sessions look blocks up and pin
//! them by themselves ([`catalogue`]); the pool alone changes it, behind one lock that is held for
//! microseconds, some hundred for the longest prompts.
//!
//! A block enters with [`Pool::begin_save`], which hands out a slot; it can be matched from that moment
//! on, is known complete as soon as every rank has published its shard ([`Pool::poll`]), and leaves when
//! it is evicted, found damaged ([`Pool::drop_damaged`]) or cleared ([`Pool::clear`]). Every count here
//! is bounded by the number of slots.

pub(crate) mod adoption;
pub(crate) mod catalogue;
mod counters;
mod eviction;
mod free_slots;
pub(crate) mod holders;
mod index;
mod lease;
mod location;
pub(crate) mod pins;
pub(crate) mod scrub;
mod sessions;
pub(crate) mod slot_table;
mod state;

use std::ops::Range;
use std::sync::Arc;

use kvtide_model::{BlockKey, SlotRef};
use kvtide_segment::SharedSegment;

use crate::config::Eviction;
use crate::session::{SessionError, SessionId};
use crate::sync::{Mutex, lock};
use adoption::Survivor;
use catalogue::{Catalogue, HeldBlock};
use holders::SlotHolder;
use pins::HolderGuard;
use slot_table::SealedSlot;
use state::State;

pub use counters::{PoolCounters, PoolGauges};
pub use lease::{Lease, Readiness};
pub use location::{Arriving, Location, Source};

/// What happened to a block, for those who mirror what the pool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolEvent {
    /// The block is held and complete.
    Stored(BlockKey),
    /// The block is no longer held.
    Removed(BlockKey),
    /// No block is held any more.
    Cleared,
}

/// A block that an engine is to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filling {
    /// Its place in the chain.
    pub(crate) at: usize,
    /// Where it goes.
    pub(crate) slot: SlotRef,
}

/// What becomes of the blocks that an engine wants to save.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Begun {
    /// Those that it saves.
    pub(crate) filling: Vec<Filling>,
    /// Leading blocks that the pool holds or that are now being saved; the rest was not accepted.
    pub(crate) covered: usize,
}

/// How a pool behaves.
#[derive(Clone, Copy, Debug)]
pub struct PoolOptions {
    /// Eviction policy.
    pub eviction: Eviction,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Pool {
    catalogue: Arc<Catalogue>,
    state: Mutex<State>,
}

impl Pool {
    /// An empty pool over all rows of `segment`, whatever was in them before.
    #[must_use]
    pub fn new(segment: Arc<SharedSegment>, options: PoolOptions) -> Self {
        let rows = segment.geometry().rows();
        let pool = Self::without_rows(segment, options);
        pool.grow(0..rows);
        pool
    }

    /// A pool that has none of the rows of `segment` yet; a life of its memory begins.
    pub(crate) fn without_rows(segment: Arc<SharedSegment>, options: PoolOptions) -> Self {
        let catalogue = Arc::new(Catalogue::new(segment));
        catalogue.prove_nothing();
        for holder in [SlotHolder::POOL, SlotHolder::SCRUB] {
            // What the last life held when it ended, nobody holds any more.
            catalogue.slots.let_go_all(holder);
            catalogue.slots.enter(holder);
        }
        let state = Mutex::new(State::new(&catalogue, options));
        Self { catalogue, state }
    }

    /// Takes `rows`, in which nobody reads or writes, into the pool.
    pub(crate) fn grow(&self, rows: Range<u32>) {
        lock(&self.state).grow(&self.catalogue.slots, rows);
    }

    /// Takes over the rows of `extents` with what an earlier life of this memory left in them.
    pub(crate) fn adopt(&self, extents: &[Range<u32>], survivors: &[Survivor]) {
        lock(&self.state).adopt(&self.catalogue, extents, survivors);
    }

    /// Gives up `rows` with the blocks in them; whether it did.
    pub(crate) fn give_up(&self, rows: &Range<u32>) -> bool {
        lock(&self.state).give_up(&self.catalogue, rows)
    }

    /// When the blocks in `rows` were last used on average, in seconds of Unix time; `None` if they
    /// cannot be given up now.
    pub(crate) fn last_use(&self, rows: &Range<u32>) -> Option<u64> {
        lock(&self.state).last_use(&self.catalogue, rows)
    }

    /// A session of an engine in another process, which is this holder in every pool.
    pub(crate) fn open_session_as(&self, holder: SlotHolder, events: bool) -> SessionId {
        lock(&self.state).sessions.open_as(holder, events)
    }

    /// Nobody waits any more for what a session's engine, in another process, is saving.
    pub(crate) fn abandon_saves(&self, session: SessionId) {
        lock(&self.state).abandon(&self.catalogue, session);
    }

    /// Ends a session of an engine in another process, none of whose processes is left.
    pub(crate) fn close_session_elsewhere(&self, session: SessionId) {
        lock(&self.state).close_elsewhere(&self.catalogue, session);
    }

    /// Keeps all blocks, and those that come, from eviction until then, in seconds of Unix time.
    pub(crate) fn pin_until(&self, unix_s: u64) {
        lock(&self.state).pinned_until = unix_s;
    }

    /// The first row of the pool's from `row` on, or else its first of all.
    pub(crate) fn next_row(&self, row: u32) -> Option<u32> {
        let state = lock(&self.state);
        let first = |from: u32| {
            let rows = state.rows.iter().filter(|rows| rows.end > from);
            rows.map(|rows| rows.start.max(from)).min()
        };
        first(row).or_else(|| first(0))
    }

    /// Shows every block that is held or being saved.
    pub(crate) fn each_block(&self, see: &mut dyn FnMut(HeldBlock)) {
        let rows = lock(&self.state).rows.clone();
        let slots = rows.into_iter().flatten();
        slots
            .filter_map(|slot| self.catalogue.block(slot))
            .for_each(see);
    }

    /// Rows that may be free in a full pool, so that chains that begin find some that lie together.
    pub(crate) fn spare_rows(&self) -> usize {
        lock(&self.state).spare()
    }

    /// Blocks that a session is saving.
    pub(crate) fn saving_blocks_of(&self, session: SessionId) -> usize {
        lock(&self.state).sessions.saving_blocks_of(session)
    }

    pub(crate) fn open_session(
        &self,
        events: bool,
    ) -> Result<(SessionId, HolderGuard), SessionError> {
        lock(&self.state).sessions.open(events)
    }

    pub(crate) fn close_session(&self, session: SessionId) {
        lock(&self.state).close(&self.catalogue, session);
    }

    /// Hands out slots for `blocks` blocks of `chain` from `from` on, as far as the pool does not hold
    /// them already; those that it holds are marked as used.
    pub(crate) fn begin_save(
        &self,
        session: SessionId,
        chain: &[BlockKey],
        from: usize,
        blocks: usize,
    ) -> Begun {
        let mut state = lock(&self.state);
        // Rows that nobody holds any more are of use now.
        state.poll(&self.catalogue);
        let end = chain.len().min(from + blocks);
        let (held, missing) = state.divide(chain, from, end);
        state.used(&self.catalogue, &held);
        let earlier = &chain[..from.min(end)];
        let filling = state.fill(&self.catalogue, session, earlier, &held, &missing);
        state.counters.throttled_blocks += (missing.len() - filling.len()) as u64;
        let refused = missing.get(filling.len()).map(|missing| missing.at);
        Begun {
            filling,
            covered: refused.unwrap_or(end).saturating_sub(from),
        }
    }

    /// Marks blocks as used, so that they are given up later. A lookup is no use, a load is: many a
    /// lookup is put off or asked again.
    pub(crate) fn mark_used(&self, used: &[SlotRef]) {
        lock(&self.state).used_if_held(&self.catalogue, used);
    }

    /// Nothing follows in `chain` for now: its tail goes before its head, although the head was
    /// saved first.
    pub(crate) fn settle(&self, chain: &[BlockKey]) {
        lock(&self.state).settle(chain);
    }

    /// Takes note of the saves that workers have finished since the last call.
    pub fn poll(&self) {
        lock(&self.state).poll(&self.catalogue);
    }

    /// Drops blocks whose bytes were found damaged. Stale references are ignored.
    ///
    /// Requests that hold such a block already find the damage when they load it.
    pub(crate) fn drop_damaged(&self, damaged: &[SlotRef]) {
        let mut state = lock(&self.state);
        for &slot in damaged {
            state.drop_damaged(&self.catalogue.slots, slot);
        }
    }

    /// Drops a damaged block unless somebody has pinned it: a match that vLLM was told of cannot be
    /// taken back. Its load will find the damage, or the next scrub.
    pub(crate) fn drop_if_unused(&self, slot: SealedSlot) {
        let mut state = lock(&self.state);
        if let Some(free) = self.catalogue.slots.evict(slot) {
            state.forget(slot.slot_ref().slot);
            state.counters.damaged_blocks += 1;
            state.free.put(free);
        }
    }

    /// Drops every block. Those that are held or being saved go as soon as they no longer are.
    pub(crate) fn clear(&self) {
        lock(&self.state).clear(&self.catalogue);
    }

    /// What a session has not been told yet, oldest first.
    pub(crate) fn take_events(&self, session: SessionId) -> Vec<PoolEvent> {
        lock(&self.state).sessions.take_events(session)
    }

    pub(crate) fn note_scrubbed(&self) {
        lock(&self.state).counters.scrubbed_blocks += 1;
    }

    /// Totals since the pool was made.
    #[must_use]
    pub fn counters(&self) -> PoolCounters {
        lock(&self.state).counters
    }

    /// What the pool holds now.
    #[must_use]
    pub fn gauges(&self) -> PoolGauges {
        let mut state = lock(&self.state);
        state.poll(&self.catalogue);
        let geometry = self.catalogue.segment.geometry();
        PoolGauges {
            slots: state.free.owned(),
            free: state.free.len(),
            saving: state.sessions.saving_blocks(),
            held: state.index.len(),
            index_bytes: state.policy.allocated_bytes()
                + state.free.allocated_bytes()
                + geometry.table_bytes(),
        }
    }

    /// The segment behind the pool.
    #[must_use]
    pub fn segment(&self) -> &Arc<SharedSegment> {
        &self.catalogue.segment
    }

    pub(crate) fn catalogue(&self) -> &Arc<Catalogue> {
        &self.catalogue
    }
}
