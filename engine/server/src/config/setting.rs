//! Every setting: its section and key, what it may be, how it is read and shown.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kvtide_engine::Eviction;
use kvtide_segment::{HugePages, Numa};
use serde_json::{Value, json};

use super::quantity::{self, exact_duration, exact_size};
use super::value;
use super::{Config, ConfigError, MOST_SESSIONS, Origin};
use crate::logs::{self, LogFormat};

/// A Unix socket's path has no more bytes (`sockaddr_un`).
const MOST_PATH_BYTES: usize = 107;
/// Within it, saves in flight end or never will.
const MOST_GRACE: Duration = Duration::from_secs(3600);
/// Whole huge pages, and not more than a large model's share.
const EXTENTS: std::ops::RangeInclusive<u64> = 2 << 20..=64 << 30;
const HUGE_PAGE_BYTES: u64 = 2 << 20;

const HUGE_PAGES: [(&str, HugePages); 3] = [
    ("auto", HugePages::Auto),
    ("off", HugePages::Off),
    ("require", HugePages::Require),
];
const NUMA: [(&str, Numa); 3] = [
    ("none", Numa::AsTold),
    ("interleave", Numa::Interleave),
    ("local", Numa::Local),
];

/// One setting.
pub(super) struct Setting {
    pub(super) section: &'static str,
    pub(super) key: &'static str,
    pub(super) expects: &'static str,
    /// Takes a value into the configuration; `None` if it means nothing.
    pub(super) apply: fn(&mut Config, &Value) -> Option<()>,
    /// The value, as it may be written in the file; `None` for what nobody has set and that has no
    /// value of its own.
    pub(super) show: fn(&Config) -> Option<Value>,
}

impl Setting {
    /// `section.key`.
    pub(super) fn name(&self) -> String {
        format!("{}.{}", self.section, self.key)
    }

    pub(super) fn is(&self, name: &str) -> bool {
        name.split_once('.') == Some((self.section, self.key))
    }

    /// The environment variable that sets it.
    pub(super) fn variable(&self) -> String {
        format!("KVTIDE_SERVE_{}_{}", self.section, self.key).to_uppercase()
    }

    pub(super) fn unexpected(&self, origin: Origin, value: &Value) -> ConfigError {
        ConfigError {
            origin,
            key: self.name(),
            problem: format!("{value} is not {}", self.expects),
            fix: format!("set it to {}", self.expects),
        }
    }
}

