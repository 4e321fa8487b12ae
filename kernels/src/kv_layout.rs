//! Where one rank's KV cache blocks lie in memory.
//!
//! vLLM registers one tensor view a layer. Versions and attention backends differ in shape (K and V
//! split or interleaved, heads before or after tokens), in stride, and in whether layers share one
//! storage. All of that is reduced here to one formula: byte run *r* of block *b* in layer *l* is
//! `base(l) + b × block_stride(l) + run_offset(l, r)`. What [`KvLayout::new`] accepts cannot be
//! indexed out of bounds afterwards with a block below [`KvLayout::blocks`].

use std::ops::Range;

use crate::encoding::{Codec, Float, ScaledDimension, Scales};

/// A layer whose block falls into more pieces than this is not worth copying piece by piece.
const MAX_RUNS_PER_LAYER: usize = 4096;

/// A tensor as vLLM registers it: one layer's paged KV cache.
#[derive(Clone, Debug)]
pub struct TensorView {
    /// The layer's name in vLLM.
    pub name: String,
    /// Address of element (0, …, 0).
    pub address: usize,
    /// Bytes from `address` to the end of the storage behind it.
    pub reachable_bytes: usize,
    /// Length of every dimension, in elements.
    pub shape: Vec<usize>,
    /// Distance between neighbours in every dimension, in bytes.
    pub strides_bytes: Vec<usize>,
    /// Bytes of one element.
    pub item_bytes: usize,
}

/// Why tensors cannot be used as a paged KV cache.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// No tensors were given.
    #[error("no KV cache tensor was registered")]
    NoLayers,
    /// A shape and its strides differ in length, or an element has no bytes.
    #[error("layer {layer}: shape, strides and element size do not describe a tensor")]
    Malformed {
        /// Layer's name.
        layer: String,
    },
    /// No dimension of the tensor counts blocks.
    #[error("layer {layer}: no dimension of shape {shape:?} is a multiple of {blocks} blocks")]
    NoBlockDimension {
        /// Layer's name.
        layer: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Blocks of the engine's KV cache.
        blocks: usize,
    },
    /// Two elements would share an address.
    #[error("layer {layer}: elements overlap (shape {shape:?}, strides {strides_bytes:?} bytes)")]
    Overlap {
        /// Layer's name.
        layer: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides in bytes.
        strides_bytes: Vec<usize>,
    },
    /// The view reaches past the end of its storage.
    #[error("layer {layer}: needs {needed} bytes behind its address, its storage has {reachable}")]
    OutOfBounds {
        /// Layer's name.
        layer: String,
        /// Bytes the shape and strides reach.
        needed: usize,
        /// Bytes there are.
        reachable: usize,
    },
    /// A block falls into too many pieces.
    #[error(
        "layer {layer}: a block lies in {runs} pieces, at most {MAX_RUNS_PER_LAYER} are copied"
    )]
    TooScattered {
        /// Layer's name.
        layer: String,
        /// Pieces of one block.
        runs: usize,
    },
    /// Layers differ in bytes for a block, or from what the engine's configuration says.
    #[error("layer {layer}: a block has {bytes} bytes, {expected} were expected")]
    UnequalLayers {
        /// Layer's name.
        layer: String,
        /// Bytes of a block in this layer.
        bytes: usize,
        /// Bytes that the pool's geometry gives to a layer.
        expected: usize,
    },
    /// Its numbers cannot be encoded.
    #[error("layer {layer} cannot be encoded: {why}")]
    NotEncodable {
        /// Layer's name.
        layer: String,
        /// What stands against it.
        why: &'static str,
    },
}

/// One layer of a [`KvLayout`].
#[derive(Clone, Debug)]
struct Layer {
    base: usize,
    block_stride: usize,
    /// Offsets of the contiguous pieces of a block, ascending; all are `run_bytes` long.
    run_offsets: Vec<usize>,
    run_bytes: usize,
}

/// What rows hold instead of the blocks' bytes.
#[derive(Clone, Debug)]
pub(crate) struct Encoding {
    pub(crate) float: Float,
    /// Of every layer.
    pub(crate) scales: Vec<Scales>,
}

