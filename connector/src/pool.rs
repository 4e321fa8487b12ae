//! The shared segment and the pool over it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kvtide_engine::{
    PoolEvent, PoolOptions, Scrubber, Session, SessionOptions, available_memory_bytes,
};
use kvtide_model::SlotRef;
use kvtide_segment::{Holder, LoadEnd, RowGeometry, SegmentOptions, SharedSegment};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::fence::{config_error, enter, kvtide_error};
use crate::plans::{self, DueSave, Load, PlannedLoad, PlannedSave};
use crate::settings::Settings;

/// The shared host segment of one engine.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Segment(pub(crate) Arc<SharedSegment>);

#[pymethods]
impl Segment {
    /// Attaches to the segment of `instance`, or creates it, as the worker of `rank` or, without one,
    /// as the scheduler's side. `on_wait(path, seconds)` is called now and then while another process
    /// holds it up.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "one call from one place")]
    fn new(
        py: Python<'_>,
        settings: &Settings,
        instance: String,
        ranks: u32,
        layers: u32,
        layer_bytes: usize,
        rank: Option<u32>,
        on_wait: Py<PyAny>,
    ) -> PyResult<Self> {
        let config = &settings.config;
        let capacity = usize::try_from(config.host_capacity_bytes).unwrap_or(usize::MAX);
        let geometry = RowGeometry::fit(ranks, layers, layer_bytes, capacity).map_err(|error| {
            let error = format!("host_capacity_gb: {error}; raise it");
            crate::fence::ConfigError::new_err(error)
        })?;
        let options = SegmentOptions {
            directory: config.segment_directory.clone(),
            instance,
            holder: rank.map_or(Holder::Scheduler, Holder::Worker),
            huge_pages: config.huge_pages,
            available_bytes: available_memory_bytes(),
        };
        let on_wait = |path: &Path, waited: Duration| {
            let line = (path.display().to_string(), waited.as_secs());
            // A line that cannot be written must not keep the engine from starting.
            Python::attach(|py| drop(on_wait.call1(py, line)));
        };
        let open = || SharedSegment::create_or_attach(&options, geometry, &on_wait);
        enter(py, open)
            .map(|segment| Self(Arc::new(segment)))
            .map_err(config_error)
    }

    /// Maps all of the segment's memory; `progress(done_bytes, total_bytes)` is called about every
    /// tenth of it.
    fn populate(&self, py: Python<'_>, progress: Py<PyAny>) -> PyResult<()> {
        let segment = &self.0;
        let reported = AtomicUsize::new(0);
        let report = |done: usize, total: usize| {
            let tenths = (done * 10).checked_div(total).unwrap_or(0);
            if reported.fetch_max(tenths, Ordering::Relaxed) < tenths {
                // A progress line that cannot be written must not keep the engine from starting.
                Python::attach(|py| drop(progress.call1(py, (done, total))));
            }
        };
        enter(py, || segment.populate(&report)).map_err(kvtide_error)
    }

    #[getter]
    fn path(&self) -> String {
        self.0.path().display().to_string()
    }

    /// A number that no other segment has.
    #[getter]
    fn nonce(&self) -> u64 {
        self.0.nonce()
    }

    #[getter]
    fn created(&self) -> bool {
        self.0.created()
    }

    #[getter]
    fn on_huge_pages(&self) -> bool {
        self.0.on_huge_pages()
    }

    #[getter]
    fn reclaimed(&self) -> Vec<String> {
        self.0
            .reclaimed()
            .iter()
            .map(|path| path.display().to_string())
            .collect()
    }

    /// For each async load, given as (board cell, job): on how many ranks it has failed, once it has
    /// ended on all of them; None before. Reads only atomics, so the interpreter lock stays.
    fn ended_loads(&self, loads: Vec<(u32, u64)>) -> Vec<Option<usize>> {
        let ranks = self.0.geometry().ranks();
        let failures = |(cell, job): (u32, u64)| {
            (0..ranks).try_fold(0, |failures, rank| {
                let end = self.0.load_end(cell, rank, job)?;
                Some(failures + usize::from(end == LoadEnd::Failed))
            })
        };
        loads.into_iter().map(failures).collect()
    }

    #[getter]
    fn total_bytes(&self) -> usize {
        self.0.geometry().total_bytes()
    }

    #[getter]
    fn rows(&self) -> u32 {
        self.0.geometry().rows()
    }

