#![doc = include_str!("../../docs/architecture.md")]
#![forbid(unsafe_code)]

mod access;
mod config;
mod cost;
mod memory;
#[cfg(not(loom))]
mod node;
mod pool;
mod sequence;
mod session;
mod sync;
mod worker;

#[cfg(not(loom))]
pub use access::{AttachError, AttachOptions, Attachment};
pub use config::{
    Config, ConfigError, EngineConfig, Eviction, LoadMode, PoolConfig, PoolPlace, Settings, Verify,
};
pub use cost::CostModel;
pub use memory::available_memory_bytes;
#[cfg(not(loom))]
pub use node::{
    BlockReport, EngineReport, ModelReport, Node, NodeError, NodeOptions, NodeReport, Peer,
    ProcessReport, PurgeReport,
};
pub use pool::scrub::Scrubber;
pub use pool::{
    Arriving, Lease, Location, Pool, PoolCounters, PoolEvent, PoolGauges, PoolOptions, Readiness,
    Source,
};
pub use sequence::{Load, LoadPart, Matched, Sequence};
pub use session::{Match, Save, SavePlan, Session, SessionError, SessionOptions};
pub use worker::{LoadOutcome, SaveJob, StartError, StepError, Worker, WorkerCounters};
