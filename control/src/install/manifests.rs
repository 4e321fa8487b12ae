//! The objects of `control/deploy` less the CRDs, as this build was made with them.

use anyhow::Context;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::core::GroupVersionKind;
use kube::{Client, ResourceExt};
use serde::Deserialize;

const PROTECTION: &str = include_str!("../../deploy/protection.yaml");
const WEBHOOK: &str = include_str!("../../deploy/webhook.yaml");
const CONTROLLER: &str = include_str!("../../deploy/controller.yaml");
const RIGHTS: &str = include_str!("../../deploy/rbac.yaml");

/// What keeps the CRDs from being deleted.
///
/// # Errors
///
/// When a manifest is not YAML; a test covers all.
pub(super) fn protection() -> anyhow::Result<Vec<DynamicObject>> {
    read(&[PROTECTION])
}

/// What the API server asks at every write.
///
/// # Errors
///
/// As above.
pub(super) fn webhook() -> anyhow::Result<Vec<DynamicObject>> {
    read(&[WEBHOOK])
}

/// The controller.
///
/// # Errors
///
/// As above.
pub(super) fn controller() -> anyhow::Result<Vec<DynamicObject>> {
    read(&[CONTROLLER])
}

/// What it may do.
///
/// # Errors
///
/// As above.
pub(super) fn rights() -> anyhow::Result<Vec<DynamicObject>> {
    read(&[RIGHTS])
}

fn read(manifests: &[&str]) -> anyhow::Result<Vec<DynamicObject>> {
    let documents = manifests
        .iter()
        .flat_map(|manifest| serde_norway::Deserializer::from_str(manifest));
    documents
        .map(|document| DynamicObject::deserialize(document).context("reading the manifests"))
        .collect()
}

/// Where an object of the manifests is, in an installation in `namespace`.
pub(super) fn api_of(
    client: &Client,
    object: &DynamicObject,
    namespace: &str,
) -> Api<DynamicObject> {
    let types = object.types.clone().unwrap_or_default();
    let (group, version) = types
        .api_version
        .split_once('/')
        .unwrap_or(("", types.api_version.as_str()));
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &types.kind));
    match object.namespace() {
        Some(_) => Api::namespaced_with(client.clone(), namespace, &kind),
        None => Api::all_with(client.clone(), &kind),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_object_that_is_installed_is_known() {
        let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/");
        let list = std::fs::read_to_string(format!("{deploy}kustomization.yaml")).unwrap();
        let list: serde_json::Value = serde_norway::from_str(&list).unwrap();
        let mut installed = BTreeSet::new();
        for file in list["resources"].as_array().unwrap() {
            // The CRDs have a test of their own, and the namespace is left to whoever uses it.
            let file = file.as_str().unwrap();
            if !["crds.yaml", "namespace.yaml"].contains(&file) {
                let text = std::fs::read_to_string(format!("{deploy}{file}")).unwrap();
                installed.extend(read(&[&text]).unwrap().iter().map(name_of));
            }
        }
        let parts = [protection(), webhook(), controller(), rights()];
        let known = parts.into_iter().flat_map(Result::unwrap);
        assert_eq!(
            known
                .map(|object| name_of(&object))
                .collect::<BTreeSet<_>>(),
            installed
        );
    }

    fn name_of(object: &DynamicObject) -> String {
        let kind = object.types.clone().unwrap_or_default().kind;
        format!("{kind} {}", object.name_any())
    }
}
