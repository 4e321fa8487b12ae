//! The object that is reconciled, as the children that are made for it name it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube_core::Resource;
use serde_json::{Value, json};

use crate::meta::Key;

/// Read once of the object's metadata.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where it is, and its children with it.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The reference that makes it the controller of a child.
    pub owner_ref: Value,
}

impl Target {
    /// The object of kind `K` with this metadata.
    #[must_use]
    pub fn of<K: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> Self {
        Self {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            owner_ref: json!({
                "apiVersion": K::api_version(&()),
                "kind": K::kind(&()),
                "name": meta.name,
                "uid": meta.uid,
                "controller": true,
                "blockOwnerDeletion": true,
            }),
        }
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> Key {
        Key {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }

    /// Namespace and name.
    #[must_use]
    pub fn names(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}