/// The layout of one rank's KV cache, checked.
#[derive(Clone, Debug)]
pub struct KvLayout {
    blocks: u32,
    /// In rows.
    layer_bytes: usize,
    layers: Vec<Layer>,
    encoding: Option<Encoding>,
}

impl KvLayout {
    /// Checks `tensors`, in the order in which the model runs them, as the paged cache of an engine
    /// with `blocks` blocks in which every layer holds `layer_bytes` of a block.
    ///
    /// # Errors
    /// [`LayoutError`] names the layer and what is wrong with it.
    pub fn new(
        tensors: &[TensorView],
        blocks: u32,
        layer_bytes: usize,
    ) -> Result<Self, LayoutError> {
        if tensors.is_empty() {
            return Err(LayoutError::NoLayers);
        }
        let layers = tensors
            .iter()
            .map(|tensor| Layer::new(tensor, blocks as usize, layer_bytes));
        Ok(Self {
            blocks,
            layer_bytes,
            layers: layers.collect::<Result<_, _>>()?,
            encoding: None,
        })
    }

    /// The same for rows in [`Codec::Fp8`]: the blocks hold `float`s, and `dimensions` of each
    /// layer's tensor, at most two, the outer one first, have scales of their own.
    ///
    /// # Errors
    /// [`LayoutError::NotEncodable`] names the layer and why.
    pub fn encoded(
        self,
        float: Float,
        names: &[TensorView],
        dimensions: &[Vec<ScaledDimension>],
    ) -> Result<Self, LayoutError> {
        let refuse = |index: usize, why| LayoutError::NotEncodable {
            layer: names
                .get(index)
                .map(|tensor| tensor.name.clone())
                .unwrap_or_default(),
            why,
        };
        let scales = self.places().enumerate().map(|(index, place)| {
            let dimensions = dimensions.get(index).map_or(&[][..], Vec::as_slice);
            Scales::new(&place, dimensions).map_err(|why| refuse(index, why))
        });
        let scales: Vec<Scales> = scales.collect::<Result<_, _>>()?;
        let count = scales.first().map_or(0, Scales::count);
        if let Some(other) = scales.iter().position(|scales| scales.count() != count) {
            return Err(refuse(other, "it has not as many heads as the first layer"));
        }
        Ok(Self {
            layer_bytes: Codec::Fp8.row_layer_bytes(self.layer_bytes, count),
            encoding: Some(Encoding { float, scales }),
            ..self
        })
    }

    /// Blocks of the engine's KV cache; block ids lie below this.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Bytes of a block in one layer of a row.
    #[must_use]
    pub fn layer_bytes(&self) -> usize {
        self.layer_bytes
    }

    /// Bytes of a block in all layers of a row: one rank's shard of it.
    #[must_use]
    pub fn shard_bytes(&self) -> usize {
        self.layer_bytes * self.layers.len()
    }

    /// What rows hold, if it is not the blocks' bytes.
    pub(crate) fn encoding(&self) -> Option<&Encoding> {
        self.encoding.as_ref()
    }

    /// Where the blocks of each layer lie.
    pub(crate) fn places(&self) -> impl Iterator<Item = LayerPlace<'_>> {
        self.layers.iter().map(|layer| LayerPlace {
            base: layer.base,
            block_stride: layer.block_stride,
            run_offsets: &layer.run_offsets,
            run_bytes: layer.run_bytes,
        })
    }

    /// Whether a block's bytes in `layer` are contiguous.
    pub(crate) fn is_one_run(&self, layer: usize) -> bool {
        self.layers
            .get(layer)
            .is_some_and(|layer| layer.run_offsets.len() == 1)
    }

    /// Contiguous pieces of `block` in `layer`, as (address, bytes), in the order of their address.
    ///
    /// `None` when block or layer is out of range.
    pub(crate) fn runs(
        &self,
        layer: usize,
        block: u32,
    ) -> Option<impl Iterator<Item = (usize, usize)>> {
        let layer = self.layers.get(layer)?;
        (block < self.blocks).then(|| {
            let start = layer.base + block as usize * layer.block_stride;
            layer
                .run_offsets
                .iter()
                .map(move |offset| (start + offset, layer.run_bytes))
        })
    }
}

