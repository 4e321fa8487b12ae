//! The only place that writes to the API server.
//!
//! Creations are POSTs under names that the caller fixed: a name that exists is a success if the
//! object is ours. Deletions carry the uid that was looked at, so that an object made anew under the
//! same name is safe. All writes of this process together are bounded by `WRITES_AT_ONCE`.

mod patch;

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, PostParams, Preconditions};
use kube::{Client, Resource};
use kvtide_control_api::meta::owner_uid;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::error::{Error, is_already_exists, is_not_found};
use crate::ledger::Ledger;

/// Who writes, in managed fields and for server-side apply.
pub const FIELD_MANAGER: &str = "kvtide-control";
/// Writes in flight in one process: enough to keep an API server busy, few enough that its
/// priority-and-fairness queues (default 16 a flow) are not flooded.
const WRITES_AT_ONCE: usize = 32;
/// In the ledger: an update that changed nothing, because the installed CRDs drop what it would add.
const IN_VAIN: &str = "update in vain";
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

    /// Replaces an object, if nobody else wrote it since. Returns whether that changed it: where the
    /// installed CRDs drop what is new, nothing does, and the same is not tried again.
    ///
    /// # Errors
    ///
    /// When the API server refuses, or somebody else was faster.
    pub async fn replace<K>(&self, namespace: &str, object: &K) -> Result<bool, Error>
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
        let mut meant = value.clone();
        if let Some(metadata) = meant["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
        }
        let (uid, meant) = (
            object.meta().uid.clone().unwrap_or_default(),
            blake3::hash(meant.to_string().as_bytes()).to_string(),
        );
        if self.ledger.is_applied(&uid, IN_VAIN, &meant) {
            return Ok(false);
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
        let changed = stored.metadata.resource_version != object.metadata.resource_version;
        if !changed {
            self.ledger.applied(&uid, IN_VAIN, meant);
        } else if let Some(generation) = stored.metadata.generation {
            self.ledger.updated(&uid, generation);
        }
        Ok(changed)
    }

    /// Other CRDs are installed: what was dropped before may be kept now.
    pub fn try_again(&self) {
        self.ledger.forget_all_applied(IN_VAIN);
    }

    /// Replaces several objects, some at a time; goes on after a failure. Returns whether any changed.
    ///
    /// # Errors
    ///
    /// The first failure.
    pub async fn replace_all<K>(&self, namespace: &str, objects: Vec<K>) -> Result<bool, Error>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        let results: Vec<Result<bool, Error>> = stream::iter(objects)
            .map(|object| async move { self.replace(namespace, &object).await })
            .buffer_unordered(CHILDREN_AT_ONCE)
            .collect()
            .await;
        let mut changed = false;
        for result in results {
            changed |= result?;
        }
        Ok(changed)
    }
}
