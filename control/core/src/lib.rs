//! What the controllers decide, as pure functions over values: no I/O, no clock, no randomness. The
//! present time and everything observed are arguments, so each rule has a table test beside it.
#![forbid(unsafe_code)]

pub mod adoption;
pub mod budget;
pub mod canonical;
pub mod early_ends;
mod go_types;
pub mod names;
pub mod pod;
pub mod pod_group;
pub mod pod_set;
pub mod recovery;
pub mod restarts;
pub mod revision;
pub mod role_plan;
pub mod role_set;
pub mod role_units;
pub mod rollout;
pub mod scaling_target;
pub mod seen;
pub mod service_plan;
pub mod validate;
