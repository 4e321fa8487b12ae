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
pub(crate) mod meta;
pub mod observed;
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
pub use trigger::{Key, Trigger};

/// When to go on after as many creations as one look may ask for, if no event comes before.
const NEXT_CREATIONS: std::time::Duration = std::time::Duration::from_secs(1);

/// Conditions that all kinds share.
pub mod conditions {
    /// All that is wanted is there and ready.
    pub const READY: &str = "Ready";
    /// Something is on its way.
    pub const PROGRESSING: &str = "Progressing";
    /// The last attempt to create or delete something failed.
    pub const REPLICA_FAILURE: &str = "ReplicaFailure";
    /// The spec cannot be acted on.
    pub const INVALID: &str = "Invalid";
    /// Gang scheduling is asked for, and its PodGroup kind is not installed, or came too late.
    pub const POD_GROUP_UNAVAILABLE: &str = "PodGroupUnavailable";
    /// An annotation asks AIBrix for its runtime sidecar, which is not put into pods here.
    pub const SIDECAR_NOT_INJECTED: &str = "SidecarNotInjected";
    /// Which generation the status is about, where the installed CRD has no field for it.
    pub const OBSERVED: &str = "Observed";
    /// The installed CRDs lack fields of this version.
    pub const SCHEMA_OUTDATED: &str = "SchemaOutdated";
    /// Pods of a PodSet were replaced because they were unhealthy.
    pub const RECOVERING: &str = "Recovering";
}
