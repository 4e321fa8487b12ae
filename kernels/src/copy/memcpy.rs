//! Plain memory copies by the calling thread, for KV caches in host memory.

use std::ptr;
use std::sync::Arc;

use super::{CopyBackend, CopyError, CopyPlan, Direction, Registration};
use crate::checksum::layer_digest;

/// Copies with the CPU. When `copy` returns, the bytes are in place.
#[derive(Debug)]
pub struct MemcpyBackend {
    registration: Arc<Registration>,
}

impl MemcpyBackend {
    /// A backend for the tensors and rows of `registration`.
    #[must_use]
    pub fn new(registration: Arc<Registration>) -> Self {
        Self { registration }
    }

    /// Copies one layer of one block; returns the host side's address, or `None` if out of range.
    fn copy_layer(&self, direction: Direction, slot: u32, block: u32, layer: usize) -> Option<*mut u8> {
        let Registration { layout, segment, rank, .. } = &*self.registration;
        let runs = layout.runs(layer, block)?;
        let host = segment.shard_address(slot, *rank)?.wrapping_add(layer * layout.layer_bytes());
        let mut at = host;
        for (address, bytes) in runs {
            let device = ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: `runs` lie inside the tensors that `Registration::new` was promised
            // (KvLayout checked them), their lengths add up to one layer of a shard, and `host`
            // starts one (`Registration::new` compared the sizes). Tensors and segment are
            // different mappings, so the two sides do not overlap. That nobody else writes
            // either side now is the promise of `Registration::new` and of the pool's slots.
            unsafe {
                match direction {
                    Direction::Save => ptr::copy_nonoverlapping(device, at, bytes),
                    Direction::Load => ptr::copy_nonoverlapping(at, device, bytes),
                }
            }
            at = at.wrapping_add(bytes);
        }
        Some(host)
    }
}

impl CopyBackend for MemcpyBackend {
    fn copy(&mut self, plan: &CopyPlan<'_>, mut digests: Option<&mut [u64]>) -> Result<(), CopyError> {
        let layer_bytes = self.registration.layout.layer_bytes();
        for (i, step) in plan.moves.iter().enumerate() {
            for layer in plan.layers.clone() {
                let (slot, block) = (step.slot.slot, step.block);
                let host = self
                    .copy_layer(plan.direction, slot, block, layer)
                    .ok_or(CopyError::OutOfRange { slot, block, layer })?;
                if let Some(sum) = digests.as_deref_mut().and_then(|sums| sums.get_mut(i)) {
                    // SAFETY: `copy_layer` returned the start of one layer of a shard in the
                    // segment; the pool keeps others from writing it meanwhile.
                    let bytes = unsafe { std::slice::from_raw_parts(host, layer_bytes) };
                    *sum = sum.wrapping_add(layer_digest(bytes, layer * layer_bytes));
                }
            }
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "memcpy"
    }
}
