//! How memory goes to the pools that need it: what [`Shares`] decides, done.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtide_model::NamespaceId;

use super::error::NodeError;
use super::ledger::PoolEntry;
use super::limits::Limits;
use super::shares::{Candidate, Denied, Next, Share, Shares};
use super::{Inner, State, unix_seconds};
use crate::pool::Pool;
use crate::sync::lock;

/// Between two looks at when extents were last used, which reads all records of the node; and
/// between two answers to a pool that gets nothing.
const PERIOD: Duration = Duration::from_secs(1);
/// Between two lines of the log that say that a pool gets nothing.
const TOLD_EVERY: Duration = Duration::from_secs(600);

/// When every extent was last used, as of a moment ago.
#[derive(Debug, Default)]
pub(super) struct Ages {
    /// When that was looked at.
    at: Option<Instant>,
    /// By extent; those that cannot be given up are missing.
    last_uses: BTreeMap<u32, u64>,
    /// How many extents were taken from pools so far.
    taken: u64,
}

/// What a pool was denied.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Denials {
    last: Option<Instant>,
    told: Option<Instant>,
}

/// How often the pools of a tenant got no memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DenialCounts {
    /// Because the tenant has its quota.
    pub quota: u64,
    /// Because nobody has any that is needed less.
    pub capacity: u64,
}

/// A pool, and where its extents lie.
type Extents = (Arc<Pool>, Vec<(u32, Range<u32>)>);

impl Inner {
    /// Gives a pool more memory until it has `rows` free ones, if there is any for it. Otherwise
    /// what it has must do.
    pub(super) fn make_room(&self, namespace: NamespaceId, rows: usize) {
        let Err(error) = self.grow(namespace, rows) else {
            return;
        };
        let mut state = lock(&self.state);
        let model = state.models.get_mut(&namespace);
        if model.is_some_and(|model| model.denials.note()) {
            tracing::warn!(%namespace, %error, "a model gets no more memory");
        }
    }

    fn grow(&self, namespace: NamespaceId, rows: usize) -> Result<(), NodeError> {
        loop {
            // While somebody else moves memory, a save does with what there is.
            let Ok(mut state) = self.state.try_lock() else {
                return Ok(());
            };
            let Some(model) = state.models.get(&namespace) else {
                return Ok(());
            };
            let was_denied = model.denials.last;
            if was_denied.is_some_and(|at| at.elapsed() < PERIOD)
                || model.pool.gauges().free >= rows
            {
                return Ok(());
            }
            let (shares, names) = state.shares(&self.options.limits, self.options.extent_bytes);
            let Some(asking) = names.iter().position(|name| *name == namespace) else {
                return Ok(());
            };
            let next = shares.next(asking, &state.candidates(&names));
            // What would be taken or denied depends on how old extents are.
            if next != Next::Free && !state.ages.are_fresh() {
                let (pools, taken) = (state.extents_in_use(), state.ages.taken);
                drop(state);
                self.look(pools, taken);
                continue;
            }
            let extent = match &next {
                Next::Free => state.unowned(),
                Next::Taken(candidates) => state.take(&names, candidates),
                Next::Denied(_) => None,
            };
            let Some(extent) = extent else {
                let why = match next {
                    Next::Denied(why) => why,
                    // Somebody has begun to read or write there.
                    _ => Denied::Capacity,
                };
                state.deny(namespace, why);
                return Ok(());
            };
            self.give(&mut state, namespace, extent)?;
        }
    }

    /// Takes back what tenants have beyond their quotas, which were lowered since, as far as nobody
    /// uses it.
    pub(super) fn take_excess(&self) -> Result<(), NodeError> {
        loop {
            let mut state = lock(&self.state);
            let (shares, names) = state.shares(&self.options.limits, self.options.extent_bytes);
            if !shares.any_is_over() {
                return Ok(());
            }
            if !state.ages.are_fresh() {
                let (pools, taken) = (state.extents_in_use(), state.ages.taken);
                drop(state);
                self.look(pools, taken);
                continue;
            }
            let excess = shares.excess(&state.candidates(&names));
            let Some(extent) = state.take(&names, &excess) else {
                return Ok(());
            };
            self.memory.note(&state.ledger)?;
            tracing::info!(extent, "a tenant had more than its quota");
        }
    }

    /// Gives a pool an extent that nobody has.
    fn give(
        &self,
        state: &mut State,
        namespace: NamespaceId,
        extent: u32,
    ) -> Result<(), NodeError> {
        if let Some(model) = state.models.get(&namespace) {
            model.reserve_tables(extent)?;
        }
        let mut pools = state.ledger.pools.iter_mut();
        if let Some(entry) = pools.find(|entry| entry.namespace() == namespace) {
            entry.extents.push(extent);
        }
        // Before anything lies there: the next life must not take it for another model's.
        if let Err(error) = self.memory.note(&state.ledger) {
            state.disown(extent);
            return Err(error);
        }
        if let Some(model) = state.models.get(&namespace) {
            model.pool.grow(model.rows_of(extent));
        }
        Ok(())
    }

    /// Looks when extents were last used. It reads all records of the node, so nothing is locked
    /// meanwhile.
    fn look(&self, pools: Vec<Extents>, taken: u64) {
        let mut last_uses = BTreeMap::new();
        for (pool, extents) in pools {
            for (extent, rows) in extents {
                last_uses.extend(pool.last_use(&rows).map(|last_use| (extent, last_use)));
            }
        }
        let ages = &mut lock(&self.state).ages;
        // Otherwise an extent may be another pool's by now, which has only begun to use it.
        if ages.taken == taken {
            ages.at = Some(Instant::now());
            ages.last_uses = last_uses;
        }
    }
}

