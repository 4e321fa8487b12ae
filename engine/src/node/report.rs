//! What a node says of itself, and does at an operator's word.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvtide_model::wire::{Geometry, Role};
use kvtide_model::{BlockKey, NamespaceId, SlotRef};

use super::error::NodeError;
use super::growth::DenialCounts;
use super::ledger::PoolEntry;
use super::{Inner, Node, State, unix_seconds};
use crate::pool::{Pool, PoolCounters, PoolGauges};
use crate::sync::lock;

/// Everything.
#[derive(Clone, Debug)]
pub struct NodeReport {
    /// Drawn anew whenever a daemon opens the memory.
    pub boot: [u8; 16],
    /// Bytes for rows.
    pub capacity_bytes: u64,
    /// Bytes of an extent.
    pub extent_bytes: u64,
    /// Extents that no model has.
    pub free_extents: u32,
    /// Models.
    pub models: Vec<ModelReport>,
    /// Tenants that have a pool or a quota, by their names.
    pub tenants: Vec<TenantReport>,
    /// Engines.
    pub engines: Vec<EngineReport>,
}

/// The pool of one model, for one tenant.
#[derive(Clone, Debug)]
pub struct ModelReport {
    /// Whose blocks they are.
    pub namespace: NamespaceId,
    /// The model, as the engine names it that came first.
    pub model: String,
    /// The tenant.
    pub tenant: String,
    /// Group of the model's KV cache.
    pub group: u16,
    /// What a block is.
    pub geometry: Geometry,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// Extents that are its own.
    pub extents: u32,
    /// What it holds.
    pub gauges: PoolGauges,
    /// What was counted.
    pub counters: PoolCounters,
    /// Blocks that engines hold.
    pub pinned_blocks: u64,
    /// Until when an operator keeps it from eviction, in seconds of Unix time; not in the past.
    pub pinned_until_unix_s: Option<u64>,
    /// What is not taken from it, and from others of the same name in [`super::Limits::minimums`].
    pub minimum_bytes: u64,
}

/// One tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TenantReport {
    /// Its name; empty for engines that have none.
    pub tenant: String,
    /// What it may have; `None` if that is as much as there is.
    pub quota_bytes: Option<u64>,
    /// Bytes of the extents that its pools have.
    pub bytes: u64,
    /// Blocks in them.
    pub held_blocks: u64,
    /// How often its pools got no memory, since it has one.
    pub denied: DenialCounts,
}

/// One engine.
#[derive(Clone, Debug)]
pub struct EngineReport {
    /// Its number.
    pub number: u8,
    /// Its own name.
    pub engine_id: String,
    /// What it runs.
    pub client: String,
    /// On whose behalf it runs.
    pub tenant: String,
    /// Whose blocks it uses.
    pub namespace: NamespaceId,
    /// When it came, in seconds of Unix time.
    pub since_unix_s: u64,
    /// Whether its scheduler is connected.
    pub attached: bool,
    /// Its processes that are connected.
    pub processes: Vec<ProcessReport>,
    /// Blocks that it holds.
    pub pinned_blocks: u64,
    /// Blocks that it is saving.
    pub saving_blocks: u64,
}

/// One process of an engine.
#[derive(Clone, Copy, Debug)]
pub struct ProcessReport {
    /// What it is.
    pub role: Role,
    /// 0 where the daemon cannot see it.
    pub pid: u32,
    /// The user that it runs as.
    pub uid: u32,
}

/// One block.
#[derive(Clone, Copy, Debug)]
pub struct BlockReport {
    /// Its key.
    pub key: BlockKey,
    /// Whose it is.
    pub namespace: NamespaceId,
    /// Where it lies.
    pub slot: SlotRef,
    /// Whether it is still being saved.
    pub saving: bool,
    /// Engines that hold it.
    pub pins: u32,
    /// Bytes of its row.
    pub bytes: u64,
}

/// What was dropped.
#[derive(Clone, Copy, Debug, Default)]
pub struct PurgeReport {
    /// Blocks.
    pub blocks: u64,
    /// Bytes of their rows.
    pub bytes: u64,
    /// Those among them whose rows are free later, since an engine reads or writes them.
    pub later_blocks: u64,
}

