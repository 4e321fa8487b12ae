//! How the requests for a model fare: for `/status`.

use std::collections::BTreeMap;

use serde::Serialize;

/// Why a tenant's requests for a model are paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Nobody answers.
    Unavailable,
    /// The upstream refuses this server's key.
    Refused,
    /// The upstream asks for less: 429.
    RateLimited,
}

/// The requests for a model, of all tenants for whom it is in the same condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Standing {
    /// The model.
    pub model: String,
    /// What is wrong, if something is.
    pub condition: Option<Condition>,
    /// How many tenants these are.
    pub tenants: usize,
    /// Requests that are being sent or answered.
    pub in_flight: usize,
    /// Requests that have failed and wait to be sent again.
    pub to_repeat: usize,
    /// Seconds until the first of the tenants asks again, where all wait.
    pub paused_for_s: Option<u64>,
}

impl Standing {
    /// Adds up those for the same model in the same condition.
    pub(super) fn together(each: impl Iterator<Item = Standing>) -> Vec<Standing> {
        let mut together: BTreeMap<(String, Option<Condition>), Standing> = BTreeMap::new();
        for one in each {
            let key = (one.model.clone(), one.condition);
            let Some(sum) = together.get_mut(&key) else {
                together.insert(key, one);
                continue;
            };
            sum.tenants += one.tenants;
            sum.in_flight += one.in_flight;
            sum.to_repeat += one.to_repeat;
            // None, somebody asks, is the least.
            sum.paused_for_s = sum.paused_for_s.min(one.paused_for_s);
        }
        together.into_values().collect()
    }
}
