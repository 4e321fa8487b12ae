//! Least recently used.

use kvtide_model::BlockKey;

use super::list::{Links, Queue};
use super::{EvictionPolicy, SCAN_MAX};

/// Gives up the block whose last use is longest ago.
#[derive(Debug)]
pub(super) struct Lru {
    links: Links,
    queue: Queue,
}

impl Lru {
    pub(super) fn new(slots: u32) -> Self {
        Self {
            links: Links::new(slots),
            queue: Queue::new(),
        }
    }
}

impl EvictionPolicy for Lru {
    fn insert(&mut self, slot: u32, _key: BlockKey) {
        self.queue.push_head(&mut self.links, slot);
    }

    fn touch(&mut self, slot: u32) {
        self.queue.unlink(&mut self.links, slot);
        self.queue.push_head(&mut self.links, slot);
    }

    fn settle(&mut self, slot: u32) {
        self.touch(slot);
    }

    fn remove(&mut self, slot: u32) {
        self.queue.unlink(&mut self.links, slot);
    }

    fn victim(
        &mut self,
        _key_of: &dyn Fn(u32) -> BlockKey,
        try_evict: &mut dyn FnMut(u32) -> bool,
    ) -> Option<u32> {
        for _ in 0..self.queue.len().min(SCAN_MAX) {
            let slot = self.queue.pop_tail(&mut self.links)?;
            if try_evict(slot) {
                return Some(slot);
            }
            // In use at this moment is as recent as use gets.
            self.queue.push_head(&mut self.links, slot);
        }
        None
    }

    fn allocated_bytes(&self) -> usize {
        self.links.allocated_bytes()
    }
}
