//! The batch API: OpenAI's `/v1/files` and `/v1/batches`.
//!
//! ```text
//!   client ──▶ http ──▶ store (what exists) ◀── run ──▶ upstream
//!                └────▶ blobs (bytes)       ◀────┘
//! ```
//!
//! `http` and `run` meet only in the database: a create is durable before it is answered, a result
//! before it is counted, and whoever is killed leaves nothing behind that the next to come could not
//! go on from. `state` and `input` are pure.
#![forbid(unsafe_code)]

mod address;
pub mod blobs;
mod budget;
pub mod client;
pub mod clock;
mod command;
mod credentials;
pub mod endpoint;
pub mod error;
pub mod file;
pub mod http;
pub mod id;
pub mod input;
mod private;
pub mod run;
mod serve;
pub mod state;
pub mod store;
mod variables;

pub use command::{Args, main};
pub use serve::ServeArgs;
