//! A device's primary context: the one that PyTorch uses too.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::CudaError;
use super::error::Explain;

/// A GPU of this process.
#[derive(Debug)]
pub struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    name: String,
    multiprocessors: u32,
    /// Bytes of the device's memory that our buffers take now.
    pub(super) allocated: AtomicUsize,
}

// SAFETY: a context handle may be used from any thread; the driver locks inside.
unsafe impl Send for Context {}
// SAFETY: as for `Send`.
unsafe impl Sync for Context {}

impl Context {
    /// Opens GPU `ordinal`, as the process numbers them.
    ///
    /// # Errors
    /// [`CudaError`] when there is no driver or no such device.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, CudaError> {
        // SAFETY: loading libcuda runs its initializers only.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        result::init().explain("initialize the driver")?;
        let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let device = result::device::get(ordinal).explain("find the device")?;
        let name = result::device::get_name(device).explain("name the device")?;
        let attribute = |attribute| -> Result<u32, CudaError> {
            // SAFETY: `device` came from `device::get`.
            let value = unsafe { result::device::get_attribute(device, attribute) };
            Ok(u32::try_from(value.explain("ask for an attribute")?).unwrap_or(0))
        };
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: `device` came from `device::get`; the reference is given back in `drop`.
        let raw = unsafe { result::primary_ctx::retain(device) }.explain("open the context")?;
        Ok(Arc::new(Self {
            device,
            raw,
            name,
            multiprocessors,
            allocated: AtomicUsize::new(0),
        }))
    }

    /// Bytes of the device's memory that our buffers take now.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Makes the context current on the calling thread; calls that need one come after this.
    ///
    /// # Errors
    /// [`CudaError`] when the context is broken.
    pub fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: `raw` is retained until `self` is dropped.
        unsafe { result::ctx::set_current(self.raw) }.explain("enter the context")
    }

    /// The product's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Waits until everything that was put on any of the context's streams has ended.
    ///
    /// # Errors
    /// [`CudaError`] when any of it failed.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        self.enter()?;
        result::ctx::synchronize().explain("wait for the device")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: balances the `retain` of `open`. A failure means that the driver is shutting down.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}
