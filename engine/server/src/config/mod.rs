//! The daemon's configuration: a TOML file, the environment, the command line.
//!
//! The command line wins over `KVTIDE_SERVE_<SECTION>_<KEY>`, that over the file, and that over the
//! default. What is not known is refused, and all that is wrong is told at once: a setting that is
//! silently ignored is worse than none, and a daemon that is restarted five times to find five slips
//! is worse than a list.

mod environment;
mod file;
pub(crate) mod quantity;
mod setting;
mod shown;
mod value;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvtide_engine::{Eviction, NodeOptions};
use kvtide_segment::{HugePages, Numa};
use serde_json::Value;

use crate::logs::LogFormat;
use quantity::exact_size;
use setting::{SETTINGS, Setting};

/// Sessions that there is room for: each is one bit of what a slot knows of its readers.
pub const MOST_SESSIONS: u8 = 62;
const _: () = assert!(MOST_SESSIONS as usize == NodeOptions::SESSIONS_MAX);

/// `[memory]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    /// Bytes of all rows of all models. What describes them comes on top.
    pub capacity_bytes: u64,
    /// Whether somebody chose the capacity. Where nobody did, it follows from the memory that is
    /// available at the moment, and a pool that exists should keep the size that it has.
    pub capacity_is_chosen: bool,
    /// Where the pool's directory lies.
    pub directory: PathBuf,
    /// Of the pool, which its directory is named after.
    pub name: String,
    /// The unit in which space moves between models.
    pub extent_bytes: u64,
    /// Whether memory that is made is taken in huge pages.
    pub huge_pages: HugePages,
    /// On which NUMA nodes it is taken.
    pub numa: Numa,
}

/// `[socket]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Socket {
    /// Where engines and operators connect.
    pub path: PathBuf,
    /// Who may, by the file's mode.
    pub mode: u32,
    /// Owner of the file: a name, or a number.
    pub owner: Option<String>,
    /// Group of the file: a name, or a number.
    pub group: Option<String>,
    /// Users whose processes are let in. With no user and no group named, all are.
    pub allow_uids: Vec<u32>,
    /// Groups whose processes are let in; a process counts with its primary group.
    pub allow_gids: Vec<u32>,
}

/// `[limits]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Engines served at once.
    pub sessions: u8,
    /// Bytes that are not taken from a namespace that has them, whatever others need.
    pub minimum_bytes: u64,
    /// The same of those that are named, by their model or their id.
    pub minimums: BTreeMap<String, u64>,
    /// Bytes that a tenant may have at most; `None` for as many as there are.
    pub quota_bytes: Option<u64>,
    /// The same of those that are named.
    pub quotas: BTreeMap<String, u64>,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// What is logged: a level, or a list as `RUST_LOG` has it.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[memory]`.
    pub memory: Memory,
    /// `[socket]`.
    pub socket: Socket,
    /// `[http] listen`: where health and metrics are served.
    pub http_listen: Option<SocketAddr>,
    /// `[limits]`.
    pub limits: Limits,
    /// `[scrub] rate`: at which rows are compared with their checksums in the background; 0 turns it
    /// off.
    pub scrub_bytes_per_s: u64,
    /// `[eviction] policy`.
    pub eviction: Eviction,
    /// `[shutdown] grace`: how long saves in flight are waited for after SIGTERM.
    pub grace: Duration,
    /// `[log]`.
    pub log: Log,
}

/// Where a value was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere.
    Default,
    /// In a line of the file.
    File {
        /// The file's path.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// In an environment variable.
    Variable(String),
    /// On the command line.
    Argument(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Argument(name) => f.write_str(name),
        }
    }
}

/// One setting that cannot be used.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{origin}: {key}: {problem}; {fix}")]
pub struct ConfigError {
    /// Where it was set.
    pub origin: Origin,
    /// `section.key`.
    pub key: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub fix: String,
}

/// Everything that is wrong with a configuration.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors(pub Vec<ConfigError>);

