//! `Range` of a download, as RFC 9110 has it: one range of bytes, so that a download that was cut off
//! can go on. Pure.

use std::ops::Range;

/// What is asked for of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of it.
    Whole,
    /// These bytes.
    Part(Range<u64>),
    /// Bytes that it does not have.
    Nothing,
}

/// Reads the header's value for a file of so many bytes. What is no range of bytes, or several, may be
/// answered with the whole file.
pub(super) fn wanted(value: &str, bytes: u64) -> Wanted {
    let Some((first, last)) = value
        .trim()
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
    else {
        return Wanted::Whole;
    };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // A number that is too large is beyond every file.
        digits.then(|| text.parse::<u64>().unwrap_or(u64::MAX))
    };
    let range = match (first.trim(), last.trim()) {
        ("", last) => match number(last) {
            Some(suffix) => bytes.saturating_sub(suffix)..bytes,
            None => return Wanted::Whole,
        },
        (first, "") => match number(first) {
            Some(first) => first..bytes,
            None => return Wanted::Whole,
        },
        (first, last) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(bytes),
            _ => return Wanted::Whole,
        },
    };
    if range.is_empty() {
        Wanted::Nothing
    } else {
        Wanted::Part(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_the_file() {
        for (value, expected) in [
            ("bytes=0-9", Wanted::Part(0..10)),
            ("bytes=10-", Wanted::Part(10..100)),
            ("bytes=-10", Wanted::Part(90..100)),
            ("bytes=-1000", Wanted::Part(0..100)),
            ("bytes=99-99", Wanted::Part(99..100)),
            ("bytes=50-1000", Wanted::Part(50..100)),
            ("bytes=0-99999999999999999999999", Wanted::Part(0..100)),
            ("bytes=100-", Wanted::Nothing),
            ("bytes=99999999999999999999999-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=9-8", Wanted::Whole),
            ("bytes=0-1,5-6", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("lines=0-9", Wanted::Whole),
            ("", Wanted::Whole),
        ] {
            assert_eq!(wanted(value, 100), expected, "{value}");
        }
        assert_eq!(wanted("bytes=0-", 0), Wanted::Nothing);
    }
}
