//! Much to copy in one call of the driver: pieces anywhere, or pieces at equal distances.

use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{
    self, CUDA_MEMCPY2D, CUmemLocation, CUmemLocationType, CUmemcpyAttributes,
    CUmemcpySrcAccessOrder, CUmemorytype,
};

use crate::cuda::{CudaError, Stream};

/// Copies of one call. The driver's cost grows with them, and other threads wait for its lock.
const COPIES_PER_CALL: usize = 8192;

/// Pieces to copy, by device address; pinned host memory has one too.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    sources: Vec<u64>,
    targets: Vec<u64>,
    sizes: Vec<usize>,
}

impl Pieces {
    pub(super) fn clear(&mut self) {
        self.sources.clear();
        self.targets.clear();
        self.sizes.clear();
    }

    pub(super) fn push(&mut self, source: u64, target: u64, bytes: usize) {
        self.sources.push(source);
        self.targets.push(target);
        self.sizes.push(bytes);
    }

    /// Adds every piece by itself.
    pub(super) fn push_each(&mut self, pieces: &Strided) {
        for i in 0..pieces.count {
            let source = pieces.source + (i * pieces.source_pitch) as u64;
            let target = pieces.target + (i * pieces.target_pitch) as u64;
            self.push(source, target, pieces.bytes);
        }
    }

    /// Puts all copies on `stream`.
    ///
    /// # Safety
    /// All ranges are valid for the device until the stream has been waited for.
    pub(super) unsafe fn copy(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let batches = has_batches();
        for start in (0..self.sizes.len()).step_by(COPIES_PER_CALL) {
            let range = start..self.sizes.len().min(start + COPIES_PER_CALL);
            let (targets, sources) = (
                &mut self.targets[range.clone()],
                &mut self.sources[range.clone()],
            );
            let sizes = &mut self.sizes[range];
            // SAFETY: passed on from the caller.
            unsafe {
                if batches && sizes.len() > 1 {
                    copy_batch(targets, sources, sizes, stream)?;
                } else {
                    copy_each(targets, sources, sizes, stream)?;
                }
            }
        }
        Ok(())
    }
}

/// Pieces of one size at equal distances on either side: one command of a copy engine, however many
/// they are, where every entry of [`Pieces`] costs the calling thread half a microsecond.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strided {
    pub(super) source: u64,
    /// Bytes from one piece to the next.
    pub(super) source_pitch: usize,
    pub(super) target: u64,
    pub(super) target_pitch: usize,
    /// Of a piece.
    pub(super) bytes: usize,
    pub(super) count: usize,
}

impl Strided {
    /// Puts the copy on `stream`.
    ///
    /// # Safety
    /// All pieces are valid for the device until the stream has been waited for.
    pub(super) unsafe fn copy(&self, stream: &Stream) -> Result<(), CudaError> {
        let copy = CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
            srcHost: ptr::null(),
            srcDevice: self.source,
            srcArray: ptr::null_mut(),
            srcPitch: self.source_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
            dstHost: ptr::null_mut(),
            dstDevice: self.target,
            dstArray: ptr::null_mut(),
            dstPitch: self.target_pitch,
            WidthInBytes: self.bytes,
            Height: self.count,
        };
        // SAFETY: passed on from the caller; the driver reads `copy` during the call.
        let done = unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream.raw()) };
        CudaError::check(done, "copy rows")
    }
}

/// Whether the driver has the call in the form that is bound, which is CUDA 13's.
pub(super) fn has_batches() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    // SAFETY: a context exists, so the library is loaded; the symbol's address is not used.
    *FOUND.get_or_init(|| unsafe {
        sys::culib()
            .get::<unsafe extern "C" fn()>(b"cuMemcpyBatchAsync_v2\0")
            .is_ok()
    })
}

/// # Safety
/// As for [`Pieces::copy`].
unsafe fn copy_batch(
    targets: &mut [u64],
    sources: &mut [u64],
    sizes: &mut [usize],
    stream: &Stream,
) -> Result<(), CudaError> {
    let anywhere = CUmemLocation {
        type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
        id: 0,
    };
    let mut attributes = CUmemcpyAttributes {
        srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: anywhere,
        dstLocHint: anywhere,
        flags: 0,
    };
    let mut first = 0;
    // SAFETY: the arrays have one entry a copy and are read during the call; one attribute holds
    // from copy 0 on.
    let done = unsafe {
        sys::cuMemcpyBatchAsync_v2(
            targets.as_mut_ptr(),
            sources.as_mut_ptr(),
            sizes.as_mut_ptr(),
            sizes.len(),
            ptr::from_mut(&mut attributes),
            ptr::from_mut(&mut first),
            1,
            stream.raw(),
        )
    };
    CudaError::check(done, "copy a batch")
}

/// # Safety
/// As for [`Pieces::copy`].
unsafe fn copy_each(
    targets: &[u64],
    sources: &[u64],
    sizes: &[usize],
    stream: &Stream,
) -> Result<(), CudaError> {
    for ((&target, &source), &bytes) in targets.iter().zip(sources).zip(sizes) {
        // SAFETY: passed on from the caller.
        let done = unsafe { sys::cuMemcpyAsync(target, source, bytes, stream.raw()) };
        CudaError::check(done, "copy")?;
    }
    Ok(())
}
