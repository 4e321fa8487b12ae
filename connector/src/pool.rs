//! The shared segment and the pool over it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtide_engine::{
    AttachOptions, Attachment, Config, PoolEvent, PoolOptions, Scrubber, Session, SessionOptions,
    available_memory_bytes,
};
use kvtide_model::SlotRef;
use kvtide_model::wire::Geometry;
use kvtide_segment::{
    Holder, LoadEnd, MappedFile, RowGeometry, SegmentOptions, SegmentParts, SharedSegment,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::fence::{config_error, enter, kvtide_error};
use crate::plans::{self, DueSave, Load, PlannedLoad, PlannedSave};
use crate::sequence::Namespace;
use crate::settings::Settings;

/// Bytes of a scratch segment: what is copied at a time to measure the routes to a GPU.
const SCRATCH_BYTES: usize = 256 << 20;

/// The memory that holds an engine's rows: its own shared segment, or part of a daemon's pool.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Segment {
    /// None while it is being dropped.
    memory: Option<Arc<SharedSegment>>,
    /// The connection with the daemon, until a session takes it.
    attachment: Mutex<Option<Attachment>>,
}

/// Which of an engine's processes has a rank, or none.
fn holder(rank: Option<u32>) -> Holder {
    rank.map_or(Holder::Scheduler, Holder::Worker)
}

impl Segment {
    pub(crate) fn memory(&self) -> &Arc<SharedSegment> {
        match &self.memory {
            Some(memory) => memory,
            None => unreachable!("it is taken out in drop alone"),
        }
    }

    fn of(memory: Arc<SharedSegment>, attachment: Option<Attachment>) -> Self {
        Self {
            memory: Some(memory),
            attachment: Mutex::new(attachment),
        }
    }
}

impl Drop for Segment {
    /// The interpreter runs this under its lock, and a large map takes its time to be taken down. A
    /// segment of the engine's own goes only with the engine, and removes its file then.
    fn drop(&mut self) {
        let attachment = self.attachment.get_mut();
        let attachment = attachment.unwrap_or_else(PoisonError::into_inner).take();
        let memory = self.memory.take();
        if memory
            .as_ref()
            .is_some_and(|memory| memory.outlives_engines())
        {
            // Without a thread, this one does it.
            let _ = std::thread::Builder::new().spawn(move || drop((attachment, memory)));
        }
    }
}

/// The daemon that has an engine's pool, and what it is told of the engine.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Daemon(AttachOptions);

#[pymethods]
impl Daemon {
    /// The daemon that listens on `socket`, for the engine `instance`.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "one call from one place")]
    fn new(
        socket: PathBuf,
        instance: String,
        namespace: &Namespace,
        tenant: String,
        ranks: u32,
        layers: u32,
        layer_bytes: u64,
        events: bool,
    ) -> Self {
        let about = namespace.about();
        Self(AttachOptions {
            socket,
            engine_id: instance,
            client: concat!("kvtide ", env!("CARGO_PKG_VERSION")).to_owned(),
            namespace: about.id(),
            model: about.model.clone(),
            tenant,
            geometry: Geometry {
                ranks,
                layers,
                layer_bytes,
                block_tokens: about.block_tokens,
            },
            events,
            timeout: Duration::ZERO,
        })
    }

