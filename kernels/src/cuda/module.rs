//! The embedded kernels.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::error::Explain;
use super::stream::Stream;
use super::{Context, CudaError};

/// The driver reads the image in words.
#[repr(align(64))]
pub(super) struct Aligned<Bytes: ?Sized>(Bytes);

/// The fat binary that `build.rs` made of `kernels/cuda`.
#[cfg(kvtide_cuda_kernels)]
pub(super) static IMAGE: Option<&Aligned<[u8]>> = {
    static IMAGE: &Aligned<[u8]> =
        &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));
    Some(IMAGE)
};
#[cfg(not(kvtide_cuda_kernels))]
pub(super) static IMAGE: Option<&Aligned<[u8]>> = None;

/// The kernels, loaded into a context.
#[derive(Debug)]
pub(crate) struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

// SAFETY: a module handle may be used from any thread; the driver locks inside.
unsafe impl Send for Module {}
// SAFETY: as for `Send`.
unsafe impl Sync for Module {}

impl Module {
    pub(crate) fn load(context: &Arc<Context>) -> Result<Arc<Self>, CudaError> {
        let image = IMAGE.ok_or(CudaError::NoKernels)?;
        context.enter()?;
        // SAFETY: the image is a fat binary, which carries its own length.
        let raw = unsafe { result::module::load_data(image.0.as_ptr().cast()) };
        Ok(Arc::new(Self {
            context: Arc::clone(context),
            raw: raw.explain("load the kernels")?,
        }))
    }

    /// The kernel of this name.
    pub(crate) fn function(self: &Arc<Self>, name: &CStr) -> Result<Function, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the module is loaded, `name` ends with a zero, `raw` is a place for the handle.
        unsafe { sys::cuModuleGetFunction(&raw mut raw, self.raw, name.as_ptr()) }
            .result()
            .explain("find a kernel")?;
        Ok(Function {
            _module: Arc::clone(self),
            raw,
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: functions hold the module, so none is left; streams that ran them have been waited
        // for.
        let _ = unsafe { result::module::unload(self.raw) };
    }
}

/// One kernel.
#[derive(Debug)]
pub(crate) struct Function {
    _module: Arc<Module>,
    raw: sys::CUfunction,
}

// SAFETY: a function handle may be used from any thread; the driver locks inside.
unsafe impl Send for Function {}
// SAFETY: as for `Send`.
unsafe impl Sync for Function {}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
}

impl Function {
    /// Puts the kernel on `stream`.
    ///
    /// # Safety
    /// `arguments` point to values of the types that the kernel takes, in its order, and what those
    /// values point to is valid for the kernel until the stream has been waited for.
    pub(crate) unsafe fn launch(
        &self,
        stream: &Stream,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller; function and stream are alive.
        unsafe {
            result::launch_kernel(
                self.raw,
                (launch.blocks, 1, 1),
                (launch.threads, 1, 1),
                0,
                stream.raw(),
                arguments,
            )
        }
        .explain("launch a kernel")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where nvcc was missing this is ignored by name: the build has no kernels, and no GPU works.
    #[test]
    #[cfg_attr(
        not(kvtide_cuda_kernels),
        ignore = "no nvcc when this was built: there are no CUDA kernels in it"
    )]
    fn the_build_embeds_a_fat_binary() {
        let image = &IMAGE.expect("compiled by build.rs").0;
        assert_eq!(
            image[..4],
            0xba55_ed50u32.to_le_bytes(),
            "a fat binary's magic number"
        );
        for kernel in [
            "kvtide_save",
            "kvtide_load",
            "kvtide_decode",
            "kvtide_digest",
        ] {
            let name = kernel.as_bytes();
            let named = image.windows(name.len()).any(|bytes| bytes == name);
            assert!(named, "{kernel} is missing");
        }
    }
}
