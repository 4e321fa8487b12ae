//! Reconcilers, one for each kind. Each runs the same steps:
//!
//! ```text
//! dereference (reads caches) → validate → plan → build → apply (writes) → status
//! ```
//!
//! The middle three are pure and live in [`kvtide_control_core`]. Only `apply` and the status writer write,
//! and only to objects whose controller reference is the object being reconciled. Reconcilers run
//! on tokio's threads, one at a time for each object.
#![forbid(unsafe_code)]

mod cascade;
pub mod context;
mod frame;
pub mod gangs;
pub mod podset;
pub mod roleset;
mod status;
pub mod stormservice;
mod taken_names;
mod undecodable;

pub use context::{Context, Settings};

/// When to go on after as many creations as one look may ask for, if no event comes before.
const NEXT_CREATIONS: std::time::Duration = std::time::Duration::from_secs(1);
