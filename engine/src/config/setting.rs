//! Every setting: its key, what it may be, and how it is read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvtide_kernels::Codec;
use kvtide_kernels::copy::Route;
use kvtide_segment::HugePages;
use serde_json::Value;

use super::{Config, ConfigError, Eviction, LoadMode, PoolPlace, Verify};

const GIB: f64 = (1u64 << 30) as f64;

/// One setting: its key, and what it may be.
pub(super) struct Setting {
    pub(super) key: &'static str,
    expects: &'static str,
    apply: fn(&mut Config, &Value) -> Option<()>,
}

/// All settings.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "pool",
        expects: "\"embedded\" or the socket of `kvtide serve`, such as \"unix:/run/kvtide/kvtide.sock\"",
        apply: |config, value| {
            config.pool = match value.as_str()? {
                "embedded" => PoolPlace::Embedded,
                other => {
                    let path = Path::new(other.strip_prefix("unix:")?);
                    path.is_absolute()
                        .then(|| PoolPlace::Socket(path.to_owned()))?
                }
            };
            Some(())
        },
    },
    Setting {
        key: "host_capacity_gb",
        expects: "a number of GiB above 0, such as 32 or 0.5",
        apply: |config, value| {
            config.host_capacity_bytes = capacity(value, 1)?;
            Some(())
        },
    },
    Setting {
        key: "eviction",
        expects: "\"s3fifo\" or \"lru\"",
        apply: |config, value| {
            config.eviction = choose(
                value,
                &[("s3fifo", Eviction::S3Fifo), ("lru", Eviction::Lru)],
            )?;
            Some(())
        },
    },
    Setting {
        key: "load",
        expects: "\"auto\", \"layered\", \"async\" or \"sync\"",
        apply: |config, value| {
            let modes = [
                ("auto", LoadMode::Auto),
                ("layered", LoadMode::Layered),
                ("async", LoadMode::Async),
                ("sync", LoadMode::Sync),
            ];
            config.load_mode = choose(value, &modes)?;
            Some(())
        },
    },
    Setting {
        key: "codec",
        expects: "\"none\" or \"fp8\"",
        apply: |config, value| {
            config.codec = choose(value, &[("none", Codec::None), ("fp8", Codec::Fp8)])?;
            Some(())
        },
    },
    Setting {
        key: "verify",
        expects: "\"load\" or \"always\"",
        apply: |config, value| {
            config.verify = choose(value, &[("load", Verify::Load), ("always", Verify::Always)])?;
            Some(())
        },
    },
    Setting {
        key: "scrub_mib_per_s",
        expects: "a number of MiB per second, 0 for none",
        apply: |config, value| {
            let mib = number(value).filter(|mib| (0.0..1e6).contains(mib))?;
            config.scrub_bytes_per_second = whole(mib * 1_048_576.0)?;
            Some(())
        },
    },
    Setting {
        key: "save_generated",
        expects: "true or false",
        apply: |config, value| {
            config.save_generated = boolean(value)?;
            Some(())
        },
    },
    Setting {
        key: "lease_ms",
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.lease_ttl = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "join_timeout_ms",
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.join_timeout = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "load_timeout_ms",
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.load_timeout = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "tenant",
        expects: "a text",
        apply: |config, value| {
            config.tenant = Some(value.as_str()?.to_owned());
            Some(())
        },
    },
    Setting {
        key: "weights_revision",
        expects: "a text",
        apply: |config, value| {
            config.weights_revision = Some(value.as_str()?.to_owned());
            Some(())
        },
    },
    Setting {
        key: "segment_directory",
        expects: "an existing directory on shared memory, such as \"/dev/shm\"",
        apply: |config, value| {
            config.segment_directory =
                Some(PathBuf::from(value.as_str()?)).filter(|d| d.is_dir())?;
            Some(())
        },
    },
    Setting {
        key: "huge_pages",
        expects: "\"auto\", \"off\" or \"require\"",
        apply: |config, value| {
            let choices = [
                ("auto", HugePages::Auto),
                ("off", HugePages::Off),
                ("require", HugePages::Require),
            ];
            config.huge_pages = choose(value, &choices)?;
            Some(())
        },
    },
    Setting {
        key: "gpu_save_route",
        expects: ROUTES,
        apply: |config, value| {
            config.gpu_routes.save = route(value)?;
            Some(())
        },
    },
    Setting {
        key: "gpu_load_route",
        expects: ROUTES,
        apply: |config, value| {
            config.gpu_routes.load = route(value)?;
            Some(())
        },
    },
    Setting {
        key: "gpu_layered_route",
        expects: ROUTES,
        apply: |config, value| {
            config.gpu_routes.layered = route(value)?;
            Some(())
        },
    },
];

const ROUTES: &str = "\"auto\", \"dma\", \"staged\" or \"kernel\", the latter two with a number of \
                      multiprocessors as in \"kernel:4\"";

/// A way of copying, or none for "auto".
#[expect(
    clippy::option_option,
    reason = "the outer one is for values that mean nothing"
)]
fn route(value: &Value) -> Option<Option<Route>> {
    match value.as_str()?.trim().to_lowercase().as_str() {
        "auto" => Some(None),
        text => text.parse().ok().map(Some),
    }
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
    if SETTINGS.iter().any(|setting| setting.key == key) {
        return Ok(());
    }
    let nearest = SETTINGS
        .iter()
        .map(|s| s.key)
        .max_by(|a, b| strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key)));
    let keys: Vec<&str> = SETTINGS.iter().map(|setting| setting.key).collect();
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

fn number(value: &Value) -> Option<f64> {
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
fn whole(value: f64) -> Option<u64> {
    (0.0..=9e15).contains(&value).then_some(value as u64)
}

fn milliseconds(value: &Value) -> Option<Duration> {
    let count = value
        .as_u64()
        .or_else(|| value.as_str()?.trim().parse().ok())?;
    (1..=86_400_000)
        .contains(&count)
        .then(|| Duration::from_millis(count))
}

fn boolean(value: &Value) -> Option<bool> {
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
