//! Sizes as people read them.

use std::fmt;

/// `bytes` in the largest binary unit of which there is at least one, to two places; sizes that
/// differ in bytes but not in those places are told apart by the bytes behind them.
pub(crate) fn size(bytes: impl TryInto<u64>) -> impl fmt::Display {
    Size(bytes.try_into().unwrap_or(u64::MAX))
}

struct Size(u64);

const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bytes) = *self;
        let Some((unit, name)) = UNITS.into_iter().find(|(unit, _)| bytes >= *unit) else {
            return write!(f, "{bytes} bytes");
        };
        let hundredths = u128::from(bytes) * 100 / u128::from(unit);
        let (whole, rest) = (hundredths / 100, hundredths % 100);
        write!(f, "{whole}.{rest:02} {name} ({bytes} bytes)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_told_in_the_largest_unit_that_fits() {
        assert_eq!(size(0u64).to_string(), "0 bytes");
        assert_eq!(size(1023u64).to_string(), "1023 bytes");
        assert_eq!(size(1536usize).to_string(), "1.50 KiB (1536 bytes)");
        assert_eq!(size(3u64 << 20).to_string(), "3.00 MiB (3145728 bytes)");
        let large = size(69_793_218_560u64).to_string();
        assert_eq!(large, "65.00 GiB (69793218560 bytes)");
        assert!(size(u64::MAX).to_string().starts_with("17179869183.99 GiB"));
    }
}
