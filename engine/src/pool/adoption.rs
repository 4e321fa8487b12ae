//! What a pool does that outlives its process: taking over the memory of an earlier life, moving space
//! to other pools, and ending sessions of engines elsewhere.

use std::ops::Range;

use kvtide_model::{BlockKey, SlotRef};

use super::catalogue::Catalogue;
use super::holders::SlotHolder;
use super::slot_table::SlotState;
use super::state::State;
use crate::session::SessionId;

/// An engine that was there in an earlier life of the pool and still is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Survivor {
    pub(crate) holder: SlotHolder,
    pub(crate) session: SessionId,
}

/// A block that an earlier life left complete.
struct Left {
    used_at: u64,
    slot: u32,
    key: BlockKey,
}

impl State {
    /// Takes over the rows of `extents` with what an earlier life of the pool left in them: complete blocks are held
    /// again, what a survivor reads or writes stays until it has ended, and the rest is free.
    ///
    /// Bytes are not read here: every load compares them with their checksum, and a load that cannot be
    /// taken back is not offered before somebody has.
    pub(super) fn adopt(
        &mut self,
        catalogue: &Catalogue,
        extents: &[Range<u32>],
        survivors: &[Survivor],
    ) {
        let living: Vec<SlotHolder> = survivors.iter().map(|each| each.holder).collect();
        let slots = &catalogue.slots;
        slots.keep_only(&[&living[..], &[SlotHolder::POOL, SlotHolder::SCRUB]].concat());
        extents.iter().for_each(|rows| self.own(rows.clone()));
        self.poll(catalogue);
        let mut complete: Vec<Left> = Vec::new();
        for slot in extents.iter().cloned().flatten() {
            let (slot, state) = slots.adopt(slot);
            catalogue.mend(slot);
            let key = self.index.key_of(slot.slot);
            let filler = slots.filler(slot.slot);
            let writer = survivors.iter().find(|each| each.holder.number() == filler);
            match (state, writer) {
                // The last life may have ended before it took note of the end of a save.
                (SlotState::Sealed | SlotState::Filling, _)
                    if catalogue.saved(slot).is_memory() =>
                {
                    slots.adopt_as_sealed(slot);
                    // A clock may have been put back, and memory may be damaged: no time is to come.
                    let used_at = catalogue.used_at(slot.slot).min(self.now);
                    catalogue.note_used(slot.slot, used_at);
                    let slot = slot.slot;
                    complete.push(Left { used_at, slot, key });
                }
                (SlotState::Filling | SlotState::Abandoned, Some(writer)) => {
                    let is_new = self.index.find(key).is_none();
                    if state == SlotState::Filling && is_new {
                        self.index.insert(key, slot.slot);
                        self.policy.insert(slot.slot, key);
                    } else {
                        slots.doom(slot);
                    }
                    let filling = slots.adopt_as_filling(slot);
                    self.sessions.fill(writer.session, vec![filling]);
                }
                (SlotState::Free, _) => self.free.put(slots.adopt_as_free(slot)),
                (SlotState::Filling | SlotState::Abandoned, None) => {
                    for rank in 0..catalogue.segment.geometry().ranks() {
                        let segment = &catalogue.segment;
                        segment.condemn_shard(slot.slot, rank, slot.generation);
                    }
                    self.discard(catalogue, slot);
                }
                (SlotState::Sealed | SlotState::Doomed, _) => self.discard(catalogue, slot),
            }
        }
        // As they would stand in line if there had been one life only.
        complete.sort_unstable_by_key(|left| left.used_at);
        for Left { slot, key, .. } in complete {
            if self.index.find(key).is_none() {
                self.index.insert(key, slot);
                self.policy.insert(slot, key);
            } else {
                self.discard(catalogue, slots.current(slot));
            }
        }
    }

    /// Frees a slot of an earlier life that nobody writes, when nobody holds it any more.
    fn discard(&mut self, catalogue: &Catalogue, slot: SlotRef) {
        catalogue.slots.adopt_as_doomed(slot);
        self.release(&catalogue.slots, slot);
    }