/// What an operator means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// Everything.
    All,
    /// A namespace.
    Namespace(NamespaceId),
    /// All that a tenant has.
    Tenant(String),
}

/// What an operator's pin has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinReport {
    /// Until when it was pinned before, in seconds of Unix time.
    pub earlier_unix_s: u64,
    /// Blocks that it holds.
    pub blocks: u64,
    /// Bytes of a row.
    pub row_bytes: u64,
}

impl Which {
    fn is(&self, entry: &PoolEntry) -> bool {
        match self {
            Self::All => true,
            Self::Namespace(namespace) => *namespace == entry.namespace(),
            Self::Tenant(tenant) => *tenant == entry.tenant,
        }
    }
}

/// A pool, and what is known of it without reading its records.
type Known = (PoolEntry, Arc<Pool>);

impl Node {
    /// How everything stands. It reads the records of all slots.
    #[must_use]
    pub fn report(&self) -> NodeReport {
        self.inner.report()
    }

    /// At most `limit` blocks of a namespace, or with a key, and how many more there are.
    #[must_use]
    pub fn blocks(
        &self,
        namespace: Option<NamespaceId>,
        key: Option<BlockKey>,
        limit: usize,
    ) -> (Vec<BlockReport>, u64) {
        let which = namespace.map_or(Which::All, Which::Namespace);
        let pools = lock(&self.inner.state).pools(&which);
        let mut found = Vec::new();
        let mut more = 0;
        for (entry, pool) in pools {
            let namespace = entry.namespace();
            let bytes = row_bytes(&pool);
            pool.each_block(&mut |block| {
                if key.is_some_and(|wanted| wanted != block.key) {
                } else if found.len() < limit {
                    found.push(BlockReport {
                        key: block.key,
                        namespace,
                        slot: block.slot,
                        saving: block.saving,
                        pins: block.holders.count_ones(),
                        bytes,
                    });
                } else {
                    more += 1;
                }
            });
        }
        (found, more)
    }

    /// Keeps the blocks of a namespace, and those that come to it, from eviction until then, in seconds
    /// of Unix time, also over lives of the node. `None` if there is no such namespace.
    ///
    /// # Errors
    /// [`NodeError`] when it cannot be written down: then the next life does not know of it.
    pub fn pin(
        &self,
        namespace: NamespaceId,
        until_unix_s: u64,
    ) -> Result<Option<PinReport>, NodeError> {
        let mut state = lock(&self.inner.state);
        let State { ledger, models, .. } = &mut *state;
        let mut entries = ledger.pools.iter_mut();
        let entry = entries.find(|entry| entry.namespace() == namespace);
        let Some((entry, model)) = entry.zip(models.get(&namespace)) else {
            return Ok(None);
        };
        model.pool.pin_until(until_unix_s);
        let earlier_unix_s = std::mem::replace(&mut entry.pinned_until_unix_s, until_unix_s);
        let report = PinReport {
            earlier_unix_s,
            blocks: model.pool.gauges().held as u64,
            row_bytes: row_bytes(&model.pool),
        };
        self.inner.memory.note(ledger)?;
        Ok(Some(report))
    }

    /// Drops blocks; `None` if there is nothing of that name.
    #[must_use]
    pub fn purge(&self, which: &Which) -> Option<PurgeReport> {
        let pools = lock(&self.inner.state).pools(which);
        if pools.is_empty() && *which != Which::All {
            return None;
        }
        let mut purged = PurgeReport::default();
        for (_, pool) in pools {
            let held = pool.gauges().held as u64;
            pool.each_block(&mut |block| {
                purged.later_blocks += u64::from(block.saving || block.holders != 0);
            });
            pool.clear();
            purged.blocks += held;
            purged.bytes += held * row_bytes(&pool);
        }
        Some(purged)
    }
}

fn row_bytes(pool: &Pool) -> u64 {
    pool.segment().geometry().row_bytes() as u64
}

impl State {
    /// The pools that are meant: what has to read their records does so when the lock is free again.
    fn pools(&self, which: &Which) -> Vec<Known> {
        let entries = self.ledger.pools.iter().filter(|entry| which.is(entry));
        let known = |entry: &PoolEntry| {
            let model = self.models.get(&entry.namespace())?;
            Some((entry.clone(), Arc::clone(&model.pool)))
        };
        entries.filter_map(known).collect()
    }
}

