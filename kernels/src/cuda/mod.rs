//! The CUDA driver, as far as copies need it.
//!
//! It is looked for when a GPU is first used, so one build serves machines with and without one.
//! Every object holds the context it belongs to; handles are freed when dropped. What may be done to
//! an object by several threads at once is what the driver allows: everything here.

mod chunks;
mod context;
mod error;
mod event;
mod memory;
mod module;
mod stream;

pub use context::Context;
pub use error::CudaError;
pub use stream::ComputeStream;

pub(crate) use chunks::{CHUNK_BYTES, Chunks};
pub(crate) use event::{Event, EventPool};
pub(crate) use memory::{DeviceBuffer, HostRegistration, PinnedBuffer, Pod};
pub(crate) use module::{Function, Launch, Module};
pub(crate) use stream::{Priority, Stream};

/// Whether this build holds the kernels.
#[must_use]
pub fn kernels_are_embedded() -> bool {
    module::IMAGE.is_some()
}