/// What a configuration is read from.
#[derive(Debug)]
pub struct Sources<'a> {
    /// The file: its path, and its text.
    pub file: Option<(&'a Path, &'a str)>,
    /// All environment variables; only those that are meant for the daemon are looked at.
    pub environment: &'a BTreeMap<OsString, OsString>,
    /// Of the command line: the option, `section.key`, and the value.
    pub arguments: &'a [(&'static str, &'static str, String)],
    /// Memory that can be taken, from which the default capacity follows; `None` where the system does
    /// not tell.
    pub available_bytes: Option<u64>,
}

/// A configuration, and where each value came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The configuration.
    pub config: Config,
    origins: BTreeMap<String, Origin>,
    /// One sentence each, to be logged as a warning.
    pub notices: Vec<String>,
}

/// A value that was set somewhere.
struct Given {
    setting: &'static Setting,
    origin: Origin,
    value: Value,
}

impl Settings {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ConfigErrors`] with everything that is unknown or cannot be used.
    pub fn read(sources: &Sources<'_>) -> Result<Self, ConfigErrors> {
        let mut errors = Vec::new();
        let mut given = Vec::new();
        if let Some((path, text)) = sources.file {
            given.extend(file::read(path, text, &mut errors));
        }
        given.extend(environment::read(sources.environment, &mut errors));
        for (option, key, value) in sources.arguments {
            let setting = SETTINGS.iter().find(|setting| setting.is(key));
            given.extend(setting.map(|setting| Given {
                setting,
                origin: Origin::Argument(option),
                value: value.as_str().into(),
            }));
        }
        let mut config = Config::defaults();
        let mut origins = BTreeMap::new();
        // Later ones win; those that they win over have to be right nevertheless.
        for Given {
            setting,
            origin,
            value,
        } in given
        {
            if (setting.apply)(&mut config, &value).is_none() {
                errors.push(setting.unexpected(origin.clone(), &value));
            }
            origins.insert(setting.name(), origin);
        }
        match sources.available_bytes {
            Some(available_bytes) if !config.memory.capacity_is_chosen => {
                config.memory.capacity_bytes = default_capacity(available_bytes, &config);
            }
            None if !config.memory.capacity_is_chosen => errors.push(ConfigError {
                origin: Origin::Default,
                key: "memory.capacity".into(),
                problem: "how much memory is available cannot be read here".into(),
                fix: "set it, such as to \"64GiB\"".into(),
            }),
            _ => {}
        }
        let mut settings = Self {
            config,
            origins,
            notices: Vec::new(),
        };
        if errors.is_empty() {
            errors.extend(settings.contradictions(sources.available_bytes));
        }
        if !errors.is_empty() {
            return Err(ConfigErrors(errors));
        }
        settings.notices = settings.remarks();
        Ok(settings)
    }

    /// Where the value of `section.key` came from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// What is wrong with values that are right one by one.
    fn contradictions(&self, available_bytes: Option<u64>) -> Vec<ConfigError> {
        let Config { memory, limits, .. } = &self.config;
        let wrong = |key: &str, problem: String, fix: String| ConfigError {
            origin: self.origin(key),
            key: key.to_owned(),
            problem,
            fix,
        };
        let (capacity, extent) = (memory.capacity_bytes, memory.extent_bytes);
        let mut errors = Vec::new();
        if let Some(available_bytes) = available_bytes
            && capacity > available_bytes
        {
            errors.push(wrong(
                "memory.capacity",
                format!(
                    "{} is more than the {} of memory that this process can take",
                    exact_size(capacity),
                    exact_size(available_bytes)
                ),
                "lower it, or raise the memory limit of the container or the unit".into(),
            ));
        }
        if extent > capacity {
            errors.push(wrong(
                "memory.extent",
                format!(
                    "an extent of {} does not fit into the capacity of {}",
                    exact_size(extent),
                    exact_size(capacity)
                ),
                "lower it, or raise memory.capacity".into(),
            ));
        }
        if limits.minimum_bytes > capacity {
            errors.push(wrong(
                "limits.minimum",
                format!(
                    "{} is more than the capacity of {}",
                    exact_size(limits.minimum_bytes),
                    exact_size(capacity)
                ),
                "lower it, or raise memory.capacity".into(),
            ));
        }
        let kept = self.kept_bytes();
        if kept > capacity {
            errors.push(wrong(
                "limits.minimums",
                format!(
                    "together, in whole extents, they are {}, which is more than the capacity of {}",
                    exact_size(kept),
                    exact_size(capacity)
                ),
                "lower one, or raise memory.capacity".into(),
            ));
        }
        let is_small = |bytes: u64| bytes < extent;
        let mut named = limits.quotas.iter();
        if let Some((tenant, &bytes)) = named.find(|&(_, &bytes)| is_small(bytes)) {
            errors.push(wrong(
                "limits.quotas",
                format!(
                    "the {} of {tenant:?} are less than an extent",
                    exact_size(bytes)
                ),
                format!(
                    "set it to {} at least, or lower memory.extent",
                    exact_size(extent)
                ),
            ));
        }
        if let Some(bytes) = limits.quota_bytes.filter(|bytes| is_small(*bytes)) {
            errors.push(wrong(
                "limits.quota",
                format!("{} is less than an extent", exact_size(bytes)),
                format!(
                    "set it to {} at least, or lower memory.extent",
                    exact_size(extent)
                ),
            ));
        }
        errors
    }

    /// What is kept for those that `limits.minimums` names, in whole extents.
    fn kept_bytes(&self) -> u64 {
        let extent = self.config.memory.extent_bytes.max(1);
        let minimums = self.config.limits.minimums.values();
        let kept = minimums.map(|bytes| bytes.div_ceil(extent).saturating_mul(extent));
        kept.fold(0, u64::saturating_add)
    }

    /// What works, and may not be meant.
    fn remarks(&self) -> Vec<String> {
        let Config {
            socket,
            memory,
            limits,
            ..
        } = &self.config;
        let mut notices = Vec::new();
        if socket.mode & 0o002 != 0 && socket.allow_uids.is_empty() && socket.allow_gids.is_empty()
        {
            notices.push(
                "every user of this machine may connect: socket.mode lets others write, and \
                 neither socket.allow_uids nor socket.allow_gids names anybody"
                    .to_owned(),
            );
        }
        if memory.capacity_bytes / memory.extent_bytes < 4 {
            notices.push(format!(
                "the capacity of {} has room for {} extents of {}, so hardly more than one model \
                 finds space; lower memory.extent",
                exact_size(memory.capacity_bytes),
                memory.capacity_bytes / memory.extent_bytes,
                exact_size(memory.extent_bytes)
            ));
        }
        let left = memory.capacity_bytes.saturating_sub(self.kept_bytes());
        if !limits.minimums.is_empty() && left < limits.minimum_bytes.max(memory.extent_bytes) {
            notices.push(format!(
                "limits.minimums leaves {} to models that it does not name; lower one, or raise \
                 memory.capacity",
                exact_size(left)
            ));
        }
        notices
    }
}

/// A quarter of what is available, in whole extents, of which there is at least one.
fn default_capacity(available_bytes: u64, config: &Config) -> u64 {
    let extent = config.memory.extent_bytes.max(1);
    (available_bytes / 4 / extent).max(1) * extent
}

impl Config {
    fn defaults() -> Self {
        Self {
            memory: Memory {
                capacity_bytes: 0,
                capacity_is_chosen: false,
                directory: PathBuf::from("/dev/shm"),
                name: "pool".to_owned(),
                extent_bytes: 256 << 20,
                huge_pages: HugePages::Auto,
                numa: Numa::AsTold,
            },
            socket: Socket {
                path: PathBuf::from(crate::DEFAULT_SOCKET),
                mode: 0o660,
                owner: None,
                group: None,
                allow_uids: Vec::new(),
                allow_gids: Vec::new(),
            },
            http_listen: Some(SocketAddr::from(([127, 0, 0, 1], 9462))),
            limits: Limits {
                sessions: MOST_SESSIONS,
                minimum_bytes: 0,
                minimums: BTreeMap::new(),
                quota_bytes: None,
                quotas: BTreeMap::new(),
            },
            scrub_bytes_per_s: 32 << 20,
            eviction: Eviction::Lru,
            // Saves in flight take a second or two, on a loaded machine a few more.
            grace: Duration::from_secs(30),
            log: Log {
                level: "info".to_owned(),
                format: LogFormat::Text,
            },
        }
    }
}

#[cfg(test)]
mod tests;
