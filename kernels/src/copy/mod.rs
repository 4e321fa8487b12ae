//! Copies between paged KV cache blocks and rows.
//!
//! A [`Device`] is one rank's KV cache and the rows it may use. It hands out [`CopyBackend`]s, one to
//! each thread that copies, and starts the layered loads of a device that has streams. A backend
//! works in batches: some blocks, named by row and block, of which layers are copied one after the
//! other or all at once. It may only enqueue; the batch's end is waited for. Nothing here knows of
//! requests.

mod cuda;
mod host_cache;
mod memcpy;
mod stream;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kvtide_segment::SharedSegment;

use crate::cuda::{ComputeStream, CudaError, Event};
use crate::kv_layout::KvLayout;

pub use cuda::{CudaDevice, CudaOptions, Measured, Route, Routes};
pub use host_cache::HostCache;
pub use memcpy::HostDevice;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the engine's paged KV cache to rows.
    Save,
    /// From rows to the engine's paged KV cache.
    Load,
}

/// One block to copy between a row of the segment and a block of the engine's paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowMove {
    /// The segment's side.
    pub row: u32,
    /// The engine's side: a vLLM block id.
    pub block: u32,
}

/// One rank's memory on both sides of a copy.
///
/// Whoever runs a copy holds an `Arc` of this until the copy has ended, so neither the segment nor
/// the tensors can be unmapped under it.
pub struct Registration {
    layout: KvLayout,
    segment: Arc<SharedSegment>,
    rank: u32,
    /// Keeps the tensors' storage alive.
    owner: Arc<dyn Any + Send + Sync>,
}

/// Why two sides do not fit together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "rank {rank} registered {layers} layers of {layer_bytes} bytes a block; the segment was made for \
     {expected_ranks} ranks, {expected_layers} layers of {expected_layer_bytes} bytes"
)]
pub struct RegistrationError {
    rank: u32,
    layers: usize,
    layer_bytes: usize,
    expected_ranks: u32,
    expected_layers: u32,
    expected_layer_bytes: usize,
}

impl Registration {
    /// Joins the layout of `rank`'s tensors with the segment.
    ///
    /// # Errors
    /// [`RegistrationError`] when the segment's rows do not hold what the layout describes.
    ///
    /// # Safety
    /// The tensors behind `layout` are memory that can be read and written by the device that this
    /// is given to (host memory by [`HostDevice`], memory of that GPU by [`CudaDevice`]), and stay
    /// so until `owner` is dropped. Blocks named in a batch are not written by others while a save
    /// of them runs, and not used by others while a load of them runs.
    pub unsafe fn new(
        layout: KvLayout,
        segment: Arc<SharedSegment>,
        rank: u32,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, RegistrationError> {
        Self::join(layout, segment, rank, owner)
    }

    /// The same tensors, as those of `rank`, with another segment.
    ///
    /// # Errors
    /// [`RegistrationError`] when its rows do not hold what the layout describes.
    pub fn over(&self, segment: Arc<SharedSegment>, rank: u32) -> Result<Self, RegistrationError> {
        Self::join(self.layout.clone(), segment, rank, Arc::clone(&self.owner))
    }

    fn join(
        layout: KvLayout,
        segment: Arc<SharedSegment>,
        rank: u32,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, RegistrationError> {
        let geometry = segment.geometry();
        let fits = rank < geometry.ranks()
            && layout.layers() == geometry.layers() as usize
            && layout.layer_bytes() == geometry.layer_bytes();
        if !fits {
            return Err(RegistrationError {
                rank,
                layers: layout.layers(),
                layer_bytes: layout.layer_bytes(),
                expected_ranks: geometry.ranks(),
                expected_layers: geometry.layers(),
                expected_layer_bytes: geometry.layer_bytes(),
            });
        }
        Ok(Self {
            layout,
            segment,
            rank,
            owner,
        })
    }

    /// The tensors' layout.
    #[must_use]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The segment.
    #[must_use]
    pub fn segment(&self) -> &SharedSegment {
        &self.segment
    }

    /// This rank's place in a row.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// An error if one of `moves` names a row or a block that does not exist.
    fn check(&self, moves: &[RowMove]) -> Result<(), CopyError> {
        let rows = self.segment.geometry().rows();
        let outside = moves
            .iter()
            .find(|wanted| wanted.row >= rows || wanted.block >= self.layout.blocks());
        outside.map_or(Ok(()), |&RowMove { row, block }| {
            Err(CopyError::OutOfRange { row, block })
        })
    }

    /// An error if `layers` do not exist.
    fn check_layers(&self, layers: &Range<usize>) -> Result<(), CopyError> {
        if layers.start <= layers.end && layers.end <= self.layout.layers() {
            return Ok(());
        }
        Err(CopyError::NoSuchLayer { layer: layers.end })
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("rank", &self.rank)
            .field("layers", &self.layout.layers())
            .field("segment", &self.segment.path())
            .finish_non_exhaustive()
    }
}

/// Why a batch could not be carried out. Some of it may have been copied.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyError {
    /// A move names something that does not exist.
    #[error("row {row} or block {block} is out of range")]
    OutOfRange {
        /// Row.
        row: u32,
        /// Block.
        block: u32,
    },
    /// There is no such layer.
    #[error("layer {layer} is out of range")]
    NoSuchLayer {
        /// Layer.
        layer: usize,
    },
    /// This way of copying moves bytes as they are.
    #[error(
        "the pool's rows are encoded, and {way} copies bytes as they are: set the route to \"staged\" or \"kernel\", or codec to \"none\""
    )]
    CannotEncode {
        /// A route, or the device.
        way: String,
    },
    /// The GPU or its driver failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// A point in the work of an engine or a backend: what was started by then is done before whatever
