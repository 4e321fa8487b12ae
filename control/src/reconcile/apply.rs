//! The only place that writes to the API server.
//!
//! Creations are POSTs under names that the caller fixed: a name that exists is a success if the
//! object is ours. Deletions carry the uid that was looked at, so that an object made anew under the
//! same name is safe. All writes of this process together are bounded by `WRITES_AT_ONCE`.

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions,
};
use kube::{Client, Resource};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::error::{Error, is_already_exists, is_not_found};
use super::informer::{owner_uid, version_of};
use super::ledger::Ledger;
use super::meta::names_of;
use std::sync::Arc;

/// Who writes, in managed fields and for server-side apply.
pub const FIELD_MANAGER: &str = "kvtide-control";
/// Writes in flight in one process: enough to keep an API server busy, few enough that its
/// priority-and-fairness queues (default 16 a flow) are not flooded.
const WRITES_AT_ONCE: usize = 32;
/// Writes in flight for one object's children.
const CHILDREN_AT_ONCE: usize = 16;

/// What came of a creation.
#[derive(Clone, Debug, PartialEq)]
pub enum Creation {
    /// It was made.
    Made,
    /// It was there already, and is the parent's.
    Found(Box<ObjectMeta>),
    /// An earlier one of the name is still going.
    Waiting,
}

/// See the module.
pub struct Writer {
    client: Client,
    ledger: Arc<Ledger>,
    permits: Semaphore,
}

/// A kind of ours or of Kubernetes'.
#[must_use]
pub fn resource<K: Resource<DynamicType = ()>>() -> ApiResource {
    ApiResource::erase::<K>(&())
}

