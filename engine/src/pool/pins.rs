//! What one session has pinned.

use std::sync::Arc;

use kvtide_model::{BlockKey, SlotRef};

use super::catalogue::Catalogue;
use super::slot_table::HolderBit;
use crate::sync::{Mutex, MutexGuard, lock};

/// Pins on one slot at once, of one session: requests that share a block.
const PINS_MAX: u16 = u16::MAX;

/// The pins of one session. In the slots' records it has one bit; how many of its requests a bit stands
/// for is counted here, in the session's own process.
#[derive(Debug)]
pub(crate) struct Pins {
    catalogue: Arc<Catalogue>,
    holder: HolderGuard,
    counts: Mutex<Box<[u16]>>,
}

/// The session's bit, and what is done with it when nothing is pinned any more.
#[derive(Debug)]
pub(crate) struct HolderGuard {
    pub(crate) bit: HolderBit,
    /// The bits in use, if they are given out in this process.
    pub(crate) given: Option<Arc<Mutex<Vec<HolderBit>>>>,
}

impl Drop for HolderGuard {
    fn drop(&mut self) {
        if let Some(given) = &self.given {
            lock(given).retain(|&bit| bit != self.bit);
        }
    }
}

impl Pins {
    /// None yet.
    pub(crate) fn new(catalogue: Arc<Catalogue>, holder: HolderGuard) -> Self {
        let slots = catalogue.segment.geometry().rows() as usize;
        Self {
            catalogue,
            holder,
            counts: Mutex::new(vec![0; slots].into_boxed_slice()),
        }
    }

    pub(crate) fn catalogue(&self) -> &Arc<Catalogue> {
        &self.catalogue
    }

    /// Pins the longest run of `keys`, from the first on, that the pool holds or is saving; of how many,
    /// from the first on, it is certain that they can be loaded.
    pub(crate) fn pin_run(&self, keys: &[BlockKey]) -> (Vec<SlotRef>, usize) {
        let mut pinned = Vec::with_capacity(keys.len());
        let mut certain = 0;
        let mut counts = lock(&self.counts);
        for &key in keys {
            let Some(slot) = self.pin(&mut counts, key) else {
                break;
            };
            if certain == pinned.len() && self.catalogue.is_certain(slot) {
                certain += 1;
            }
            pinned.push(slot);
        }
        (pinned, certain)
    }

    fn pin(&self, counts: &mut MutexGuard<'_, Box<[u16]>>, key: BlockKey) -> Option<SlotRef> {
        let Catalogue { slots, index, .. } = &*self.catalogue;
        let slot = index.find(key)?;
        let count = counts.get_mut(slot as usize)?;
        if *count == PINS_MAX {
            return None;
        }
        // A slot that is pinned already stays, but it may have been doomed since.
        let pinned = match *count {
            0 => slots.hold(slot, self.holder.bit)?,
            _ => slots.held(slot)?,
        };
        // Between finding and holding it, the slot may have been given to another block.
        if index.key_of(slot) != key {
            if *count == 0 {
                slots.let_go(slot, self.holder.bit);
            }
            return None;
        }
        *count += 1;
        Some(pinned)
    }

    /// Gives back pins.
    pub(crate) fn unpin(&self, pinned: &[SlotRef]) {
        let mut counts = lock(&self.counts);
        for slot in pinned {
            let Some(count) = counts.get_mut(slot.slot as usize) else {
                continue;
            };
            debug_assert!(*count > 0, "not pinned");
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.catalogue.slots.let_go(slot.slot, self.holder.bit);
            }
        }
    }

    /// Whether `slot` is pinned once, by this session, and by nobody else.
    pub(crate) fn is_only_pin(&self, slot: SlotRef) -> bool {
        let once = lock(&self.counts).get(slot.slot as usize) == Some(&1);
        once && self
            .catalogue
            .slots
            .is_held_by_one(slot.slot, self.holder.bit)
    }
}
