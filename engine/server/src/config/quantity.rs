//! Sizes and times as people write them: `64GiB`, `30s`.

use std::time::Duration;

/// Names of binary units, largest first. Decimal ones (`GB`) are refused: half of their readers take
/// them for binary.
const SIZES: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];
/// Beyond it, a number with a fraction is no longer exact in bytes.
const MOST_BYTES: f64 = 9e15;
const TIMES: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];
/// A year: what is longer is a slip of the hand.
const MOST_MS: f64 = 31_536_000_000.0;

/// Bytes of a size such as `64GiB` or `1.5 TiB`; Kubernetes' `64Gi` is the same.
pub(crate) fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let unit = SIZES.iter().find(|(name, _)| {
        unit == *name || (name.len() > 1 && name.strip_suffix('B') == Some(unit))
    })?;
    whole(number, unit.1, MOST_BYTES)
}

/// A time such as `30s` or `1.5h`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = split(text)?;
    let unit = TIMES.iter().find(|(name, _)| unit == *name)?;
    whole(number, unit.1, MOST_MS).map(Duration::from_millis)
}

/// A size in the largest unit in which it is a whole number, so that it can be read back exactly.
pub(crate) fn exact_size(bytes: u64) -> String {
    let fitting = SIZES
        .iter()
        .find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit));
    let (name, unit) = fitting.unwrap_or(&("B", 1));
    format!("{}{name}", bytes / unit)
}

/// A time in the largest unit up to hours in which it is a whole number.
pub(crate) fn exact_duration(time: Duration) -> String {
    let ms = time.as_millis();
    let units = TIMES.iter().rev().skip(1);
    let fitting = units
        .map(|&(name, unit)| (name, u128::from(unit)))
        .find(|(_, unit)| ms >= *unit && ms.is_multiple_of(*unit));
    let (name, unit) = fitting.unwrap_or(("ms", 1));
    format!("{}{name}", ms / unit)
}

/// A number, and the unit behind it.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim_start()))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "the range is checked, units are powers of two or small, and a fraction of a byte or of a \
              millisecond is nothing"
)]
fn whole(number: f64, unit: u64, most: f64) -> Option<u64> {
    let value = number * unit as f64;
    (0.0..=most).contains(&value).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_binary_units_with_or_without_a_fraction() {
        for (text, expected) in [
            ("64GiB", 64 << 30),
            ("64 GiB", 64 << 30),
            ("64Gi", 64 << 30),
            ("1.5TiB", 3 << 39),
            ("0B", 0),
            ("4096B", 4096),
        ] {
            assert_eq!(bytes(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_could_be_misread_is_no_size() {
        for text in [
            "64GB", "64G", "64", "GiB", "-1GiB", "1e3GiB", "1.2.3GiB", "64gib", "99999TiB",
        ] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn times_are_read_with_their_unit() {
        assert_eq!(duration("30s"), Some(Duration::from_secs(30)));
        assert_eq!(duration("1.5h"), Some(Duration::from_secs(5400)));
        assert_eq!(duration("250 ms"), Some(Duration::from_millis(250)));
        assert_eq!(duration("7d"), Some(Duration::from_secs(604_800)));
        for text in ["30", "s", "30sec", "-1s", "400d"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_shown_is_read_back_as_the_same() {
        for size in [
            0,
            1,
            1023,
            1 << 10,
            3 << 29,
            64 << 30,
            (64 << 30) + 1,
            5 << 40,
        ] {
            assert_eq!(bytes(&exact_size(size)), Some(size));
        }
        for ms in [0, 1, 999, 1000, 90_000, 3_600_000, 86_400_000] {
            let time = Duration::from_millis(ms);
            assert_eq!(duration(&exact_duration(time)), Some(time));
        }
        assert_eq!(exact_size(3 << 29), "1536MiB");
        assert_eq!(exact_duration(Duration::from_secs(30)), "30s");
    }
}
