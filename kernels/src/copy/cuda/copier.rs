//! One stream's copies.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use super::device::Shared;
use super::dma::{Pieces, Strided, has_batches};
use super::launches::Rows;
use super::route::{Route, STAGED_BLOCKS};
use super::tables::{Move, Plan};
use crate::copy::{Batch, CopyBackend, CopyError, Direction, Mark, RowMove};
use crate::cuda::{
    CudaError, DeviceBuffer, Event, Function, Launch, PinnedBuffer, Pod, Priority, Stream,
};

/// Threads of a block of the copy kernels: sixteen warps with four KiB in flight each.
const COPY_THREADS: u32 = 512;
const DIGEST_THREADS: u32 = 256;
/// Bytes of a row from which on a copy engine keeps its speed. Fewer, larger pieces also take less of
/// the driver, whose lock the engine's own launches need.
const STAGED_PIECE_BYTES: usize = 256 << 10;
/// Rows next to each other from which on they are copied by one command: a call of the driver by itself
/// takes about as long as so many pieces of a call for many.
const STRIDED_MIN: usize = 4;
/// Bytes from one row to the next that such a command takes.
const PITCH_MAX: usize = i32::MAX as usize;
/// Moves that a batch has room for at first: prompts of 128 Ki tokens in blocks of 16. Making room
/// while the model runs would make the driver wait for it.
const MOVES: usize = 8192;

/// Values that go to the device and back with every batch.
#[derive(Debug)]
struct Mirrored<T: Pod> {
    host: PinnedBuffer<T>,
    device: DeviceBuffer<T>,
}

impl<T: Pod> Mirrored<T> {
    fn new(shared: &Shared, count: usize) -> Result<Self, CudaError> {
        Ok(Self {
            host: PinnedBuffer::new(&shared.context, count)?,
            device: DeviceBuffer::new(&shared.context, count)?,
        })
    }
}

/// A stream, and where rows wait on it between copy engine and kernel, if they do: what is on one
/// stream does so in turn.
#[derive(Debug)]
pub(super) struct Lane {
    // Before the buffer, which its work uses: dropping a stream waits for it.
    stream: Stream,
    staging: Option<DeviceBuffer<u8>>,
}

impl Lane {
    /// A lane for copies by `route`.
    pub(super) fn new(
        shared: &Shared,
        priority: Priority,
        route: Route,
    ) -> Result<Self, CudaError> {
        let staging = matches!(route, Route::Staged(_))
            .then(|| DeviceBuffer::new(&shared.context, shared.staging_bytes()))
            .transpose()?;
        Ok(Self {
            stream: Stream::new(&shared.context, priority)?,
            staging,
        })
    }
}

/// A backend with a lane of its own, or a share of one.
#[derive(Debug)]
pub(super) struct Copier {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
    route: Route,
    moves: Mirrored<Move>,
    sums: Mirrored<u64>,
    pieces: Pieces,
    direction: Direction,
    /// By row: those of a prompt mostly lie next to each other, and can be copied in one piece.
    batch: Vec<RowMove>,
    /// Of each of them, its place in what the caller gave.
    places: Vec<u32>,
    digests: bool,
    /// Layers that the batch has copied, from the first to the last.
    copied: Range<usize>,
    closed: bool,
    done: Event,
}

