//! Reconcilers, one for each kind. Each runs the same steps:
//!
//! ```text
//! dereference (reads caches) → validate → plan → build → apply (writes) → status
//! ```
//!
//! The middle three are pure and live in [`kvtide_control_core`]. Only `apply` and the status writer write,
//! and only to objects whose controller reference is the object being reconciled. Reconcilers run
//! on tokio's threads, one at a time for each object.

pub mod apply;
pub mod context;
mod error;
mod event;
mod farewell;
mod foreign;
mod ganging;
pub mod gangs;
pub mod informer;
pub mod ledger;
pub mod pod_groups;
pub mod podset;
pub mod roleset;
pub mod schema;
mod status;
pub mod stormservice;
mod trigger;
mod undecodable;

pub use context::{Context, Settings};
pub use error::Error;
pub(crate) use error::said;
pub use trigger::Trigger;

/// When to go on after as many creations as one look may ask for, if no event comes before.
const NEXT_CREATIONS: std::time::Duration = std::time::Duration::from_secs(1);
