//! kvtide's control plane: StormServices on Kubernetes, and the batch API. Knows nothing of GPUs.
//!
//! ```text
//! StormService ── RoleSet ──┬── Pod                 a role with podGroupSize 1
//!      │                    └── PodSet ── Pod …     a role with podGroupSize above 1
//!      ├── ControllerRevision …                     what its template was
//!      └── Service (headless)                       names of its pods in DNS
//! ```
//!
//! [`kvtide_control_api`] is what is stored, [`kvtide_control_core`] decides and does no I/O, [`reconcile`] reads and writes, and
//! [`controller`] is the process around it, and [`install`] checks and removes an installation.
//! [`batch`] stands beside them and needs no Kubernetes;
//! its callers are known by their [`kvtide_control_base::api_keys`].
#![forbid(unsafe_code)]

pub mod batch;
pub mod controller;
pub mod crds;
pub mod install;
pub mod reconcile;
pub mod webhook;
