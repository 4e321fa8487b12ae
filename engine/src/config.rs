//! The pool's configuration, from vLLM's `kv_connector_extra_config` and the environment.
//!
//! For every key, the extra configuration wins over `KVTIDE_<KEY>`, and that over the variable that
//! AIBrix users have set already. Unknown keys, also unknown `KVTIDE_*` variables, are refused: a
//! setting that is silently ignored is worse than none.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use kvtide_kernels::Codec;
use kvtide_kernels::copy::{CudaOptions, Route};
use kvtide_segment::HugePages;
use serde_json::{Map, Value};

const GIB: f64 = (1u64 << 30) as f64;

/// Which eviction policy the pool uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// S3-FIFO: resistant to scans.
    S3Fifo,
    /// Least recently used.
    Lru,
}

/// How matched blocks are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadMode {
    /// Layered while no other request would be held up by it, else async.
    Auto,
    /// In the step itself, layer by layer ahead of the computation.
    Layered,
    /// Between steps, while the request waits outside the batch.
    Async,
    /// In the step itself, all layers before the computation and all saves behind it, each waited for
    /// on the thread that runs the model: what layered loads and saves are measured against.
    Sync,
}

/// When rows are compared with their checksums, besides the background scrub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// On every load; a layered load's result comes too late to be acted upon and is counted.
    Load,
    /// On every load, and when complete blocks are matched, before vLLM is told of them.
    Always,
}

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Bytes of the pool in host memory.
    pub host_capacity_bytes: u64,
    /// Eviction policy.
    pub eviction: Eviction,
    /// How matched blocks are loaded.
    pub load_mode: LoadMode,
    /// What rows hold of blocks.
    pub codec: Codec,
    /// When rows are verified.
    pub verify: Verify,
    /// Rate of the background scrub; 0 turns it off.
    pub scrub_bytes_per_second: u64,
    /// Whether blocks completed by generated tokens are saved.
    pub save_generated: bool,
    /// How long a match is held for a request that is not scheduled.
    pub lease_ttl: Duration,
    /// How long a request waits for blocks that another request is saving.
    pub join_timeout: Duration,
    /// Seeds the identity of every block.
    pub tenant: Option<String>,
    /// Seeds the identity of every block; to be changed when weights change under the same name.
    pub weights_revision: Option<String>,
    /// Where the shared segment lies.
    pub segment_directory: PathBuf,
    /// Whether huge pages are used.
    pub huge_pages: HugePages,
    /// Ways of copying to and from a GPU that are not left to measurement.
    pub gpu_routes: CudaOptions,
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{key}: {problem}; {fix}")]
pub struct ConfigError {
    /// The key or variable as the user wrote it.
    pub key: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub fix: String,
}

/// One setting: its key, other variables that carry it, and what it may be.
struct Setting {
    key: &'static str,
    aliases: &'static [&'static str],
    expects: &'static str,
    apply: fn(&mut Config, &Value) -> Option<()>,
}