    /// Gives up `rows` of the pool, with the blocks in them; whether it did. It does not where somebody
    /// holds or writes one.
    pub(super) fn give_up(&mut self, catalogue: &Catalogue, rows: &Range<u32>) -> bool {
        self.poll(catalogue);
        if self.is_pinned() || self.last_use(catalogue, rows).is_none() {
            return false;
        }
        for slot in rows.clone() {
            if self.free.holds(slot) {
                continue;
            }
            let Some(sealed) = catalogue.slots.evictable(slot) else {
                return false; // Somebody was faster.
            };
            let Some(freed) = catalogue.slots.evict(sealed) else {
                return false;
            };
            self.forget(slot);
            self.counters.evicted_blocks += 1;
            self.free.put(freed);
        }
        let all = rows.clone().all(|slot| self.free.disown(slot));
        self.rows.retain(|owned| owned != rows);
        all
    }

    /// When the blocks in `rows` were last used, on average and in seconds of Unix time: 0 if there are
    /// none. `None` where somebody holds or writes one.
    pub(super) fn last_use(&self, catalogue: &Catalogue, rows: &Range<u32>) -> Option<u64> {
        let (mut sum, mut blocks) = (0u64, 0u64);
        for slot in rows.clone() {
            if catalogue.slots.evictable(slot).is_some() {
                sum += catalogue.used_at(slot);
                blocks += 1;
            } else if !self.free.holds(slot) {
                return None;
            }
        }
        Some(sum.checked_div(blocks).unwrap_or(0))
    }

    /// The engine of a session has lost its connection, or leaves: nobody waits for what it is saving.
    /// Its processes may still read and write rows; see [`State::close_elsewhere`].
    pub(super) fn abandon(&mut self, catalogue: &Catalogue, session: SessionId) {
        self.poll(catalogue);
        let slots = self.sessions.fillings(session);
        let slots: Vec<SlotRef> = slots.map(|filling| filling.slot_ref()).collect();
        for slot in slots {
            if catalogue.slots.doom(slot) {
                self.forget(slot.slot);
            }
        }
    }

    /// All processes of a session's engine have ended: nothing is read or written any more.
    pub(super) fn close_elsewhere(&mut self, catalogue: &Catalogue, session: SessionId) {
        let holder = self.sessions.holder(session);
        self.close(catalogue, session);
        if let Some(holder) = holder {
            catalogue.slots.let_go_all(holder);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use kvtide_model::BlockKey;
    use kvtide_segment::{MappedFile, RowGeometry, SegmentParts, SharedSegment};

    use super::*;
    use crate::config::Eviction;
    use crate::pool::{Pool, PoolOptions};

    #[test]
    fn what_the_pool_and_its_scrub_held_when_a_life_ended_is_free_in_the_next() {
        let rows = RowGeometry::over(1, 1, 64, 4 * 4096).unwrap();
        let parts = SegmentParts {
            memory: MappedFile::private(rows.area_bytes()).unwrap(),
            data_offset: 0,
            tables: MappedFile::private(rows.tables_file_bytes()).unwrap(),
            own: MappedFile::private(rows.own_bytes()).unwrap(),
        };
        let open = || {
            let segment = SharedSegment::of_parts(&parts, rows, Path::new("test")).unwrap();
            let eviction = Eviction::Lru;
            Pool::without_rows(Arc::new(segment), PoolOptions { eviction })
        };
        let last = open();
        last.grow(0..4);
        let (session, _guard) = last.open_session(false).unwrap();
        let keys = [1, 2].map(|n: u8| BlockKey::from_bytes([n; 16]));
        let begun = last.begin_save(session, &keys, 0, 2);
        let segment = last.segment();
        for each in &begun.filling {
            let (row, generation) = (each.slot.slot, each.slot.generation);
            assert!(segment.begin_shard(row, 0, generation));
            assert!(segment.seal_shard(row, 0, generation, 0));
        }
        last.poll();
        let slots = &last.catalogue().slots;
        for (each, holder) in begun
            .filling
            .iter()
            .zip([SlotHolder::POOL, SlotHolder::SCRUB])
        {
            assert!(slots.hold(each.slot.slot, holder).is_some());
        }
        assert!(!last.give_up(&(0..4)), "they are held");
        drop(last);

        let next = open();
        next.adopt(std::slice::from_ref(&(0..4)), &[]);
        assert_eq!(next.gauges().held, 2);
        assert!(next.give_up(&(0..4)));
    }
}
