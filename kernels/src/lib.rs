//! vLLM's side of a copy, and the backends that copy between it and the rows of a
//! [`kvtide_segment::SharedSegment`].
//!
//! * [`KvLayout`]: where one rank's blocks lie in the tensors that vLLM registered;
//! * [`Codec`]: what rows hold of blocks;
//! * [`copy`]: devices and backends that move blocks between the two;
//! * [`cuda`]: the driver, as far as they need it. The kernels are in `kernels/cuda`.
//!
//! All addresses, strides and lengths are checked once, when a [`KvLayout`] or a segment is made;
//! after that a copy can be named only by row, block and layer, each of which is compared with its
//! bound. This crate knows rows and bytes: no hashes, requests, tenants or policy.

pub mod copy;
pub mod cuda;
mod encoding;
mod kv_layout;

pub use encoding::{Codec, Float, ScaledDimension};
pub use kv_layout::{KvLayout, LayoutError, TensorView};
