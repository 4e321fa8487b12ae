//! Sizes and times, rounded for people.

use std::fmt;

const UNITS: [(u64, &str); 4] = [
    (1 << 40, "TiB"),
    (1 << 30, "GiB"),
    (1 << 20, "MiB"),
    (1 << 10, "KiB"),
];
const TIMES: [(u64, &str); 3] = [(86_400, "d"), (3600, "h"), (60, "min")];

/// Bytes in the largest unit of which there is one, to one place, rounded down.
#[must_use]
pub fn size(bytes: u64) -> impl fmt::Display {
    let found = UNITS.into_iter().find(|(unit, _)| bytes >= *unit);
    found.map_or_else(
        || format!("{bytes} B"),
        |(unit, name)| {
            let tenths = u128::from(bytes) * 10 / u128::from(unit);
            format!("{}.{} {name}", tenths / 10, tenths % 10)
        },
    )
}

/// Seconds in the two largest units of which there is one.
pub(super) fn time(seconds: u64) -> String {
    let Some(place) = TIMES.iter().position(|(unit, _)| seconds >= *unit) else {
        return format!("{seconds} s");
    };
    let (unit, name) = TIMES[place];
    let rest = seconds % unit;
    match TIMES.get(place + 1) {
        Some((smaller, smaller_name)) if rest >= *smaller => {
            format!(
                "{} {name} {} {smaller_name}",
                seconds / unit,
                rest / smaller
            )
        }
        _ => format!("{} {name}", seconds / unit),
    }
}

/// A text of an engine, without what a terminal would act on. Nothing is shown as a dash.
pub(super) fn plain(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    let shown = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_shown_in_units_that_fit() {
        assert_eq!(size(0).to_string(), "0 B");
        assert_eq!(size(1023).to_string(), "1023 B");
        assert_eq!(size(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(size(u64::MAX).to_string(), "16777215.9 TiB");
        assert_eq!(time(59), "59 s");
        assert_eq!(time(60), "1 min");
        assert_eq!(time(3 * 3600 + 12 * 60 + 5), "3 h 12 min");
        assert_eq!(time(86_400 + 59), "1 d");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\n"), "a?[2Jb?");
        assert_eq!(plain(""), "-");
    }
}
