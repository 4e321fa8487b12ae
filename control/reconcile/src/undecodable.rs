//! A stored object that the types cannot hold.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use kvtide_control_api::conditions;
use kvtide_control_api::meta::{names_of, uid_of};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;
use serde_json::json;

use super::context::Context;

/// In the ledger: what an object was told.
const PURPOSE: &str = "not readable";

/// That one can be read: should it not be any more, it is told again.
pub(super) fn readable(context: &Context, meta: &ObjectMeta) {
    context.ledger.forget_applied(uid_of(meta), PURPOSE);
}

/// It is told so, and left alone until it is deleted.
///
/// # Errors
///
/// When the API server refuses.
pub(super) async fn undecodable<K: Resource<DynamicType = ()>>(
    context: &Context,
    invalid: &InvalidObject,
) -> Result<Action, Error> {
    let meta = &invalid.metadata;
    let message = format!("the stored object cannot be read: {}", invalid.error);
    let uid = uid_of(meta);
    if !context.ledger.is_applied(uid, PURPOSE, &message) {
        let (namespace, name) = names_of(meta);
        tracing::warn!(kind = %K::kind(&()), %namespace, %name, error = %invalid.error, "not readable");
        let now = context.now();
        let status = json!({"status": {"conditions": [{
            "type": conditions::INVALID, "status": "True", "reason": "Unreadable",
            "message": message, "lastTransitionTime": now, "lastUpdateTime": now,
        }]}});
        context
            .writer
            .merge_status(&resource::<K>(), namespace, name, &status)
            .await?;
        // Not before: one that could not be told is told at the next look.
        context.ledger.applied(uid, PURPOSE, message);
    }
    Ok(Action::await_change())
}
