//! The pool's configuration, from vLLM's `kv_connector_extra_config` and the environment.
//!
//! For every key, the extra configuration wins over `KVTIDE_<KEY>`, and that over the variable that
//! AIBrix users have set already. An empty variable is as none. Unknown keys, also unknown `KVTIDE_*`
//! variables, are refused: a setting that is silently ignored is worse than none.

mod aibrix;
mod engine;
mod environment;
mod pool;
mod setting;

use std::collections::BTreeMap;
use std::ffi::OsString;

use serde_json::{Map, Value};

use environment::Environment;
use setting::settings;

pub use engine::{EngineConfig, LoadMode, Verify};
pub use pool::{Eviction, PoolConfig, PoolPlace};

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Of the pool.
    pub pool: PoolConfig,
    /// Of the engine itself.
    pub engine: EngineConfig,
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

impl ConfigError {
    fn unexpected(source: &str, value: &Value, expects: &str) -> Self {
        Self {
            problem: format!("{value} is not {expects}"),
            fix: format!("set it to {expects}"),
            key: source.to_owned(),
        }
    }
}

/// A configuration, and what the user should know of how it came about.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The configuration.
    pub config: Config,
    /// One sentence each, to be logged as a warning.
    pub notices: Vec<String>,
}

impl Config {
    /// Reads the configuration of an engine of so many `ranks`; `environment` may hold anything, only
    /// the variables meant for kvtide are looked at. `memory_bytes` is the host's available memory,
    /// from which the default capacity follows.
    ///
    /// # Errors
    /// [`ConfigError`] for the first setting that is unknown or has a wrong value.
    pub fn read(
        extra: &Map<String, Value>,
        environment: &BTreeMap<OsString, OsString>,
        ranks: u32,
        memory_bytes: u64,
    ) -> Result<Settings, ConfigError> {
        let mut config = Self::defaults(memory_bytes);
        for key in extra.keys() {
            setting::require_known(key, key)?;
        }
        let environment = Environment::read(environment)?;
        let mut notices = Vec::new();
        let mut of_own_pool = Vec::new();
        for setting in settings() {
            let source = if let Some(value) = extra.get(setting.key) {
                setting.read(&mut config, setting.key, value)?;
                setting.key
            } else if let Some((name, value)) = environment.own(setting.key) {
                setting.read(&mut config, name, &value)?;
                name
            } else if let Some((variable, value)) = environment.aibrix(setting.key) {
                notices.extend(variable.read(&mut config, &value, ranks)?);
                variable.name
            } else {
                continue;
            };
            of_own_pool.extend(setting.of_own_pool.then_some(source));
        }
        if let PoolPlace::Socket(socket) = &config.pool.place {
            // Nor does what was said of them above.
            notices.clear();
            let socket = socket.display();
            notices.extend(of_own_pool.iter().map(|source| {
                format!("{source} has no effect: the pool is that of the daemon at {socket}")
            }));
        }
        notices.extend(aibrix::notice_of_ignored(environment.aibrix_names()));
        Ok(Settings { config, notices })
    }

    fn defaults(memory_bytes: u64) -> Self {
        Self {
            pool: PoolConfig::defaults(memory_bytes),
            engine: EngineConfig::defaults(),
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
