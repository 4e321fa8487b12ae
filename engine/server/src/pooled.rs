//! The inside of the daemon: the pools of a node, as the shell sees them.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvtide_engine::{
    BlockReport, EngineReport, ModelReport, NodeError, NodeOptions, NodeReport, PurgeReport,
};
use kvtide_model::wire::Role;
use kvtide_model::{BlockKey, NamespaceId};

use crate::config::Config;
use crate::node::{
    Block, Closed, Connection, Inspect, Inspection, Node, Pinned, Purge, Purged, Refusal, Unpinned,
};
use crate::status::{Namespace, Process, Readiness, Session, SessionState, Status, Tier, Totals};

/// The kind of memory that holds blocks.
const TIER: &str = "host";

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pooled {
    node: kvtide_engine::Node,
    started_unix_s: u64,
    minimum_bytes: u64,
    /// Until when namespaces are pinned, in seconds of Unix time.
    pinned: Mutex<BTreeMap<NamespaceId, u64>>,
}

impl Pooled {
    /// Reserves the memory, or takes over what the last daemon left. Blocks for as long as that takes.
    pub(crate) fn open(config: &Config) -> Result<Self, NodeError> {
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let options = NodeOptions {
            directory: config.memory.directory.clone(),
            name: config.memory.name.clone(),
            capacity_bytes: bytes(config.memory.capacity_bytes),
            capacity_is_chosen: config.memory.capacity_is_chosen,
            extent_bytes: bytes(config.memory.extent_bytes),
            eviction: config.eviction,
            sessions: config.limits.sessions.into(),
            minimum_bytes: bytes(config.limits.minimum_bytes),
            scrub_bytes_per_second: config.scrub_bytes_per_s,
            server: concat!("kvtide ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let progress = |done: usize, total: usize| {
            tracing::info!(
                done_mib = done >> 20,
                total_mib = total >> 20,
                "reserving memory"
            );
        };
        let node = kvtide_engine::Node::open(options, &progress)?;
        let report = node.report();
        let held: usize = report.models.iter().map(|model| model.gauges.held).sum();
        tracing::info!(
            capacity_mib = report.capacity_bytes >> 20,
            models = report.models.len(),
            blocks = held,
            "the pool is open"
        );
        Ok(Self {
            node,
            started_unix_s: unix_seconds(),
            minimum_bytes: config.limits.minimum_bytes,
            pinned: Mutex::default(),
        })
    }

    fn namespace(&self, digits: &str) -> Result<NamespaceId, Refusal> {
        let models = self.node.report().models;
        let mut ids = models.iter().map(|model| model.namespace);
        ids.find(|id| id.to_string() == digits)
            .ok_or_else(|| Refusal {
                problem: format!("there is no namespace {digits:?}"),
                fix: "name one that kvtide status shows".into(),
            })
    }

    fn namespace_status(&self, model: &ModelReport, report: &NodeReport) -> Namespace {
        let pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let until = pinned.get(&model.namespace).copied();
        Namespace {
            namespace: model.namespace.to_string(),
            model: model.model.clone(),
            group: model.group,
            ranks: model.geometry.ranks,
            block_tokens: model.geometry.block_tokens,
            row_bytes: model.row_bytes,
            rows: model.gauges.slots as u64,
            free_rows: model.gauges.free as u64,
            bytes: u64::from(model.extents) * report.extent_bytes,
            minimum_bytes: self.minimum_bytes,
            held_blocks: model.gauges.held as u64,
            saving_blocks: model.gauges.saving as u64,
            pinned_blocks: model.pinned_blocks,
            pinned_until_unix_s: until.filter(|&until| until > unix_seconds()),
            totals: Totals {
                hit_blocks: model.counters.used_blocks,
                saved_blocks: model.counters.saved_blocks,
                failed_blocks: model.counters.failed_blocks,
                throttled_blocks: model.counters.throttled_blocks,
                evicted_blocks: model.counters.evicted_blocks,
                damaged_blocks: model.counters.damaged_blocks,
                scrubbed_blocks: model.counters.scrubbed_blocks,
            },
        }
    }
}

fn session(engine: &EngineReport, report: &NodeReport) -> Session {
    let models = &report.models;
    let model = models.iter().find(|m| m.namespace == engine.namespace);
    let state = match (engine.attached, engine.processes.is_empty()) {
        (true, _) => SessionState::Attached,
        (false, false) => SessionState::Joining,
        (false, true) => SessionState::Detached,
    };
    Session {
        session: engine.number,
        engine_id: engine.engine_id.clone(),
        client: engine.client.clone(),
        state,
        namespace: engine.namespace.to_string(),
        model: model.map_or_else(String::new, |model| model.model.clone()),
        tenant: engine.tenant.clone(),
        since_unix_s: engine.since_unix_s,
        processes: engine.processes.iter().map(process).collect(),
        pinned_blocks: engine.pinned_blocks,
        saving_blocks: engine.saving_blocks,
    }
}

fn process(process: &kvtide_engine::ProcessReport) -> Process {
    let (role, rank) = match process.role {
        Role::Worker { rank } => ("worker", Some(rank)),
        _ => ("scheduler", None),
    };
    Process {
        role: role.to_owned(),
        rank,
        pid: process.pid,
        uid: process.uid,
    }
}

fn block(block: &BlockReport) -> Block {
    Block {
        key: block.key.to_string(),
        namespace: block.namespace.to_string(),
        tier: TIER.to_owned(),
        slot: block.slot.slot,
        generation: block.slot.generation,
        state: if block.saving { "saving" } else { "held" }.to_owned(),
        pins: block.pins,
        bytes: block.bytes,
    }
}

/// The key of 32 hexadecimal digits.
fn key(digits: &str) -> Result<BlockKey, Refusal> {
    let number = u128::from_str_radix(digits, 16).ok();
    let number = number.filter(|_| digits.len() == 32);
    let key = number.map(|number| BlockKey::from_bytes(number.to_be_bytes()));
    key.ok_or_else(|| Refusal {
        problem: format!("{digits:?} is no key"),
        fix: "give 32 hexadecimal digits".into(),
    })
}

impl Node for Pooled {
    fn readiness(&self) -> Readiness {
        Readiness {
            ready: true,
            reasons: Vec::new(),
        }
    }

