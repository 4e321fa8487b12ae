//! A pool in another process, `kvtide serve`, over its socket.
//!
//! The thread that calls is vLLM's scheduler. It waits for one thing only, where blocks go that it wants
//! to save, and for that no longer than 5 ms; as long as an answer is owed it asks nothing more.
//! All else it sends and forgets, or reads in the pool's memory. A daemon that is slow, stopped or gone
//! means that nothing is saved and nothing found; another thread attaches again when there is one.

mod attach;
mod client;
mod connection;

pub use attach::{AttachError, AttachOptions, Attachment};
pub(crate) use client::SocketAccess;