/// The formula of one layer; see the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerPlace<'a> {
    pub(crate) base: usize,
    pub(crate) block_stride: usize,
    pub(crate) run_offsets: &'a [usize],
    pub(crate) run_bytes: usize,
}

impl Layer {
    fn new(tensor: &TensorView, blocks: usize, layer_bytes: usize) -> Result<Self, LayoutError> {
        let name = || tensor.name.clone();
        if tensor.shape.len() != tensor.strides_bytes.len() || tensor.item_bytes == 0 {
            return Err(LayoutError::Malformed { layer: name() });
        }
        let overlap = || LayoutError::Overlap {
            layer: name(),
            shape: tensor.shape.clone(),
            strides_bytes: tensor.strides_bytes.clone(),
        };
        let (block_stride, dims) = Self::split_blocks(tensor, blocks)?;
        let shape = BlockShape::new(dims, tensor.item_bytes).ok_or_else(overlap)?;
        let runs = shape.runs();
        if runs > MAX_RUNS_PER_LAYER {
            return Err(LayoutError::TooScattered {
                layer: name(),
                runs,
            });
        }
        let (run_bytes, run_offsets) = (shape.run_bytes, shape.run_offsets());
        if runs * run_bytes != layer_bytes {
            return Err(LayoutError::UnequalLayers {
                layer: name(),
                bytes: runs * run_bytes,
                expected: layer_bytes,
            });
        }
        let needed = (blocks - 1)
            .checked_mul(block_stride)
            .and_then(|start| start.checked_add(shape.extent))
            .ok_or_else(overlap)?;
        if needed > tensor.reachable_bytes || tensor.address.checked_add(needed).is_none() {
            return Err(LayoutError::OutOfBounds {
                layer: name(),
                needed,
                reachable: tensor.reachable_bytes,
            });
        }
        if blocks > 1 && !blocks_are_disjoint(block_stride, &run_offsets, run_bytes, blocks) {
            return Err(overlap());
        }
        Ok(Self {
            base: tensor.address,
            block_stride,
            run_offsets,
            run_bytes,
        })
    }

    /// Separates the dimension that counts blocks: `(block stride, the other dimensions)`, each
    /// dimension as (length, stride in bytes).
    ///
    /// Blocks come first, except behind a leading K/V dimension of 2. An attention kernel may work
    /// on smaller blocks than the engine hands out; then an engine block is a few of them in a row.
    fn split_blocks(
        tensor: &TensorView,
        blocks: usize,
    ) -> Result<(usize, Vec<(usize, usize)>), LayoutError> {
        let shape = &tensor.shape;
        let counts = |d: usize| {
            shape
                .get(d)
                .is_some_and(|&n| blocks > 0 && n >= blocks && n % blocks == 0)
        };
        let dimension = if shape.len() == 5 && shape[0] == 2 && counts(1) {
            1
        } else if counts(0) {
            0
        } else {
            return Err(LayoutError::NoBlockDimension {
                layer: tensor.name.clone(),
                shape: shape.clone(),
                blocks,
            });
        };
        let pairs = shape
            .iter()
            .copied()
            .zip(tensor.strides_bytes.iter().copied());
        let mut dims: Vec<(usize, usize)> = pairs.collect();
        let (length, stride) = dims.remove(dimension);
        let kernel_blocks = length / blocks;
        dims.push((kernel_blocks, stride));
        Ok((stride * kernel_blocks, dims))
    }
}

/// The dimensions inside one block of one layer.
struct BlockShape {
    /// Contiguous bytes.
    run_bytes: usize,
    /// Dimensions of runs, as (length, stride in bytes), from the innermost to the outermost.
    outer: Vec<(usize, usize)>,
    /// Bytes from the first to the end of the last.
    extent: usize,
}

