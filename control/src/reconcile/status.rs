//! What all kinds say in their status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::conditions::REPLICA_FAILURE;
use super::error::Error;
use crate::api::{Condition, set_condition};

/// Tells of the last write that was refused, or that none was.
pub(super) fn note_failure(all: &mut Vec<Condition>, failure: Option<&Error>, now: &Time) {
    match failure {
        Some(error) => {
            set_condition(
                all,
                REPLICA_FAILURE,
                true,
                "Failure",
                error.to_string(),
                now,
            );
        }
        None => all.retain(|condition| condition.kind != REPLICA_FAILURE),
    }
}