impl Copier {
    pub(super) fn new(
        shared: &Arc<Shared>,
        lane: &Arc<Lane>,
        route: Route,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            shared: Arc::clone(shared),
            lane: Arc::clone(lane),
            route,
            moves: Mirrored::new(shared, MOVES)?,
            sums: Mirrored::new(shared, MOVES)?,
            pieces: Pieces::default(),
            direction: Direction::Save,
            batch: Vec::new(),
            places: Vec::new(),
            digests: false,
            copied: 0..0,
            closed: false,
            done: shared.events.take()?,
        })
    }

    pub(super) fn set_route(&mut self, route: Route) {
        self.route = route;
    }

    /// Layers of the layout.
    pub(super) fn layers(&self) -> usize {
        self.shared.registration.layout().layers()
    }

    /// Bytes of a block in one layer of a row.
    pub(super) fn layer_bytes(&self) -> usize {
        self.shared.registration.layout().layer_bytes()
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.lane.stream
    }

    /// The batch's rows, as a layered load asks for them.
    pub(super) fn rows(&self) -> Rows {
        let single = if has_batches() { 1 } else { STRIDED_MIN };
        let runs = self.batch.chunk_by(self.neighbours()).map(<[_]>::len);
        Rows {
            count: self.batch.len(),
            runs: runs.clone().count(),
            pieces: runs.map(|rows| STRIDED_MIN.min(rows * single)).sum(),
        }
    }

    /// Tells whether the row of `b` follows that of `a`, where one command may copy both.
    fn neighbours(&self) -> impl Fn(&RowMove, &RowMove) -> bool + Clone + use<> {
        let chunks = self.shared.chunks;
        move |a, b| a.row.checked_add(1) == Some(b.row) && !chunks.begins_with(b.row)
    }

    /// Enqueues the end of the batch: digests, and the event behind them.
    fn enqueue_end(&mut self) -> Result<(), CudaError> {
        self.shared.context.enter()?;
        let count = self.batch.len();
        if self.digests && count > 0 {
            if !self.digests_on_the_way() {
                self.sums.device.clear(count, &self.lane.stream)?;
                self.launch_digest()?;
            }
            self.sums
                .host
                .download(count, &self.sums.device, &self.lane.stream)?;
        }
        self.done.record(&self.lane.stream)?;
        self.closed = true;
        Ok(())
    }

    /// Whether a closed batch has ended.
    pub(super) fn is_done(&self) -> Result<bool, CudaError> {
        self.done.is_done()
    }

    /// The digests of a batch that has ended, in the order of its moves.
    pub(super) fn take_digests(&mut self) -> Vec<u64> {
        let count = if self.digests { self.batch.len() } else { 0 };
        let mut digests = vec![0; count];
        for (&place, &sum) in self.places.iter().zip(self.sums.host.values()) {
            if let Some(digest) = digests.get_mut(place as usize) {
                *digest = sum;
            }
        }
        self.batch.clear();
        digests
    }

    /// A plan for moves `start` to `start + count` of the batch, over the host's rows.
    fn plan(&self, layers: &Range<usize>, start: usize, count: usize) -> Plan {
        let layer_bytes = self.shared.registration.layout().layer_bytes();
        Plan {
            moves: self.moves.device.address() + (start * size_of::<Move>()) as u64,
            move_count: u32::try_from(count).unwrap_or(0),
            rows: self.shared.rows,
            row_stride: self.shared.row_stride as u64,
            ..self.shared.tables.plan(layers, layer_bytes)
        }
    }

    /// Whether rows hold something else than the blocks' bytes.
    fn is_encoded(&self) -> bool {
        self.shared.registration.layout().encoding().is_some()
    }

    /// Whether what is copied passes through threads that compute the digests as well. A load's are
    /// of what it has written, unless they are of encoded rows.
    fn digests_on_the_way(&self) -> bool {
        self.is_encoded() || (self.direction == Direction::Save && self.route != Route::Dma)
    }

    /// Copies moves from `start` on, as `plan` says.
    fn launch_copy(&self, start: usize, mut plan: Plan) -> Result<(), CudaError> {
        let mut keys = self.shared.keys.address();
        let mut sums = match self.digests {
            true => self.sums.device.address() + (start * size_of::<u64>()) as u64,
            false => 0,
        };
        let wanted = match self.route {
            Route::Kernel(blocks) | Route::Staged(blocks) => blocks,
            Route::Dma => STAGED_BLOCKS,
        };
        let launch = Launch {
            blocks: wanted.min(self.shared.context.multiprocessors().max(1)),
            threads: COPY_THREADS,
        };
        let arguments: &mut [*mut c_void] = &mut [
            ptr::from_mut(&mut plan).cast(),
            ptr::from_mut(&mut keys).cast(),
            ptr::from_mut(&mut sums).cast(),
        ];
        let kernels = &self.shared.kernels;
        let pair = if self.is_encoded() {
            &kernels.codec
        } else {
            &kernels.copy
        };
        self.launch(pair.of(self.direction), launch, arguments)
    }

    fn launch_digest(&self) -> Result<(), CudaError> {
        let mut plan = self.plan(&self.copied, 0, self.batch.len());
        let mut keys = self.shared.keys.address();
        let mut sums = self.sums.device.address();
        let launch = Launch {
            blocks: self.shared.context.multiprocessors().max(1),
            threads: DIGEST_THREADS,
        };
        let arguments: &mut [*mut c_void] = &mut [
            ptr::from_mut(&mut plan).cast(),
            ptr::from_mut(&mut keys).cast(),
            ptr::from_mut(&mut sums).cast(),
        ];
        self.launch(&self.shared.kernels.digest, launch, arguments)
    }

    fn launch(
        &self,
        function: &Function,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        // SAFETY: arguments are as the kernels of `kernels/cuda/kernels.cu` take them. Slots, blocks
        // and layers of the plan were compared with their bounds, so all addresses that it leads to
        // lie in the tensors and the segment, which `shared` keeps alive; tables and buffers belong
        // to `shared` and `self`. Dropping a copier waits for its stream.
        unsafe { function.launch(&self.lane.stream, launch, arguments) }
    }

    fn copy_pieces(&mut self) -> Result<(), CudaError> {
        // SAFETY: pieces lie in tensors, segment and staging buffer, as in `launch`.
        unsafe { self.pieces.copy(&self.lane.stream) }
    }

    /// Copy engines, one contiguous piece of a block at a time.
    fn copy_dma(&mut self, layers: &Range<usize>) -> Result<(), CudaError> {
        let layout = self.shared.registration.layout();
        let layer_bytes = layout.layer_bytes();
        self.pieces.clear();
        for &RowMove { row, block } in &self.batch {
            let row = self.shared.row_address(row);
            for layer in layers.clone() {
                let mut at = row + (layer * layer_bytes) as u64;
                for (address, bytes) in layout.runs(layer, block).into_iter().flatten() {
                    match self.direction {
                        Direction::Save => self.pieces.push(address as u64, at, bytes),
                        Direction::Load => self.pieces.push(at, address as u64, bytes),
                    }
                    at += bytes as u64;
                }
            }
        }
        self.copy_pieces()
    }

    /// Copy engines between the staging buffer and `width` bytes, `skipped` ones from the start, of
    /// the rows of some moves.
    fn copy_rows(
        &mut self,
        moves: Range<usize>,
        skipped: u64,
        staging: u64,
        width: usize,
    ) -> Result<(), CudaError> {
        self.pieces.clear();
        let mut staged = staging;
        for rows in self.batch[moves].chunk_by(self.neighbours()) {
            let Some(first) = rows.first() else { continue };
            let row = self.shared.row_address(first.row) + skipped;
            let pitch = self.shared.row_stride;
            let (source, source_pitch, target, target_pitch) = match self.direction {
                Direction::Save => (staged, width, row, pitch),
                Direction::Load => (row, pitch, staged, width),
            };
            let pieces = Strided {
                source,
                source_pitch,
                target,
                target_pitch,
                bytes: width,
                count: rows.len(),
            };
            if rows.len() < STRIDED_MIN || pitch > PITCH_MAX {
                self.pieces.push_each(&pieces);
            } else {
                // SAFETY: rows and staging buffer are as in `launch`.
                unsafe { pieces.copy(&self.lane.stream) }?;
            }
            staged += (rows.len() * width) as u64;
        }
        self.copy_pieces()
    }

    /// Copy engines for rows, kernels for pieces, as many moves at a time as `room` bytes at `staging`
    /// hold.
    fn copy_staged(
        &mut self,
        layers: &Range<usize>,
        staging: u64,
        room: usize,
    ) -> Result<(), CudaError> {
        let layer_bytes = self.shared.registration.layout().layer_bytes();
        let width = layers.len() * layer_bytes;
        let skipped = (layers.start * layer_bytes) as u64;
        let at_once = (room / width.max(1)).max(1);
        for start in (0..self.batch.len()).step_by(at_once) {
            let count = at_once.min(self.batch.len() - start);
            let plan = Plan {
                // Kernels add a layer's place in the shard to a row's address; the staging buffer
                // holds no layers before the first.
                rows: staging.wrapping_sub(skipped),
                row_stride: width as u64,
                rows_in_order: 1,
                ..self.plan(layers, start, count)
            };
            if self.direction == Direction::Save {
                self.launch_copy(start, plan)?;
            }
            self.copy_rows(start..start + count, skipped, staging, width)?;
            if self.direction == Direction::Load {
                self.launch_copy(start, plan)?;
            }
        }
        Ok(())
    }
}