impl BlockShape {
    /// Melts neighbouring dimensions into one run for as long as they touch; `None` if elements
    /// overlap or lie further apart than can be addressed.
    fn new(mut dims: Vec<(usize, usize)>, item_bytes: usize) -> Option<Self> {
        dims.retain(|&(length, _)| length != 1);
        dims.sort_unstable_by_key(|&(_, stride)| stride);
        let mut shape = Self {
            run_bytes: item_bytes,
            outer: Vec::new(),
            extent: item_bytes,
        };
        for (length, stride) in dims {
            if stride < shape.extent {
                return None;
            }
            if shape.outer.is_empty() && stride == shape.run_bytes {
                shape.run_bytes *= length;
            } else {
                shape.outer.push((length, stride));
            }
            let reach = (length - 1).checked_mul(stride)?;
            shape.extent = reach.checked_add(shape.extent)?;
        }
        Some(shape)
    }

    /// Number of runs.
    fn runs(&self) -> usize {
        self.outer
            .iter()
            .try_fold(1usize, |runs, &(length, _)| runs.checked_mul(length))
            .unwrap_or(usize::MAX)
    }

    /// Places of all runs in the block, in ascending order.
    fn run_offsets(&self) -> Vec<usize> {
        self.outer
            .iter()
            .rev()
            .fold(vec![0], |offsets, &(length, stride)| {
                offsets
                    .iter()
                    .flat_map(|&offset| (0..length).map(move |i| offset + i * stride))
                    .collect()
            })
    }
}

