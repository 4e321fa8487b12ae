//! How memory goes to the models that need it.
//!
//! What nobody has goes to whoever asks first. Then an extent is taken from the model whose extent was
//! longest out of use, if that is longer than what the asking model would have to give up of its own:
//! as if all models had one queue, in pieces of an extent.

use std::time::{Duration, Instant};

use kvtide_model::NamespaceId;

use super::error::NodeError;
use super::{Inner, State};

/// Between two looks at who could give up an extent: each reads all records of the node.
const TAKING_PERIOD: Duration = Duration::from_secs(1);
/// So many seconds longer out of use than what the asking model has itself, or it is not taken: what
/// two models use alike would go back and forth.
const LONGER_S: u64 = 10;

/// An extent that its model can give up.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    namespace: NamespaceId,
    extent: u32,
    last_use: u64,
}

impl Inner {
    /// Gives a model more memory until it has `rows` free ones, if there is any for it.
    pub(super) fn make_room(&self, namespace: NamespaceId, rows: usize) -> Result<(), NodeError> {
        // While somebody else looks at everything, a save does with what there is.
        let Ok(mut state) = self.state.try_lock() else {
            return Ok(());
        };
        loop {
            let Some(model) = state.models.get(&namespace) else {
                return Ok(());
            };
            if model.pool.gauges().free >= rows || !self.grow(&mut state, namespace)? {
                return Ok(());
            }
        }
    }

    /// Gives a model one extent more; whether there was one.
    fn grow(&self, state: &mut State, namespace: NamespaceId) -> Result<bool, NodeError> {
        let extent = match state.unowned() {
            Some(extent) => extent,
            None => match self.take(state, namespace)? {
                Some(extent) => extent,
                None => return Ok(false),
            },
        };
        if let Some(model) = state.models.get(&namespace) {
            model.reserve_tables(extent)?;
        }
        let mut pools = state.ledger.pools.iter_mut();
        if let Some(entry) = pools.find(|entry| entry.namespace() == namespace) {
            entry.extents.push(extent);
        }
        // Before anything lies there: the next life must not take it for another model's.
        if let Err(error) = self.memory.note(&state.ledger) {
            for entry in &mut state.ledger.pools {
                entry.extents.retain(|&each| each != extent);
            }
            return Err(error);
        }
        if let Some(model) = state.models.get(&namespace) {
            model.pool.grow(model.rows_of(extent));
        }
        Ok(true)
    }

    /// Takes an extent from a model that needs it less than `namespace`, which may be none.
    fn take(&self, state: &mut State, namespace: NamespaceId) -> Result<Option<u32>, NodeError> {
        if state
            .last_taken
            .is_some_and(|at| at.elapsed() < TAKING_PERIOD)
        {
            return Ok(None);
        }
        state.last_taken = Some(Instant::now());
        let mut others = state.candidates(|entry| {
            let has = entry.extents.len() * self.options.extent_bytes;
            entry.namespace() != namespace
                && has >= self.options.minimum_bytes + self.options.extent_bytes
        });
        if others.is_empty() {
            return Ok(None);
        }
        others.sort_unstable_by_key(|candidate| candidate.last_use);
        let own = state.candidates(|entry| entry.namespace() == namespace);
        let own = own.iter().map(|candidate| candidate.last_use).min();
        let has_any = state.extents_of(namespace) > 0;
        let gives = |candidate: &&Candidate| match own {
            Some(own) => candidate.last_use + LONGER_S < own,
            // All of its own is in use just now, or it has nothing at all.
            None => !has_any || candidate.last_use + LONGER_S < super::unix_seconds(),
        };
        for candidate in others.iter().filter(gives) {
            let Some(model) = state.models.get(&candidate.namespace) else {
                continue;
            };
            if !model.pool.give_up(&model.rows_of(candidate.extent)) {
                continue; // Somebody has begun to read or write there.
            }
            for entry in &mut state.ledger.pools {
                entry.extents.retain(|&extent| extent != candidate.extent);
            }
            state.last_taken = None;
            return Ok(Some(candidate.extent));
        }
        Ok(None)
    }
}

impl State {
    fn unowned(&self) -> Option<u32> {
        let pools = &self.ledger.pools;
        let is_owned = |extent: &u32| pools.iter().any(|pool| pool.extents.contains(extent));
        (0..self.ledger.extents).find(|extent| !is_owned(extent))
    }

    pub(super) fn extents_of(&self, namespace: NamespaceId) -> usize {
        let mut pools = self.ledger.pools.iter();
        pools
            .find(|entry| entry.namespace() == namespace)
            .map_or(0, |entry| entry.extents.len())
    }

    /// Extents that the models could give up that `of` says.
    fn candidates(&self, of: impl Fn(&super::ledger::PoolEntry) -> bool) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for entry in self.ledger.pools.iter().filter(|entry| of(entry)) {
            let namespace = entry.namespace();
            let Some(model) = self.models.get(&namespace) else {
                continue;
            };
            for &extent in &entry.extents {
                let last_use = model.pool.last_use(&model.rows_of(extent));
                candidates.extend(last_use.map(|last_use| Candidate {
                    namespace,
                    extent,
                    last_use,
                }));
            }
        }
        candidates
    }
}
