//! What the pool keeps of every engine that uses it.

use std::collections::BTreeMap;

use kvtide_model::NamespaceId;
use kvtide_segment::SharedSegment;

use super::PoolEvent;
use super::saves::{InFlightSaves, Saved};
use super::slot_table::FillingSlot;
use crate::session::{SessionError, SessionId};

/// Engines that a pool serves at once: more than a node has GPUs, and few enough to look at each of
/// them whenever saves are collected.
const SESSIONS_MAX: usize = 256;
/// Events kept for a session that stopped taking them.
const EVENTS_MAX: usize = 1 << 18;

/// A namespace by the number that the pool gave it, which is what a slot notes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NamespaceNumber(u32);

#[derive(Debug)]
struct SessionState {
    namespace: NamespaceNumber,
    saves: InFlightSaves,
    /// `None` if the session is told nothing.
    events: Option<Vec<PoolEvent>>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    open: BTreeMap<SessionId, SessionState>,
    opened: u64,
    /// Every namespace that a session ever had; its place is its number.
    namespaces: Vec<NamespaceId>,
}

impl Sessions {
    pub(super) fn open(
        &mut self,
        namespace: NamespaceId,
        events: bool,
    ) -> Result<SessionId, SessionError> {
        if self.open.len() >= SESSIONS_MAX {
            return Err(SessionError::TooMany { max: SESSIONS_MAX });
        }
        self.opened += 1;
        let state = SessionState {
            namespace: self.number(namespace),
            saves: InFlightSaves::default(),
            events: events.then(Vec::new),
        };
        let id = SessionId::new(self.opened);
        self.open.insert(id, state);
        Ok(id)
    }

    /// Forgets a session; the slots that it was filling.
    pub(super) fn close(&mut self, id: SessionId) -> Vec<FillingSlot> {
        let closed = self.open.remove(&id);
        closed.map_or_else(Vec::new, |state| state.saves.into_slots())
    }

    /// The namespace of a session that is open.
    pub(super) fn namespace(&self, id: SessionId) -> Option<NamespaceNumber> {
        self.open.get(&id).map(|state| state.namespace)
    }

    /// A session's saves.
    pub(super) fn saves(&self, id: SessionId) -> Option<&InFlightSaves> {
        self.open.get(&id).map(|state| &state.saves)
    }

    /// The same, to begin one.
    pub(super) fn saves_mut(&mut self, id: SessionId) -> Option<&mut InFlightSaves> {
        self.open.get_mut(&id).map(|state| &mut state.saves)
    }

    /// Blocks in flight, of all sessions.
    pub(super) fn saving_blocks(&self) -> usize {
        self.open.values().map(|state| state.saves.blocks()).sum()
    }

    /// Takes out the saves that have ended, of every session by itself: one that has stopped hides
    /// nobody else's.
    pub(super) fn collect(&mut self, segment: &SharedSegment) -> Vec<Saved> {
        let mut ended = Vec::new();
        for state in self.open.values_mut() {
            state.saves.collect(segment, |saved| ended.push(saved));
        }
        ended
    }

    /// Notes what happened to a block, for the sessions of its namespace.
    pub(super) fn record(&mut self, namespace: NamespaceNumber, event: PoolEvent) {
        let told = self.open.values_mut();
        for state in told.filter(|state| state.namespace == namespace) {
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

    /// The number of a namespace. Those of sessions that ended keep theirs, for their blocks stay;
    /// an entry takes 16 bytes, and an operator has not many models.
    fn number(&mut self, namespace: NamespaceId) -> NamespaceNumber {
        let known = self.namespaces.iter().position(|&each| each == namespace);
        let place = known.unwrap_or_else(|| {
            self.namespaces.push(namespace);
            self.namespaces.len() - 1
        });
        NamespaceNumber(u32::try_from(place).unwrap_or(u32::MAX))
    }
}
