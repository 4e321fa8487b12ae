//! A KV cache in a GPU's memory.
//!
//! Three routes lead from a block to a row and back:
//!
//! * `dma`: the copy engines move every contiguous piece, in one call of the driver for all of them;
//! * `staged`: kernels gather pieces into a buffer on the device (or scatter them from it) at the
//!   speed of its memory, and the copy engines move whole rows;
//! * `kernel`: multiprocessors read and write pinned host memory themselves, 16 bytes a thread.
//!
//! Which is taken for saves, async loads and layered loads is measured when the device is opened
//! (`calibrate`), since it depends on the pieces' size as much as on the machine.

mod calibrate;
mod copier;
mod device;
mod dma;
mod launches;
mod layered;
mod route;
mod tables;

pub use device::{CudaDevice, CudaOptions};
pub use route::{Measured, Route, Routes};
