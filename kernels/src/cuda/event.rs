//! Events: points in a stream that others can wait for.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent_flags_enum as Flags};

use super::error::Explain;
use super::stream::{ComputeStream, Stream};
use super::{Context, CudaError};

#[derive(Debug)]
struct Handle {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: an event handle may be used from any thread; the driver locks inside.
unsafe impl Send for Handle {}
// SAFETY: as for `Send`.
unsafe impl Sync for Handle {}

impl Handle {
    fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        context.enter()?;
        let mut raw = std::ptr::null_mut();
        // A thread that waits sleeps: copy threads must not take a core from the engine.
        let flags = Flags::CU_EVENT_DISABLE_TIMING as u32 | Flags::CU_EVENT_BLOCKING_SYNC as u32;
        // SAFETY: `raw` is a place for the handle.
        let made = unsafe { sys::cuEventCreate(&raw mut raw, flags) }.result();
        made.explain("create an event")?;
        Ok(Self {
            context: Arc::clone(context),
            raw,
        })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: the handle is ours and is not used again; waits that were enqueued stay.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// A point in a stream. Goes back to its pool when dropped.
///
/// It can be recorded again while earlier waits for it are pending: a wait is for the point that was
/// recorded when it was enqueued.
#[derive(Debug)]
pub(crate) struct Event {
    handle: Option<Handle>,
    pool: EventPool,
}

impl Event {
    fn raw(&self) -> sys::CUevent {
        self.handle
            .as_ref()
            .map_or(std::ptr::null_mut(), |handle| handle.raw)
    }

    /// Marks the end of what `stream` was given so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both handles are alive.
        unsafe { result::event::record(self.raw(), stream.raw()) }.explain("record an event")
    }

    /// Marks the end of what the engine's stream was given so far.
    pub(crate) fn record_compute(&self, stream: ComputeStream) -> Result<(), CudaError> {
        // SAFETY: the event is alive; so is the engine's stream, by `ComputeStream::from_raw`.
        unsafe { result::event::record(self.raw(), stream.raw()) }.explain("record an event")
    }

    pub(super) fn hold_back(&self, stream: sys::CUstream) -> Result<(), CudaError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event is alive, and the stream is one of ours or a `ComputeStream`.
        unsafe { result::stream::wait_event(stream, self.raw(), flags) }
            .explain("make a stream wait")
    }

    /// Whether everything before the point has ended.
    pub(crate) fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: the handle is alive.
        match unsafe { result::event::query(self.raw()) } {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            done => done.explain("ask for an event").map(|()| true),
        }
    }

    /// Waits until everything before the point has ended; the thread sleeps.
    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is alive.
        unsafe { result::event::synchronize(self.raw()) }.explain("wait for an event")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            self.pool.lock().push(handle);
        }
    }
}

/// Events that are not in use: one is needed for every layer of every step.
#[derive(Clone, Debug)]
pub(crate) struct EventPool {
    context: Arc<Context>,
    free: Arc<Mutex<Vec<Handle>>>,
}

impl EventPool {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self {
            context: Arc::clone(context),
            free: Arc::default(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Handle>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event that was not recorded yet, or long ago.
    pub(crate) fn take(&self) -> Result<Event, CudaError> {
        let free = self.lock().pop();
        let handle = free.map_or_else(|| Handle::new(&self.context), Ok)?;
        Ok(Event {
            handle: Some(handle),
            pool: self.clone(),
        })
    }
}
