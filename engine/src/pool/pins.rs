//! What one session has pinned.

use std::sync::Arc;

use kvtide_model::{BlockKey, SlotRef};

use super::catalogue::Catalogue;
use super::holders::SlotHolder;
use super::slot_table::SlotTable;
use crate::sync::{Mutex, lock};

/// Pins on one slot at once, of one session: requests that share a block.
const PINS_MAX: u16 = u16::MAX;
/// Slots claimed before one fence: few enough that what was read of them is still near by.
const CLAIMED_AT_ONCE: usize = 64;

/// The pins of one session. In its bitmap it has one bit for each slot; how many of its requests a bit
/// stands for is counted here, in the session's own process.
#[derive(Debug)]
pub(crate) struct Pins {
    catalogue: Arc<Catalogue>,
    holder: HolderGuard,
    /// Under its lock, the bitmap is written.
    counts: Mutex<Box<[u16]>>,
}

/// What the session holds slots as, and what is done with it when nothing is pinned any more.
#[derive(Debug)]
pub(crate) struct HolderGuard {
    pub(crate) holder: SlotHolder,
    /// The holders in use, if they are given out in this process.
    pub(crate) given: Option<Arc<Mutex<Vec<SlotHolder>>>>,
}

impl Drop for HolderGuard {
    fn drop(&mut self) {
        if let Some(given) = &self.given {
            lock(given).retain(|&holder| holder != self.holder);
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // Leases keep the pins, so there are none. From now on nobody looks for any.
        self.catalogue.slots.let_go_all(self.holder.holder);
    }
}

/// A run of pinned blocks that grows.
#[derive(Debug, Default)]
struct Run {
    slots: Vec<SlotRef>,
    /// Leading blocks of which it is certain that they can be loaded.
    certain: usize,
}

impl Pins {
    /// None yet.
    pub(crate) fn new(catalogue: Arc<Catalogue>, holder: HolderGuard) -> Self {
        catalogue.slots.enter(holder.holder);
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
        let mut run = Run {
            slots: Vec::with_capacity(keys.len()),
            certain: 0,
        };
        let mut counts = lock(&self.counts);
        for keys in keys.chunks(CLAIMED_AT_ONCE) {
            if !self.pin_some(&mut counts, keys, &mut run) {
                break;
            }
        }
        (run.slots, run.certain)
    }

    /// Pins the next `keys` of a run, at most [`CLAIMED_AT_ONCE`], as far as they are there; whether all
    /// were.
    fn pin_some(&self, counts: &mut [u16], keys: &[BlockKey], run: &mut Run) -> bool {
        let Catalogue { slots, index, .. } = &*self.catalogue;
        let mut found = [0; CLAIMED_AT_ONCE];
        let mut claimed = 0;
        for (&key, place) in keys.iter().zip(&mut found) {
            *place = index.first(key);
        }
        for (&key, place) in keys.iter().zip(&mut found) {
            let Some(slot) = index.find_from(*place, key) else {
                break;
            };
            match counts.get(slot as usize) {
                None | Some(&PINS_MAX) => break,
                Some(0) => slots.claim(slot, self.holder.holder),
                Some(_) => {}
            }
            *place = slot;
            claimed += 1;
        }
        SlotTable::publish_claims();
        let found = found.get(..claimed).unwrap_or_default();
        let pinned = found.iter().zip(keys).take_while(|&(&slot, &key)| {
            let Some(count) = counts.get_mut(slot as usize) else {
                return false;
            };
            // A slot that is pinned already stays, but it may have been doomed since.
            let stays = match *count {
                0 => slots.claimed(slot),
                _ => slots.held(slot),
            };
            // Between finding and claiming it, the slot may have been given to another block.
            let Some((slot, state)) = stays.filter(|_| index.has_key(slot, key)) else {
                return false;
            };
            // The same key may come twice in these.
            let Some(raised) = count.checked_add(1) else {
                return false;
            };
            *count = raised;
            if run.certain == run.slots.len() && self.catalogue.is_certain_in(slot, state) {
                run.certain += 1;
            }
            run.slots.push(slot);
            true
        });
        let pinned = pinned.count();
        for &slot in found.get(pinned..).unwrap_or_default() {
            if counts.get(slot as usize) == Some(&0) {
                slots.let_go(slot, self.holder.holder);
            }
        }
        pinned == keys.len()
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
                self.catalogue.slots.let_go(slot.slot, self.holder.holder);
            }
        }
    }

    /// Whether `slot` is pinned once, by this session, and by nobody else.
    pub(crate) fn is_only_pin(&self, slot: SlotRef) -> bool {
        let once = lock(&self.counts).get(slot.slot as usize) == Some(&1);
        once && self
            .catalogue
            .slots
            .is_held_by_one(slot.slot, self.holder.holder)
    }
}
