//! The shared segment and the pool over it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvtide_engine::{PoolEvent, PoolOptions, Scrubber, Session, available_memory_bytes};
use kvtide_model::SlotRef;
use kvtide_segment::{LoadEnd, RowGeometry, SegmentOptions, SharedSegment};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::fence::{config_error, enter, kvtide_error};
use crate::sequence::Namespace;
use crate::settings::Settings;

/// The shared host segment of one engine.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Segment(pub(crate) Arc<SharedSegment>);

#[pymethods]
impl Segment {
    /// Attaches to the segment of `instance`, or creates it; `holders` do so in all.
    #[new]
    fn new(
        py: Python<'_>,
        settings: &Settings,
        instance: String,
        ranks: u32,
        layers: u32,
        layer_bytes: usize,
        holders: u32,
    ) -> PyResult<Self> {
        let config = &settings.0;
        let capacity = usize::try_from(config.host_capacity_bytes).unwrap_or(usize::MAX);
        let geometry = RowGeometry::fit(ranks, layers, layer_bytes, capacity).map_err(|error| {
            let error = format!("host_capacity_gb: {error}; raise it");
            crate::fence::ConfigError::new_err(error)
        })?;
        let options = SegmentOptions {
            directory: config.segment_directory.clone(),
            instance,
            huge_pages: config.huge_pages,
            holders,
            available_bytes: available_memory_bytes(),
        };
        enter(py, || SharedSegment::create_or_attach(&options, geometry))
            .map(|segment| Self(Arc::new(segment)))
            .map_err(config_error)
    }

    /// Maps all of the segment's memory; `progress(done_bytes, total_bytes)` is called about every
    /// tenth of it.
    fn populate(&self, py: Python<'_>, progress: Py<PyAny>) -> PyResult<()> {
        let segment = &self.0;
        let told = AtomicUsize::new(0);
        let tell = |done: usize, total: usize| {
            if total > 0 && told.fetch_max(done * 10 / total, Ordering::Relaxed) < done * 10 / total
            {
                // A progress line that cannot be written must not keep the engine from starting.
                Python::attach(|py| drop(progress.call1(py, (done, total))));
            }
        };
        enter(py, || segment.populate(&tell)).map_err(kvtide_error)
    }

    #[getter]
    fn path(&self) -> String {
        self.0.path().display().to_string()
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

    /// On how many ranks the async load `job` at `place` has failed, once it has ended on all of
    /// them; None before.
    fn load_failures(&self, place: u32, job: u64) -> Option<usize> {
        let ranks = 0..self.0.geometry().ranks();
        let ends: Option<Vec<LoadEnd>> = ranks
            .map(|rank| self.0.load_end(place, rank, job))
            .collect();
        Some(
            ends?
                .into_iter()
                .filter(|&end| end == LoadEnd::Failed)
                .count(),
        )
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
    /// A pool over all rows of `segment`, with its background scrub, for an engine of `namespace`.
    #[new]
    fn new(
        settings: &Settings,
        segment: &Segment,
        namespace: &Namespace,
        events: bool,
    ) -> PyResult<Self> {
        let config = settings.0.clone();
        let options = PoolOptions {
            eviction: config.eviction,
            lease_ttl: config.lease_ttl,
        };
        let pool = Arc::new(kvtide_engine::Pool::new(Arc::clone(&segment.0), options));
        let scrubber =
            Scrubber::start(&pool, config.scrub_bytes_per_second).map_err(kvtide_error)?;
        let session = Session::open(&pool, namespace.id(), events).map_err(kvtide_error)?;
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

    /// Drops blocks whose bytes were found damaged, given as (slot, generation).
    fn drop_damaged(&self, py: Python<'_>, damaged: Vec<(u32, u32)>) {
        let damaged: Vec<SlotRef> = damaged
            .into_iter()
            .map(|(slot, generation)| SlotRef { slot, generation })
            .collect();
        enter(py, || self.session.pool().drop_damaged(&damaged));
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
        let counters = self.session.pool().counters();
        let dict = PyDict::new(py);
        dict.set_item("saved_blocks", counters.saved_blocks)?;
        dict.set_item("failed_blocks", counters.failed_blocks)?;
        dict.set_item("throttled_blocks", counters.throttled_blocks)?;
        dict.set_item("evicted_blocks", counters.evicted_blocks)?;
        dict.set_item("damaged_blocks", counters.damaged_blocks)?;
        dict.set_item("scrubbed_blocks", counters.scrubbed_blocks)?;
        Ok(dict)
    }

    /// What the pool holds now.
    fn gauges<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let gauges = self.session.pool().gauges();
        let dict = PyDict::new(py);
        dict.set_item("slots", gauges.slots)?;
        dict.set_item("free", gauges.free)?;
        dict.set_item("saving", gauges.saving)?;
        dict.set_item("held", gauges.held)?;
        dict.set_item("index_bytes", gauges.index_bytes)?;
        Ok(dict)
    }
}
