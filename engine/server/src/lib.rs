//! `kvtide`: the cache server of a node, and the commands of its operator.
//!
//! ```text
//!   engines ──▶ socket ──▶ connection ──▶ node (sessions, pools, memory)
//! operators ──▶   "    ──▶     ask     ──▶  "
//!                             http     ──▶  "    health and metrics
//! ```
//!
//! This crate's shell is everything but the node: configuration, the socket and who is let in, HTTP,
//! logs, the service manager, commands. It asks the node through one trait, [`node::Node`].
#![forbid(unsafe_code)]

pub mod ask;
pub mod check;
pub mod cli;
pub mod config;
pub mod connection;
pub mod http;
pub mod logs;
pub mod node;
mod opening;
pub mod operator;
mod pooled;
pub mod print;
pub mod selection;
pub mod serve;
pub mod socket;
pub mod status;
mod systemd;
pub mod tally;

/// Where the daemon listens, and commands look for it, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/kvtide/kvtide.sock";
