//! Numbers that look random and are the same for the same seed.

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed that a variable names, or one that no run has had before. Who takes it prints it.
    pub(crate) fn seed_of(variable: &str) -> u64 {
        let chosen = std::env::var(variable).ok();
        let chosen = chosen.map(|text| text.parse().expect("a number"));
        chosen.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            u64::from(since.subsec_nanos()) ^ since.as_secs() << 20
        })
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number of `range`, which is not empty.
    pub(crate) fn within(&mut self, range: Range<usize>) -> usize {
        let length = u64::try_from(range.len()).unwrap();
        range.start + usize::try_from(self.next() % length).unwrap()
    }

    /// Whether it happens, of so many times in a hundred.
    pub(crate) fn percent(&mut self, percent: usize) -> bool {
        self.within(0..100) < percent
    }

    /// A time of `range`, in milliseconds.
    pub(crate) fn ms(&mut self, range: Range<usize>) -> Duration {
        Duration::from_millis(u64::try_from(self.within(range)).unwrap())
    }
}
