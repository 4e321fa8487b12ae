//! Finalizer and marks of a PodSet.

use kvtide_control_api::meta::{finalizer_patch, uid_of};
use kvtide_control_api::target::Target;
use kvtide_control_api::{PodSet, keys};
use kvtide_control_core::restarts::Baseline;
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;
use serde_json::{Map, Value, json};

use super::observe::baseline;
use crate::context::Context;

/// Puts finalizer and marks on a PodSet that lacks them. Returns whether anything was written.
pub(super) async fn prepare(
    set: &PodSet,
    target: &Target,
    context: &Context,
) -> Result<bool, Error> {
    let meta = &set.metadata;
    let (namespace, name) = target.names();
    let mut patch = finalizer_patch(meta, keys::POD_SET_FINALIZER);
    let counts = set.spec.recovery_policy.unwrap_or_default().recreates_all();
    match (counts, baseline(meta)) {
        (true, None) => {
            let pods = context.pods_of(&target.uid);
            let restarts = pods
                .iter()
                .map(|pod| (uid_of(&pod.metadata), pod.restarts()));
            let baseline = Baseline::of(restarts).write();
            patch["metadata"]["annotations"][keys::RESTARTS_BEFORE] = json!(baseline);
        }
        // The next time begins anew.
        (false, Some(_)) => {
            patch["metadata"]["annotations"][keys::RESTARTS_BEFORE] = Value::Null;
        }
        (true, Some(_)) | (false, None) => {}
    }
    if patch["metadata"].as_object().is_some_and(Map::is_empty) {
        return Ok(false);
    }
    let kind = resource::<PodSet>();
    context.writer.merge(&kind, namespace, name, &patch).await?;
    Ok(true)
}
