//! A paged KV cache in plain host memory, for whoever drives the engine without vLLM.

use std::io;
use std::ptr;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use super::{Registration, RegistrationError};
use crate::kv_layout::{KvLayout, TensorView};
use kvtide_segment::SharedSegment;

/// Tensors of shape (blocks, layer bytes), one a layer, in one anonymous mapping.
///
/// Benchmarks and tests above this crate use it as the engine's side of a copy.
#[derive(Debug)]
pub struct HostCache {
    memory: MmapRaw,
    layers: usize,
    blocks: u32,
    layer_bytes: usize,
}

impl HostCache {
    /// A zeroed cache.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub fn new(layers: usize, blocks: u32, layer_bytes: usize) -> io::Result<Arc<Self>> {
        let bytes = layers * blocks as usize * layer_bytes;
        let memory = MmapOptions::new().len(bytes.max(1)).map_anon()?.into();
        Ok(Arc::new(Self {
            memory,
            layers,
            blocks,
            layer_bytes,
        }))
    }

    /// Registers the cache as `rank`'s tensors.
    ///
    /// # Errors
    /// [`RegistrationError`] when the segment was made for another geometry.
    pub fn register(
        self: &Arc<Self>,
        segment: Arc<SharedSegment>,
        rank: u32,
    ) -> Result<Registration, RegistrationError> {
        let stride = self.blocks as usize * self.layer_bytes;
        let views: Vec<TensorView> = (0..self.layers)
            .map(|layer| TensorView {
                name: format!("layers.{layer}"),
                address: self
                    .memory
                    .as_mut_ptr()
                    .wrapping_add(layer * stride)
                    .expose_provenance(),
                reachable_bytes: stride,
                shape: vec![self.blocks as usize, self.layer_bytes],
                strides_bytes: vec![self.layer_bytes, 1],
                item_bytes: 1,
            })
            .collect();
        let layout = KvLayout::new(&views, self.blocks, self.layer_bytes);
        let layout = layout.unwrap_or_else(|error| unreachable!("made to fit: {error}"));
        // SAFETY: the views lie in `memory`, which the registration keeps alive through its owner.
        // All access to it is through raw pointers; a caller that reads or writes a block while it
        // is copied sees torn bytes, as it would with a real engine, and nothing worse.
        unsafe { Registration::new(layout, segment, rank, Arc::clone(self) as _) }
    }

    /// Address of a block's bytes in one layer.
    fn block(&self, layer: usize, block: u32) -> *mut u8 {
        assert!(
            layer < self.layers && block < self.blocks,
            "layer {layer}, block {block}"
        );
        let index = layer * self.blocks as usize + block as usize;
        self.memory
            .as_mut_ptr()
            .wrapping_add(index * self.layer_bytes)
    }

    /// Overwrites one layer of a block, byte by byte as `byte_at` tells.
    pub fn write(&self, layer: usize, block: u32, byte_at: impl Fn(usize) -> u8) {
        let address = self.block(layer, block);
        for i in 0..self.layer_bytes {
            // SAFETY: `block` is in range and has `layer_bytes` bytes of this mapping behind it.
            unsafe { ptr::write_volatile(address.wrapping_add(i), byte_at(i)) };
        }
    }

    /// The bytes of one layer of a block.
    #[must_use]
    pub fn read(&self, layer: usize, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.layer_bytes];
        // SAFETY: as in `write`; the destination is a fresh allocation of the same length.
        unsafe {
            ptr::copy_nonoverlapping(
                self.block(layer, block),
                bytes.as_mut_ptr(),
                self.layer_bytes,
            );
        }
        bytes
    }
}
