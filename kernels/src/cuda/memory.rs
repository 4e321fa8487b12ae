//! Memory of the device, and host memory that it can reach.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::error::Explain;
use super::stream::Stream;
use super::{Chunks, Context, CudaError};

/// Values that can be copied as bytes and have no invalid bit patterns.
///
/// # Safety
/// As the name says; padding must be initialized or absent.
pub(crate) unsafe trait Pod: Copy + Default + Send + 'static {}
// SAFETY: integers are plain.
unsafe impl Pod for u32 {}
// SAFETY: as above.
unsafe impl Pod for u64 {}
// SAFETY: as above.
unsafe impl Pod for u8 {}

/// Values in the device's memory.
#[derive(Debug)]
pub(crate) struct DeviceBuffer<T: Pod> {
    context: Arc<Context>,
    address: u64,
    count: usize,
    _values: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// Room for `count` values, not initialized.
    pub(crate) fn new(context: &Arc<Context>, count: usize) -> Result<Self, CudaError> {
        context.enter()?;
        let bytes = (count * size_of::<T>()).max(1);
        // SAFETY: nothing is asked of the caller but a current context.
        let address = unsafe { result::malloc_sync(bytes) }.explain("allocate device memory")?;
        context.allocated.fetch_add(bytes, Ordering::Relaxed);
        Ok(Self {
            context: Arc::clone(context),
            address,
            count,
            _values: PhantomData,
        })
    }

    /// A copy of `values`.
    pub(crate) fn of(context: &Arc<Context>, values: &[T]) -> Result<Self, CudaError> {
        let buffer = Self::new(context, values.len())?;
        if !values.is_empty() {
            // SAFETY: the buffer has room for `values`.
            unsafe { result::memcpy_htod_sync(buffer.address, values) }
                .explain("copy to the device")?;
        }
        Ok(buffer)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Values there is room for.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Sets the first `count` values to zero, in the order of `stream`.
    pub(crate) fn clear(&self, count: usize, stream: &Stream) -> Result<(), CudaError> {
        let bytes = count.min(self.count) * size_of::<T>();
        // SAFETY: the bytes are inside the buffer, and both live until the stream has been waited
        // for (`CudaCopier` waits before it lets go of a buffer).
        unsafe { result::memset_d8_async(self.address, 0, bytes, stream.raw()) }
            .explain("clear device memory")
    }
}

impl<T: Pod> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: the address came from `malloc_sync` and is not used again: whoever put work on a
        // stream that uses it has waited. A failure means that the context is gone with its memory.
        let _ = unsafe { result::free_sync(self.address) };
        let bytes = (self.count * size_of::<T>()).max(1);
        self.context.allocated.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Pinned host memory: the device copies to and from it without a stop in between.
#[derive(Debug)]
pub(crate) struct PinnedBuffer<T: Pod> {
    context: Arc<Context>,
    values: *mut T,
    count: usize,
}

// SAFETY: the memory is ours alone.
unsafe impl<T: Pod> Send for PinnedBuffer<T> {}
// SAFETY: shared references only read.
unsafe impl<T: Pod> Sync for PinnedBuffer<T> {}

impl<T: Pod> PinnedBuffer<T> {
    /// `count` default values.
    pub(crate) fn new(context: &Arc<Context>, count: usize) -> Result<Self, CudaError> {
        context.enter()?;
        let bytes = (count * size_of::<T>()).max(1);
        // SAFETY: nothing is asked of the caller but a current context.
        let memory = unsafe { result::malloc_host(bytes, 0) }.explain("allocate pinned memory")?;
        let values = memory.cast::<T>();
        for i in 0..count {
            // SAFETY: inside the allocation, which is aligned to pages.
            unsafe { values.add(i).write(T::default()) };
        }
        Ok(Self {
            context: Arc::clone(context),
            values,
            count,
        })
    }

    /// The values. Work of a stream that writes them has been waited for.
    pub(crate) fn values(&self) -> &[T] {
        // SAFETY: `count` values were initialized in `new`.
        unsafe { std::slice::from_raw_parts(self.values, self.count) }
    }

    /// The values, to be changed. Work of a stream that uses them has been waited for.
    pub(crate) fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `values`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.values, self.count) }
    }

    /// Copies the first `count` values to `target` in the order of `stream`.
    pub(crate) fn upload(
        &self,
        count: usize,
        target: &DeviceBuffer<T>,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let count = count.min(self.count).min(target.count);
        let bytes = count * size_of::<T>();
        // SAFETY: both sides have room, and live until the stream has been waited for.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(target.address, self.values.cast(), bytes, stream.raw())
        }
        .result()
        .explain("copy to the device")
    }

    /// Copies the first `count` values of `source` here in the order of `stream`.
    pub(crate) fn download(
        &mut self,
        count: usize,
        source: &DeviceBuffer<T>,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let count = count.min(self.count).min(source.count);
        let bytes = count * size_of::<T>();
        // SAFETY: as in `upload`.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(self.values.cast(), source.address, bytes, stream.raw())
        }
        .result()
        .explain("copy from the device")
    }
}

impl<T: Pod> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: the memory came from `malloc_host`, and streams that use it have been waited for.
        let _ = unsafe { result::free_host(self.values.cast()) };
    }
}

/// Host memory of somebody else, pinned and mapped for the device.
#[derive(Debug)]
pub(crate) struct HostRegistration {
    context: Arc<Context>,
    /// Where the registrations begin; what is here is registered.
    pinned: Vec<*mut u8>,
    device: u64,
}

// SAFETY: only addresses are kept here; nothing is read or written through them.
unsafe impl Send for HostRegistration {}
// SAFETY: as for `Send`.
unsafe impl Sync for HostRegistration {}

impl HostRegistration {
    /// Pins the range that begins at `host`, in `chunks`. Where one of them cannot be pinned, none is.
    ///
    /// # Safety
    /// The range is mapped, page-aligned, and stays mapped until this is dropped.
    pub(crate) unsafe fn new(
        context: &Arc<Context>,
        host: *mut u8,
        chunks: Chunks,
    ) -> Result<Self, CudaError> {
        context.enter()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        let mut registration = Self {
            context: Arc::clone(context),
            pinned: Vec::new(),
            device: 0,
        };
        for (at, range) in chunks.ranges().enumerate() {
            let start = host.wrapping_add(range.start);
            // SAFETY: the chunk is part of the caller's range.
            unsafe { sys::cuMemHostRegister_v2(start.cast(), range.len(), flags) }
                .result()
                .explain("pin the pool (is RLIMIT_MEMLOCK, or the container's limit, too low?)")?;
            // Unpinned from now on, also where a later one fails.
            registration.pinned.push(start);
            let mut device = 0;
            // SAFETY: the range was registered just now.
            unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut device, start.cast(), 0) }
                .result()
                .explain("map the pool for the device")?;
            if at == 0 {
                registration.device = device;
            }
            // A row's address is counted from the first one's.
            if device != registration.device + range.start as u64 {
                return Err(CudaError::ScatteredPool);
            }
        }
        Ok(registration)
    }

    /// The device's address of the range's first byte.
    pub(crate) fn device(&self) -> u64 {
        self.device
    }
}

impl Drop for HostRegistration {
    fn drop(&mut self) {
        let _ = self.context.enter();
        for &start in &self.pinned {
            // SAFETY: registered in `new`; whoever put work on a stream that uses it has waited.
            let _ = unsafe { sys::cuMemHostUnregister(start.cast()) };
        }
    }
}
