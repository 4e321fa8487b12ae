//! A memory copy whose stores go past the caches.
//!
//! Both ends of a block copy are far larger than any cache and are not read again soon by the core
//! that writes them. Ordinary stores would first fetch every line that they overwrite, a third of
//! the memory traffic; libc's `memcpy` avoids that only for pieces of many megabytes, and ours are
//! of tens of kilobytes.

/// Below this the set-up and the fence cost more than the fetches.
const STREAM_BYTES_MIN: usize = 4096;

/// Copies `bytes` bytes. Other cores may see the bytes later than stores that follow, until
/// [`fence`].
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`] of `bytes` bytes; before the target is read by another
/// core, or published to it, [`fence`] is called.
pub(super) unsafe fn copy(source: *const u8, target: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes >= STREAM_BYTES_MIN {
        // SAFETY: passed on from the caller; SSE2 is part of x86-64.
        unsafe { x86::copy(source, target, bytes) };
        return;
    }
    // SAFETY: passed on from the caller.
    unsafe { std::ptr::copy_nonoverlapping(source, target, bytes) };
}

/// Orders the stores of [`copy`] before whatever this core stores next.
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64; the instruction has no operands.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_stream_si128,
    };
    use std::ptr;

    const LINE: usize = 64;
    /// How far ahead lines are asked for. The processor's own prefetch ends at the page; one page
    /// ahead also walks the page table in time. Measured best of 512, 1024 and 4096.
    const AHEAD: usize = 4096;

    /// See [`super::copy`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn copy(source: *const u8, target: *mut u8, bytes: usize) {
        let head = target.align_offset(LINE).min(bytes);
        // SAFETY: `head`, the whole lines and the tail are consecutive pieces of the `bytes` bytes
        // that the caller vouches for. Streaming stores need alignment to 16, and `target + head` is
        // aligned to 64. Prefetching past the end touches nothing.
        unsafe {
            ptr::copy_nonoverlapping(source, target, head);
            let (mut from, mut to) = (source.add(head), target.add(head));
            let lines = (bytes - head) / LINE;
            for _ in 0..lines {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
                let (input, output) = (from.cast::<__m128i>(), to.cast::<__m128i>());
                let line = [
                    _mm_loadu_si128(input),
                    _mm_loadu_si128(input.add(1)),
                    _mm_loadu_si128(input.add(2)),
                    _mm_loadu_si128(input.add(3)),
                ];
                _mm_stream_si128(output, line[0]);
                _mm_stream_si128(output.add(1), line[1]);
                _mm_stream_si128(output.add(2), line[2]);
                _mm_stream_si128(output.add(3), line[3]);
                from = from.add(LINE);
                to = to.add(LINE);
            }
            ptr::copy_nonoverlapping(from, to, bytes - head - lines * LINE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_length_and_misalignment_is_copied_and_nothing_else(
            bytes in prop_oneof![0usize..300, 4000usize..9000], from in 0usize..70, to in 0usize..70,
        ) {
            let source: Vec<u8> = (0..bytes + 70).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let mut target = vec![255u8; bytes + 140];
            // SAFETY: both ranges lie inside their allocations.
            unsafe { copy(source.as_ptr().add(from), target.as_mut_ptr().add(to), bytes) };
            fence();
            prop_assert_eq!(&target[to..to + bytes], &source[from..from + bytes]);
            prop_assert!(target[..to].iter().chain(&target[to + bytes..]).all(|&b| b == 255));
        }
    }
}