impl Denials {
    /// Notes one more; whether it is to be said.
    fn note(&mut self) -> bool {
        let now = Instant::now();
        self.last = Some(now);
        let is_new = self.told.is_none_or(|at| at.elapsed() >= TOLD_EVERY);
        if is_new {
            self.told = Some(now);
        }
        is_new
    }
}

impl Ages {
    /// Whoever has an extent next has just begun to use it.
    pub(super) fn forget(&mut self, extent: u32) {
        self.last_uses.remove(&extent);
        self.taken += 1;
    }

    fn are_fresh(&self) -> bool {
        self.at.is_some_and(|at| at.elapsed() < PERIOD)
    }
}

impl State {
    fn unowned(&self) -> Option<u32> {
        let pools = &self.ledger.pools;
        let is_owned = |extent: &u32| pools.iter().any(|pool| pool.extents.contains(extent));
        (0..self.ledger.extents).find(|extent| !is_owned(extent))
    }

    fn disown(&mut self, extent: u32) {
        for entry in &mut self.ledger.pools {
            entry.extents.retain(|&each| each != extent);
        }
        self.ages.forget(extent);
    }

    /// Takes the first of these extents that its pool gives up.
    fn take(&mut self, names: &[NamespaceId], candidates: &[Candidate]) -> Option<u32> {
        let given = candidates.iter().find(|candidate| {
            let name = names.get(candidate.share);
            let model = name.and_then(|name| self.models.get(name));
            model.is_some_and(|model| model.pool.give_up(&model.rows_of(candidate.extent)))
        });
        let extent = given?.extent;
        self.disown(extent);
        Some(extent)
    }

    /// Counts, and says now and then, that a pool gets no memory.
    fn deny(&mut self, namespace: NamespaceId, why: Denied) {
        let mut pools = self.ledger.pools.iter();
        let entry = pools.find(|entry| entry.namespace() == namespace);
        let (Some(model), Some(entry)) = (self.models.get_mut(&namespace), entry) else {
            return;
        };
        let counts = self.denied.entry(entry.tenant.clone()).or_default();
        match why {
            Denied::Quota => counts.quota += 1,
            Denied::Capacity => counts.capacity += 1,
        }
        if !model.denials.note() {
            return;
        }
        let PoolEntry { model, tenant, .. } = entry;
        match why {
            Denied::Quota => tracing::warn!(
                model,
                tenant,
                %namespace,
                "a model gets no more memory: its tenant has its quota; the model evicts blocks of its own"
            ),
            Denied::Capacity if entry.extents.is_empty() => tracing::warn!(
                model,
                tenant,
                %namespace,
                "a model gets no memory: all of it is in use, pinned, or another model's minimum; nothing \
                 of the model is cached"
            ),
            // As it should be in a pool that is full.
            Denied::Capacity => tracing::info!(
                model,
                tenant,
                %namespace,
                "a model gets no more memory: what others have was used later; the model evicts blocks of \
                 its own"
            ),
        }
    }

    /// What all pools have, in numbers, and whose the numbers are.
    fn shares(&self, limits: &Limits, extent_bytes: usize) -> (Shares, Vec<NamespaceId>) {
        let mut tenants: BTreeMap<&str, usize> = BTreeMap::new();
        let mut groups: BTreeMap<(&str, Option<NamespaceId>), usize> = BTreeMap::new();
        let (mut quotas, mut minimums, mut names) = (Vec::new(), Vec::new(), Vec::new());
        let mut pools = Vec::new();
        let mut owned = 0;
        for entry in &self.ledger.pools {
            let tenant = *tenants.entry(&entry.tenant).or_insert_with(|| {
                quotas.push(limits.quota_extents(&entry.tenant, extent_bytes));
                quotas.len() - 1
            });
            let (minimum_bytes, name) = limits.minimum_of(entry);
            // Whoever is not named has a minimum of its own.
            let group = name.map_or(("", Some(entry.namespace())), |name| (name, None));
            let group = *groups.entry(group).or_insert_with(|| {
                minimums.push(Limits::extents_for(minimum_bytes, extent_bytes));
                minimums.len() - 1
            });
            let extents = u32::try_from(entry.extents.len()).unwrap_or(u32::MAX);
            owned += extents;
            names.push(entry.namespace());
            pools.push(Share {
                tenant,
                group,
                extents,
            });
        }
        let shares = Shares {
            now: unix_seconds(),
            free: self.ledger.extents.saturating_sub(owned),
            pools,
            quotas,
            minimums,
        };
        (shares, names)
    }

    /// Extents that pools could give up when they were last looked at.
    fn candidates(&self, names: &[NamespaceId]) -> Vec<Candidate> {
        let now = unix_seconds();
        let mut candidates = Vec::new();
        for entry in &self.ledger.pools {
            let share = names.iter().position(|name| *name == entry.namespace());
            let Some(share) = share.filter(|_| entry.pinned_until_unix_s <= now) else {
                continue;
            };
            for &extent in &entry.extents {
                let last_use = self.ages.last_uses.get(&extent);
                candidates.extend(last_use.map(|&last_use| Candidate {
                    share,
                    extent,
                    last_use,
                }));
            }
        }
        candidates
    }

    /// Where everything lies that could be given up.
    fn extents_in_use(&self) -> Vec<Extents> {
        let extents = |entry: &PoolEntry| {
            let model = self.models.get(&entry.namespace())?;
            let of = |&extent: &u32| (extent, model.rows_of(extent));
            let extents = entry.extents.iter().map(of).collect();
            Some((Arc::clone(&model.pool), extents))
        };
        self.ledger.pools.iter().filter_map(extents).collect()
    }
}