    /// Attaches as the worker of `rank` or, without one, as the scheduler's side, which takes its place
    /// later with `Segment.take_place`. None where no daemon answers within `timeout_s` and it is not
    /// `required`; otherwise, and where the daemon refuses, ConfigError.
    fn attach(
        &self,
        py: Python<'_>,
        rank: Option<u32>,
        timeout_s: f64,
        required: bool,
    ) -> PyResult<Option<Segment>> {
        let holder = holder(rank);
        let timeout = Duration::from_secs_f64(timeout_s.clamp(0.0, 3600.0));
        let options = AttachOptions {
            timeout,
            ..self.0.clone()
        };
        match enter(py, || Attachment::without_place(options, holder)) {
            Ok(attachment) => {
                let memory = Arc::clone(attachment.segment());
                Ok(Some(Segment::of(memory, Some(attachment))))
            }
            Err(error) if error.may_pass() && !required => Ok(None),
            Err(error) => Err(config_error(error)),
        }
    }
}

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
        let capacity = usize::try_from(config.pool.host_capacity_bytes).unwrap_or(usize::MAX);
        let geometry = RowGeometry::fit(ranks, layers, layer_bytes, capacity).map_err(|error| {
            let error = format!("host_capacity_gb: {error}; raise it");
            crate::fence::ConfigError::new_err(error)
        })?;
        let options = SegmentOptions {
            directory: config.pool.segment_directory.clone(),
            instance,
            holder: holder(rank),
            huge_pages: config.pool.huge_pages,
            available_bytes: available_memory_bytes(),
        };
        let on_wait = |path: &Path, waited: Duration| {
            let line = (path.display().to_string(), waited.as_secs());
            // A line that cannot be written must not keep the engine from starting.
            Python::attach(|py| drop(on_wait.call1(py, line)));
        };
        let open = || SharedSegment::create_or_attach(&options, geometry, &on_wait);
        let segment = enter(py, open).map_err(config_error)?;
        Ok(Self::of(Arc::new(segment), None))
    }

    /// Memory of this process alone, with rows of one rank, to open and measure a device with where the
    /// rows of the pool may hold blocks already, or there is none yet.
    #[staticmethod]
    fn scratch(layers: u32, layer_bytes: usize) -> PyResult<Self> {
        let row_bytes = (layers as usize).saturating_mul(layer_bytes);
        // The least that has a row is one, with its padding.
        let area = SCRATCH_BYTES.max(row_bytes.saturating_add(4096));
        let rows = RowGeometry::over(1, layers, layer_bytes, area).map_err(kvtide_error)?;
        let private = |bytes| MappedFile::private(bytes).map_err(kvtide_error);
        let parts = SegmentParts {
            memory: private(area)?,
            data_offset: 0,
            tables: private(rows.tables_file_bytes())?,
            own: private(rows.own_bytes())?,
        };
        let name = Path::new("private memory");
        let segment = SharedSegment::of_parts(&parts, rows, name).map_err(kvtide_error)?;
        Ok(Self::of(Arc::new(segment), None))
    }

    /// Maps all of the segment's memory; `progress(done_bytes, total_bytes)` is called about every
    /// tenth of it.
    fn populate(&self, py: Python<'_>, progress: Py<PyAny>) -> PyResult<()> {
        let segment = self.memory();
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
        self.memory().path().display().to_string()
    }

    /// A number that no other segment has.
    #[getter]
    fn nonce(&self) -> u64 {
        self.memory().nonce()
    }

    /// The worker of `rank`, or the scheduler's side, is ready to use it.
    fn take_place(&self, rank: Option<u32>) -> PyResult<()> {
        let taken = self.memory().take_place(holder(rank));
        taken.map_err(config_error)
    }

    /// Whether the workers of all ranks are ready to use it.
    #[getter]
    fn has_all_workers(&self) -> bool {
        self.memory().has_all_workers()
    }

    #[getter]
    fn created(&self) -> bool {
        self.memory().created()
    }

    #[getter]
    fn on_huge_pages(&self) -> bool {
        self.memory().on_huge_pages()
    }

    #[getter]
    fn reclaimed(&self) -> Vec<String> {
        self.memory()
            .reclaimed()
            .iter()
            .map(|path| path.display().to_string())
            .collect()
    }

    /// For each async load, given as (board cell, job): on how many ranks it has failed, once it has
    /// ended on all of them; None before. Reads only atomics, so the interpreter lock stays.
    fn ended_loads(&self, loads: Vec<(u32, u64)>) -> Vec<Option<usize>> {
        let ranks = self.memory().geometry().ranks();
        let failures = |(cell, job): (u32, u64)| {
            (0..ranks).try_fold(0, |failures, rank| {
                let end = self.memory().load_end(cell, rank, job)?;
                Some(failures + usize::from(end == LoadEnd::Failed))
            })
        };
        loads.into_iter().map(failures).collect()
    }

    #[getter]
    fn total_bytes(&self) -> usize {
        self.memory().geometry().total_bytes()
    }

    #[getter]
    fn rows(&self) -> u32 {
        self.memory().geometry().rows()
    }

    #[getter]
    fn row_bytes(&self) -> usize {
        self.memory().geometry().row_bytes()
    }
}

