//! Memory that both sides of a copy can name, and the backends that copy between them.
//!
//! * [`segment`]: the shared host segment that holds the pool's rows, one file on shared memory
//!   mapped by every process of a node that takes part;
//! * [`KvLayout`]: where one rank's blocks lie in the tensors that vLLM registered;
//! * [`Codec`]: what rows hold of blocks;
//! * [`copy`]: devices and backends that move blocks between the two;
//! * [`cuda`]: the driver, as far as they need it. The kernels are in `kernels/cuda`.
//!
//! All addresses, strides and lengths are checked once, when a [`KvLayout`] or a segment is made;
//! after that a copy can be named only by slot, block and layer, each of which is compared with its
//! bound. This crate knows rows and bytes: no hashes, requests, tenants or policy.

mod checksum;
pub mod copy;
pub mod cuda;
mod encoding;
mod kv_layout;
pub mod segment;

pub use checksum::shard_checksum;
pub use encoding::{Codec, Float, ScaledDimension};
pub use kv_layout::{KvLayout, LayoutError, TensorView};
