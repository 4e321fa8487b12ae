//! Errors of the driver.

use std::fmt;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// A call of the driver that failed, or the reason why it could not be made.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no `libcuda.so`: no NVIDIA driver is installed.
    NoDriver,
    /// This build has no kernels.
    NoKernels,
    /// Neighbouring parts of the pool are not neighbours for the device.
    ScatteredPool,
    /// A call failed.
    Call {
        /// What was to be done.
        what: &'static str,
        /// The driver's code.
        code: CUresult,
        /// The driver's explanation.
        explanation: String,
    },
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDriver => f.write_str("CUDA: libcuda.so was not found; install the NVIDIA driver"),
            Self::NoKernels => f.write_str(
                "this build of kvtide has no CUDA kernels: no nvcc was found when it was built; set \
                 CUDA_HOME and build again",
            ),
            Self::ScatteredPool => f.write_str(
                "CUDA: this GPU has other addresses for host memory than the host; give the engine a \
                 pool of at most 64 GiB",
            ),
            Self::Call {
                what,
                code,
                explanation,
            } => write!(f, "CUDA: cannot {what}: {explanation} ({code:?})"),
        }
    }
}

impl std::error::Error for CudaError {}

impl CudaError {
    /// The outcome of a call of the driver.
    pub(crate) fn check(code: CUresult, what: &'static str) -> Result<(), Self> {
        code.result().explain(what)
    }
}

/// Names what a call of the driver was for.
pub(super) trait Explain<T> {
    fn explain(self, what: &'static str) -> Result<T, CudaError>;
}

impl<T> Explain<T> for Result<T, DriverError> {
    fn explain(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| CudaError::Call {
            what,
            code: error.0,
            explanation: error.error_string().map_or_else(
                |_| "unknown error".to_owned(),
                |text| text.to_string_lossy().into_owned(),
            ),
        })
    }
}
