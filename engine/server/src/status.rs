//! What the daemon says of itself: the answer to `kvtide status`, and what metrics are made of.
//!
//! Fields are added and never given another meaning, since an operator's command may be older or newer
//! than the daemon that it asks: what it does not know it leaves out, what it misses is empty.
//! Bytes and blocks are now; totals count since the daemon started.

use serde::{Deserialize, Serialize};

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Given anew at every start, in hexadecimal digits.
    pub boot: String,
    /// When it started, in seconds of Unix time.
    pub started_unix_s: u64,
    /// Whether engines are served.
    pub readiness: Readiness,
    /// Kinds of memory that hold blocks.
    pub tiers: Vec<Tier>,
    /// What blocks belong to, the largest first.
    pub namespaces: Vec<Namespace>,
    /// Engines, by their number.
    pub sessions: Vec<Session>,
}

/// Whether the daemon serves engines, and if not, what it waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Readiness {
    /// Whether engines are served.
    pub ready: bool,
    /// Sentences that say why not, such as `reserving memory: 12 of 64 GiB`; of a daemon that is
    /// ready, what it still does.
    pub reasons: Vec<String>,
}

/// One kind of memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tier {
    /// Such as `host`.
    pub tier: String,
    /// What may be used.
    pub capacity_bytes: u64,
    /// What namespaces have, whether blocks fill it or not.
    pub used_bytes: u64,
    /// What no namespace has.
    pub free_bytes: u64,
    /// The unit in which space moves between namespaces.
    pub extent_bytes: u64,
    /// Tables about blocks, beside their rows.
    pub index_bytes: u64,
}

/// The blocks of one model, served in one way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// 32 hexadecimal digits.
    pub namespace: String,
    /// The model, as its engines name it.
    pub model: String,
    /// Group of the model's KV cache; 0 where it has one alone.
    pub group: u16,
    /// Ranks whose shards a row has.
    pub ranks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// Rows that the namespace has space for.
    pub rows: u64,
    /// Rows of them without a block. What is neither free nor held was dropped, and is still read or
    /// written by an engine.
    pub free_rows: u64,
    /// Bytes of that space.
    pub bytes: u64,
    /// Bytes that are not taken from it once it has them.
    pub minimum_bytes: u64,
    /// Blocks that can be matched, those being saved included.
    pub held_blocks: u64,
    /// Blocks that are being saved.
    pub saving_blocks: u64,
    /// Blocks that engines are reading.
    pub pinned_blocks: u64,
    /// Until when an operator keeps the namespace from eviction, in seconds of Unix time.
    pub pinned_until_unix_s: Option<u64>,
    /// What was counted.
    pub totals: Totals,
}

/// What was counted of blocks since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Blocks that engines have loaded.
    pub hit_blocks: u64,
    /// Blocks whose save was completed.
    pub saved_blocks: u64,
    /// Blocks whose save failed, or whose engine died meanwhile.
    pub failed_blocks: u64,
    /// Blocks that were not saved because there was no place for them.
    pub throttled_blocks: u64,
    /// Blocks that were given up to make room.
    pub evicted_blocks: u64,
    /// Blocks that were dropped because their bytes did not have their checksum.
    pub damaged_blocks: u64,
    /// Blocks that the background scrub has checked.
    pub scrubbed_blocks: u64,
}

/// One engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Session {
    /// From 0; given again when the engine is gone.
    pub session: u8,
    /// The engine's own name.
    pub engine_id: String,
    /// What it runs, such as `kvtide 0.1.0`.
    pub client: String,
    /// Where it stands.
    pub state: SessionState,
    /// The namespace of its blocks.
    pub namespace: String,
    /// The model, as the engine names it.
    pub model: String,
    /// On whose behalf it runs; empty for nobody in particular.
    pub tenant: String,
    /// When it first came, in seconds of Unix time.
    pub since_unix_s: u64,
    /// Its processes that are connected.
    pub processes: Vec<Process>,
    /// Blocks that it is reading.
    pub pinned_blocks: u64,
    /// Blocks that it is saving.
    pub saving_blocks: u64,
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// Some of its workers are connected, and its scheduler, which comes last, is not.
    Joining,
    /// Its scheduler is connected. Workers need not be: after a new start of the daemon they go on
    /// without a connection.
    Attached,
    /// None of its processes is connected, and one lives: it is about to end, or has yet to come back to
    /// a daemon that was started anew.
    Detached,
    /// A newer daemon's word.
    #[default]
    #[serde(other)]
    Unknown,
}

/// One process of an engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// `scheduler` or `worker`.
    pub role: String,
    /// Which worker.
    pub rank: Option<u32>,
    /// As this machine counts them; 0 where the process lives in a PID namespace that the daemon
    /// cannot see into.
    pub pid: u32,
    /// The user that it runs as.
    pub uid: u32,
}
