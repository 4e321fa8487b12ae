//! The pool's configuration, from vLLM's `kv_connector_extra_config` and the environment.
//!
//! For every key, the extra configuration wins over `KVTIDE_<KEY>`, and that over the variable that
//! AIBrix users have set already. An empty variable is as none. Unknown keys, also unknown `KVTIDE_*`
//! variables, are refused: a setting that is silently ignored is worse than none.

mod aibrix;
mod environment;
mod setting;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use kvtide_kernels::Codec;
use kvtide_kernels::copy::CudaOptions;
use kvtide_segment::HugePages;
use serde_json::{Map, Value};

use environment::Environment;
use setting::SETTINGS;

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

/// Whose the pool is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolPlace {
    /// The engine's own, in the process of its scheduler.
    Embedded,
    /// That of the daemon which listens on this socket.
    Socket(PathBuf),
}

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Whose the pool is.
    pub pool: PoolPlace,
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
    /// How long an async load may take, from when workers are given it, before it counts as failed.
    pub load_timeout: Duration,
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
        for setting in SETTINGS {
            if let Some(value) = extra.get(setting.key) {
                setting.read(&mut config, setting.key, value)?;
            } else if let Some((name, value)) = environment.own(setting.key) {
                setting.read(&mut config, name, &value)?;
            } else if let Some((variable, value)) = environment.aibrix(setting.key) {
                notices.extend(variable.read(&mut config, &value, ranks)?);
            }
        }
        notices.extend(aibrix::notice_of_ignored(environment.aibrix_names()));
        Ok(Settings { config, notices })
    }

    fn defaults(memory_bytes: u64) -> Self {
        Self {
            pool: PoolPlace::Embedded,
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
            // All loads in flight have blocks in the engine's KV cache: 100 GB of them take 20 s at
            // 5 GB/s, a slow link. A prompt that has waited longer is computed sooner than loaded.
            load_timeout: Duration::from_secs(30),
            tenant: None,
            weights_revision: None,
            segment_directory: PathBuf::from("/dev/shm"),
            huge_pages: HugePages::Auto,
            gpu_routes: CudaOptions::default(),
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