impl Inner {
    fn report(&self) -> NodeReport {
        let state = lock(&self.state);
        let pools = state.pools(&Which::All);
        let extents = state.ledger.extents;
        let denied = state.denied.clone();
        let engine = |engine: &super::engine::Engine| {
            let entry = &engine.entry;
            let report = EngineReport {
                number: entry.number,
                engine_id: entry.engine_id.clone(),
                client: entry.client.clone(),
                tenant: entry.tenant.clone(),
                namespace: engine.namespace(),
                since_unix_s: entry.since_unix_s,
                attached: engine.link.is_some(),
                processes: engine.processes.iter().map(process).collect(),
                pinned_blocks: 0,
                saving_blocks: 0,
            };
            (report, engine.session)
        };
        let engines: Vec<_> = state.engines.values().map(engine).collect();
        drop(state);

        let mut held_by = [0u64; 64];
        let models: Vec<_> = pools
            .iter()
            .map(|(entry, pool)| self.model(entry, pool, &mut held_by))
            .collect();
        let engine = |(mut report, session): (EngineReport, crate::session::SessionId)| {
            let mut pools = pools.iter();
            let pool = pools.find(|(entry, _)| entry.namespace() == report.namespace);
            report.saving_blocks =
                pool.map_or(0, |(_, pool)| pool.saving_blocks_of(session) as u64);
            let held = held_by.get(usize::from(report.number));
            report.pinned_blocks = held.copied().unwrap_or(0);
            report
        };
        let owned: u32 = models.iter().map(|model| model.extents).sum();
        let extent_bytes = self.options.extent_bytes as u64;
        NodeReport {
            boot: self.boot,
            capacity_bytes: u64::from(extents) * extent_bytes,
            extent_bytes,
            free_extents: extents.saturating_sub(owned),
            tenants: self.tenants(&models, &denied),
            models,
            engines: engines.into_iter().map(engine).collect(),
        }
    }

    /// One pool. It reads all of its records, and counts in `held_by` how many blocks each engine holds.
    fn model(&self, entry: &PoolEntry, pool: &Pool, held_by: &mut [u64; 64]) -> ModelReport {
        let mut pinned_blocks = 0;
        pool.each_block(&mut |block| {
            pinned_blocks += u64::from(block.holders != 0);
            let mut holders = block.holders;
            while holders != 0 {
                if let Some(held) = held_by.get_mut(holders.trailing_zeros() as usize) {
                    *held += 1;
                }
                holders &= holders - 1;
            }
        });
        let until = entry.pinned_until_unix_s;
        ModelReport {
            namespace: entry.namespace(),
            model: entry.model.clone(),
            tenant: entry.tenant.clone(),
            group: entry.group,
            geometry: entry.geometry(),
            row_bytes: row_bytes(pool),
            extents: u32::try_from(entry.extents.len()).unwrap_or(u32::MAX),
            gauges: pool.gauges(),
            counters: pool.counters(),
            pinned_blocks,
            pinned_until_unix_s: Some(until).filter(|until| *until > unix_seconds()),
            minimum_bytes: self.options.limits.minimum_of(entry).0,
        }
    }

    fn tenants(
        &self,
        models: &[ModelReport],
        denied: &BTreeMap<String, DenialCounts>,
    ) -> Vec<TenantReport> {
        let limits = &self.options.limits;
        let with_pools = models.iter().map(|model| &model.tenant);
        let names: BTreeSet<&String> = limits.quotas.keys().chain(with_pools).collect();
        let tenant = |name: &String| {
            let own = || models.iter().filter(|model| model.tenant == *name);
            let extents: u64 = own().map(|model| u64::from(model.extents)).sum();
            TenantReport {
                tenant: name.clone(),
                quota_bytes: limits.quota_of(name),
                bytes: extents * self.options.extent_bytes as u64,
                held_blocks: own().map(|model| model.gauges.held as u64).sum(),
                denied: denied.get(name).copied().unwrap_or_default(),
            }
        };
        names.into_iter().map(tenant).collect()
    }
}

fn process(process: &super::engine::Process) -> ProcessReport {
    ProcessReport {
        role: process.role,
        pid: process.pid,
        uid: process.uid,
    }
}
