//! The control plane of kvtide: controllers for Kubernetes, and the batch API. Knows nothing of
//! GPUs.

#![forbid(unsafe_code)]

pub mod batch;
pub mod keys;
pub mod telemetry;
