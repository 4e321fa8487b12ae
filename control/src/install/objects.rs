//! What StormServices are and what follows from them, in all namespaces.

use std::fmt;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::core::PartialObjectMeta;
use kvtide_control_api::meta::owner_key;
use kvtide_control_api::{PodSet, RoleSet, Scheduler, StormService, keys};
use kvtide_control_kube::writer::resource;
use serde_json::json;

/// Objects in one page of a list.
const PAGE: u32 = 500;

/// The finalizers that a controller takes off.
const FINALIZERS: [&str; 3] = [
    keys::STORM_SERVICE_FINALIZER,
    keys::ROLE_SET_FINALIZER,
    keys::POD_SET_FINALIZER,
];

/// One object.
pub(super) struct Found {
    kind: ApiResource,
    pub(super) meta: ObjectMeta,
}

impl fmt::Display for Found {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |part: &Option<String>| part.clone().unwrap_or_default();
        let (namespace, name) = (name(&self.meta.namespace), name(&self.meta.name));
        write!(formatter, "{} {namespace}/{name}", self.kind.kind)
    }
}

/// StormServices, RoleSets and PodSets. None of a kind that is not installed.
///
/// # Errors
///
/// When the API server refuses.
pub(super) async fn of_ours(client: &Client) -> kube::Result<Vec<Found>> {
    let kinds = [
        resource::<StormService>(),
        resource::<RoleSet>(),
        resource::<PodSet>(),
    ];
    let mut found = Vec::new();
    for kind in kinds {
        found.extend(list(client, kind).await?);
    }
    Ok(found)
}

/// What those made: pods, Services, revisions, PodGroups. Garbage collection can take them only for as
/// long as the kinds of their owners are installed.
///
/// # Errors
///
/// When the API server refuses.
pub(super) async fn below(client: &Client) -> kube::Result<Vec<Found>> {
    let mut kinds = vec![
        resource::<Pod>(),
        resource::<Service>(),
        resource::<ControllerRevision>(),
    ];
    for scheduler in [
        Scheduler::Godel,
        Scheduler::Coscheduling,
        Scheduler::Volcano,
    ] {
        let (group, version) = scheduler.api_version();
        let kind = GroupVersionKind::gvk(group, version, "PodGroup");
        kinds.push(ApiResource::from_gvk(&kind));
    }
    let mut found = Vec::new();
    for kind in kinds {
        let all = list(client, kind).await?;
        found.extend(all.into_iter().filter(|found| is_below(&found.meta)));
    }
    Ok(found)
}

/// AIBrix has other kinds in the same group, which are not ours.
fn is_below(meta: &ObjectMeta) -> bool {
    let kinds = ["StormService", "RoleSet", "PodSet"];
    let is_owned_by = |kind: &&str| owner_key(meta, kind).is_some();
    kinds.iter().any(is_owned_by)
}

async fn list(client: &Client, kind: ApiResource) -> kube::Result<Vec<Found>> {
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &kind);
    let mut found = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let listed = match api.list_metadata(&page).await {
            Ok(listed) => listed,
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(found),
            Err(error) => return Err(error),
        };
        let next = listed.metadata.continue_.clone();
        let objects = listed.items.into_iter();
        found.extend(
            objects.map(|object: PartialObjectMeta<DynamicObject>| Found {
                kind: kind.clone(),
                meta: object.metadata,
            }),
        );
        match next.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(found),
        }
    }
}

impl Found {
    fn api(&self, client: &Client) -> Api<DynamicObject> {
        let namespace = self.meta.namespace.as_deref().unwrap_or_default();
        Api::namespaced_with(client.clone(), namespace, &self.kind)
    }

    /// Asks for it to go, unless it is going.
    ///
    /// # Errors
    ///
    /// When the API server refuses; not when it is gone.
    pub(super) async fn delete(&self, client: &Client) -> kube::Result<()> {
        if self.meta.deletion_timestamp.is_some() {
            return Ok(());
        }
        let name = self.meta.name.as_deref().unwrap_or_default();
        let (api, params) = (self.api(client), DeleteParams::background());
        unless_gone(api.delete(name, &params).await.map(|_| ()))
    }

    /// Takes off the finalizers that a controller would, if it is going.
    ///
    /// # Errors
    ///
    /// When the API server refuses, or somebody else wrote it; not when it is gone.
    pub(super) async fn release(&self, client: &Client) -> kube::Result<()> {
        let held = self.meta.finalizers.as_deref().unwrap_or_default();
        let is_ours = |finalizer: &&String| FINALIZERS.contains(&finalizer.as_str());
        if self.meta.deletion_timestamp.is_none() || !held.iter().any(|held| is_ours(&held)) {
            return Ok(());
        }
        let kept: Vec<&String> = held.iter().filter(|held| !is_ours(held)).collect();
        let patch = json!({"metadata": {
            "uid": self.meta.uid, "resourceVersion": self.meta.resource_version, "finalizers": kept,
        }});
        let (name, params) = (
            self.meta.name.as_deref().unwrap_or_default(),
            PatchParams::default(),
        );
        let api = self.api(client);
        let patched = api
            .patch_metadata(name, &params, &Patch::Merge(&patch))
            .await;
        unless_gone(patched.map(|_| ()))
    }

    /// What still holds it.
    pub(super) fn holders(&self) -> &[String] {
        self.meta.finalizers.as_deref().unwrap_or_default()
    }
}

fn unless_gone(outcome: kube::Result<()>) -> kube::Result<()> {
    match outcome {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other,
    }
}
