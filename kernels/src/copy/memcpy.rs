//! Plain memory copies by the calling thread, for KV caches in host memory.

use std::fmt;
use std::ops::Range;
use std::ptr;
use std::slice;
use std::sync::Arc;

use kvtide_segment::digest_piece;

use super::{
    Batch, CopyBackend, CopyError, Device, Direction, LayeredLoad, Mark, Registration, RowMove,
    stream,
};
use crate::cuda::ComputeStream;

/// A piece is hashed just before it is copied, while it is in the core's own cache. A multiple of the
/// checksum's chunks.
const PIECE_BYTES: usize = 32 << 10;

/// A slice of an async load: what a layered load waits for at most.
const SLICE_BLOCKS: usize = 32;

/// A KV cache in host memory, copied by the threads that ask for it.
#[derive(Debug)]
pub struct HostDevice {
    registration: Arc<Registration>,
}

impl HostDevice {
    /// A device for the tensors and rows of `registration`, all of them in host memory.
    #[must_use]
    pub fn new(registration: Arc<Registration>) -> Self {
        Self { registration }
    }
}

impl fmt::Display for HostDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KV cache in host memory")
    }
}

impl Device for HostDevice {
    fn registration(&self) -> &Arc<Registration> {
        &self.registration
    }

    fn over(&self, registration: Registration) -> Result<Arc<dyn Device>, CopyError> {
        Ok(Arc::new(Self::new(Arc::new(registration))))
    }

    fn backend(&self, _direction: Direction) -> Result<Box<dyn CopyBackend>, CopyError> {
        if self.registration.layout().encoding().is_some() {
            let way = "host memory".to_owned();
            return Err(CopyError::CannotEncode { way });
        }
        Ok(Box::new(MemcpyBackend {
            registration: Arc::clone(&self.registration),
            direction: Direction::Save,
            moves: Vec::new(),
            digests: None,
        }))
    }

    fn mark(&self, _stream: ComputeStream) -> Result<Mark, CopyError> {
        Ok(Mark::passed())
    }

    fn hold_back(&self, _stream: ComputeStream, _mark: &Mark) -> Result<(), CopyError> {
        Ok(())
    }

    fn begin_layered(
        &self,
        _moves: &[RowMove],
        _begin: &Mark,
    ) -> Option<Result<Box<dyn LayeredLoad>, CopyError>> {
        None
    }

    fn slice_blocks(&self) -> usize {
        SLICE_BLOCKS
    }
}

/// Copies with the CPU. When `copy` returns, the bytes are in place.
#[derive(Debug)]
struct MemcpyBackend {
    registration: Arc<Registration>,
    direction: Direction,
    moves: Vec<RowMove>,
    /// One a move, if wanted.
    digests: Option<Vec<u64>>,
}

impl MemcpyBackend {
    /// Copies one layer of one block; its digest (0 unless wanted), or `None` if out of range.
    fn copy_layer(
        &self,
        RowMove { row, block }: RowMove,
        layer: usize,
        wants_digest: bool,
    ) -> Option<u64> {
        let direction = self.direction;
        let Registration {
            layout,
            segment,
            rank,
            ..
        } = &*self.registration;
        let offset = layer * layout.layer_bytes();
        let host = segment.shard_address(row, *rank)?.wrapping_add(offset);
        let mut runs = layout.runs(layer, block)?;
        // A layer in one piece is hashed while it passes through the cache: piece by piece, first
        // read by the hash, then by the copy.
        if layout.is_one_run(layer) && wants_digest {
            let (address, bytes) = runs.next()?;
            let device = ptr::with_exposed_provenance_mut::<u8>(address);
            let mut sum: u64 = 0;
            for start in (0..bytes).step_by(PIECE_BYTES) {
                let length = PIECE_BYTES.min(bytes - start);
                let (device, host) = (device.wrapping_add(start), host.wrapping_add(start));
                let (source, target) = ends(direction, device, host);
                // SAFETY: see `copy_run`; hashing reads what the copy reads.
                sum = sum.wrapping_add(unsafe {
                    let piece = digest_piece(slice::from_raw_parts(source, length), offset + start);
                    stream::copy(source, target, length);
                    piece
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
        Some(digest_piece(layer, offset))
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
    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), CopyError> {
        self.registration.check(batch.moves)?;
        self.direction = batch.direction;
        self.moves = batch.moves.to_vec();
        self.digests = batch.digests.then(|| vec![0; batch.moves.len()]);
        Ok(())
    }

    fn wait_for(&mut self, _mark: &Mark) -> Result<(), CopyError> {
        Ok(())
    }

    fn copy(&mut self, layers: Range<usize>) -> Result<(), CopyError> {
        self.registration.check_layers(&layers)?;
        let mut digests = self.digests.take();
        for (i, &each) in self.moves.iter().enumerate() {
            let wanted = digests.as_deref_mut().and_then(|sums| sums.get_mut(i));
            let sum = layers.clone().try_fold(0, |sum: u64, layer| {
                let digest = self.copy_layer(each, layer, wanted.is_some())?;
                Some(sum.wrapping_add(digest))
            });
            let RowMove { row, block } = each;
            let sum = sum.ok_or(CopyError::OutOfRange { row, block })?;
            if let Some(wanted) = wanted {
                *wanted = wanted.wrapping_add(sum);
            }
        }
        self.digests = digests;
        stream::fence();
        Ok(())
    }

    fn close(&mut self) -> Result<Mark, CopyError> {
        Ok(Mark::passed())
    }

    fn finish(&mut self) -> Result<Vec<u64>, CopyError> {
        self.moves.clear();
        Ok(self.digests.take().unwrap_or_default())
    }
}
