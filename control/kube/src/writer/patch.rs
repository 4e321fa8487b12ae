//! Writes that change a part of an object.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, Patch, PatchParams};
use kvtide_control_api::meta::{names_of, uid_of, version_of};
use serde::Serialize;
use serde_json::{Value, json};

use super::{FIELD_MANAGER, Writer};
use crate::error::{Error, is_not_found};

fn ours() -> PatchParams {
    PatchParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PatchParams::default()
    }
}

fn operations(kind: &'static str, operations: Value) -> Result<Patch<Value>, Error> {
    let operations =
        serde_json::from_value(operations).map_err(|source| Error::Build { kind, source })?;
    Ok(Patch::Json(operations))
}

/// A refusal because the object is gone is none: there is nothing left to change.
fn unless_gone(outcome: Result<(), Error>) -> Result<(), Error> {
    match outcome {
        Err(Error::Api { source, .. }) if is_not_found(&source) => Ok(()),
        other => other,
    }
}

impl Writer {
    async fn patch(
        &self,
        action: &'static str,
        resource: &ApiResource,
        (namespace, name): (&str, &str),
        params: &PatchParams,
        patch: &Patch<Value>,
    ) -> Result<(), Error> {
        let api = self.api(resource, namespace);
        let request = api.patch_metadata(name, params, patch);
        self.counted(action, resource, name, request).await?;
        Ok(())
    }

    /// Merges a patch into an object.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub async fn merge(
        &self,
        resource: &ApiResource,
        namespace: &str,
        name: &str,
        patch: &Value,
    ) -> Result<(), Error> {
        let patch = Patch::Merge(patch.clone());
        let at = (namespace, name);
        self.patch("patch", resource, at, &ours(), &patch).await
    }

    /// The same, of an object that may have gone meanwhile.
    ///
    /// # Errors
    ///
    /// When the API server refuses; not when the object is gone.
    pub async fn merge_unless_gone(
        &self,
        resource: &ApiResource,
        namespace: &str,
        name: &str,
        patch: &Value,
    ) -> Result<(), Error> {
        unless_gone(self.merge(resource, namespace, name, patch).await)
    }

    /// Merges a patch into an object's status.
    ///
    /// # Errors
    ///
    /// When the API server refuses; not when the object is gone.
    pub async fn merge_status(
        &self,
        resource: &ApiResource,
        namespace: &str,
        name: &str,
        patch: &Value,
    ) -> Result<(), Error> {
        let api = self.api(resource, namespace);
        let (params, patch) = (ours(), Patch::Merge(patch));
        let request = api.patch_subresource("status", name, &params, &patch);
        let written = self.counted("status", resource, name, request).await;
        unless_gone(written.map(|_| ()))
    }

    /// Applies an object as its only wanted form.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub async fn apply(
        &self,
        resource: &ApiResource,
        namespace: &str,
        name: &str,
        object: &Value,
    ) -> Result<(), Error> {
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let (at, patch) = ((namespace, name), Patch::Apply(object.clone()));
        self.patch("apply", resource, at, &params, &patch).await
    }

    /// Puts a spec in the place of the one that an object has, with all that is no longer in it. Applying
    /// would leave what was not applied before: what the object was made with.
    ///
    /// # Errors
    ///
    /// When the API server refuses, or the object is not the one of this uid.
    pub async fn replace_spec(
        &self,
        resource: &ApiResource,
        namespace: &str,
        name: &str,
        uid: &str,
        spec: &Value,
    ) -> Result<(), Error> {
        let replaced = json!([
            {"op": "test", "path": "/metadata/uid", "value": uid},
            {"op": "add", "path": "/spec", "value": spec},
        ]);
        let (at, patch) = ((namespace, name), operations("patch", replaced)?);
        self.patch("patch", resource, at, &ours(), &patch).await
    }

    /// Writes a status if it differs from the one that is stored. `cached` is what the cache holds.
    ///
    /// # Errors
    ///
    /// When the API server refuses; not when the object is gone.
    pub async fn status<S: Serialize>(
        &self,
        resource: &ApiResource,
        meta: &ObjectMeta,
        cached: Option<&S>,
        status: &S,
    ) -> Result<(), Error> {
        let uid = uid_of(meta);
        let build = |source| Error::Build {
            kind: "status",
            source,
        };
        let status = serde_json::to_value(status).map_err(build)?;
        let known = match self.ledger.newer_status(uid, version_of(meta)) {
            Some(newer) => newer,
            None => serde_json::to_value(cached).map_err(build)?,
        };
        if known == status {
            return Ok(());
        }
        let (namespace, name) = names_of(meta);
        let api = self.api(resource, namespace);
        let replaced = json!([{"op": "add", "path": "/status", "value": status}]);
        let (params, patch) = (ours(), operations("status", replaced)?);
        let request = api.patch_subresource("status", name, &params, &patch);
        let written = self.counted("status", resource, name, request).await;
        unless_gone(written.map(|stored| {
            let version = version_of(&stored.metadata);
            self.ledger.wrote_status(uid, version, status);
        }))
    }

    /// Takes a finalizer off an object.
    ///
    /// # Errors
    ///
    /// When the API server refuses; not when the object is gone.
    pub async fn release(
        &self,
        resource: &ApiResource,
        meta: &ObjectMeta,
        finalizer: &str,
    ) -> Result<(), Error> {
        let finalizers = meta.finalizers.as_deref().unwrap_or_default();
        if !finalizers.iter().any(|held| held == finalizer) {
            return Ok(());
        }
        let kept = finalizers.iter().filter(|held| *held != finalizer);
        let kept: Vec<&String> = kept.collect();
        // With the version that was looked at: a finalizer that somebody just added is not lost.
        let patch = json!({"metadata": {
            "finalizers": kept, "resourceVersion": meta.resource_version,
        }});
        let (namespace, name) = names_of(meta);
        unless_gone(self.merge(resource, namespace, name, &patch).await)
    }

    /// Makes a child nobody's: takes the reference to the owner with uid `owner` off it.
    ///
    /// # Errors
    ///
    /// When the API server refuses; not when the object is gone.
    pub async fn disown(
        &self,
        resource: &ApiResource,
        meta: &ObjectMeta,
        owner: &str,
    ) -> Result<(), Error> {
        let owners = meta.owner_references.iter().flatten();
        let kept: Vec<_> = owners.filter(|reference| reference.uid != owner).collect();
        let patch = json!({"metadata": {
            "ownerReferences": kept, "resourceVersion": meta.resource_version,
        }});
        let (namespace, name) = names_of(meta);
        unless_gone(self.merge(resource, namespace, name, &patch).await)
    }
}