/// waits for the mark.
#[derive(Debug)]
pub struct Mark(Option<Event>);

impl Mark {
    /// A mark in host memory: what was started is done.
    #[must_use]
    pub fn passed() -> Self {
        Self(None)
    }
}

/// Blocks that are copied together, in one direction.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Which way.
    pub direction: Direction,
    /// Rows and blocks.
    pub moves: &'a [RowMove],
    /// Whether checksums are wanted.
    pub digests: bool,
}

/// Copies for one thread, in batches; a batch ends before the next begins.
///
/// Dropping it waits for what it has started.
pub trait CopyBackend: Send {
    /// Begins a batch.
    ///
    /// # Errors
    /// [`CopyError`] when a move is out of range, and when the device fails.
    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), CopyError>;

    /// Layers that are best copied at once, where one after the other becomes ready.
    fn layers_at_once(&self) -> usize {
        1
    }

    /// What is copied from now on is copied after `mark`.
    ///
    /// # Errors
    /// [`CopyError`] when the device fails.
    fn wait_for(&mut self, mark: &Mark) -> Result<(), CopyError>;

    /// Copies `layers`, by index in the layout, of all the batch's moves.
    ///
    /// # Errors
    /// [`CopyError`] when a layer is out of range, and when the device fails.
    fn copy(&mut self, layers: Range<usize>) -> Result<(), CopyError>;

    /// Ends the batch: nothing more is copied. Behind the mark, its blocks and rows are not touched
    /// any more.
    ///
    /// # Errors
    /// [`CopyError`] when the device fails.
    fn close(&mut self) -> Result<Mark, CopyError>;

    /// Closes the batch if it is not, and waits until all its copies have ended. If digests were wanted: for each move, the
    /// wrapping sum of the digests of the layers that were copied, which over all layers is the
    /// shard's checksum ([`kvtide_segment::shard_checksum`]). On a GPU they are of what the blocks hold when
    /// all copies have been made, and nobody changes them before the batch has ended; where rows are
    /// encoded, of what was written to or read from the rows.
    ///
    /// # Errors
    /// [`CopyError`] when the device fails.
    fn finish(&mut self) -> Result<Vec<u64>, CopyError>;
}

/// A load whose layers arrive one after the other, all of it enqueued on the device.
pub trait LayeredLoad: Send + Sync {
    /// Holds back `stream` until `layer` is there. Returns at once.
    ///
    /// # Errors
    /// [`CopyError`] when the layer is out of range, and when the device fails.
    fn hold_back(&self, stream: ComputeStream, layer: usize) -> Result<(), CopyError>;

    /// Holds back `stream` until the load has ended, its digests included: they are of the blocks,
    /// which must not change before. Returns at once.
    ///
    /// # Errors
    /// [`CopyError`] when the device fails.
    fn hold_back_until_end(&self, stream: ComputeStream) -> Result<(), CopyError>;

    /// Waits, on this thread, until all layers are there.
    ///
    /// # Errors
    /// [`CopyError`] when the device fails.
    fn wait(&self) -> Result<(), CopyError>;

    /// What [`CopyBackend::finish`] returns, once the load has ended; `None` before.
    fn poll(&mut self) -> Option<Result<Vec<u64>, CopyError>>;
}

/// One rank's KV cache, where it can be copied to and from. Shown, it says what an operator wants to
/// know of it.
pub trait Device: Send + Sync + fmt::Debug + fmt::Display {
    /// Both sides of every copy.
    fn registration(&self) -> &Arc<Registration>;

    /// The same device with the rows of another segment, which may hold blocks already. Nothing is
    /// measured again, because the engine computes meanwhile.
    ///
    /// # Errors
    /// [`CopyError`] when the device has no room for what it needs, or cannot pin the segment.
    fn over(&self, registration: Registration) -> Result<Arc<dyn Device>, CopyError>;

    /// A backend for a thread that copies in one direction.
    ///
    /// # Errors
    /// [`CopyError`] when the device has no room for what a backend needs.
    fn backend(&self, direction: Direction) -> Result<Box<dyn CopyBackend>, CopyError>;

    /// Marks what the engine has put on `stream` so far.
    ///
    /// # Errors
    /// [`CopyError`] when the device fails.
    fn mark(&self, stream: ComputeStream) -> Result<Mark, CopyError>;

    /// Holds back `stream` until `mark` is reached. Returns at once.
    ///
    /// # Errors
    /// [`CopyError`] when the device fails.
    fn hold_back(&self, stream: ComputeStream, mark: &Mark) -> Result<(), CopyError>;

    /// Enqueues a load of `moves`, layer by layer, behind `begin`. `None` if the device has no
    /// streams: a thread loads, and the engine waits for it.
    fn begin_layered(
        &self,
        moves: &[RowMove],
        begin: &Mark,
    ) -> Option<Result<Box<dyn LayeredLoad>, CopyError>>;

    /// Blocks of one slice of a long load: few enough that others need not wait long, enough to
    /// keep the device busy.
    fn slice_blocks(&self) -> usize;
}
