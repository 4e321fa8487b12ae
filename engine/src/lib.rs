#![doc = include_str!("../../docs/architecture.md")]
#![forbid(unsafe_code)]

mod access;
mod config;
mod cost;
mod memory;
mod pool;
mod sequence;
mod session;
mod sync;
mod worker;

pub use config::{Config, ConfigError, Eviction, LoadMode, Settings, Verify};
pub use cost::CostModel;
pub use memory::available_memory_bytes;
pub use pool::scrub::Scrubber;
pub use pool::{Lease, Pool, PoolCounters, PoolEvent, PoolGauges, PoolOptions, Readiness};
pub use sequence::{Load, LoadPlan, Matched, Sequence};
pub use session::{Match, Save, SavePlan, Session, SessionError, SessionOptions};
pub use worker::{LoadOutcome, SaveJob, StartError, StepError, Worker, WorkerCounters};
