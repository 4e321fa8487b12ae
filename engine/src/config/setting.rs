//! One setting: its key, what it may be, and how its value is read.

use std::time::Duration;

use serde_json::Value;

use super::{Config, ConfigError, engine, pool};

const GIB: f64 = (1u64 << 30) as f64;

/// See the module's documentation.
pub(super) struct Setting {
    pub(super) key: &'static str,
    /// Whether it means nothing where the pool is a daemon's.
    pub(super) of_own_pool: bool,
    pub(super) expects: &'static str,
    pub(super) apply: fn(&mut Config, &Value) -> Option<()>,
}

/// All settings.
pub(super) fn settings() -> impl Iterator<Item = &'static Setting> {
    pool::SETTINGS.iter().chain(engine::SETTINGS)
}

impl Setting {
    /// Takes `value`, which the user gave as `source`, into `config`.
    pub(super) fn read(
        &self,
        config: &mut Config,
        source: &str,
        value: &Value,
    ) -> Result<(), ConfigError> {
        (self.apply)(config, value)
            .ok_or_else(|| ConfigError::unexpected(source, value, self.expects))
    }
}

/// Checks that `key`, given as `source`, is a setting.
pub(super) fn require_known(key: &str, source: &str) -> Result<(), ConfigError> {
    if settings().any(|setting| setting.key == key) {
        return Ok(());
    }
    let nearest = settings()
        .map(|s| s.key)
        .max_by(|a, b| strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key)));
    let keys: Vec<&str> = settings().map(|setting| setting.key).collect();
    Err(ConfigError {
        key: source.to_owned(),
        problem: "there is no such setting".into(),
        fix: format!(
            "did you mean {}? The settings are {}",
            nearest.unwrap_or_default(),
            keys.join(", ")
        ),
    })
}

/// Bytes of `count` times so many GiB.
pub(super) fn capacity(value: &Value, count: u32) -> Option<u64> {
    let gib = number(value).filter(|gib| *gib > 0.0 && *gib < 1e6)?;
    whole(gib * GIB * f64::from(count))
}

pub(super) fn number(value: &Value) -> Option<f64> {
    value
        .as_f64()
        .or_else(|| value.as_str()?.trim().parse().ok())
        .filter(|n: &f64| n.is_finite())
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked; a fraction of a byte is nothing"
)]
pub(super) fn whole(value: f64) -> Option<u64> {
    (0.0..=9e15).contains(&value).then_some(value as u64)
}

pub(super) fn milliseconds(value: &Value) -> Option<Duration> {
    let count = value
        .as_u64()
        .or_else(|| value.as_str()?.trim().parse().ok())?;
    (1..=86_400_000)
        .contains(&count)
        .then(|| Duration::from_millis(count))
}

pub(super) fn boolean(value: &Value) -> Option<bool> {
    value
        .as_bool()
        .or_else(|| match value.as_str()?.to_lowercase().as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        })
}

/// Compares without case and punctuation, so that "S3-FIFO" and "s3fifo" are the same.
pub(super) fn choose<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Option<T> {
    let plain = |text: &str| {
        text.chars()
            .filter(char::is_ascii_alphanumeric)
            .collect::<String>()
            .to_lowercase()
    };
    let wanted = plain(value.as_str()?);
    choices
        .iter()
        .find(|(name, _)| *name == wanted)
        .map(|&(_, choice)| choice)
}
