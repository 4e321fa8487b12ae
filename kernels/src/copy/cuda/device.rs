//! One GPU with one rank's KV cache.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvtide_segment::CHECKSUM_KEYS;

use super::calibrate::measure;
use super::copier::{Copier, Lane};
use super::layered::Layered;
use super::route::{Measured, Route, Routes};
use super::tables::Tables;
use crate::copy::{
    CopyBackend, CopyError, Device, Direction, LayeredLoad, Mark, Registration, RowMove,
};
use crate::cuda::{
    CHUNK_BYTES, Chunks, ComputeStream, Context, CudaError, DeviceBuffer, EventPool, Function,
    HostRegistration, Module, Priority,
};

/// Bytes that wait on the device between copy engine and kernel; also the most of a load's slice.
pub(super) const STAGING_BYTES: usize = 32 << 20;
/// Time that a slice may take the link. Two are on the device when a load comes, and the oldest load may
/// have the next turn, so no load is held up by others for longer than three times this before its first
/// slice begins.
const SLICE_SECONDS: f64 = 1.5e-3;
/// Layered loads whose tables are there from the start: an engine schedules a step or two ahead.
const LAYERED_COPIERS: usize = 3;

/// Choices that are not left to measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Route of saves.
    pub save: Option<Route>,
    /// Route of async loads.
    pub load: Option<Route>,
    /// Route of layered loads.
    pub layered: Option<Route>,
}

/// A kernel for each direction.
#[derive(Debug)]
pub(super) struct Pair {
    save: Function,
    load: Function,
}

impl Pair {
    pub(super) fn of(&self, direction: Direction) -> &Function {
        match direction {
            Direction::Save => &self.save,
            Direction::Load => &self.load,
        }
    }
}

#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) copy: Pair,
    pub(super) digest: Function,
    /// Where rows are encoded; they compute digests too.
    pub(super) codec: Pair,
}

impl Kernels {
    fn load(context: &Arc<Context>) -> Result<Self, CudaError> {
        let module = Module::load(context)?;
        Ok(Self {
            copy: Pair {
                save: module.function(c"kvtide_save")?,
                load: module.function(c"kvtide_load")?,
            },
            digest: module.function(c"kvtide_digest")?,
            codec: Pair {
                save: module.function(c"kvtide_encode")?,
                load: module.function(c"kvtide_decode")?,
            },
        })
    }
}

/// What all copiers of a device use. Fields are freed in this order: the segment is unpinned before
/// the registration lets go of it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) kernels: Kernels,
    pub(super) tables: Tables,
    /// Keys of the checksum.
    pub(super) keys: DeviceBuffer<u32>,
    pub(super) events: EventPool,
    _pinned: HostRegistration,
    pub(super) registration: Arc<Registration>,
    pub(super) context: Arc<Context>,
    /// Device address of this rank's shard of row 0.
    pub(super) rows: u64,
    pub(super) row_stride: usize,
    /// Which rows are pinned together.
    pub(super) chunks: Chunks,
}

impl Shared {
    /// Pins the rows of `registration`; also the time that it took.
    fn pin(
        context: &Arc<Context>,
        registration: Arc<Registration>,
    ) -> Result<(Arc<Self>, Duration), CudaError> {
        let segment = registration.segment();
        let geometry = segment.geometry();
        let (start, bytes) = segment.range();
        let row_stride = geometry.row_stride_bytes();
        let chunks = Chunks::of(bytes, segment.data_offset(), row_stride, CHUNK_BYTES);
        let began = Instant::now();
        // SAFETY: the range is the segment's map, which `registration` keeps until after `_pinned`
        // is dropped.
        let pinned = unsafe { HostRegistration::new(context, start, chunks) }?;
        let pinning = began.elapsed();
        let first =
            geometry.shard_offset(0, registration.rank()).unwrap_or(0) + segment.data_offset();
        let shared = Arc::new(Self {
            kernels: Kernels::load(context)?,
            tables: Tables::new(context, registration.layout())?,
            keys: DeviceBuffer::of(context, &CHECKSUM_KEYS)?,
            events: EventPool::new(context),
            rows: pinned.device() + first as u64,
            row_stride,
            chunks,
            _pinned: pinned,
            registration,
            context: Arc::clone(context),
        });
        Ok((shared, pinning))
    }