/// The engine's session with its pool: one in this process, or a daemon's.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Pool {
    pub(crate) session: Session,
    pub(crate) config: kvtide_engine::Config,
    _scrubber: Option<Scrubber>,
}

#[pymethods]
impl Pool {
    /// The session over `segment`. Where that is the engine's own, it comes with a pool over all of its
    /// rows and the pool's background scrub.
    #[new]
    fn new(settings: &Settings, segment: &Segment, events: bool) -> PyResult<Self> {
        let config = settings.config.clone();
        let attachment = segment.attachment.lock();
        let attachment = attachment.unwrap_or_else(PoisonError::into_inner).take();
        let (session, scrubber) = match attachment {
            Some(attachment) => (Session::attached(attachment, config.engine.lease_ttl), None),
            None => embedded(&config, segment, events)?,
        };
        Ok(Self {
            session,
            config,
            _scrubber: scrubber,
        })
    }

    /// The session with a daemon that is not there yet.
    #[staticmethod]
    fn waiting(settings: &Settings, daemon: &Daemon) -> Self {
        let config = settings.config.clone();
        Self {
            session: Session::waiting(daemon.0.clone(), config.engine.lease_ttl),
            config,
            _scrubber: None,
        }
    }

    /// Whether the daemon has other memory than this session. Reads one lock, so the interpreter's stays.
    fn has_new_memory(&self) -> bool {
        self.session.has_new_memory()
    }

    /// Goes over to that memory, once no load and no save uses the last one, and nothing is matched in
    /// it. Nothing is found or saved then before `admit`.
    fn change_memory(&self, py: Python<'_>) -> Option<Segment> {
        let memory = enter(py, || self.session.change_memory())?;
        Some(Segment::of(memory, None))
    }

    /// Whether the workers of all ranks have the memory that this session has.
    fn admit(&self, admitted: bool) {
        self.session.admit(admitted);
    }

    /// Whether blocks can be found and saved now.
    #[getter]
    fn is_usable(&self) -> bool {
        self.session.is_usable()
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

    /// The next part of each load, and of `more`, as many of those as there may be: (moves, the first
    /// block that will not be loaded, whether it is the last part), or None while too little has come.
    fn plan_loads<'py>(
        &self,
        py: Python<'py>,
        mut loads: Vec<PyRefMut<'py, Load>>,
        mut more: Vec<PyRefMut<'py, Load>>,
        at_most: usize,
    ) -> Vec<Option<PlannedLoad<'py>>> {
        plans::plan_loads(py, self, &mut loads, &mut more, at_most)
    }

    /// Drops blocks whose bytes were found damaged, given as (slot, generation).
    fn drop_damaged(&self, py: Python<'_>, damaged: Vec<(u32, u32)>) {
        let damaged: Vec<SlotRef> = damaged
            .into_iter()
            .map(|(slot, generation)| SlotRef { slot, generation })
            .collect();
        enter(py, || self.session.drop_damaged(&damaged));
    }

    /// Drops every block of the engine's namespace; whether the pool knows, or a daemon is gone and will
    /// hear of it when this engine is attached again.
    fn clear(&self, py: Python<'_>) -> bool {
        enter(py, || self.session.clear())
    }

    /// What is to be logged since the last call, one sentence each.
    fn take_notices(&self) -> Vec<String> {
        self.session.take_notices()
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
        for (name, value) in counters.named() {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    /// What the pool holds now.
    fn gauges<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let gauges = self.session.gauges();
        let dict = PyDict::new(py);
        for (name, value) in gauges.named() {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }
}

/// A session with a pool in this process.
fn embedded(
    config: &Config,
    segment: &Segment,
    events: bool,
) -> PyResult<(Session, Option<Scrubber>)> {
    let options = PoolOptions {
        eviction: config.pool.eviction,
    };
    let session = SessionOptions {
        events,
        lease_ttl: config.engine.lease_ttl,
    };
    let memory = Arc::clone(segment.memory());
    let pool = Arc::new(kvtide_engine::Pool::new(memory, options));
    let scrubber =
        Scrubber::start(&pool, config.pool.scrub_bytes_per_second).map_err(kvtide_error)?;
    let session = Session::open(&pool, session).map_err(kvtide_error)?;
    Ok((session, scrubber))
}