impl CopyBackend for Copier {
    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), CopyError> {
        self.shared.registration.check(batch.moves)?;
        self.shared.context.enter()?;
        // The tables of a batch that failed half-way may still be read.
        if !self.batch.is_empty() {
            self.lane.stream.synchronize()?;
        }
        self.batch.clear();
        let count = batch.moves.len();
        if count > self.moves.device.count() {
            let room = count.next_power_of_two();
            let (moves, sums) = (
                Mirrored::new(&self.shared, room)?,
                Mirrored::new(&self.shared, room)?,
            );
            // Both or neither: kernels index them alike.
            (self.moves, self.sums) = (moves, sums);
        }
        let mut moves: Vec<_> = (0..).zip(batch.moves).collect();
        moves.sort_unstable_by_key(|(_, wanted)| wanted.row);
        self.places.clear();
        for (entry, (place, &wanted)) in self.moves.host.values_mut().iter_mut().zip(moves) {
            *entry = Move {
                row: wanted.row,
                block: wanted.block,
            };
            self.batch.push(wanted);
            self.places.push(place);
        }
        self.direction = batch.direction;
        self.digests = batch.digests;
        self.copied = 0..0;
        self.closed = false;
        self.moves
            .host
            .upload(count, &self.moves.device, &self.lane.stream)?;
        if self.digests && self.digests_on_the_way() && count > 0 {
            self.sums.device.clear(count, &self.lane.stream)?;
        }
        Ok(())
    }

    fn layers_at_once(&self) -> usize {
        match self.route {
            Route::Staged(_) => {
                let layer_bytes = self.shared.registration.layout().layer_bytes();
                STAGED_PIECE_BYTES.div_ceil(layer_bytes).min(self.layers())
            }
            Route::Dma | Route::Kernel(_) => 1,
        }
    }

    fn wait_for(&mut self, mark: &Mark) -> Result<(), CopyError> {
        if let Some(event) = &mark.0 {
            self.shared.context.enter()?;
            self.lane.stream.wait_for(event)?;
        }
        Ok(())
    }

    fn copy(&mut self, layers: Range<usize>) -> Result<(), CopyError> {
        self.shared.registration.check_layers(&layers)?;
        if layers.is_empty() || self.batch.is_empty() {
            return Ok(());
        }
        self.shared.context.enter()?;
        match (self.route, &self.lane.staging) {
            (Route::Dma, _) if self.is_encoded() => {
                let way = format!("the route {}", self.route);
                return Err(CopyError::CannotEncode { way });
            }
            (Route::Dma, _) => self.copy_dma(&layers)?,
            (Route::Staged(_), Some(staging)) => {
                let (address, room) = (staging.address(), staging.count());
                self.copy_staged(&layers, address, room)?;
            }
            (Route::Staged(_), None) | (Route::Kernel(_), _) => {
                self.launch_copy(0, self.plan(&layers, 0, self.batch.len()))?;
            }
        }
        self.copied = if self.copied.is_empty() {
            layers
        } else {
            self.copied.start.min(layers.start)..self.copied.end.max(layers.end)
        };
        Ok(())
    }

    fn close(&mut self) -> Result<Mark, CopyError> {
        self.enqueue_end()?;
        let end = self.shared.events.take()?;
        end.record(&self.lane.stream)?;
        Ok(Mark(Some(end)))
    }

    fn finish(&mut self) -> Result<Vec<u64>, CopyError> {
        if !self.closed
            && let Err(error) = self.enqueue_end()
        {
            // What was enqueued before must have ended when this returns.
            self.lane.stream.synchronize()?;
            return Err(error.into());
        }
        self.done.wait()?;
        Ok(self.take_digests())
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        // Buffers and tables are freed after this. A failure means that the context is broken and
        // runs nothing any more.
        let _ = self.shared.context.enter();
        let _ = self.lane.stream.synchronize();
    }
}
