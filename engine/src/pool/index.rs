//! Which slot holds which block: buckets of slots, chained through the slots' records.
//!
//! It lies in the pool's memory, and whoever has that memory reads it without asking: a lookup takes no
//! lock and waits for nobody. Only the pool changes it ([`IndexWriter`]). A reader may be on a slot that
//! is taken out at that moment and end up in another bucket, or walk on for too long; it misses a block
//! then that it might have found. It never takes one block for another: what it found it pins, and then
//! compares the key ([`super::Catalogue`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvtide_model::BlockKey;
use kvtide_segment::{SharedSegment, SlotRecord};

/// Slots of a bucket that a reader looks at. Keys are hashes and there are as many buckets as slots, so
/// a bucket of so many slots is one that changes under the reader.
const WALK_MAX: usize = 64;

/// What everybody may do.
#[derive(Clone, Debug)]
pub(crate) struct Index(Arc<SharedSegment>);

impl Index {
    pub(crate) fn of(segment: &Arc<SharedSegment>) -> Self {
        Self(Arc::clone(segment))
    }

    /// A slot that has, or had a moment ago, the block `key`.
    pub(crate) fn find(&self, key: BlockKey) -> Option<u32> {
        self.find_from(self.first(key), key)
    }

    /// Where the bucket of `key` begins. Whoever looks many keys up reads this of all of them before they
    /// follow it: the processor fetches them together then.
    pub(crate) fn first(&self, key: BlockKey) -> u32 {
        let bucket = self.bucket(key);
        bucket.map_or(0, |bucket| bucket.load(Ordering::Acquire))
    }

    /// [`Index::find`] from where the bucket begins.
    pub(crate) fn find_from(&self, first: u32, key: BlockKey) -> Option<u32> {
        let wanted = halves(key);
        let mut link = first;
        for _ in 0..WALK_MAX {
            let (slot, record) = self.link(link)?;
            if has(record, wanted) {
                return Some(slot);
            }
            link = record.next.load(Ordering::Acquire);
        }
        None
    }

    /// Whether `key` was the last one entered at `slot`.
    pub(crate) fn has_key(&self, slot: u32, key: BlockKey) -> bool {
        let record = self.0.record(slot);
        record.is_some_and(|record| has(record, halves(key)))
    }

    /// The key last entered at `slot`.
    pub(crate) fn key_of(&self, slot: u32) -> BlockKey {
        let mut bytes = [0; 16];
        if let Some(record) = self.0.record(slot) {
            let (words, _) = bytes.as_chunks_mut::<8>();
            for (word, half) in words.iter_mut().zip(&record.key) {
                *word = half.load(Ordering::Acquire).to_le_bytes();
            }
        }
        BlockKey::from_bytes(bytes)
    }

    fn bucket(&self, key: BlockKey) -> Option<&AtomicU32> {
        let mask = self.0.geometry().buckets() - 1;
        let [a, b, c, d, ..] = key.table_hash().to_le_bytes();
        self.0.bucket(u32::from_le_bytes([a, b, c, d]) & mask)
    }

    /// The slots in the bucket of `key`.
    fn chain(&self, key: BlockKey) -> impl Iterator<Item = (u32, &SlotRecord)> {
        std::iter::successors(self.link(self.first(key)), |(_, record)| {
            self.link(record.next.load(Ordering::Acquire))
        })
    }

    /// The slot that a link leads to.
    fn link(&self, link: u32) -> Option<(u32, &SlotRecord)> {
        let slot = link.checked_sub(1)?;
        Some((slot, self.0.record(slot)?))
    }
}

/// What only the pool may do, under its lock.
#[derive(Debug)]
pub(super) struct IndexWriter {
    index: Index,
    entries: usize,
}

impl IndexWriter {
    /// Of a pool that holds nothing, whatever was in its memory before: nothing of that is followed.
    pub(super) fn new(segment: &Arc<SharedSegment>) -> Self {
        for bucket in 0..segment.geometry().buckets() {
            if let Some(bucket) = segment.bucket(bucket) {
                bucket.store(0, Ordering::Release);
            }
        }
        Self {
            index: Index::of(segment),
            entries: 0,
        }
    }

    /// The slot of `key`.
    pub(super) fn find(&self, key: BlockKey) -> Option<u32> {
        self.index.find(key)
    }

    /// The key last entered at `slot`.
    pub(super) fn key_of(&self, slot: u32) -> BlockKey {
        self.index.key_of(slot)
    }

    pub(super) fn len(&self) -> usize {
        self.entries
    }

    /// Enters `key`, which is not in the index, at `slot`, which nobody finds yet.
    pub(super) fn insert(&mut self, key: BlockKey, slot: u32) {
        let index = &self.index;
        let (Some(bucket), Some(record)) = (index.bucket(key), index.0.record(slot)) else {
            return;
        };
        for (half, new) in record.key.iter().zip(halves(key)) {
            half.store(new, Ordering::Release);
        }
        let first = bucket.load(Ordering::Acquire);
        record.next.store(first, Ordering::Release);
        bucket.store(slot + 1, Ordering::Release);
        self.entries += 1;
    }

    /// Takes out the entry of `slot`, if there is one; its key.
    pub(super) fn remove_slot(&mut self, slot: u32) -> Option<BlockKey> {
        let index = &self.index;
        let key = index.key_of(slot);
        let bucket = index.bucket(key)?;
        let before = index
            .chain(key)
            .take_while(|(each, _)| *each != slot)
            .last();
        let next = index.0.record(slot)?.next.load(Ordering::Acquire);
        let link = slot + 1;
        match before {
            None if bucket.load(Ordering::Acquire) == link => {
                bucket.store(next, Ordering::Release);
            }
            Some((_, record)) if record.next.load(Ordering::Acquire) == link => {
                record.next.store(next, Ordering::Release);
            }
            _ => return None,
        }
        self.entries -= 1;
        Some(key)
    }

    /// Takes out everything; the slots.
    pub(super) fn clear(&mut self) -> Vec<u32> {
        let index = &self.index;
        let mut slots = Vec::with_capacity(self.entries);
        for bucket in 0..index.0.geometry().buckets() {
            let Some(bucket) = index.0.bucket(bucket) else {
                continue;
            };
            let mut link = bucket.swap(0, Ordering::AcqRel);
            while let Some((slot, record)) = index.link(link) {
                slots.push(slot);
                link = record.next.load(Ordering::Acquire);
            }
        }
        self.entries = 0;
        slots
    }
}

fn has(record: &SlotRecord, wanted: [u64; 2]) -> bool {
    let halves = record.key.iter().zip(wanted);
    halves.fold(true, |same, (half, wanted)| {
        same & (half.load(Ordering::Acquire) == wanted)
    })
}

fn halves(key: BlockKey) -> [u64; 2] {
    let (words, _) = key.as_bytes().as_chunks::<8>();
    [0, 1].map(|half| words.get(half).map_or(0, |&word| u64::from_le_bytes(word)))
}
