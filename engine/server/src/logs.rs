//! Logs, on stderr: systemd and Kubernetes keep them from there.

use std::io;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, ParseError};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Whether `text` is a level, or a list of levels and of modules with theirs. A word alone that is no
/// level would count as a module's name, and silence everything else.
#[must_use]
pub fn is_filter(text: &str) -> bool {
    let is_level = |part: &str| !part.is_empty() && part.parse::<LevelFilter>().is_ok();
    let is_clear = |part: &str| part.contains('=') || is_level(part.trim());
    text.split(',').all(is_clear) && EnvFilter::try_new(text).is_ok()
}

/// Sets up logs.
///
/// # Errors
/// When `level` is no filter; see [`is_filter`].
pub fn init(level: &str, format: LogFormat) -> Result<(), ParseError> {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(level)?)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(false).init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_lists_are_filters_and_other_words_are_not() {
        for text in [
            "info",
            "off",
            "warn,kvtide_server=debug",
            "kvtide_server::http=trace",
        ] {
            assert!(is_filter(text), "{text}");
        }
        for text in [
            "",
            "verbose",
            "info,",
            "kvtide_server",
            "kvtide_server=loud",
        ] {
            assert!(!is_filter(text), "{text}");
        }
    }
}
