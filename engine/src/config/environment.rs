//! Which environment variables are meant for the pool.
//!
//! Nothing else is looked at: a variable of somebody else may hold any bytes.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

use serde_json::Value;

use super::ConfigError;
use super::aibrix;
use super::setting::require_known;

const PREFIX: &str = "KVTIDE_";

/// Variables `KVTIDE_<KEY>` of the daemon, of the control plane, of the tools and of the tests, which may stand in
/// the same ConfigMap or shell.
const OF_OTHERS: [&str; 6] = [
    "API_KEYS",
    "CACHE",
    "LISTEN",
    "LOG",
    "LOG_FORMAT",
    "NAMESPACE",
];
/// What such keys begin with.
const PREFIXES_OF_OTHERS: [&str; 6] = [
    "BATCH_", "BENCH_", "CONTROL_", "KUBE_", "REQUIRE_", "SERVE_",
];
/// What the keys have in them that Kubernetes sets in every pod for a Service named `kvtide…`.
const OF_SERVICES: [&str; 3] = ["SERVICE_HOST", "SERVICE_PORT", "PORT"];

/// The variables of kvtide and of AIBrix that are set to something.
#[derive(Debug, Default)]
pub(super) struct Environment<'a> {
    /// Of kvtide, by the key of the setting.
    own: BTreeMap<String, (&'a str, &'a str)>,
    aibrix: BTreeMap<&'a str, &'a OsStr>,
}

impl<'a> Environment<'a> {
    /// Refuses variables that look like settings and are none.
    pub(super) fn read(variables: &'a BTreeMap<OsString, OsString>) -> Result<Self, ConfigError> {
        let mut read = Self::default();
        for (name, value) in variables.iter().filter(|(_, value)| !value.is_empty()) {
            let starts_with = |prefix: &str| name.as_encoded_bytes().starts_with(prefix.as_bytes());
            if starts_with(aibrix::PREFIX) {
                read.aibrix
                    .extend(name.to_str().map(|name| (name, value.as_os_str())));
            } else if starts_with(PREFIX) {
                let lossy = name.to_string_lossy();
                let key = lossy.strip_prefix(PREFIX).unwrap_or_default();
                if is_for_others(key) {
                    continue;
                }
                let key = key.to_lowercase();
                require_known(&key, &lossy)?;
                if let Some(name) = name.to_str() {
                    read.own.insert(key, (name, text(name, value)?));
                }
            }
        }
        for variable in &aibrix::VARIABLES {
            if let Some(value) = read.aibrix.get(variable.name) {
                text(variable.name, value)?;
            }
        }
        Ok(read)
    }

    /// The variable of kvtide for a setting, and its value.
    pub(super) fn own(&self, key: &str) -> Option<(&'a str, Value)> {
        let &(name, value) = self.own.get(key)?;
        Some((name, value.into()))
    }

    /// The variable of AIBrix for a setting, and its value.
    pub(super) fn aibrix(&self, key: &str) -> Option<(&'static aibrix::Variable, Value)> {
        let variable = aibrix::VARIABLES.iter().find(|v| v.key == key)?;
        let value = self.aibrix.get(variable.name)?.to_str()?;
        Some((variable, value.into()))
    }

    /// Names of all variables of AIBrix's KV cache that are set.
    pub(super) fn aibrix_names(&self) -> impl Iterator<Item = &'a str> {
        self.aibrix.keys().copied()
    }
}

/// A value as text.
fn text<'a>(name: &str, value: &'a OsStr) -> Result<&'a str, ConfigError> {
    value.to_str().ok_or_else(|| ConfigError {
        key: name.to_owned(),
        problem: format!("{value:?} is not UTF-8"),
        fix: "set it to text in UTF-8, or unset it".into(),
    })
}

/// Whether the variable `KVTIDE_<key>` means something, but not to the pool.
fn is_for_others(key: &str) -> bool {
    OF_OTHERS.contains(&key)
        || PREFIXES_OF_OTHERS
            .iter()
            .any(|prefix| key.starts_with(prefix))
        || OF_SERVICES
            .iter()
            .any(|of_service| format!("_{key}_").contains(&format!("_{of_service}_")))
}
