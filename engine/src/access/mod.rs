//! The one seam between an engine and the pool that it uses: what changes the pool goes through here.
//!
//! What only reads it does not: an engine looks up, pins and loads by itself, in the pool's memory
//! ([`crate::pool::catalogue`]).

mod local;
#[cfg(not(loom))]
mod socket;

use std::fmt::Debug;

use kvtide_model::{BlockKey, SlotRef};

use crate::pool::pins::Pins;
use crate::pool::{Begun, PoolCounters, PoolEvent, PoolGauges};

pub(crate) use local::LocalAccess;
#[cfg(not(loom))]
pub(crate) use socket::SocketAccess;
#[cfg(not(loom))]
pub use socket::{AttachError, AttachOptions, Attachment};

/// Blocks that an engine wants to save.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// Keys from the beginning of the chain.
    pub(crate) chain: &'a [BlockKey],
    /// The first block to save.
    pub(crate) from: usize,
    /// How many.
    pub(crate) blocks: usize,
}

/// A sentence for the engine's log.
pub(crate) type Notice = String;

/// A pool, as one session reaches it.
pub(crate) trait Access: Send + Sync + Debug {
    /// Whether what is found in the pool's memory may be used.
    fn is_readable(&self) -> bool {
        true
    }

    /// Whether the pool has other memory than the session, because its daemon has come or made it anew.
    fn has_new_memory(&self) -> bool {
        false
    }

    /// Goes over to that memory; nothing of the last one is in use any more.
    fn take_new_memory(&self) -> Option<Pins> {
        None
    }

    /// Hands out slots for what the pool does not hold already, one answer for each that is wanted.
    fn begin_saves(&self, wanted: &[Wanted<'_>]) -> Vec<Begun>;

    /// Marks blocks as used.
    fn mark_used(&self, used: &[SlotRef]);

    /// Nothing follows in `chain` for now.
    fn settle(&self, chain: &[BlockKey]);

    /// Drops blocks whose bytes were found damaged. Stale references are ignored.
    fn drop_damaged(&self, damaged: &[SlotRef]);

    /// Drops every block of the session's namespace; no lookup of this session finds one of them
    /// afterwards. Whether the pool knows: a daemon that is gone hears of it when this engine is
    /// attached again, and not if it ends before.
    fn clear(&self) -> bool;

    /// Takes note of the saves that workers have finished since the last call.
    fn poll(&self);

    /// What happened since the last call, oldest first.
    fn take_events(&self) -> Vec<PoolEvent>;

    /// Totals since the pool was made.
    fn counters(&self) -> PoolCounters;

    /// What the pool holds now.
    fn gauges(&self) -> PoolGauges;

    /// What is to be said in the engine's log since the last call.
    fn take_notices(&self) -> Vec<Notice> {
        Vec::new()
    }
}
