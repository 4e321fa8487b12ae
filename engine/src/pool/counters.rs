//! What the pool counts.

/// Totals since the pool was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Blocks whose save completed.
    pub saved_blocks: u64,
    /// Blocks whose save failed.
    pub failed_blocks: u64,
    /// Blocks that were not saved because too much was in flight or pinned.
    pub throttled_blocks: u64,
    /// Blocks given up to make room.
    pub evicted_blocks: u64,
    /// Blocks dropped because their bytes did not have their checksum.
    pub damaged_blocks: u64,
    /// Blocks whose bytes were compared with their checksums when they were matched.
    pub verified_blocks: u64,
    /// Blocks that the background scrub has checked.
    pub scrubbed_blocks: u64,
    /// Blocks that were loaded.
    pub used_blocks: u64,
}

/// What the pool holds at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolGauges {
    /// Slots in all.
    pub slots: usize,
    /// Slots that hold nothing.
    pub free: usize,
    /// Blocks being saved.
    pub saving: usize,
    /// Blocks that can be matched, those being saved included.
    pub held: usize,
    /// Bytes of all tables about blocks, the shard headers in the segment included.
    pub index_bytes: usize,
}

impl PoolCounters {
    /// Names and values, as they are sent to other processes.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("saved_blocks", self.saved_blocks),
            ("failed_blocks", self.failed_blocks),
            ("throttled_blocks", self.throttled_blocks),
            ("evicted_blocks", self.evicted_blocks),
            ("damaged_blocks", self.damaged_blocks),
            ("verified_blocks", self.verified_blocks),
            ("scrubbed_blocks", self.scrubbed_blocks),
        ]
    }

    /// Adds what was counted between two readings.
    pub(crate) fn add_growth(&mut self, from: &Self, to: &Self) {
        let before = self.named();
        let growth = from.named().into_iter().zip(to.named());
        for ((name, value), ((_, from), (_, to))) in before.into_iter().zip(growth) {
            self.set(name, value + to.saturating_sub(from));
        }
    }

    /// Takes over a value by its name; whether there is one of that name.
    pub(crate) fn set(&mut self, name: &str, value: u64) -> bool {
        let field = match name {
            "saved_blocks" => &mut self.saved_blocks,
            "failed_blocks" => &mut self.failed_blocks,
            "throttled_blocks" => &mut self.throttled_blocks,
            "evicted_blocks" => &mut self.evicted_blocks,
            "damaged_blocks" => &mut self.damaged_blocks,
            "verified_blocks" => &mut self.verified_blocks,
            "scrubbed_blocks" => &mut self.scrubbed_blocks,
            _ => return false,
        };
        *field = value;
        true
    }
}

impl PoolGauges {
    /// Names and values, as they are sent to other processes.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 5] {
        [
            ("slots", self.slots as u64),
            ("free", self.free as u64),
            ("saving", self.saving as u64),
            ("held", self.held as u64),
            ("index_bytes", self.index_bytes as u64),
        ]
    }

    /// Takes over a value by its name; whether there is one of that name.
    pub(crate) fn set(&mut self, name: &str, value: u64) -> bool {
        let field = match name {
            "slots" => &mut self.slots,
            "free" => &mut self.free,
            "saving" => &mut self.saving,
            "held" => &mut self.held,
            "index_bytes" => &mut self.index_bytes,
            _ => return false,
        };
        *field = usize::try_from(value).unwrap_or(usize::MAX);
        true
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn counters_grow_by_what_was_counted_and_never_fall() {
        let reading = |saved, evicted| PoolCounters {
            saved_blocks: saved,
            evicted_blocks: evicted,
            ..PoolCounters::default()
        };
        let mut counted = reading(5, 1);
        counted.add_growth(&reading(100, 7), &reading(103, 7));
        assert_eq!(counted, reading(8, 1));
        counted.add_growth(&reading(103, 7), &reading(2, 0));
        assert_eq!(counted, reading(8, 1), "another one counts");
    }

    #[test]
    fn every_counter_and_gauge_is_taken_over_by_its_name() {
        let mut counters = PoolCounters::default();
        assert!(
            counters
                .named()
                .iter()
                .all(|(name, _)| counters.set(name, 9))
        );
        assert!(counters.named().iter().all(|&(_, value)| value == 9));
        let mut gauges = PoolGauges::default();
        assert!(gauges.named().iter().all(|(name, _)| gauges.set(name, 9)));
        assert!(gauges.named().iter().all(|&(_, value)| value == 9));
        assert!(!counters.set("unknown", 1) && !gauges.set("unknown", 1));
    }
}
