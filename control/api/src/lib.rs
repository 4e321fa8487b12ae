//! The API as it is stored: custom resources of group `orchestration.aibrix.ai`, version
//! `v1alpha1`, field for field as AIBrix v0.5.0 defines them, and the keys it puts on objects.
//!
//! Types here only carry what a user wrote. Defaults that would change a meaning are not filled in
//! (whoever decides reads a nil at the place that knows what it means), and nothing here does I/O. Of kube it uses the
//! types alone, and no client.
#![forbid(unsafe_code)]

mod condition;
pub mod conditions;
pub mod crd_gap;
pub mod crds;
pub mod keys;
pub mod meta;
pub mod observed;
mod pod_template;
mod podset;
mod roleset;
mod scheduling;
mod stormservice;
pub mod target;

pub use condition::{Condition, ConditionStatus, find_condition, set_condition};
pub use pod_template::PodTemplate;
pub use podset::{PodSet, PodSetPhase, PodSetSpec, PodSetStatus, RecoveryPolicy};
pub use roleset::{
    DisruptionTolerance, RoleSet, RoleSetSpec, RoleSetStatus, RoleSpec, RoleStatus,
    RoleUpdateOrder, RolloutBudget,
};
pub use scheduling::{
    CoschedulingStrategy, GodelStrategy, Scheduler, SchedulingStrategy, VolcanoStrategy,
};
pub use stormservice::{
    RoleSetTemplate, StormService, StormServiceSpec, StormServiceStatus, TemplateMeta,
    UpdateStrategy, UpdateType,
};

/// The API group of every kind here.
pub const GROUP: &str = "orchestration.aibrix.ai";
/// The only version of that group.
pub const VERSION: &str = "v1alpha1";
