//! Copies between paged KV cache blocks and rows.
//!
//! A [`CopyPlan`] names slots, blocks and layers; a [`CopyBackend`] carries it out for one rank.
//! Backends run on the device's own load and save threads and know nothing of requests.

mod host_cache;
mod memcpy;
mod stream;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kvtide_model::BlockMove;

use crate::kv_layout::KvLayout;
use crate::segment::SharedSegment;

pub use host_cache::HostCache;
pub use memcpy::MemcpyBackend;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the engine's paged KV cache to rows.
    Save,
    /// From rows to the engine's paged KV cache.
    Load,
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
    _owner: Box<dyn Any + Send + Sync>,
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
    /// The tensors behind `layout` are memory of this process that can be read and written, and
    /// stay so until `owner` is dropped. Blocks named in a plan are not written by others while a
    /// save of them runs, and not used by others while a load of them runs.
    pub unsafe fn new(
        layout: KvLayout,
        segment: Arc<SharedSegment>,
        rank: u32,
        owner: Box<dyn Any + Send + Sync>,
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
            _owner: owner,
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

/// Some layers of some blocks, in one direction.
#[derive(Clone, Debug)]
pub struct CopyPlan<'a> {
    /// Which way.
    pub direction: Direction,
    /// Slots and blocks.
    pub moves: &'a [BlockMove],
    /// Layers, by index in the layout.
    pub layers: Range<usize>,
}

/// Why a plan could not be carried out. Layers before the one that is named may have been copied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyError {
    /// The plan names something that does not exist.
    #[error("slot {slot}, block {block} or layer {layer} is out of range")]
    OutOfRange {
        /// Slot.
        slot: u32,
        /// Block.
        block: u32,
        /// Layer.
        layer: usize,
    },
}

/// Copies for one rank.
pub trait CopyBackend: Send {
    /// Carries out `plan`. If `digests` is given it has one entry a move, to which the digest of
    /// every layer that was copied is added (wrapping); the sum over all layers is the shard's
    /// checksum ([`crate::shard_checksum`]).
    ///
    /// # Errors
    /// [`CopyError`] at the first move that cannot be made.
    fn copy(&mut self, plan: &CopyPlan<'_>, digests: Option<&mut [u64]>) -> Result<(), CopyError>;
}
