//! kvtide's Kubernetes control plane: StormServices and what they consist of.
//!
//! ```text
//! StormService ── RoleSet ──┬── Pod                 a role with podGroupSize 1
//!      │                    └── PodSet ── Pod …     a role with podGroupSize above 1
//!      ├── ControllerRevision …                     what its template was
//!      └── Service (headless)                       names of its pods in DNS
//! ```
//!
//! [`api`] is what is stored, [`core`] decides and does no I/O, [`reconcile`] reads and writes, and
//! [`controller`] is the process around it.
#![forbid(unsafe_code)]

pub mod api;
pub mod controller;
pub mod core;
pub mod crds;
pub mod reconcile;
pub mod telemetry;
pub mod webhook;
