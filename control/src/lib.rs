//! kvtide's control plane: StormServices on Kubernetes, and the batch API. Knows nothing of GPUs.
//!
//! ```text
//! StormService ── RoleSet ──┬── Pod                 a role with podGroupSize 1
//!      │                    └── PodSet ── Pod …     a role with podGroupSize above 1
//!      ├── ControllerRevision …                     what its template was
//!      └── Service (headless)                       names of its pods in DNS
//! ```
//!
//! `kvtide_control_api` is what is stored, `kvtide_control_core` decides and does no I/O, [`kvtide_control_reconcile`]
//! reads and writes, [`controller`] is the process around it, and [`install`] checks and removes an
//! installation. `kvtide_control_batch` stands beside them and needs no Kubernetes.
#![forbid(unsafe_code)]

#[cfg(not(any(feature = "batch", feature = "controller")))]
compile_error!("nothing to build: name a feature, batch or controller");

#[cfg(feature = "controller")]
pub mod controller;
#[cfg(feature = "controller")]
pub mod crds;
#[cfg(feature = "controller")]
pub mod install;
#[cfg(feature = "controller")]
pub mod webhook;
