//! How the controllers meet Kubernetes. Knows the kinds' metadata, and not what is decided of them.
//!
//! ```text
//!  watch ──▶ Informer ──▶ Trigger ──▶ (a reconciler) ──▶ Writer ──▶ API server
//!               └──────────────▶ Ledger ◀──────────────────┘
//! ```
#![forbid(unsafe_code)]

pub mod crd_gap;
pub mod error;
pub mod event;
pub mod informer;
pub mod lease;
pub mod ledger;
pub mod trigger;
pub mod writer;
