//! What the kernels are told, in their own types; mirrors `kernels/cuda/layout.cuh`.

use std::sync::Arc;

use crate::cuda::{Context, CudaError, DeviceBuffer, Pod};
use crate::encoding::{Float, ScaledDimension};
use crate::kv_layout::KvLayout;

/// One layer of the paged KV cache.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layer {
    base: u64,
    block_stride: u64,
    first_offset: u32,
    runs: u32,
    run_bytes: u32,
    outer_count: u32,
    outer_bytes: u32,
    inner_count: u32,
    inner_bytes: u32,
    reserved: u32,
}

/// A row and a block.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) row: u32,
    pub(super) block: u32,
}

/// Some layers of some moves.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Plan {
    pub(super) layers: u64,
    pub(super) run_offsets: u64,
    pub(super) run_scales: u64,
    pub(super) moves: u64,
    pub(super) rows: u64,
    pub(super) row_stride: u64,
    pub(super) move_count: u32,
    pub(super) first_layer: u32,
    pub(super) layer_count: u32,
    pub(super) layer_bytes: u32,
    pub(super) rows_in_order: u32,
    pub(super) elements: u32,
}

/// What rows hold of a block: `Elements` of the kernels.
fn elements(layout: &KvLayout) -> u32 {
    match layout.encoding().map(|encoding| encoding.float) {
        None => 0,
        Some(Float::Bfloat16) => 1,
        Some(Float::Float16) => 2,
    }
}

// SAFETY: integers without padding: 2×8 + 8×4 bytes.
unsafe impl Pod for Layer {}
// SAFETY: two integers of one size.
unsafe impl Pod for Move {}

const _: () =
    assert!(size_of::<Layer>() == 48 && size_of::<Move>() == 8 && size_of::<Plan>() == 72);

/// The layout, where kernels can read it.
#[derive(Debug)]
pub(super) struct Tables {
    layers: DeviceBuffer<Layer>,
    run_offsets: DeviceBuffer<u64>,
    /// Empty unless rows are encoded.
    run_scales: DeviceBuffer<u32>,
    elements: u32,
}

/// A number that the kernels hold in 32 bits: counts of layers and runs, and bytes of a block in one
/// layer, all of them far smaller.
fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Tables {
    pub(super) fn new(context: &Arc<Context>, layout: &KvLayout) -> Result<Self, CudaError> {
        let mut offsets = Vec::new();
        let mut run_scales = Vec::new();
        let mut layers = Vec::new();
        for (index, place) in layout.places().enumerate() {
            let scales = layout
                .encoding()
                .and_then(|encoding| encoding.scales.get(index));
            let dimension = |dimension: Option<ScaledDimension>| {
                // A stride beyond 32 bits leads out of the run, whose own scale says all.
                dimension.map_or((1, u32::MAX), |d| {
                    (narrow(d.length), narrow(d.stride_bytes))
                })
            };
            let (outer_count, outer_bytes) = dimension(scales.map(|scales| scales.outer));
            let (inner_count, inner_bytes) = dimension(scales.map(|scales| scales.inner));
            run_scales.extend(scales.iter().flat_map(|scales| &scales.of_runs));
            layers.push(Layer {
                outer_count,
                outer_bytes,
                inner_count,
                inner_bytes,
                base: place.base as u64,
                block_stride: place.block_stride as u64,
                first_offset: narrow(offsets.len()),
                runs: narrow(place.run_offsets.len()),
                run_bytes: narrow(place.run_bytes),
                reserved: 0,
            });
            offsets.extend(place.run_offsets.iter().map(|&offset| offset as u64));
        }
        Ok(Self {
            layers: DeviceBuffer::of(context, &layers)?,
            run_offsets: DeviceBuffer::of(context, &offsets)?,
            run_scales: DeviceBuffer::of(context, &run_scales)?,
            elements: elements(layout),
        })
    }

    /// A plan for `layers` of the moves at address `moves`; its rows are to be filled in.
    pub(super) fn plan(&self, layers: &std::ops::Range<usize>, layer_bytes: usize) -> Plan {
        Plan {
            layers: self.layers.address(),
            run_offsets: self.run_offsets.address(),
            run_scales: self.run_scales.address(),
            elements: self.elements,
            first_layer: narrow(layers.start),
            layer_count: narrow(layers.len()),
            layer_bytes: narrow(layer_bytes),
            ..Plan::default()
        }
    }
}