/// The reference that makes an object the controller of another.
#[must_use]
pub fn owner_reference<K: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> Value {
    json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "name": meta.name,
        "uid": meta.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

/// An object to delete.
#[derive(Clone, Debug)]
pub struct Doomed {
    /// Its name.
    pub name: String,
    /// Its uid as it was looked at.
    pub uid: String,
}

impl Doomed {
    /// The object with this metadata.
    #[must_use]
    pub fn of(meta: &ObjectMeta) -> Self {
        Self {
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
        }
    }
}

impl Writer {
    /// A writer that notes what it wrote in `ledger`.
    #[must_use]
    pub fn new(client: Client, ledger: Arc<Ledger>) -> Self {
        Self {
            client,
            ledger,
            permits: Semaphore::new(WRITES_AT_ONCE),
        }
    }

    fn api(&self, resource: &ApiResource, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, resource)
    }

    async fn counted<T>(
        &self,
        action: &'static str,
        resource: &ApiResource,
        name: &str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Error> {
        // The semaphore is never closed; without a permit the write would only be unbounded.
        let _permit = self.permits.acquire().await.ok();
        metrics::counter!(
            "kvtide_control_writes_total", "verb" => action, "kind" => resource.kind.clone()
        )
        .increment(1);
        request.await.map_err(|source| Error::Api {
            action,
            kind: resource.kind.clone(),
            name: name.to_owned(),
            source: Box::new(source),
        })
    }

    /// Creates a child of the object with uid `parent`.
    ///
    /// # Errors
    ///
    /// When the API server refuses, or the name is somebody else's.
    pub async fn create(
        &self,
        parent: &str,
        kind: &'static str,
        resource: &ApiResource,
        namespace: &str,
        object: Value,
    ) -> Result<Creation, Error> {
        let object: DynamicObject =
            serde_json::from_value(object).map_err(|source| Error::Build { kind, source })?;
        let name = object.metadata.name.clone().unwrap_or_default();
        let api = self.api(resource, namespace);
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PostParams::default()
        };
        let made = self
            .counted("create", resource, &name, api.create(&params, &object))
            .await;
        match made {
            Ok(made) => {
                self.ledger.created(parent, kind, made.metadata);
                Ok(Creation::Made)
            }
            Err(Error::Api { source, .. }) if is_already_exists(&source) => {
                match self
                    .counted("get", resource, &name, api.get_metadata_opt(&name))
                    .await?
                {
                    // It went in between: the next look creates it.
                    None => Ok(Creation::Waiting),
                    Some(found) if owner_uid(&found.metadata) != Some(parent) => {
                        Err(Error::NameTaken {
                            kind: kind.to_owned(),
                            name,
                        })
                    }
                    Some(found) if found.metadata.deletion_timestamp.is_some() => {
                        Ok(Creation::Waiting)
                    }
                    Some(found) => {
                        self.ledger.created(parent, kind, found.metadata.clone());
                        Ok(Creation::Found(Box::new(found.metadata)))
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Creates children, some at a time and in order; stops at the first failure.
    ///
    /// # Errors
    ///
    /// The first failure.
    pub async fn create_all(
        &self,
        parent: &str,
        kind: &'static str,
        resource: &ApiResource,
        namespace: &str,
        objects: Vec<Value>,
    ) -> Result<(), Error> {
        stream::iter(objects)
            .map(|object| self.create(parent, kind, resource, namespace, object))
            .buffered(CHILDREN_AT_ONCE)
            .try_for_each(|_| std::future::ready(Ok(())))
            .await
    }

    /// Deletes an object if it is still the one that was looked at.
    ///
    /// # Errors
    ///
    /// When the API server refuses; not when the object is gone or replaced.
    pub async fn delete(
        &self,
        resource: &ApiResource,
        namespace: &str,
        doomed: &Doomed,
        force: bool,
    ) -> Result<(), Error> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(doomed.uid.clone()),
                ..Preconditions::default()
            }),
            grace_period_seconds: force.then_some(0),
            propagation_policy: Some(kube::api::PropagationPolicy::Background),
            ..DeleteParams::default()
        };
        let api = self.api(resource, namespace);
        let deleted = self
            .counted(
                "delete",
                resource,
                &doomed.name,
                api.delete(&doomed.name, &params),
            )
            .await;
        match deleted {
            Ok(_) => self.ledger.deleted(&doomed.uid),
            Err(Error::Api { source, .. }) if is_not_found(&source) => {}
            // The uid is another's: what was meant is gone.
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Deletes objects, some at a time; goes on after a failure.
    ///
    /// # Errors
    ///
    /// The first failure.
    pub async fn delete_all(
        &self,
        resource: &ApiResource,
        namespace: &str,
        doomed: Vec<Doomed>,
    ) -> Result<(), Error> {
        let results: Vec<Result<(), Error>> = stream::iter(doomed)
            .map(|doomed| async move { self.delete(resource, namespace, &doomed, false).await })
            .buffer_unordered(CHILDREN_AT_ONCE)
            .collect()
            .await;
        results.into_iter().collect()
    }

    /// Replaces an object, if nobody else wrote it since.
    ///
    /// # Errors
    ///
    /// When the API server refuses, or somebody else was faster.
    pub async fn replace<K>(&self, namespace: &str, object: &K) -> Result<(), Error>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        let resource = resource::<K>();
        let name = object.meta().name.clone().unwrap_or_default();
        let mut value = serde_json::to_value(object).unwrap_or_default();
        value["apiVersion"] = json!(K::api_version(&()));
        value["kind"] = json!(K::kind(&()));
        if let Some(fields) = value.as_object_mut() {
            fields.remove("status");
        }
        let object: DynamicObject =
            serde_json::from_value(value).map_err(|source| Error::Build {
                kind: "update",
                source,
            })?;
        let api = self.api(&resource, namespace);
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PostParams::default()
        };
        let stored = self
            .counted(
                "update",
                &resource,
                &name,
                api.replace(&name, &params, &object),
            )
            .await?;
        if let (Some(uid), Some(generation)) = (stored.metadata.uid, stored.metadata.generation) {
            self.ledger.updated(&uid, generation);
        }
        Ok(())
    }

    /// Replaces several objects, some at a time; goes on after a failure.
    ///
    /// # Errors
    ///
    /// The first failure.
    pub async fn replace_all<K>(&self, namespace: &str, objects: Vec<K>) -> Result<(), Error>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        let results: Vec<Result<(), Error>> = stream::iter(objects)
            .map(|object| async move { self.replace(namespace, &object).await })
            .buffer_unordered(CHILDREN_AT_ONCE)
            .collect()
            .await;
        results.into_iter().collect()
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
        let api = self.api(resource, namespace);
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(patch);
        self.counted(
            "patch",
            resource,
            name,
            api.patch_metadata(name, &params, &patch),
        )
        .await?;
        Ok(())
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
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(patch);
        let request = api.patch_subresource("status", name, &params, &patch);
        match self.counted("status", resource, name, request).await {
            Err(Error::Api { source, .. }) if is_not_found(&source) => Ok(()),
            other => other.map(|_| ()),
        }
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
        let api = self.api(resource, namespace);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(object);
        self.counted(
            "apply",
            resource,
            name,
            api.patch_metadata(name, &params, &patch),
        )
        .await?;
        Ok(())
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
        let api = self.api(resource, namespace);
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        let operations = json!([
            {"op": "test", "path": "/metadata/uid", "value": uid},
            {"op": "add", "path": "/spec", "value": spec},
        ]);
        let operations = serde_json::from_value(operations).map_err(|source| Error::Build {
            kind: "patch",
            source,
        })?;
        let patch = Patch::Json::<()>(operations);
        self.counted(
            "patch",
            resource,
            name,
            api.patch_metadata(name, &params, &patch),
        )
        .await?;
        Ok(())
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
        let uid = meta.uid.as_deref().unwrap_or_default();
        let status = serde_json::to_value(status).map_err(|source| Error::Build {
            kind: "status",
            source,
        })?;
        let known = match self.ledger.newer_status(uid, version_of(meta)) {
            Some(newer) => newer,
            None => serde_json::to_value(cached).map_err(|source| Error::Build {
                kind: "status",
                source,
            })?,
        };
        if known == status {
            return Ok(());
        }
        let (namespace, name) = names_of(meta);
        let api = self.api(resource, namespace);
        let patch = json!([{"op": "add", "path": "/status", "value": status}]);
        let patch: Patch<Value> =
            Patch::Json(
                serde_json::from_value(patch).map_err(|source| Error::Build {
                    kind: "status",
                    source,
                })?,
            );
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        let request = api.patch_subresource("status", name, &params, &patch);
        match self.counted("status", resource, name, request).await {
            Ok(stored) => {
                self.ledger
                    .wrote_status(uid, version_of(&stored.metadata), status);
                Ok(())
            }
            Err(Error::Api { source, .. }) if is_not_found(&source) => Ok(()),
            Err(error) => Err(error),
        }
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
        let kept: Vec<&String> = finalizers
            .iter()
            .filter(|held| *held != finalizer)
            .collect();
        // With the version that was looked at: a finalizer that somebody just added is not lost.
        let patch = json!({"metadata": {
            "finalizers": kept, "resourceVersion": meta.resource_version,
        }});
        let (namespace, name) = names_of(meta);
        match self.merge(resource, namespace, name, &patch).await {
            Err(Error::Api { source, .. }) if is_not_found(&source) => Ok(()),
            other => other,
        }
    }
}