/// Whether no byte belongs to two blocks.
///
/// Blocks lie either one behind the other, or woven: all blocks of the first run, then all of the
/// second. Anything else is refused rather than analysed.
fn blocks_are_disjoint(stride: usize, offsets: &[usize], run_bytes: usize, blocks: usize) -> bool {
    let extent = offsets.last().map_or(0, |last| last + run_bytes);
    let gaps: Range<usize> = 0..offsets.len().saturating_sub(1);
    let woven = stride >= run_bytes
        && gaps
            .into_iter()
            .all(|i| offsets[i + 1] - offsets[i] >= blocks * stride);
    stride >= extent || woven
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn view(shape: &[usize], strides: &[usize], item: usize, bytes: usize) -> TensorView {
        TensorView {
            name: "layer".into(),
            address: 0x1000,
            reachable_bytes: bytes,
            shape: shape.to_vec(),
            strides_bytes: strides.iter().map(|s| s * item).collect(),
            item_bytes: item,
        }
    }

    fn contiguous(shape: &[usize]) -> Vec<usize> {
        let mut strides = vec![1; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d];
        }
        strides
    }

    fn runs(layout: &KvLayout, block: u32) -> Vec<(usize, usize)> {
        layout.runs(0, block).expect("in range").collect()
    }

    #[test]
    fn a_block_first_tensor_is_one_run_a_block() {
        let shape = [8, 4, 32, 64];
        let tensor = view(&shape, &contiguous(&shape), 4, 8 * 32768);
        let layout = KvLayout::new(&[tensor], 8, 32768).unwrap();
        assert_eq!(runs(&layout, 3), [(0x1000 + 3 * 32768, 32768)]);
        assert!(layout.runs(0, 8).is_none());
        assert!(layout.runs(1, 0).is_none());
    }

    #[test]
    fn split_keys_and_values_are_two_runs_a_block() {
        let shape = [2, 8, 16, 4, 32];
        let block = 16 * 4 * 32 * 2;
        let tensor = view(&shape, &contiguous(&shape), 2, 16 * block);
        let layout = KvLayout::new(&[tensor], 8, 2 * block).unwrap();
        assert_eq!(
            runs(&layout, 1),
            [(0x1000 + block, block), (0x1000 + 9 * block, block)]
        );
    }

    #[test]
    fn kernel_blocks_smaller_than_engine_blocks_are_joined() {
        let shape = [16, 4, 32, 64];
        let tensor = view(&shape, &contiguous(&shape), 4, 16 * 32768);
        let layout = KvLayout::new(&[tensor], 4, 4 * 32768).unwrap();
        assert_eq!(runs(&layout, 1), [(0x1000 + 4 * 32768, 4 * 32768)]);
    }

    #[test]
    fn heads_outside_tokens_in_a_permuted_view_stay_one_run() {
        // NHD in the shape, HND in memory: permuted strides, same contiguous block.
        let tensor = view(&[8, 32, 4, 64], &[8192, 64, 2048, 1], 2, 8 * 16384);
        let layout = KvLayout::new(&[tensor], 8, 16384).unwrap();
        assert_eq!(runs(&layout, 2), [(0x1000 + 2 * 16384, 16384)]);
    }

    #[test]
    fn layers_interleaved_in_one_storage_keep_their_stride() {
        // Blocks of all layers side by side: the block stride is a multiple of one layer's bytes.
        let tensor = view(
            &[8, 4, 32, 64],
            &[8192 * 6, 2048, 64, 1],
            2,
            (7 * 6 + 1) * 16384,
        );
        let layout = KvLayout::new(&[tensor], 8, 16384).unwrap();
        assert_eq!(runs(&layout, 7), [(0x1000 + 7 * 6 * 16384, 16384)]);
    }

    #[test]
    fn what_cannot_be_copied_safely_is_refused() {
        let shape = [8, 4, 32, 64];
        let good = view(&shape, &contiguous(&shape), 4, 8 * 32768);
        let refuse = |change: &dyn Fn(&mut TensorView), bytes| {
            let mut tensor = good.clone();
            change(&mut tensor);
            KvLayout::new(&[tensor], 8, bytes).unwrap_err()
        };
        assert!(matches!(
            refuse(&|t| t.reachable_bytes -= 1, 32768),
            LayoutError::OutOfBounds { .. }
        ));
        assert!(matches!(
            refuse(&|t| t.strides_bytes[0] = 0, 32768),
            LayoutError::Overlap { .. }
        ));
        assert!(matches!(
            refuse(&|t| t.strides_bytes[2] = 4, 32768),
            LayoutError::Overlap { .. }
        ));
        assert!(matches!(
            refuse(&|t| t.shape[0] = 9, 32768),
            LayoutError::NoBlockDimension { .. }
        ));
        assert!(matches!(
            refuse(&|_| {}, 32767),
            LayoutError::UnequalLayers { .. }
        ));
        assert!(matches!(
            refuse(&|t| t.item_bytes = 0, 32768),
            LayoutError::Malformed { .. }
        ));
        assert!(matches!(
            refuse(&|t| t.strides_bytes[0] = usize::MAX / 2, 32768),
            LayoutError::Overlap { .. }
        ));
        assert_eq!(KvLayout::new(&[], 8, 1).unwrap_err(), LayoutError::NoLayers);
    }

    proptest! {
        /// Whatever order the dimensions have in memory, the runs of all blocks cover every byte of
        /// the tensor exactly once.
        #[test]
        fn runs_partition_the_tensor(
            blocks in 1usize..5, ratio in 1usize..3, heads in 1usize..4, tokens in 1usize..4,
            size in 1usize..4, item in prop::sample::select(vec![1usize, 2, 4]),
            inner in Just([1usize, 2, 3]).prop_shuffle(), split in any::<bool>(),
        ) {
            let lengths = [heads, tokens, size];
            let mut strides = [0; 3];
            let mut stride = 1;
            for &d in &inner { strides[d - 1] = stride; stride *= lengths[d - 1]; }
            let count = blocks * ratio;
            let (shape, strides) = if split {
                (vec![2, count, heads, tokens, size],
                 vec![count * stride, stride, strides[0], strides[1], strides[2]])
            } else {
                (vec![count, heads, tokens, size], vec![stride, strides[0], strides[1], strides[2]])
            };
            let total: usize = shape.iter().product::<usize>() * item;
            let tensor = view(&shape, &strides, item, total);
            let layout = KvLayout::new(&[tensor], u32::try_from(blocks).unwrap(), total / blocks).unwrap();
            let mut seen = vec![0u8; total];
            for block in 0..layout.blocks() {
                for (address, bytes) in runs(&layout, block) {
                    seen[address - 0x1000..][..bytes].iter_mut().for_each(|n| *n += 1);
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
        }
    }
}
