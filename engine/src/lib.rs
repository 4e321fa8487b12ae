#![doc = include_str!("../../docs/architecture.md")]
#![forbid(unsafe_code)]

mod config;
mod cost;
mod memory;
mod pool;
mod sequence;
mod session;
mod sync;
mod worker;

pub use config::{Config, ConfigError, Eviction, LoadMode, Verify};
pub use cost::CostModel;
pub use memory::available_memory_bytes;
pub use pool::scrub::Scrubber;
pub use pool::{
    Lease, Match, Pool, PoolCounters, PoolEvent, PoolGauges, PoolOptions, Readiness, SavePlan,
};
pub use sequence::{Load, LoadPlan, Matched, Sequence};
pub use session::{Session, SessionError, SessionId};
pub use worker::{LayerError, LoadOutcome, SaveJob, StartError, Worker, WorkerCounters};