/// All settings, in the order in which the documentation has them.
const SETTINGS: &[Setting] = &[
    Setting {
        key: "host_capacity_gb",
        aliases: &["AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB"],
        expects: "a number of GiB above 0, such as 32 or 0.5",
        apply: |config, value| {
            let gib = number(value).filter(|gib| *gib > 0.0 && *gib < 1e6)?;
            config.host_capacity_bytes = whole(gib * GIB)?;
            Some(())
        },
    },
    Setting {
        key: "eviction",
        aliases: &["AIBRIX_KV_CACHE_OL_L1_CACHE_EVICTION_POLICY"],
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
        aliases: &[],
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
        aliases: &[],
        expects: "\"none\" or \"fp8\"",
        apply: |config, value| {
            config.codec = choose(value, &[("none", Codec::None), ("fp8", Codec::Fp8)])?;
            Some(())
        },
    },
    Setting {
        key: "verify",
        aliases: &[],
        expects: "\"load\" or \"always\"",
        apply: |config, value| {
            config.verify = choose(value, &[("load", Verify::Load), ("always", Verify::Always)])?;
            Some(())
        },
    },
    Setting {
        key: "scrub_mib_per_s",
        aliases: &[],
        expects: "a number of MiB per second, 0 for none",
        apply: |config, value| {
            let mib = number(value).filter(|mib| (0.0..1e6).contains(mib))?;
            config.scrub_bytes_per_second = whole(mib * 1_048_576.0)?;
            Some(())
        },
    },
    Setting {
        key: "save_generated",
        aliases: &[],
        expects: "true or false",
        apply: |config, value| {
            config.save_generated = boolean(value)?;
            Some(())
        },
    },
    Setting {
        key: "lease_ms",
        aliases: &[],
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.lease_ttl = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "join_timeout_ms",
        aliases: &[],
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.join_timeout = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "tenant",
        aliases: &[],
        expects: "a text",
        apply: |config, value| {
            config.tenant = Some(value.as_str()?.to_owned());
            Some(())
        },
    },
    Setting {
        key: "weights_revision",
        aliases: &[],
        expects: "a text",
        apply: |config, value| {
            config.weights_revision = Some(value.as_str()?.to_owned());
            Some(())
        },
    },
    Setting {
        key: "segment_directory",
        aliases: &[],
        expects: "an existing directory on shared memory, such as \"/dev/shm\"",
        apply: |config, value| {
            config.segment_directory =
                Some(PathBuf::from(value.as_str()?)).filter(|d| d.is_dir())?;
            Some(())
        },
    },
    Setting {
        key: "huge_pages",
        aliases: &[],
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
        aliases: &[],
        expects: ROUTES,
        apply: |config, value| {
            config.gpu_routes.save = route(value)?;
            Some(())
        },
    },
    Setting {
        key: "gpu_load_route",
        aliases: &[],
        expects: ROUTES,
        apply: |config, value| {
            config.gpu_routes.load = route(value)?;
            Some(())
        },
    },
    Setting {
        key: "gpu_layered_route",
        aliases: &[],
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
    match value.as_str()? {
        "auto" => Some(None),
        text => text.parse().ok().map(Some),
    }
}

const VARIABLE_PREFIX: &str = "KVTIDE_";

impl Config {
    /// Reads the configuration; `environment` may hold anything, only the variables meant for
    /// kvtide are looked at. `memory_bytes` is the host's available memory, from which the default
    /// capacity follows.
    ///
    /// # Errors
    /// [`ConfigError`] for the first setting that is unknown or has a wrong value.
    pub fn read(
        extra: &Map<String, Value>,
        environment: &BTreeMap<String, String>,
        memory_bytes: u64,
    ) -> Result<Self, ConfigError> {
        let mut config = Self::defaults(memory_bytes);
        for key in extra.keys() {
            known(key, key)?;
        }
        for name in environment.keys() {
            let Some(key) = name.strip_prefix(VARIABLE_PREFIX) else {
                continue;
            };
            if !is_for_others(key) {
                known(&key.to_lowercase(), name)?;
            }
        }
        for setting in SETTINGS {
            let Some((source, value)) = setting.find(extra, environment) else {
                continue;
            };
            (setting.apply)(&mut config, &value).ok_or_else(|| ConfigError {
                problem: format!("{value} is not {}", setting.expects),
                fix: format!("set it to {}", setting.expects),
                key: source,
            })?;
        }
        Ok(config)
    }

    fn defaults(memory_bytes: u64) -> Self {
        Self {
            // AIBrix's default, or a quarter of what there is on a small host.
            host_capacity_bytes: (10 << 30).min(memory_bytes / 4),
            // S3-FIFO gives up what is not asked for again within a tenth of the pool's turnover, and
            // what comes back that soon is answered by the engine's own cache: see the decisions in
            // docs/architecture.md.
            eviction: Eviction::Lru,
            load_mode: LoadMode::Auto,
            codec: Codec::None,
            verify: Verify::Load,
            scrub_bytes_per_second: 32 << 20,
            save_generated: true,
            lease_ttl: Duration::from_secs(10),
            join_timeout: Duration::from_secs(10),
            tenant: None,
            weights_revision: None,
            segment_directory: PathBuf::from("/dev/shm"),
            huge_pages: HugePages::Auto,
            gpu_routes: CudaOptions::default(),
        }
    }
}

impl Setting {
    /// The value that wins, and the name under which the user gave it.
    fn find(
        &self,
        extra: &Map<String, Value>,
        environment: &BTreeMap<String, String>,
    ) -> Option<(String, Value)> {
        if let Some(value) = extra.get(self.key) {
            return Some((self.key.to_owned(), value.clone()));
        }
        let own = format!("{VARIABLE_PREFIX}{}", self.key.to_uppercase());
        let names = [own.as_str()]
            .into_iter()
            .chain(self.aliases.iter().copied());
        names
            .filter_map(|name| environment.get(name).map(|text| (name, text)))
            .map(|(name, text)| (name.to_owned(), Value::String(text.clone())))
            .next()
    }
}

/// Checks that `key`, given as `source`, is a setting.
fn known(key: &str, source: &str) -> Result<(), ConfigError> {
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

/// Whether the variable `KVTIDE_<key>` means something, but not to the pool: the tools' cache, the
/// tests' switches, and what Kubernetes tells every pod of a Service named `kvtide…`.
fn is_for_others(key: &str) -> bool {
    key == "CACHE"
        || key.starts_with("REQUIRE_")
        || ["SERVICE_HOST", "SERVICE_PORT", "PORT"]
            .iter()
            .any(|of_service| {
                key.split_once(of_service).is_some_and(|(before, after)| {
                    (before.is_empty() || before.ends_with('_'))
                        && (after.is_empty() || after.starts_with('_'))
                })
            })
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
fn choose<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Option<T> {
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

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    fn read(extra: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let environment = environment
            .iter()
            .map(|&(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        Config::read(
            &serde_json::from_str(extra).unwrap(),
            &environment,
            64 << 30,
        )
    }

    #[test]
    fn extra_config_wins_over_kvtide_variables_and_those_over_aibrix_ones() {
        let aibrix = ("AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB", "1");
        let own = ("KVTIDE_HOST_CAPACITY_GB", "2");
        let capacity = |extra, environment: &[(&str, &str)]| {
            read(extra, environment).unwrap().host_capacity_bytes >> 30
        };
        assert_eq!(capacity("{}", &[aibrix]), 1);
        assert_eq!(capacity("{}", &[aibrix, own]), 2);
        assert_eq!(capacity(r#"{"host_capacity_gb": 3}"#, &[aibrix, own]), 3);
        assert_eq!(capacity("{}", &[("HOME", "/root")]), 10);
    }

    #[test]
    fn aibrix_eviction_names_are_understood() {
        let policy = |name| {
            read(
                "{}",
                &[("AIBRIX_KV_CACHE_OL_L1_CACHE_EVICTION_POLICY", name)],
            )
        };
        assert_eq!(policy("S3FIFO").unwrap().eviction, Eviction::S3Fifo);
        assert_eq!(policy("LRU").unwrap().eviction, Eviction::Lru);
        let error = policy("FIFO").unwrap_err();
        assert_eq!(error.key, "AIBRIX_KV_CACHE_OL_L1_CACHE_EVICTION_POLICY");
        assert!(
            error.to_string().contains(r#""s3fifo" or "lru""#),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        let error = read(r#"{"host_capacity": 3}"#, &[])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("host_capacity: ") && error.contains("did you mean host_capacity_gb")
        );
        let error = read("{}", &[("KVTIDE_EVICTON", "lru")])
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("KVTIDE_EVICTON: ") && error.contains("did you mean eviction"));
    }

    #[test]
    fn variables_of_the_test_suite_are_not_settings() {
        assert!(
            read(
                "{}",
                &[("KVTIDE_REQUIRE_CUDA", "1"), ("KVTIDE_CACHE", "/tmp")]
            )
            .is_ok()
        );
    }

    #[test]
    fn variables_that_kubernetes_sets_for_a_service_are_not_settings() {
        for name in [
            "KVTIDE_SERVICE_HOST",
            "KVTIDE_SERVICE_PORT_HTTP",
            "KVTIDE_PORT",
            "KVTIDE_CACHE_PORT_8000_TCP_ADDR",
        ] {
            assert!(read("{}", &[(name, "tcp://10.0.0.1:80")]).is_ok(), "{name}");
        }
        assert!(read("{}", &[("KVTIDE_REPORT", "1")]).is_err());
    }

    #[test]
    fn wrong_values_name_the_key_and_what_is_expected() {
        for (key, value) in [
            ("host_capacity_gb", "-1"),
            ("host_capacity_gb", "\"many\""),
            ("host_capacity_gb", "1e300"),
            ("eviction", "\"clock\""),
            ("load", "true"),
            ("verify", "\"never\""),
            ("scrub_mib_per_s", "-2"),
            ("save_generated", "\"maybe\""),
            ("lease_ms", "0"),
            ("join_timeout_ms", "1.5"),
            ("tenant", "7"),
            ("segment_directory", "\"/no/such/place\""),
            ("huge_pages", "\"yes\""),
        ] {
            let error = read(&format!("{{\"{key}\": {value}}}"), &[]).unwrap_err();
            assert_eq!(error.key, key);
            assert!(error.fix.starts_with("set it to "), "{error}");
        }
    }
}
