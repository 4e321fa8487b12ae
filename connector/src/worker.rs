//! The device's side, and the place where torch's pointers enter.

use std::sync::Arc;

use kvtide_engine::SaveJob;
use kvtide_kernels::copy::{CudaDevice, Device, HostDevice, Measured, Registration};
use kvtide_kernels::cuda::ComputeStream;
use kvtide_kernels::{Float, KvLayout, ScaledDimension, TensorView};
use kvtide_model::BlockMove;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyDict;

use crate::fence::{KvtideError, enter, kvtide_error};
use crate::pool::Segment;
use crate::settings::Settings;

/// A tensor as `register_kv_caches` gets it: (layer name, address, bytes to the end of its storage,
/// shape, strides in bytes, bytes of an element).
type Tensor = (String, usize, usize, Vec<usize>, Vec<usize>, usize);
/// Type of the numbers, and for each tensor the dimensions whose places have scales of their own, as
/// (length, stride in bytes), the outer one first.
type Encoding = (String, Vec<Vec<(usize, usize)>>);
/// (purpose, route, bytes per second, whether the route is in use).
type CopyRate = (&'static str, String, f64, bool);
/// (job, indices of the moves that failed, damaged slots, bytes, seconds).
type Ended = (u64, Vec<usize>, Vec<(u32, u32)>, u64, f64);

/// One rank's KV cache, as it was registered.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct KvCache(Arc<dyn Device>);

#[pymethods]
impl KvCache {
    /// Starts copy threads, whose names begin with `name`, between this KV cache, as that of `rank`, and
    /// the rows of another segment, which may hold blocks already. Nothing is measured again.
    fn over(&self, py: Python<'_>, segment: &Segment, rank: u32, name: &str) -> PyResult<Worker> {
        let registration = self.0.registration();
        let registration = registration.over(Arc::clone(segment.memory()), rank);
        let registration = registration.map_err(kvtide_error)?;
        let device = enter(py, || self.0.over(registration)).map_err(kvtide_error)?;
        Worker::start(device, name)
    }
}

/// Saves and loads for one rank.
#[pyclass(module = "kvtide._native")]
pub(crate) struct Worker {
    /// None once closed.
    worker: Option<kvtide_engine::Worker>,
    /// The same.
    cache: Option<Arc<dyn Device>>,
    /// What is to be said of the device in the log.
    about: String,
    /// Bytes per second of layered loads, where they do not compete with the model.
    load_rate: Option<f64>,
    copy_rates: Vec<CopyRate>,
}

fn copy_rates(device: &CudaDevice) -> Vec<CopyRate> {
    let routes = device.routes();
    let rate = |measured: &Measured| {
        let bytes_per_s = measured.gb_per_s * 1e9;
        let used = routes.uses(measured);
        (
            measured.purpose,
            measured.route.to_string(),
            bytes_per_s,
            used,
        )
    };
    device.measured().iter().map(rate).collect()
}

fn float_named(name: &str) -> PyResult<Float> {
    match name {
        "bfloat16" => Ok(Float::Bfloat16),
        "float16" => Ok(Float::Float16),
        _ => Err(PyValueError::new_err(format!("{name} cannot be encoded"))),
    }
}

fn scaled((length, stride_bytes): (usize, usize)) -> ScaledDimension {
    ScaledDimension {
        length,
        stride_bytes,
    }
}

fn decode(moves: &[u8]) -> PyResult<Vec<BlockMove>> {
    BlockMove::decode_all(moves).ok_or_else(|| PyValueError::new_err("moves are not whole"))
}

fn decode_jobs(jobs: Vec<(u64, PyBackedBytes)>) -> PyResult<Vec<SaveJob>> {
    let decode_job = |(job, moves): (u64, PyBackedBytes)| {
        Ok(SaveJob {
            job,
            moves: decode(&moves)?,
        })
    };
    jobs.into_iter().map(decode_job).collect()
}

impl Worker {
    /// Starts the copy threads of a device.
    fn start(device: Arc<dyn Device>, name: &str) -> PyResult<Self> {
        let worker = kvtide_engine::Worker::start(Arc::clone(&device), name);
        Ok(Self {
            worker: Some(worker.map_err(kvtide_error)?),
            about: device.to_string(),
            cache: Some(device),
            load_rate: None,
            copy_rates: Vec::new(),
        })
    }

    fn open(&self) -> PyResult<&kvtide_engine::Worker> {
        self.worker
            .as_ref()
            .ok_or_else(|| KvtideError::new_err("the worker is closed"))
    }

    fn open_mut(&mut self) -> PyResult<&mut kvtide_engine::Worker> {
        self.worker
            .as_mut()
            .ok_or_else(|| KvtideError::new_err("the worker is closed"))
    }
}

#[pymethods]
impl Worker {
    /// Registers `tensors` as `rank`'s KV cache of `blocks` blocks, which have `layer_bytes` in each,
    /// and starts the copy threads, whose names begin with `name`. `gpu` is the GPU in whose memory
    /// the tensors lie, or None for host memory. `encoding` says what the tensors hold, if rows hold
    /// it encoded. `owner` is any object that keeps the tensors' storage alive.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "one call from one place")]
    fn new(
        py: Python<'_>,
        settings: &Settings,
        segment: &Segment,
        rank: u32,
        name: &str,
        gpu: Option<u32>,
        blocks: u32,
        layer_bytes: usize,
        tensors: Vec<Tensor>,
        encoding: Option<Encoding>,
        owner: Py<PyAny>,
    ) -> PyResult<Self> {
        let views: Vec<TensorView> = tensors
            .into_iter()
            .map(
                |(name, address, reachable_bytes, shape, strides_bytes, item_bytes)| TensorView {
                    name,
                    address,
                    reachable_bytes,
                    shape,
                    strides_bytes,
                    item_bytes,
                },
            )
            .collect();
        let mut layout = KvLayout::new(&views, blocks, layer_bytes).map_err(kvtide_error)?;
        if let Some((float, dimensions)) = encoding {
            let float = float_named(&float)?;
            let dimensions: Vec<Vec<ScaledDimension>> = dimensions
                .into_iter()
                .map(|dimensions| dimensions.into_iter().map(scaled).collect())
                .collect();
            layout = layout
                .encoded(float, &views, &dimensions)
                .map_err(kvtide_error)?;
        }
        // SAFETY: addresses and storage sizes are torch's own for the tensors vLLM registered as its
        // KV cache, in host memory or that of `gpu` (`python/kvtide/worker.py` refuses the rest);
        // `owner` holds them. vLLM writes a full block no more until it reallocates it, for which it
        // is made to wait (`saves_reading`), nor uses blocks before their load is reported.
        let registration = unsafe {
            Registration::new(layout, Arc::clone(segment.memory()), rank, Arc::new(owner))
        };
        let registration = Arc::new(registration.map_err(kvtide_error)?);
        let options = settings.config.engine.gpu_routes;
        let (device, load_rate, copy_rates): (Arc<dyn Device>, Option<f64>, _) = match gpu {
            None => (Arc::new(HostDevice::new(registration)), None, Vec::new()),
            Some(ordinal) => {
                let device = enter(py, || CudaDevice::open(ordinal, registration, options))
                    .map_err(kvtide_error)?;
                let load_rate = device.layered_bytes_per_s();
                let copy_rates = copy_rates(&device);
                (Arc::new(device), load_rate, copy_rates)
            }
        };
        Ok(Self {
            load_rate,
            copy_rates,
            ..Self::start(device, name)?
        })
    }

    /// The KV cache that was registered.
    #[getter]
    fn cache(&self) -> PyResult<KvCache> {
        let closed = || KvtideError::new_err("the worker is closed");
        let device = self.cache.as_ref().ok_or_else(closed)?;
        Ok(KvCache(Arc::clone(device)))
    }

    /// What the routes reached when the device was opened, as (purpose, route, bytes per second,
    /// whether it is in use); empty in host memory.
    #[getter]
    fn copy_rates(&self) -> Vec<CopyRate> {
        self.copy_rates.clone()
    }

    /// Bytes per second that layered loads reached when the device was opened. None in host memory,
    /// where copies compete with the model.
    #[getter]
    fn load_rate(&self) -> Option<f64> {
        self.load_rate
    }

    /// What is to be said of the device in the log.
    #[getter]
    fn about(&self) -> &str {
        &self.about
    }

    /// The engine computes on this CUDA stream from now on; 0 is the default stream.
    fn use_stream(&mut self, stream: u64) -> PyResult<()> {
        // SAFETY: vLLM's worker names the stream that PyTorch computes on, which PyTorch never destroys.
        let stream = unsafe { ComputeStream::from_raw(stream) };
        self.open_mut()?.use_stream(stream);
        Ok(())
    }

    /// All saves and loads that the next step waits for are queued; nothing of the step has begun.
    fn step_held_back(&mut self, py: Python<'_>) -> PyResult<()> {
        let worker = self.open_mut()?;
        enter(py, || worker.step_held_back());
        Ok(())
    }

    /// Saves blocks whose layers are all computed; jobs are (id, moves).
    fn save_now(&self, py: Python<'_>, jobs: Vec<(u64, PyBackedBytes)>) -> PyResult<()> {
        let (worker, jobs) = (self.open()?, decode_jobs(jobs)?);
        enter(py, || worker.save_now(jobs));
        Ok(())
    }

    /// Saves blocks that the step beginning now computes.
    fn begin_step(&mut self, py: Python<'_>, jobs: Vec<(u64, PyBackedBytes)>) -> PyResult<()> {
        let jobs = decode_jobs(jobs)?;
        let worker = self.open_mut()?;
        enter(py, || worker.begin_step(jobs));
        Ok(())
    }

    /// The running step has failed: its blocks are not saved.
    fn abort_step(&mut self, py: Python<'_>) -> PyResult<()> {
        let worker = self.open_mut()?;
        enter(py, || worker.abort_step());
        Ok(())
    }

    /// The running step has computed a layer.
    fn layer_computed(&self, py: Python<'_>, layer: usize) -> PyResult<()> {
        let worker = self.open()?;
        enter(py, || worker.layer_computed(layer));
        Ok(())
    }

    /// The running step has computed all layers.
    fn end_step(&mut self, py: Python<'_>) -> PyResult<()> {
        let worker = self.open_mut()?;
        enter(py, || worker.end_step());
        Ok(())
    }

    /// Waits until `jobs` have ended.
    fn finish_saves(&self, py: Python<'_>, jobs: Vec<u64>) -> PyResult<()> {
        let worker = self.open()?;
        enter(py, || worker.finish_saves(&jobs)).map_err(kvtide_error)
    }

    /// Holds back the engine until `jobs` do not read its blocks any more.
    fn wait_saves(&self, py: Python<'_>, jobs: Vec<u64>) -> PyResult<()> {
        let worker = self.open()?;
        enter(py, || worker.wait_saves(&jobs)).map_err(kvtide_error)
    }

    /// Loads blocks for the step beginning now, layer by layer, and behind those that have begun if
    /// they may still use them.
    fn load_layered(
        &mut self,
        py: Python<'_>,
        job: u64,
        moves: &[u8],
        behind_steps: bool,
    ) -> PyResult<()> {
        let moves = decode(moves)?;
        let worker = self.open_mut()?;
        enter(py, || worker.load_layered(job, moves, behind_steps));
        Ok(())
    }

    /// Waits until the running step's layered load has loaded a layer.
    fn wait_layer(&self, py: Python<'_>, layer: usize) -> PyResult<()> {
        let worker = self.open()?;
        enter(py, || worker.wait_layer(layer)).map_err(kvtide_error)
    }

    /// Waits until the running step's layered load has loaded every layer.
    fn wait_all_layers(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.open()?;
        enter(py, || worker.wait_all_layers()).map_err(kvtide_error)
    }

    /// Waits, on this thread also on a GPU, until the running step's layered load has all its layers.
    fn finish_layers(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.open()?;
        enter(py, || worker.finish_layers()).map_err(kvtide_error)
    }

    /// Loads blocks beside the steps, and behind those that have begun if they may still use them. The
    /// end is published in the board's `cell`.
    fn load_async(
        &self,
        py: Python<'_>,
        job: u64,
        cell: u32,
        moves: &[u8],
        behind_steps: bool,
    ) -> PyResult<()> {
        let (worker, moves) = (self.open()?, decode(moves)?);
        enter(py, || worker.load_async(job, cell, moves, behind_steps));
        Ok(())
    }

    /// The blocks of an async load will be computed: as little of it as can be is copied from now on.
    /// Whether its end is still to be taken; until then it may write into its blocks.
    fn cancel_load(&self, py: Python<'_>, job: u64) -> PyResult<bool> {
        let worker = self.open()?;
        Ok(enter(py, || worker.cancel_load(job)))
    }

    /// Loads that have ended since the last call.
    fn take_loads(&mut self) -> PyResult<Vec<Ended>> {
        let ended = |(job, outcome): (u64, kvtide_engine::LoadOutcome)| {
            let damaged = outcome
                .damaged
                .iter()
                .map(|s| (s.slot, s.generation))
                .collect();
            (job, outcome.failed, damaged, outcome.bytes, outcome.seconds)
        };
        Ok(self
            .open_mut()?
            .take_loads()
            .into_iter()
            .map(ended)
            .collect())
    }

    /// What the newest failed copy since the last call failed of.
    fn take_error(&mut self) -> PyResult<Option<String>> {
        let error = self.open_mut()?.take_error();
        Ok(error.map(|error| error.to_string()))
    }

    /// Totals since the worker was made.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = self.open()?.counters();
        let dict = PyDict::new(py);
        dict.set_item("saved_bytes", counters.saved_bytes)?;
        dict.set_item("refused_saves", counters.refused_saves)?;
        dict.set_item("copy_errors", counters.copy_errors)?;
        Ok(dict)
    }

    /// Lets what was accepted end, joins the threads and lets go of the tensors. May be called again.
    fn close(&mut self, py: Python<'_>) {
        let (worker, cache) = (self.worker.take(), self.cache.take());
        enter(py, || drop((worker, cache)));
    }
}
