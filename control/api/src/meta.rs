//! What is read of an object's metadata, whatever its kind.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube_core::{DeserializeGuard, Resource, ResourceExt};
use serde_json::{Value, json};

use crate::{GROUP, StormService, keys};

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Namespace; empty for what has none.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// The key of an object.
#[must_use]
pub fn key_of<K: Resource>(object: &K) -> Key {
    Key {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

/// Namespace and name.
#[must_use]
pub fn names_of(meta: &ObjectMeta) -> (&str, &str) {
    (
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

/// The uid.
#[must_use]
pub fn uid_of(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

/// A resource version as a number, by which versions of one object compare.
#[must_use]
pub fn version_of(meta: &ObjectMeta) -> u64 {
    meta.resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or(0)
}

/// Uid of the controller of an object.
#[must_use]
pub fn owner_uid(meta: &ObjectMeta) -> Option<&str> {
    let references = meta.owner_references.as_deref().unwrap_or_default();
    references
        .iter()
        .find(|owner| owner.controller == Some(true))
        .map(|owner| owner.uid.as_str())
}

/// Key of the controller of an object, where that is of `kind`.
#[must_use]
pub fn owner_key(meta: &ObjectMeta, kind: &str) -> Option<Key> {
    let references = meta.owner_references.as_deref().unwrap_or_default();
    let owner = references
        .iter()
        .find(|owner| owner.controller == Some(true))?;
    let ours = owner.kind == kind && owner.api_version.starts_with(GROUP);
    ours.then(|| Key {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: owner.name.clone(),
    })
}

/// A label, empty where there is none.
#[must_use]
pub fn label<'a>(meta: &'a ObjectMeta, key: &str) -> &'a str {
    let labels = meta.labels.as_ref();
    labels
        .and_then(|labels| labels.get(key))
        .map_or("", String::as_str)
}

/// An annotation.
#[must_use]
pub fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    let annotations = meta.annotations.as_ref()?;
    annotations.get(key).map(String::as_str)
}

/// Where in its group a pod is.
#[must_use]
pub fn group_index(meta: &ObjectMeta) -> Option<i32> {
    label(meta, keys::POD_GROUP_INDEX).parse().ok()
}

/// Whether a StormService is paused. Of one that cannot be read nobody knows.
#[must_use]
pub fn is_paused(service: &DeserializeGuard<StormService>) -> bool {
    let service = service.0.as_ref();
    service.map_or(true, |service| service.spec.paused)
}

/// The role that a StormService with this metadata is scaled by, where it names one.
#[must_use]
pub fn scaling_role(meta: &ObjectMeta) -> Option<&str> {
    annotation(meta, keys::SCALING_ROLE)
}

/// A patch of metadata that adds a finalizer where it is missing, and is empty where it is not. It is of
/// the version that was looked at: a finalizer that somebody just added is not lost.
#[must_use]
pub fn finalizer_patch(meta: &ObjectMeta, finalizer: &str) -> Value {
    let mut finalizers = meta.finalizers.clone().unwrap_or_default();
    if finalizers.iter().any(|held| held == finalizer) {
        return json!({"metadata": {}});
    }
    finalizers.push(finalizer.to_owned());
    json!({"metadata": {"finalizers": finalizers, "resourceVersion": meta.resource_version}})
}

/// Seconds since the epoch; 0 for none.
#[must_use]
pub fn seconds(time: Option<&Time>) -> i64 {
    time.map_or(0, |time| time.0.as_second())
}