    #[getter]
    fn row_bytes(&self) -> usize {
        self.0.geometry().row_bytes()
    }
}

/// A pool in this process, and its only engine's session.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Pool {
    pub(crate) session: Session,
    pub(crate) config: kvtide_engine::Config,
    _scrubber: Option<Scrubber>,
}

#[pymethods]
impl Pool {
    /// A pool over all rows of `segment`, with its background scrub.
    #[new]
    fn new(settings: &Settings, segment: &Segment, events: bool) -> PyResult<Self> {
        let config = settings.config.clone();
        let options = PoolOptions {
            eviction: config.eviction,
        };
        let session = SessionOptions {
            events,
            lease_ttl: config.lease_ttl,
        };
        let pool = Arc::new(kvtide_engine::Pool::new(Arc::clone(&segment.0), options));
        let scrubber =
            Scrubber::start(&pool, config.scrub_bytes_per_second).map_err(kvtide_error)?;
        let session = Session::open(&pool, session).map_err(kvtide_error)?;
        Ok(Self {
            session,
            config,
            _scrubber: scrubber,
        })
    }

    /// Takes note of finished saves; returns the blocks still in flight.
    fn poll(&self, py: Python<'_>) -> usize {
        enter(py, || self.session.poll())
    }

    /// Save jobs that still read one of the engine's `blocks`.
    fn saves_reading(&self, blocks: Vec<u32>) -> Vec<u64> {
        self.session.saves_reading(&blocks)
    }

    /// Plans saves, each given as (sequence, first block to save, the engine's blocks from there on):
    /// for each (job, moves, leading blocks that are held or being saved now); job 0 is nothing to do.
    fn plan_saves<'py>(&self, py: Python<'py>, saves: Vec<DueSave<'py>>) -> Vec<PlannedSave<'py>> {
        plans::plan_saves(py, self, saves)
    }

    /// For each load (moves, blocks that will not be loaded), or None while blocks of it are still
    /// being saved.
    fn plan_loads<'py>(
        &self,
        py: Python<'py>,
        loads: Vec<PyRef<'py, Load>>,
    ) -> Vec<Option<PlannedLoad<'py>>> {
        plans::plan_loads(py, self, &loads)
    }

    /// Drops blocks whose bytes were found damaged, given as (slot, generation).
    fn drop_damaged(&self, py: Python<'_>, damaged: Vec<(u32, u32)>) {
        let damaged: Vec<SlotRef> = damaged
            .into_iter()
            .map(|(slot, generation)| SlotRef { slot, generation })
            .collect();
        enter(py, || self.session.drop_damaged(&damaged));
    }

    /// Drops every block of the engine's namespace.
    fn clear(&self, py: Python<'_>) {
        enter(py, || self.session.clear());
    }

    /// What happened since the last call: ("stored" | "removed", key) or ("cleared", b"").
    fn take_events<'py>(&self, py: Python<'py>) -> Vec<(&'static str, Bound<'py, PyBytes>)> {
        let name = |event: PoolEvent| match event {
            PoolEvent::Stored(key) => ("stored", PyBytes::new(py, key.as_bytes())),
            PoolEvent::Removed(key) => ("removed", PyBytes::new(py, key.as_bytes())),
            PoolEvent::Cleared => ("cleared", PyBytes::new(py, b"")),
        };
        self.session.take_events().into_iter().map(name).collect()
    }

    /// Totals since the pool was made.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = self.session.counters();
        let dict = PyDict::new(py);
        dict.set_item("saved_blocks", counters.saved_blocks)?;
        dict.set_item("failed_blocks", counters.failed_blocks)?;
        dict.set_item("throttled_blocks", counters.throttled_blocks)?;
        dict.set_item("evicted_blocks", counters.evicted_blocks)?;
        dict.set_item("damaged_blocks", counters.damaged_blocks)?;
        dict.set_item("verified_blocks", counters.verified_blocks)?;
        dict.set_item("scrubbed_blocks", counters.scrubbed_blocks)?;
        Ok(dict)
    }

    /// What the pool holds now.
    fn gauges<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let gauges = self.session.gauges();
        let dict = PyDict::new(py);
        dict.set_item("slots", gauges.slots)?;
        dict.set_item("free", gauges.free)?;
        dict.set_item("saving", gauges.saving)?;
        dict.set_item("held", gauges.held)?;
        dict.set_item("index_bytes", gauges.index_bytes)?;
        Ok(dict)
    }
}
