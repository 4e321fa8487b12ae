//! What the pool keeps of every engine that uses it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::PoolEvent;
use super::catalogue::Catalogue;
use super::holders::SlotHolder;
use super::location::Location;
use super::pins::HolderGuard;
use super::slot_table::FillingSlot;
use crate::session::{SessionError, SessionId};
use crate::sync::{Mutex, lock};

/// How long a save may be unbegun. Its engine, in another process, may not have heard of it: the answer
/// was lost with a connection, or came too late.
const UNBEGUN_MAX_S: u64 = 10;
/// Events kept for a session that stopped taking them.
const EVENTS_MAX: usize = 1 << 18;

#[derive(Debug)]
struct SessionState {
    holder: SlotHolder,
    /// What the engine fills, in the order in which its workers do.
    fillings: VecDeque<FillingSlot>,
    /// Whether the engine may never have heard of them: it is in another process.
    is_elsewhere: bool,
    /// `None` if the session is told nothing.
    events: Option<Vec<PoolEvent>>,
}

/// How the save of one block ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Saved {
    Complete(FillingSlot),
    Failed(FillingSlot),
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    open: BTreeMap<SessionId, SessionState>,
    opened: u64,
    /// Holders that are given out: also those of sessions that have ended, as long as something is
    /// pinned by them.
    holders: Arc<Mutex<Vec<SlotHolder>>>,
}

impl Sessions {
    pub(super) fn open(&mut self, events: bool) -> Result<(SessionId, HolderGuard), SessionError> {
        let holder = {
            let mut given = lock(&self.holders);
            let mut all = (0..).map_while(SlotHolder::of_session);
            let free = all.find(|holder| !given.contains(holder));
            let max = SlotHolder::SESSIONS;
            let holder = free.ok_or(SessionError::TooMany { max })?;
            given.push(holder);
            holder
        };
        let given = Some(Arc::clone(&self.holders));
        let guard = HolderGuard { holder, given };
        Ok((self.add(holder, events, false), guard))
    }

    /// A session of an engine in another process, which is this holder in every pool.
    pub(super) fn open_as(&mut self, holder: SlotHolder, events: bool) -> SessionId {
        self.add(holder, events, true)
    }

    fn add(&mut self, holder: SlotHolder, events: bool, is_elsewhere: bool) -> SessionId {
        self.opened += 1;
        let id = SessionId::new(self.opened);
        let state = SessionState {
            holder,
            fillings: VecDeque::new(),
            is_elsewhere,
            events: events.then(Vec::new),
        };
        self.open.insert(id, state);
        id
    }

    /// What a session that is open holds slots as.
    pub(super) fn holder(&self, id: SessionId) -> Option<SlotHolder> {
        self.open.get(&id).map(|state| state.holder)
    }

    /// What a session that is open fills.
    pub(super) fn fillings(&self, id: SessionId) -> impl Iterator<Item = &FillingSlot> {
        self.open.get(&id).into_iter().flat_map(|s| &s.fillings)
    }

    /// Blocks in flight of one session.
    pub(super) fn saving_blocks_of(&self, id: SessionId) -> usize {
        self.open.get(&id).map_or(0, |state| state.fillings.len())
    }

    /// Forgets a session; the slots that it was filling.
    pub(super) fn close(&mut self, id: SessionId) -> VecDeque<FillingSlot> {
        let closed = self.open.remove(&id);
        closed.map(|state| state.fillings).unwrap_or_default()
    }

    /// Notes what a session fills from now on.
    pub(super) fn fill(&mut self, id: SessionId, fillings: Vec<FillingSlot>) {
        if let Some(state) = self.open.get_mut(&id) {
            state.fillings.extend(fillings);
        }
    }

    /// Blocks in flight, of all sessions.
    pub(super) fn saving_blocks(&self) -> usize {
        self.open.values().map(|state| state.fillings.len()).sum()
    }

    /// Takes out the saves that have ended, of every session by itself: one that has stopped hides
    /// nobody else's. If `all` are looked at, one that does not end hides none behind it either, and
    /// those that nobody has begun for long are refused: `now` is in seconds of Unix time.
    pub(super) fn collect(&mut self, catalogue: &Catalogue, all: bool, now: u64) -> Vec<Saved> {
        let mut ended = Vec::new();
        for state in self.open.values_mut() {
            if all {
                for filling in std::mem::take(&mut state.fillings) {
                    match catalogue.saved(filling.slot_ref()) {
                        Location::Memory => ended.push(Saved::Complete(filling)),
                        Location::Lost => ended.push(Saved::Failed(filling)),
                        Location::Arriving(_) => {
                            let slot = filling.slot_ref();
                            let age = now.saturating_sub(catalogue.used_at(slot.slot));
                            if state.is_elsewhere && age > UNBEGUN_MAX_S {
                                catalogue.refuse(slot);
                            }
                            state.fillings.push_back(filling);
                        }
                    }
                }
                continue;
            }
            while let Some(filling) = state.fillings.front() {
                let how: fn(FillingSlot) -> Saved = match catalogue.saved(filling.slot_ref()) {
                    Location::Arriving(_) => break,
                    Location::Memory => Saved::Complete,
                    Location::Lost => Saved::Failed,
                };
                ended.extend(state.fillings.pop_front().map(how));
            }
        }
        ended
    }

    /// Notes what happened to a block, for the sessions that are told.
    pub(super) fn record(&mut self, event: PoolEvent) {
        for state in self.open.values_mut() {
            let Some(events) = &mut state.events else {
                continue;
            };
            if events.len() >= EVENTS_MAX {
                // The consumer has lost track of the pool; tell it so, once.
                events.clear();
                events.push(PoolEvent::Cleared);
            }
            events.push(event);
        }
    }

    /// What a session has not been told yet.
    pub(super) fn take_events(&mut self, id: SessionId) -> Vec<PoolEvent> {
        let events = self.open.get_mut(&id).and_then(|s| s.events.as_mut());
        events.map(std::mem::take).unwrap_or_default()
    }
}