/// All settings, in the order in which they are shown.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        section: "memory",
        key: "capacity",
        expects: "a size above 0, such as \"64GiB\"",
        apply: |config, value| {
            config.memory.capacity_bytes = value::bytes(value).filter(|bytes| *bytes > 0)?;
            config.memory.capacity_is_chosen = true;
            Some(())
        },
        show: |config| Some(exact_size(config.memory.capacity_bytes).into()),
    },
    Setting {
        section: "memory",
        key: "directory",
        expects: "the absolute path of a directory on tmpfs, such as \"/dev/shm\"",
        apply: |config, value| {
            config.memory.directory =
                Some(PathBuf::from(value.as_str()?)).filter(|path| path.is_absolute())?;
            Some(())
        },
        show: |config| Some(config.memory.directory.display().to_string().into()),
    },
    Setting {
        section: "memory",
        key: "name",
        expects: "a name of letters, digits, \"-\", \"_\" and \".\", at most 64, such as \"pool\"",
        apply: |config, value| {
            config.memory.name = value.as_str().filter(|name| is_file_name(name))?.to_owned();
            Some(())
        },
        show: |config| Some(config.memory.name.clone().into()),
    },
    Setting {
        section: "memory",
        key: "extent",
        expects: "a multiple of 2MiB up to 64GiB, such as \"256MiB\"",
        apply: |config, value| {
            config.memory.extent_bytes = value::bytes(value)
                .filter(|bytes| EXTENTS.contains(bytes) && bytes.is_multiple_of(HUGE_PAGE_BYTES))?;
            Some(())
        },
        show: |config| Some(exact_size(config.memory.extent_bytes).into()),
    },
    Setting {
        section: "memory",
        key: "huge_pages",
        expects: "\"auto\", \"off\" or \"require\"",
        apply: |config, value| {
            config.memory.huge_pages = value::choose(value, &HUGE_PAGES)?;
            Some(())
        },
        show: |config| name_of(config.memory.huge_pages, &HUGE_PAGES),
    },
    Setting {
        section: "memory",
        key: "numa",
        expects: "\"none\", \"interleave\" or \"local\"",
        apply: |config, value| {
            config.memory.numa = value::choose(value, &NUMA)?;
            Some(())
        },
        show: |config| name_of(config.memory.numa, &NUMA),
    },
    Setting {
        section: "socket",
        key: "path",
        expects: "an absolute path of at most 107 bytes, such as \"/run/kvtide/kvtide.sock\"",
        apply: |config, value| {
            let path = PathBuf::from(value.as_str()?);
            let fits = path.is_absolute() && path.as_os_str().len() <= MOST_PATH_BYTES;
            config.socket.path = Some(path).filter(|path| fits && path.file_name().is_some())?;
            Some(())
        },
        show: |config| Some(config.socket.path.display().to_string().into()),
    },
    Setting {
        section: "socket",
        key: "mode",
        expects: "a text of octal digits that lets the owner read and write, such as \"0660\"",
        apply: |config, value| {
            config.socket.mode = value::mode(value)?;
            Some(())
        },
        show: |config| Some(format!("{:04o}", config.socket.mode).into()),
    },
    Setting {
        section: "socket",
        key: "owner",
        expects: "the name or number of a user, such as \"kvtide\" or 65532",
        apply: |config, value| {
            config.socket.owner = Some(value::principal(value)?);
            Some(())
        },
        show: |config| config.socket.owner.clone().map(Value::from),
    },
    Setting {
        section: "socket",
        key: "group",
        expects: "the name or number of a group, such as \"kvtide\" or 65532",
        apply: |config, value| {
            config.socket.group = Some(value::principal(value)?);
            Some(())
        },
        show: |config| config.socket.group.clone().map(Value::from),
    },
    Setting {
        section: "socket",
        key: "allow_uids",
        expects: "a list of user ids, such as [1000, 1001]",
        apply: |config, value| {
            config.socket.allow_uids = value::ids(value)?;
            Some(())
        },
        show: |config| Some(json!(config.socket.allow_uids)),
    },
    Setting {
        section: "socket",
        key: "allow_gids",
        expects: "a list of group ids, such as [1000, 1001]",
        apply: |config, value| {
            config.socket.allow_gids = value::ids(value)?;
            Some(())
        },
        show: |config| Some(json!(config.socket.allow_gids)),
    },
    Setting {
        section: "http",
        key: "listen",
        expects: "an address and port such as \"127.0.0.1:9462\", or \"none\"",
        apply: |config, value| {
            config.http_listen = match value.as_str()? {
                "" | "none" => None,
                address => Some(address.parse::<SocketAddr>().ok()?),
            };
            Some(())
        },
        show: |config| {
            let address = config.http_listen.map(|address| address.to_string());
            Some(address.unwrap_or_else(|| "none".to_owned()).into())
        },
    },
    Setting {
        section: "limits",
        key: "sessions",
        expects: "a number from 1 to 62",
        apply: |config, value| {
            let sessions = value::whole(value, 1, MOST_SESSIONS.into())?;
            config.limits.sessions = u8::try_from(sessions).ok()?;
            Some(())
        },
        show: |config| Some(config.limits.sessions.into()),
    },
    Setting {
        section: "limits",
        key: "minimum",
        expects: "a size such as \"4GiB\", or \"0B\"",
        apply: |config, value| {
            config.limits.minimum_bytes = value::bytes(value)?;
            Some(())
        },
        show: |config| Some(exact_size(config.limits.minimum_bytes).into()),
    },
    Setting {
        section: "limits",
        key: "minimums",
        expects: "sizes by model or namespace, such as { \"org/model\" = \"16GiB\" }",
        apply: |config, value| {
            config.limits.minimums = value::sizes(value)?;
            config
                .limits
                .minimums
                .keys()
                .all(|name| !name.is_empty())
                .then_some(())
        },
        show: |config| Some(sizes(&config.limits.minimums)),
    },
    Setting {
        section: "limits",
        key: "quota",
        expects: "a size such as \"32GiB\", or \"none\"",
        apply: |config, value| {
            config.limits.quota_bytes = match value.as_str()? {
                "none" => None,
                _ => Some(value::bytes(value)?),
            };
            Some(())
        },
        show: |config| {
            let quota = config.limits.quota_bytes.map(exact_size);
            Some(quota.unwrap_or_else(|| "none".to_owned()).into())
        },
    },
    Setting {
        section: "limits",
        key: "quotas",
        expects: "sizes by tenant, such as { acme = \"32GiB\" }",
        apply: |config, value| {
            config.limits.quotas = value::sizes(value)?;
            Some(())
        },
        show: |config| Some(sizes(&config.limits.quotas)),
    },
    Setting {
        section: "scrub",
        key: "rate",
        expects: "a size for each second, such as \"32MiB\", or \"0B\" for never",
        apply: |config, value| {
            config.scrub_bytes_per_s = value::bytes(value)?;
            Some(())
        },
        show: |config| Some(exact_size(config.scrub_bytes_per_s).into()),
    },
    Setting {
        section: "eviction",
        key: "policy",
        expects: "\"lru\" or \"s3fifo\"",
        apply: |config, value| {
            let choices = [("lru", Eviction::Lru), ("s3fifo", Eviction::S3Fifo)];
            config.eviction = value::choose(value, &choices)?;
            Some(())
        },
        show: |config| {
            Some(match config.eviction {
                Eviction::Lru => "lru".into(),
                Eviction::S3Fifo => "s3fifo".into(),
            })
        },
    },
    Setting {
        section: "shutdown",
        key: "grace",
        expects: "a time of at most an hour, such as \"30s\"",
        apply: |config, value| {
            config.grace =
                quantity::duration(value.as_str()?).filter(|grace| *grace <= MOST_GRACE)?;
            Some(())
        },
        show: |config| Some(exact_duration(config.grace).into()),
    },
    Setting {
        section: "log",
        key: "level",
        expects: "a level such as \"info\", or a list such as \"info,kvtide_server=debug\"",
        apply: |config, value| {
            config.log.level = value
                .as_str()
                .filter(|text| logs::is_filter(text))?
                .to_owned();
            Some(())
        },
        show: |config| Some(config.log.level.clone().into()),
    },
    Setting {
        section: "log",
        key: "format",
        expects: "\"text\" or \"json\"",
        apply: |config, value| {
            let choices = [("text", LogFormat::Text), ("json", LogFormat::Json)];
            config.log.format = value::choose(value, &choices)?;
            Some(())
        },
        show: |config| {
            Some(match config.log.format {
                LogFormat::Text => "text".into(),
                LogFormat::Json => "json".into(),
            })
        },
    },
];

