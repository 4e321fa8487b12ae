//! Settings of the pool. Where it is a daemon's, most of them are the daemon's.

use std::path::{Path, PathBuf};

use kvtide_segment::HugePages;

use super::setting::{Setting, boolean, capacity, choose, number, whole};

/// Which eviction policy the pool uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// S3-FIFO: resistant to scans.
    S3Fifo,
    /// Least recently used.
    Lru,
}

/// Whose the pool is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolPlace {
    /// The engine's own, in the process of its scheduler.
    Embedded,
    /// That of the daemon which listens on this socket.
    Socket(PathBuf),
}

/// What is configured of the pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolConfig {
    /// Whose it is.
    pub place: PoolPlace,
    /// Whether the engine does not start without the daemon whose pool it uses.
    pub required: bool,
    /// Bytes of the pool in host memory.
    pub host_capacity_bytes: u64,
    /// Eviction policy.
    pub eviction: Eviction,
    /// Rate of the background scrub; 0 turns it off.
    pub scrub_bytes_per_second: u64,
    /// Where the shared segment lies.
    pub segment_directory: PathBuf,
    /// Whether huge pages are used.
    pub huge_pages: HugePages,
}

impl PoolConfig {
    /// What holds where nothing is set, on a host with so much available memory.
    pub(super) fn defaults(memory_bytes: u64) -> Self {
        Self {
            place: PoolPlace::Embedded,
            // An engine without a cache serves; one that is not there does not.
            required: false,
            // AIBrix's default, or a quarter of what there is on a small host.
            host_capacity_bytes: (10 << 30).min(memory_bytes / 4),
            // S3-FIFO gives up what is not asked for again within a tenth of the pool's turnover, and
            // what comes back that soon is answered by the engine's own cache: see the decisions in
            // docs/architecture.md.
            eviction: Eviction::Lru,
            scrub_bytes_per_second: 32 << 20,
            segment_directory: PathBuf::from("/dev/shm"),
            huge_pages: HugePages::Auto,
        }
    }
}

/// All of them.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "pool",
        of_own_pool: false,
        expects: "\"embedded\" or the socket of `kvtide serve`, such as \"unix:/run/kvtide/kvtide.sock\"",
        apply: |config, value| {
            config.pool.place = match value.as_str()? {
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
        key: "pool_required",
        of_own_pool: false,
        expects: "true or false",
        apply: |config, value| {
            config.pool.required = boolean(value)?;
            Some(())
        },
    },
    Setting {
        key: "host_capacity_gb",
        of_own_pool: true,
        expects: "a number of GiB above 0, such as 32 or 0.5",
        apply: |config, value| {
            config.pool.host_capacity_bytes = capacity(value, 1)?;
            Some(())
        },
    },
    Setting {
        key: "eviction",
        of_own_pool: true,
        expects: "\"s3fifo\" or \"lru\"",
        apply: |config, value| {
            config.pool.eviction = choose(
                value,
                &[("s3fifo", Eviction::S3Fifo), ("lru", Eviction::Lru)],
            )?;
            Some(())
        },
    },
    Setting {
        key: "scrub_mib_per_s",
        of_own_pool: true,
        expects: "a number of MiB per second, 0 for none",
        apply: |config, value| {
            let mib = number(value).filter(|mib| (0.0..1e6).contains(mib))?;
            config.pool.scrub_bytes_per_second = whole(mib * 1_048_576.0)?;
            Some(())
        },
    },
    Setting {
        key: "segment_directory",
        of_own_pool: true,
        expects: "an existing directory on shared memory, such as \"/dev/shm\"",
        apply: |config, value| {
            config.pool.segment_directory =
                Some(PathBuf::from(value.as_str()?)).filter(|d| d.is_dir())?;
            Some(())
        },
    },
    Setting {
        key: "huge_pages",
        of_own_pool: true,
        expects: "\"auto\", \"off\" or \"require\"",
        apply: |config, value| {
            let choices = [
                ("auto", HugePages::Auto),
                ("off", HugePages::Off),
                ("require", HugePages::Require),
            ];
            config.pool.huge_pages = choose(value, &choices)?;
            Some(())
        },
    },
];
