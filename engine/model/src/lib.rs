//! The vocabulary of kvtide: what identifies a block of KV cache.
//!
//! A block is a fixed number of consecutive tokens. Two blocks have the same [`BlockKey`] exactly
//! when every input that could change their KV bytes, or who may see them, is the same: the model
//! and how it is laid out ([`Namespace`]), who asks ([`Scope`]), and all tokens and media items up
//! to the end of the block ([`ChainHasher`]). Nothing is filtered by tenant or salt after a lookup,
//! because a key of another tenant can never be found.
//!
//! Engines that share a pool speak of blocks with the daemon that owns it: [`wire`] says in which
//! bytes.
//!
//! This crate is pure: no I/O, no clocks, no threads, no unsafe code.
#![forbid(unsafe_code)]

mod block_key;
mod block_move;
mod chain;
mod encode;
mod namespace;
pub mod wire;

pub use block_key::BlockKey;
pub use block_move::{BlockMove, SlotRef};
pub use chain::{ChainHasher, MediaItem};
pub use namespace::{ChainRoot, Lora, Namespace, NamespaceId, Scope};