    /// Device address of this rank's shard of `row`.
    pub(super) fn row_address(&self, row: u32) -> u64 {
        self.rows + u64::from(row) * self.row_stride as u64
    }

    /// Size of a staging buffer: at least one row fits.
    pub(super) fn staging_bytes(&self) -> usize {
        STAGING_BYTES.max(self.registration.layout().shard_bytes())
    }
}

/// A KV cache in a GPU's memory.
#[derive(Debug)]
pub struct CudaDevice {
    shared: Arc<Shared>,
    routes: Routes,
    measured: Vec<Measured>,
    pinning: Duration,
    measuring: Duration,
    /// Bytes per second of async loads.
    load_rate: Option<f64>,
    /// All layered loads, in the order in which steps need them.
    layered_lane: Arc<Lane>,
    /// Held by whoever puts a layered load on the lane.
    layered_turn: Mutex<()>,
    /// Copiers of layered loads that have ended.
    layered_copiers: Arc<Mutex<Vec<Copier>>>,
}

impl CudaDevice {
    /// Takes `registration`, whose tensors lie in the memory of GPU `ordinal`, into use: pins the
    /// segment and measures the routes that `options` leave open, for which rows and blocks are
    /// copied back and forth, as they are or as rows hold them: neither holds anything yet. Rows that
    /// others have, a device gets by [`Device::over`].
    ///
    /// # Errors
    /// [`CopyError`] when there is no such GPU, this build has no kernels for it, or the segment
    /// cannot be pinned.
    pub fn open(
        ordinal: u32,
        registration: Arc<Registration>,
        options: CudaOptions,
    ) -> Result<Self, CopyError> {
        let context = Context::open(ordinal)?;
        context.enter()?;
        let (shared, pinning) = Shared::pin(&context, registration)?;
        // PyTorch may still be filling the KV cache that is copied back and forth now.
        context.synchronize()?;
        let began = Instant::now();
        let (routes, measured) = measure(&shared, options)?;
        let measuring = began.elapsed();
        Self::on(shared, routes, measured, pinning, measuring)
    }

    fn on(
        shared: Arc<Shared>,
        routes: Routes,
        measured: Vec<Measured>,
        pinning: Duration,
        measuring: Duration,
    ) -> Result<Self, CopyError> {
        let layered_lane = Arc::new(Lane::new(&shared, Priority::High, routes.layered)?);
        // They are made now: the driver may wait for the model to give memory.
        let copiers: Result<Vec<_>, _> = (0..LAYERED_COPIERS)
            .map(|_| Copier::new(&shared, &layered_lane, routes.layered))
            .collect();
        Ok(Self {
            load_rate: rate_of(&measured, "load", routes.load),
            layered_lane,
            layered_turn: Mutex::default(),
            shared,
            routes,
            measured,
            pinning,
            measuring,
            layered_copiers: Arc::new(Mutex::new(copiers?)),
        })
    }

    /// The routes in use.
    #[must_use]
    pub fn routes(&self) -> Routes {
        self.routes
    }

    /// What was measured when the device was opened.
    #[must_use]
    pub fn measured(&self) -> &[Measured] {
        &self.measured
    }

    /// Bytes per second that layered loads reached.
    #[must_use]
    pub fn layered_bytes_per_s(&self) -> Option<f64> {
        rate_of(&self.measured, "layered", self.routes.layered)
    }

    /// The time that pinning the segment took.
    #[must_use]
    pub fn pinning(&self) -> Duration {
        self.pinning
    }

    /// The product's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.shared.context.name()
    }

    fn mark_event(&self, stream: ComputeStream) -> Result<crate::cuda::Event, CudaError> {
        self.shared.context.enter()?;
        let event = self.shared.events.take()?;
        event.record_compute(stream)?;
        Ok(event)
    }

    fn layered(&self, moves: &[RowMove], begin: &Mark) -> Result<Box<dyn LayeredLoad>, CopyError> {
        self.shared.context.enter()?;
        // What is staged for one must not come between another's copies and kernels.
        let _turn = self.layered_turn.lock();
        let free = self
            .layered_copiers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let copier = free.map_or_else(
            || Copier::new(&self.shared, &self.layered_lane, self.routes.layered),
            Ok,
        )?;
        let pool = Arc::clone(&self.layered_copiers);
        let events = self.shared.events.clone();
        let (routes, rate) = (self.routes, self.load_rate);
        let load = Layered::enqueue(copier, pool, &events, moves, routes, rate, begin)?;
        Ok(Box::new(load))
    }
}