    fn status(&self) -> Status {
        let report = self.node.report();
        let free_bytes = u64::from(report.free_extents) * report.extent_bytes;
        let index = report.models.iter().map(|m| m.gauges.index_bytes as u64);
        let mut namespaces: Vec<Namespace> = report
            .models
            .iter()
            .map(|model| self.namespace_status(model, &report))
            .collect();
        namespaces.sort_by_key(|namespace| std::cmp::Reverse(namespace.bytes));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot: report
                .boot
                .iter()
                .fold(String::new(), |text, byte| text + &format!("{byte:02x}")),
            started_unix_s: self.started_unix_s,
            readiness: self.readiness(),
            tiers: vec![Tier {
                tier: TIER.to_owned(),
                capacity_bytes: report.capacity_bytes,
                used_bytes: report.capacity_bytes - free_bytes,
                free_bytes,
                extent_bytes: report.extent_bytes,
                index_bytes: index.sum(),
            }],
            sessions: report.engines.iter().map(|e| session(e, &report)).collect(),
            namespaces,
        }
    }

    fn inspect(&self, query: &Inspect) -> Result<Inspection, Refusal> {
        let namespace = query.namespace.as_deref();
        let namespace = namespace.map(|digits| self.namespace(digits)).transpose()?;
        let wanted = query.key.as_deref().map(key).transpose()?;
        let limit = usize::try_from(query.limit).unwrap_or(usize::MAX);
        let (blocks, more) = self.node.blocks(namespace, wanted, limit);
        let blocks = blocks.iter().map(block).collect();
        Ok(Inspection { blocks, more })
    }

    fn purge(&self, what: &Purge) -> Result<Purged, Refusal> {
        let namespace = match what {
            Purge::All => None,
            Purge::Namespace(digits) => Some(self.namespace(digits)?),
        };
        let PurgeReport {
            blocks,
            bytes,
            later_blocks,
        } = self.node.purge(namespace);
        Ok(Purged {
            blocks,
            bytes,
            later_blocks,
        })
    }

    fn pin(&self, namespace: &str, ttl: Duration) -> Result<Pinned, Refusal> {
        let id = self.namespace(namespace)?;
        let until_unix_s = unix_seconds().saturating_add(ttl.as_secs());
        self.node.pin(id, until_unix_s);
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        pinned.insert(id, until_unix_s);
        let models = self.node.report().models;
        let model = models.iter().find(|model| model.namespace == id);
        let blocks = model.map_or(0, |model| model.gauges.held as u64);
        Ok(Pinned {
            namespace: namespace.to_owned(),
            blocks,
            bytes: blocks * model.map_or(0, |model| model.row_bytes),
            until_unix_s,
        })
    }

    fn unpin(&self, namespace: &str) -> Result<Unpinned, Refusal> {
        let id = self.namespace(namespace)?;
        self.node.pin(id, 0);
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let until = pinned.remove(&id).unwrap_or(0);
        Ok(Unpinned {
            namespace: namespace.to_owned(),
            was_pinned: until > unix_seconds(),
        })
    }

    fn attach(&self, connection: Connection) {
        let Connection {
            stream,
            peer,
            hello,
        } = connection;
        let peer = kvtide_engine::Peer {
            pid: peer.pid,
            uid: peer.uid,
        };
        if let Err(error) = self.node.attach(stream, peer, hello) {
            tracing::error!(%error, "no thread for an engine; look at the limits of this process");
        }
    }

    fn close(&self, deadline: Instant) -> Closed {
        Closed {
            cut_off_saves: self.node.close(deadline) as u64,
        }
    }
}

fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
