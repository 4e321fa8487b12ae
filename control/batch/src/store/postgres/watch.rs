//! Which leases have run out, as far as one server can tell without trusting any clock but its own
//! steady one. Pure.
//!
//! Each acquisition, renewal and release counts a lease's beat up. A lease has run out when its beat has
//! been seen to stay the same for as long as it lasts: later, never earlier, than its holder thinks,
//! who counts from before the beat.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A batch that is leased, or rests until it may be taken again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leased {
    /// The batch's number.
    pub(super) seq: i64,
    pub(super) beat: i64,
    pub(super) lease_ms: i64,
}

/// What was seen of them; as many as there are.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The beat of each, and since when it is the same.
    seen: HashMap<i64, (i64, Instant)>,
}

impl Watch {
    /// Takes all that are leased `now`, and gives back those whose leases have run out.
    pub(super) fn look(&mut self, all: &[Leased], now: Instant) -> Vec<Leased> {
        let before = std::mem::take(&mut self.seen);
        let mut run_out = Vec::new();
        for lease in all {
            let since = match before.get(&lease.seq) {
                Some((beat, since)) if *beat == lease.beat => *since,
                _ => now,
            };
            self.seen.insert(lease.seq, (lease.beat, since));
            let lasts = Duration::from_millis(lease.lease_ms.unsigned_abs());
            if now.duration_since(since) >= lasts {
                run_out.push(*lease);
            }
        }
        run_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_has_run_out_when_its_beat_has_stayed_the_same_for_as_long_as_it_lasts() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let lease = |seq, beat| Leased {
            seq,
            beat,
            lease_ms: 100,
        };
        let mut watch = Watch::default();
        let (silent, alive) = (lease(1, 7), |beat| lease(2, beat));
        assert!(watch.look(&[silent, alive(1)], at(0)).is_empty());
        assert!(watch.look(&[silent, alive(2)], at(99)).is_empty());
        assert_eq!(watch.look(&[silent, alive(2)], at(100)), [silent]);
        assert!(watch.look(&[lease(1, 8), alive(2)], at(150)).is_empty());
        assert_eq!(watch.look(&[lease(1, 8), alive(2)], at(200)), [alive(2)]);
        // What is not leased any more is forgotten.
        watch.look(&[], at(300));
        assert!(watch.seen.is_empty());
        assert!(watch.look(&[silent], at(400)).is_empty());
    }
}
