//! Variables that users of AIBrix's KV cache offloading have set already.
//!
//! Those that mean what a setting of kvtide means are read, others are named in the log.

use serde_json::Value;

use super::setting::{capacity, choose};
use super::{Config, ConfigError, Eviction};

pub(super) const PREFIX: &str = "AIBRIX_KV_CACHE_OL_";

/// A variable of AIBrix that is read where `key` is not set.
pub(super) struct Variable {
    pub(super) name: &'static str,
    pub(super) key: &'static str,
    expects: &'static str,
    /// Takes the value of an engine of so many ranks; returns what the user should know.
    apply: fn(&mut Config, &Value, u32) -> Option<Vec<String>>,
}

pub(super) const VARIABLES: [Variable; 2] = [
    Variable {
        name: "AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB",
        key: "host_capacity_gb",
        expects: "a number of GiB for each rank, above 0",
        apply: |config, value, ranks| {
            config.pool.host_capacity_bytes = capacity(value, ranks)?;
            let text = value.as_str().unwrap_or_default();
            let notice = format!(
                "AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB is for each rank: the pool of {ranks} ranks \
                 has {ranks} x {text} GiB; host_capacity_gb is for all ranks together"
            );
            Some((ranks > 1).then_some(notice).into_iter().collect())
        },
    },
    Variable {
        name: "AIBRIX_KV_CACHE_OL_L1_CACHE_EVICTION_POLICY",
        key: "eviction",
        expects: "\"S3FIFO\", \"LRU\" or \"FIFO\"",
        apply: |config, value, _| {
            let policies = [
                ("s3fifo", (Eviction::S3Fifo, false)),
                ("lru", (Eviction::Lru, false)),
                // Both keep a block for one turnover of the pool; LRU counts it from the last use.
                // S3-FIFO would give up most blocks within a tenth of that.
                ("fifo", (Eviction::Lru, true)),
            ];
            let (eviction, other) = choose(value, &policies)?;
            config.pool.eviction = eviction;
            let notice = "AIBRIX_KV_CACHE_OL_L1_CACHE_EVICTION_POLICY is FIFO, which kvtide does not \
                          have: it uses \"lru\"; set eviction to \"lru\" or \"s3fifo\"";
            Some(other.then(|| notice.to_owned()).into_iter().collect())
        },
    },
];

impl Variable {
    /// Takes `value` into `config`; returns what the user should know.
    pub(super) fn read(
        &self,
        config: &mut Config,
        value: &Value,
        ranks: u32,
    ) -> Result<Vec<String>, ConfigError> {
        (self.apply)(config, value, ranks)
            .ok_or_else(|| ConfigError::unexpected(self.name, value, self.expects))
    }
}

/// Names those of AIBrix's variables that are set and mean nothing here.
pub(super) fn notice_of_ignored<'a>(set: impl Iterator<Item = &'a str>) -> Option<String> {
    let is_read = |name: &str| VARIABLES.iter().any(|variable| variable.name == name);
    let ignored: Vec<&str> = set.filter(|name| !is_read(name)).collect();
    let those = ignored.join(", ");
    (!ignored.is_empty())
        .then(|| format!("kvtide does not read these variables of AIBrix: {those}"))
}
