//! Environment variables that look like settings and are none: who misspells the one that names the
//! file of keys should hear of it. Pure.

use std::collections::HashSet;

use clap::{Args, Command};

use crate::ServeArgs;

const PREFIX: &str = "KVTIDE_BATCH_";
/// What Kubernetes sets in a container beside a Service named kvtide-batch begins like this.
const OF_A_SERVICE: [&str; 2] = ["SERVICE_", "PORT"];

/// Those among `set` that mean nothing to the server.
pub(super) fn unknown(set: impl Iterator<Item = String>) -> Vec<String> {
    let command = ServeArgs::augment_args(Command::new("batch"));
    let known: HashSet<&str> = command
        .get_arguments()
        .filter_map(|argument| argument.get_env()?.to_str())
        .collect();
    let is_unknown = |name: &String| {
        name.strip_prefix(PREFIX).is_some_and(|rest| {
            !known.contains(name.as_str())
                && !OF_A_SERVICE.iter().any(|begin| rest.starts_with(begin))
        })
    };
    let mut unknown: Vec<String> = set.filter(is_unknown).collect();
    unknown.sort();
    unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_setting_is_found_and_what_kubernetes_sets_is_not() {
        let set = [
            "KVTIDE_BATCH_KEYS",
            "KVTIDE_BATCH_KEY",
            "KVTIDE_BATCH_LISTEN",
            "KVTIDE_BATCH_SERVICE_PORT_HTTP",
            "KVTIDE_BATCH_PORT",
            "KVTIDE_BATCH_PORT_8090_TCP",
            "KVTIDE_LOG",
            "PATH",
        ];
        let found = unknown(set.into_iter().map(str::to_owned));
        assert_eq!(found, ["KVTIDE_BATCH_KEY"]);
    }

    #[test]
    fn every_option_has_the_variable_that_its_name_says() {
        let command = ServeArgs::augment_args(Command::new("batch"));
        for argument in command.get_arguments() {
            let (Some(long), Some(env)) = (argument.get_long(), argument.get_env()) else {
                panic!("{} has no variable", argument.get_id());
            };
            let expected = match long {
                "api-keys" => "KVTIDE_API_KEYS".to_owned(),
                long => format!("{PREFIX}{}", long.to_uppercase().replace('-', "_")),
            };
            assert_eq!(env.to_str(), Some(expected.as_str()));
        }
    }
}
