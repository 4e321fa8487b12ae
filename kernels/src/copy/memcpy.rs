//! Plain memory copies by the calling thread, for KV caches in host memory.

use std::ptr;
use std::slice;
use std::sync::Arc;

use super::{CopyBackend, CopyError, CopyPlan, Direction, Registration, stream};
use crate::checksum::{CHUNK_BYTES, chunk_digest, layer_digest};

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

    /// Copies one layer of one block; its digest (0 unless wanted), or `None` if out of range.
    fn copy_layer(
        &self,
        direction: Direction,
        (slot, block): (u32, u32),
        layer: usize,
        wants_digest: bool,
    ) -> Option<u64> {
        let Registration {
            layout,
            segment,
            rank,
            ..
        } = &*self.registration;
        let offset = layer * layout.layer_bytes();
        let host = segment.shard_address(slot, *rank)?.wrapping_add(offset);
        let mut runs = layout.runs(layer, block)?;
        // A layer in one piece is hashed while it passes through the cache: chunk by chunk, first
        // read by the hash, then by the copy.
        if layout.is_one_run(layer) && wants_digest {
            let (address, bytes) = runs.next()?;
            let device = ptr::with_exposed_provenance_mut::<u8>(address);
            let mut sum: u64 = 0;
            for start in (0..bytes).step_by(CHUNK_BYTES) {
                let length = CHUNK_BYTES.min(bytes - start);
                let (device, host) = (device.wrapping_add(start), host.wrapping_add(start));
                let (source, target) = ends(direction, device, host);
                // SAFETY: see `copy_run`; hashing reads what the copy reads.
                sum = sum.wrapping_add(unsafe {
                    let digest =
                        chunk_digest(slice::from_raw_parts(source, length), offset + start);
                    stream::copy(source, target, length);
                    digest
                });
            }
            return Some(sum);
        }
        let mut at = host;
        for (address, bytes) in runs {
            copy_run(
                direction,
                ptr::with_exposed_provenance_mut(address),
                at,
                bytes,
            );
            at = at.wrapping_add(bytes);
        }
        if !wants_digest {
            return Some(0);
        }
        // SAFETY: `host` starts one layer of a shard in the segment; the pool keeps others from
        // writing it meanwhile.
        let layer = unsafe { slice::from_raw_parts(host, layout.layer_bytes()) };
        Some(layer_digest(layer, offset))
    }
}

/// (source, target) of a copy in `direction`.
fn ends(direction: Direction, device: *mut u8, host: *mut u8) -> (*const u8, *mut u8) {
    match direction {
        Direction::Save => (device, host),
        Direction::Load => (host, device),
    }
}

fn copy_run(direction: Direction, device: *mut u8, host: *mut u8, bytes: usize) {
    let (source, target) = ends(direction, device, host);
    // SAFETY: runs lie inside the tensors that `Registration::new` was promised (KvLayout checked
    // them), their lengths add up to one layer of a shard, and the host side starts one
    // (`Registration::new` compared the sizes). Tensors and segment are different mappings, so the
    // two sides do not overlap. That nobody else writes either side now is the promise of
    // `Registration::new` and of the pool's slots.
    unsafe { stream::copy(source, target, bytes) };
}

impl CopyBackend for MemcpyBackend {
    fn copy(&mut self, plan: &CopyPlan<'_>, digests: Option<&mut [u64]>) -> Result<(), CopyError> {
        let copied = self.copy_moves(plan, digests);
        // Also after an error: the moves before it were made.
        stream::fence();
        copied
    }
}

impl MemcpyBackend {
    fn copy_moves(
        &self,
        plan: &CopyPlan<'_>,
        mut digests: Option<&mut [u64]>,
    ) -> Result<(), CopyError> {
        for (i, step) in plan.moves.iter().enumerate() {
            for layer in plan.layers.clone() {
                let (slot, block) = (step.slot.slot, step.block);
                let wanted = digests.as_deref_mut().and_then(|sums| sums.get_mut(i));
                let digest = self
                    .copy_layer(plan.direction, (slot, block), layer, wanted.is_some())
                    .ok_or(CopyError::OutOfRange { slot, block, layer })?;
                if let Some(sum) = wanted {
                    *sum = sum.wrapping_add(digest);
                }
            }
        }
        Ok(())
    }
}
