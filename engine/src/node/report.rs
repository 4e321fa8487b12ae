//! What a node says of itself, and does at an operator's word.

use kvtide_model::wire::{Geometry, Role};
use kvtide_model::{BlockKey, NamespaceId, SlotRef};

use super::{Inner, Node};
use crate::pool::{PoolCounters, PoolGauges};
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
    /// Engines.
    pub engines: Vec<EngineReport>,
}

/// One model's pool.
#[derive(Clone, Debug)]
pub struct ModelReport {
    /// Whose blocks they are.
    pub namespace: NamespaceId,
    /// The model, as the engine names it that came first.
    pub model: String,
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

impl Node {
    /// How everything stands. It reads the records of all slots.
    #[must_use]
    pub fn report(&self) -> NodeReport {
        self.inner.report()
    }

    /// At most `limit` blocks of a namespace, or with a key.
    #[must_use]
    pub fn blocks(
        &self,
        namespace: Option<NamespaceId>,
        key: Option<BlockKey>,
        limit: usize,
    ) -> (Vec<BlockReport>, u64) {
        let state = lock(&self.inner.state);
        let of_it = |id: &NamespaceId| namespace.is_none_or(|wanted| wanted == *id);
        let mut found = Vec::new();
        let mut more = 0;
        for (&namespace, model) in state.models.iter().filter(|(id, _)| of_it(id)) {
            let bytes = model.rows.row_bytes() as u64;
            model.pool.each_block(&mut |block| {
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
    /// of Unix time.
    pub fn pin(&self, namespace: NamespaceId, until_unix_s: u64) {
        let state = lock(&self.inner.state);
        if let Some(model) = state.models.get(&namespace) {
            model.pool.pin_until(until_unix_s);
        }
    }

    /// Drops the blocks of a namespace, or all.
    pub fn purge(&self, namespace: Option<NamespaceId>) -> PurgeReport {
        let state = lock(&self.inner.state);
        let mut purged = PurgeReport::default();
        for (id, model) in &state.models {
            if namespace.is_none_or(|wanted| wanted == *id) {
                let held = model.pool.gauges().held as u64;
                model.pool.each_block(&mut |block| {
                    purged.later_blocks += u64::from(block.saving || block.holders != 0);
                });
                model.pool.clear();
                purged.blocks += held;
                purged.bytes += held * model.rows.row_bytes() as u64;
            }
        }
        purged
    }
}

impl Inner {
    fn report(&self) -> NodeReport {
        let state = lock(&self.state);
        let mut held_by = [0u64; 64];
        let mut models = Vec::new();
        for entry in &state.ledger.pools {
            let Some(model) = state.models.get(&entry.namespace()) else {
                continue;
            };
            let mut pinned_blocks = 0;
            model.pool.each_block(&mut |block| {
                pinned_blocks += u64::from(block.holders != 0);
                let bits = (0..64).filter(|bit| block.holders & 1 << bit != 0);
                for bit in bits {
                    if let Some(held) = held_by.get_mut(bit) {
                        *held += 1;
                    }
                }
            });
            models.push(ModelReport {
                namespace: entry.namespace(),
                model: entry.model.clone(),
                group: entry.group,
                geometry: entry.geometry(),
                row_bytes: model.rows.row_bytes() as u64,
                extents: u32::try_from(entry.extents.len()).unwrap_or(u32::MAX),
                gauges: model.pool.gauges(),
                counters: model.pool.counters(),
                pinned_blocks,
            });
        }
        let owned: u32 = models.iter().map(|model| model.extents).sum();
        let engine = |engine: &super::engine::Engine| EngineReport {
            number: engine.entry.number,
            engine_id: engine.entry.engine_id.clone(),
            client: engine.entry.client.clone(),
            tenant: engine.entry.tenant.clone(),
            namespace: engine.namespace(),
            since_unix_s: engine.entry.since_unix_s,
            attached: engine.link.is_some(),
            processes: engine.processes.iter().map(process).collect(),
            pinned_blocks: held_by
                .get(usize::from(engine.entry.number))
                .copied()
                .unwrap_or(0),
            saving_blocks: state.models.get(&engine.namespace()).map_or(0, |model| {
                model.pool.saving_blocks_of(engine.session) as u64
            }),
        };
        NodeReport {
            boot: self.boot,
            capacity_bytes: state.ledger.extents as u64 * self.options.extent_bytes as u64,
            extent_bytes: self.options.extent_bytes as u64,
            free_extents: state.ledger.extents.saturating_sub(owned),
            models,
            engines: state.engines.values().map(engine).collect(),
        }
    }
}

fn process(process: &super::engine::Process) -> ProcessReport {
    ProcessReport {
        role: process.role,
        pid: process.pid,
        uid: process.uid,
    }
}