/// The name of a choice.
fn name_of<T: Copy + PartialEq>(chosen: T, choices: &[(&str, T)]) -> Option<Value> {
    let found = choices.iter().find(|(_, choice)| *choice == chosen);
    found.map(|(name, _)| (*name).into())
}

/// Sizes by name, as they may be written in the file.
fn sizes(sizes: &BTreeMap<String, u64>) -> Value {
    let entry = |(name, &bytes): (&String, &u64)| (name.clone(), exact_size(bytes).into());
    Value::Object(sizes.iter().map(entry).collect())
}

/// Whether a file may have this name; names that begin with a dot are hidden from whoever looks for
/// what fills the memory.
fn is_file_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(fits)
}

/// What to say of `section.key`, which is no setting.
pub(super) fn unknown(section: &str, key: &str, origin: Origin) -> ConfigError {
    let name = format!("{section}.{key}");
    // A right key in a wrong section is nearer than a similar word in the right one.
    let nearness = |setting: &Setting| {
        let key_alone = strsim::jaro_winkler(setting.key, key);
        strsim::jaro_winkler(&setting.name(), &name).max(key_alone)
    };
    let nearest = SETTINGS
        .iter()
        .max_by(|a, b| nearness(a).total_cmp(&nearness(b)))
        .map(Setting::name);
    let in_section: Vec<&str> = SETTINGS
        .iter()
        .filter(|setting| setting.section == section)
        .map(|setting| setting.key)
        .collect();
    let others = if in_section.is_empty() {
        format!("The sections are {}", sections().join(", "))
    } else {
        format!("The settings of [{section}] are {}", in_section.join(", "))
    };
    ConfigError {
        origin,
        key: name,
        problem: "there is no such setting".into(),
        fix: format!("did you mean {}? {others}", nearest.unwrap_or_default()),
    }
}

/// Names of all sections, in order.
pub(super) fn sections() -> Vec<&'static str> {
    let mut names: Vec<&str> = SETTINGS.iter().map(|setting| setting.section).collect();
    names.dedup();
    names
}
