//! Conditions that all kinds share.

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
