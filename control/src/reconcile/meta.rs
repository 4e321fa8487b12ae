//! What all reconcilers read of an object's metadata.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DeserializeGuard;
use kvtide_control_api::{StormService, keys};
use serde_json::{Value, json};

/// Namespace and name.
pub(super) fn names_of(meta: &ObjectMeta) -> (&str, &str) {
    (
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

/// The uid.
pub(super) fn uid_of(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

/// A label, empty where there is none.
pub(super) fn label<'a>(meta: &'a ObjectMeta, key: &str) -> &'a str {
    let labels = meta.labels.as_ref();
    labels
        .and_then(|labels| labels.get(key))
        .map_or("", String::as_str)
}

/// An annotation.
pub(super) fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    let annotations = meta.annotations.as_ref()?;
    annotations.get(key).map(String::as_str)
}

/// Where in its group a pod is.
pub(super) fn group_index(meta: &ObjectMeta) -> Option<i32> {
    label(meta, keys::POD_GROUP_INDEX).parse().ok()
}

/// Whether a StormService is paused. Of one that cannot be read nobody knows.
pub(crate) fn is_paused(service: &DeserializeGuard<StormService>) -> bool {
    let service = service.0.as_ref();
    service.map_or(true, |service| service.spec.paused)
}

/// The role that a StormService with this metadata is scaled by, where it names one.
pub(crate) fn scaling_role(meta: &ObjectMeta) -> Option<&str> {
    annotation(meta, keys::SCALING_ROLE)
}

/// A patch of metadata that adds a finalizer where it is missing, and is empty where it is not. It is of
/// the version that was looked at: a finalizer that somebody just added is not lost.
pub(super) fn finalizer_patch(meta: &ObjectMeta, finalizer: &str) -> Value {
    let mut finalizers = meta.finalizers.clone().unwrap_or_default();
    if finalizers.iter().any(|held| held == finalizer) {
        return json!({"metadata": {}});
    }
    finalizers.push(finalizer.to_owned());
    json!({"metadata": {"finalizers": finalizers, "resourceVersion": meta.resource_version}})
}
