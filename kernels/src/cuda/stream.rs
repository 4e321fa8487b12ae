//! Streams: ours, and the engine's compute stream.

use std::sync::Arc;

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys;

use super::error::Explain;
use super::event::Event;
use super::{Context, CudaError};

/// The stream on which the engine runs the model: its handle as PyTorch gives it, 0 for the default
/// stream. Meaningless where the KV cache lies in host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ComputeStream(u64);

impl ComputeStream {
    /// The stream with this handle.
    ///
    /// # Safety
    /// It is 0 or the handle of a stream of the device's primary context, which lives until what is
    /// recorded on it and held back by it has been waited for; or the KV cache lies in host memory.
    #[must_use]
    pub unsafe fn from_raw(handle: u64) -> Self {
        Self(handle)
    }

    pub(super) fn raw(self) -> sys::CUstream {
        std::ptr::with_exposed_provenance_mut(usize::try_from(self.0).unwrap_or(0))
    }

    /// Work that is put on the stream from now on begins behind `event`.
    pub(crate) fn wait_for(self, event: &Event) -> Result<(), CudaError> {
        event.hold_back(self.raw())
    }
}

/// Whose work the device takes up first where it has a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// What somebody waits for.
    High,
    /// What nobody waits for.
    Low,
}

/// A stream of our own.
#[derive(Debug)]
pub(crate) struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: a stream handle may be used from any thread; the driver locks inside.
unsafe impl Send for Stream {}
// SAFETY: as for `Send`.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(context: &Arc<Context>, priority: Priority) -> Result<Self, CudaError> {
        context.enter()?;
        let (least, greatest) =
            result::stream::get_priority_range().explain("ask for stream priorities")?;
        let priority = match priority {
            Priority::High => greatest,
            Priority::Low => least,
        };
        let raw = result::stream::create_with_priority(StreamKind::NonBlocking, priority);
        Ok(Self {
            context: Arc::clone(context),
            raw: raw.explain("create a stream")?,
        })
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Work that is put on the stream from now on begins behind `event`.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        event.hold_back(self.raw)
    }

    /// Waits until all work on the stream has ended.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.raw) }.explain("wait for a stream")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Memory that work on the stream uses is freed after this; a failure means that the context
        // is broken and runs nothing any more.
        let _ = self.context.enter();
        let _ = self.synchronize();
        // SAFETY: the handle is ours and is not used again.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}
