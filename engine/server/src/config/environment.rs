//! Which environment variables are meant for the daemon: `KVTIDE_SERVE_<SECTION>_<KEY>`.
//!
//! Nothing else is looked at, and an empty one is as none.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::setting::{SETTINGS, Setting};
use super::{ConfigError, Given, Origin};

const PREFIX: &str = "KVTIDE_SERVE_";
/// What Kubernetes sets in every pod for a Service named `kvtide-serve…` has one of these in it.
const OF_SERVICES: [&str; 3] = ["_SERVICE_HOST_", "_SERVICE_PORT_", "_PORT_"];

/// What the environment sets. What is wrong with it goes to `errors`.
pub(super) fn read(
    variables: &BTreeMap<OsString, OsString>,
    errors: &mut Vec<ConfigError>,
) -> Vec<Given> {
    let mut given = Vec::new();
    for (name, value) in variables.iter().filter(|(_, value)| !value.is_empty()) {
        if !name.as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let name = name.to_string_lossy();
        let Some(setting) = SETTINGS.iter().find(|setting| setting.variable() == name) else {
            if !is_of_a_service(&name) {
                errors.push(unknown(&name));
            }
            continue;
        };
        let origin = Origin::Variable(name.into_owned());
        let Some(text) = value.to_str() else {
            errors.push(ConfigError {
                origin,
                key: setting.name(),
                problem: format!("{value:?} is not UTF-8"),
                fix: "set it to text in UTF-8, or unset it".into(),
            });
            continue;
        };
        given.push(Given {
            setting,
            origin,
            value: text.into(),
        });
    }
    given
}

fn is_of_a_service(name: &str) -> bool {
    let key = format!("_{}_", &name[PREFIX.len()..]);
    OF_SERVICES.iter().any(|part| key.contains(part))
}

fn unknown(name: &str) -> ConfigError {
    let nearness = |setting: &&Setting| strsim::jaro_winkler(&setting.variable(), name);
    let nearest = SETTINGS
        .iter()
        .max_by(|a, b| nearness(a).total_cmp(&nearness(b)))
        .map(Setting::variable);
    ConfigError {
        origin: Origin::Variable(name.to_owned()),
        key: name[PREFIX.len()..].to_lowercase(),
        problem: "there is no such setting".into(),
        fix: format!("did you mean {}?", nearest.unwrap_or_default()),
    }
}
