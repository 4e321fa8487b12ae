//! A stretch of mapped memory, and the one place where addresses in it are made.

use std::sync::Arc;

use memmap2::MmapRaw;

/// Part of a map, which it keeps.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    map: Arc<MmapRaw>,
    offset: usize,
    bytes: usize,
}

impl Region {
    /// `bytes` of `map` from `offset` on; `None` if the map ends before.
    pub(crate) fn new(map: &Arc<MmapRaw>, offset: usize, bytes: usize) -> Option<Self> {
        (offset.checked_add(bytes)? <= map.len()).then(|| Self {
            map: Arc::clone(map),
            offset,
            bytes,
        })
    }

    /// The map.
    pub(crate) fn map(&self) -> &MmapRaw {
        &self.map
    }

    /// Where in the map it begins.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Where `bytes` from `offset` on lie; `None` if the region ends before.
    pub(crate) fn address(&self, offset: usize, bytes: usize) -> Option<*mut u8> {
        (offset.checked_add(bytes)? <= self.bytes)
            .then(|| self.map.as_mut_ptr().wrapping_add(self.offset + offset))
    }

    /// `length` of a type from `offset` on; `None` if the region ends before, or nothing of this type can
    /// lie there.
    pub(crate) fn array<T: Shared>(&self, offset: usize, length: usize) -> Option<Array<T>> {
        let first = self.address(offset, length.checked_mul(size_of::<T>())?)?;
        let first = first.cast::<T>().cast_const();
        first.is_aligned().then(|| Array {
            first,
            length,
            _map: Arc::clone(&self.map),
        })
    }

    /// What lies at `offset`; `None` if the region ends before, or nothing of this type can lie there.
    pub(crate) fn shared<T: Shared>(&self, offset: usize) -> Option<&T> {
        let address = self.address(offset, size_of::<T>())?.cast::<T>();
        // SAFETY: the address lies inside the map, with room for a `T`, and is aligned for it. A
        // `Shared` consists of atomics, for which any bits and any concurrent access are fine. The map
        // lives as long as `self`.
        address.is_aligned().then(|| unsafe { &*address })
    }
}

/// Many of one type, one behind the other in a map, which it keeps.
#[derive(Debug)]
pub(crate) struct Array<T> {
    first: *const T,
    length: usize,
    _map: Arc<MmapRaw>,
}

// SAFETY: it gives out shared references to atomics only, which any thread may use; the map may be
// dropped on any.
unsafe impl<T: Shared> Send for Array<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for Array<T> {}

impl<T: Shared> Array<T> {
    /// The one at `index`; `None` behind the last.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        // SAFETY: `Region::array` saw that `length` of them lie in the map, aligned; the map lives as
        // long as `self`, and a `Shared` is atomics only, for which any bits and any concurrent access
        // are fine.
        (index < self.length).then(|| unsafe { &*self.first.add(index) })
    }
}

/// What may lie in memory that other processes write at the same time.
///
/// # Safety
/// Nothing but atomics (padding aside), and any bits are a valid value.
pub(crate) unsafe trait Shared {}

// SAFETY: an atomic; any bits are a number.
unsafe impl Shared for std::sync::atomic::AtomicU8 {}
// SAFETY: as above.
unsafe impl Shared for std::sync::atomic::AtomicU32 {}
// SAFETY: as above.
unsafe impl Shared for std::sync::atomic::AtomicU64 {}
// SAFETY: five atomics that fill its 32 bytes.
unsafe impl Shared for crate::record::SlotRecord {}
// SAFETY: two atomic words.
unsafe impl Shared for crate::shard::ShardHeader {}