impl fmt::Display for CudaDevice {
    /// What an operator wants to know: the device, the routes, and what every route reached.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Routes {
            save,
            load,
            layered,
            scattered,
        } = self.routes;
        let (pinning, measuring) = (self.pinning.as_secs_f64(), self.measuring.as_secs_f64());
        let mib = self.shared.context.allocated_bytes() >> 20;
        write!(
            f,
            "{}: pinned the pool in {pinning:.2} s, took {mib} MiB of the GPU's memory; routes: save \
             {save}, load {load}, layered {layered}, layered with scattered rows {scattered}; measured in {measuring:.2} s",
            self.name()
        )?;
        let mut purpose = "";
        for rate in &self.measured {
            let heading = if rate.purpose == purpose { "," } else { ";" };
            let name = if rate.purpose == purpose {
                ""
            } else {
                rate.purpose
            };
            let space = if name.is_empty() { "" } else { " " };
            write!(
                f,
                "{heading}{space}{name} {} {:.1} GB/s",
                rate.route, rate.gb_per_s
            )?;
            purpose = rate.purpose;
        }
        Ok(())
    }
}

impl Device for CudaDevice {
    fn registration(&self) -> &Arc<Registration> {
        &self.shared.registration
    }

    fn over(&self, registration: Registration) -> Result<Arc<dyn Device>, CopyError> {
        let context = &self.shared.context;
        context.enter()?;
        let (shared, pinning) = Shared::pin(context, Arc::new(registration))?;
        let measured = self.measured.clone();
        let device = Self::on(shared, self.routes, measured, pinning, self.measuring)?;
        Ok(Arc::new(device))
    }

    fn backend(&self, direction: Direction) -> Result<Box<dyn CopyBackend>, CopyError> {
        let (priority, route) = match direction {
            Direction::Save => (Priority::Low, self.routes.save),
            Direction::Load => (Priority::High, self.routes.load),
        };
        let lane = Arc::new(Lane::new(&self.shared, priority, route)?);
        Ok(Box::new(Copier::new(&self.shared, &lane, route)?))
    }

    fn mark(&self, stream: ComputeStream) -> Result<Mark, CopyError> {
        Ok(Mark(Some(self.mark_event(stream)?)))
    }

    fn hold_back(&self, stream: ComputeStream, mark: &Mark) -> Result<(), CopyError> {
        if let Some(event) = &mark.0 {
            self.shared.context.enter()?;
            stream.wait_for(event)?;
        }
        Ok(())
    }

    fn begin_layered(
        &self,
        moves: &[RowMove],
        begin: &Mark,
    ) -> Option<Result<Box<dyn LayeredLoad>, CopyError>> {
        Some(self.layered(moves, begin))
    }

    fn slice_blocks(&self) -> usize {
        slice_blocks(
            self.load_rate,
            self.shared.registration.layout().shard_bytes(),
        )
    }
}

/// Bytes per second that `route` reached for `purpose`.
pub(super) fn rate_of(measured: &[Measured], purpose: &str, route: Route) -> Option<f64> {
    let mut rates = measured.iter();
    let chosen = rates.find(|m| m.purpose == purpose && m.route == route);
    chosen.map(|m| m.gb_per_s * 1e9)
}

/// Blocks of a slice of a load that goes at `rate` bytes per second.
fn slice_blocks(rate: Option<f64>, shard_bytes: usize) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a size of megabytes; a cast of floats saturates"
    )]
    let in_time = rate.map_or(STAGING_BYTES, |rate| (rate * SLICE_SECONDS) as usize);
    (in_time.min(STAGING_BYTES) / shard_bytes.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_takes_a_slow_link_no_longer_than_it_may() {
        let shard = 1 << 20;
        assert_eq!(slice_blocks(Some(50e9), shard), 32);
        assert_eq!(slice_blocks(Some(6e9), shard), 8);
        assert_eq!(slice_blocks(Some(1e6), shard), 1);
        assert_eq!(slice_blocks(None, shard), 32);
    }
}
