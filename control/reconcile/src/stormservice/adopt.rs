//! What a StormService of the same name left behind with `--cascade=orphan`: it is taken over, as a
//! Deployment takes over ReplicaSets. Made anew beside it, every pod would be there twice.

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::api::{Api, ApiResource};
use kube::runtime::events::EventType;
use kvtide_control_api::meta::{label, names_of, owner_key, owner_uid, uid_of};
use kvtide_control_api::observed::ObservedRevision;
use kvtide_control_api::target::Target;
use kvtide_control_api::{RoleSet, StormService, keys};
use kvtide_control_core::{revision, validate};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;
use serde_json::json;

use crate::context::Context;

/// Whether the RoleSets that a predecessor left behind can be counted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// There is nothing that is not ours already.
    Nothing,
    /// Some were taken over; the watch shows them.
    Adopted,
    /// They stay as they are: the StormService goes itself, as the watch is about to show.
    Going,
    /// This RoleSet still names a predecessor that is gone. Garbage collection takes it, or makes it
    /// nobody's; until then nobody knows whether another one is needed.
    Unsettled(String),
}

/// How a RoleSet stands to the StormService whose label it carries.
#[derive(Debug, PartialEq, Eq)]
enum Bond {
    None,
    Orphan,
    Predecessor,
}

impl Bond {
    fn of(meta: &ObjectMeta, service: &StormService) -> Self {
        let (namespace, name) = names_of(&service.metadata);
        let is_selected = || {
            let labels = meta.labels.clone().unwrap_or_default();
            validate::matches(&service.spec.selector, &labels).is_ok()
        };
        let is_meant = names_of(meta).0 == namespace
            && label(meta, keys::STORM_SERVICE_NAME) == name
            && is_selected();
        let of_our_name = || owner_key(meta, "StormService").is_some_and(|key| key.name == name);
        match owner_uid(meta) {
            _ if !is_meant => Self::None,
            None => Self::Orphan,
            Some(uid) if uid != uid_of(&service.metadata) && of_our_name() => Self::Predecessor,
            Some(_) => Self::None,
        }
    }
}

/// Takes over RoleSets and revisions that are nobody's and carry this StormService's labels.
pub(super) async fn adopt(
    service: &StormService,
    target: &Target,
    context: &Context,
) -> Result<Left, Error> {
    let mut orphans = Vec::new();
    for set in context.role_sets.all() {
        let meta = set.as_ref().meta();
        match Bond::of(meta, service) {
            _ if context.is_going(meta) => {}
            Bond::None => {}
            Bond::Orphan => orphans.push(meta.clone()),
            Bond::Predecessor => return Ok(Left::Unsettled(names_of(meta).1.to_owned())),
        }
    }
    if orphans.is_empty() {
        return Ok(Left::Nothing);
    }
    if !stays(target, context).await? {
        return Ok(Left::Going);
    }
    // The revisions first: RoleSets whose revision is not known count as outdated.
    for stored in context.revisions.all() {
        if is_left_behind(&stored, service) && holds_our_template(&stored, context).await? {
            let kind = resource::<ControllerRevision>();
            take_over(&kind, &stored.metadata, target, context).await?;
        }
    }
    for meta in &orphans {
        take_over(&resource::<RoleSet>(), meta, target, context).await?;
    }
    let note = format!("took over {} RoleSets, which were nobody's", orphans.len());
    let meta = &service.metadata;
    context
        .tell::<StormService>(meta, EventType::Normal, "Adopted", note)
        .await;
    Ok(Left::Adopted)
}

/// Whether a StormService may take anything over: the API server is asked, because the cache may be
/// behind. One that is being deleted with `--cascade=orphan` would take back what is to stay, and delete
/// it.
pub(super) async fn stays(target: &Target, context: &Context) -> Result<bool, Error> {
    let (namespace, name) = target.names();
    let api: Api<StormService> = Api::namespaced(context.client.clone(), namespace);
    let found = api.get_metadata_opt(name).await;
    let found = found.map_err(|source| Error::Api {
        action: "get",
        kind: StormService::kind(&()).into(),
        name: name.to_owned(),
        source: Box::new(source),
    })?;
    let now = found.as_ref().map(Resource::meta);
    Ok(now.is_some_and(|now| is_same_and_stays(now, &target.uid)))
}

fn is_same_and_stays(now: &ObjectMeta, uid: &str) -> bool {
    uid_of(now) == uid && now.deletion_timestamp.is_none()
}

fn is_left_behind(stored: &ObservedRevision, service: &StormService) -> bool {
    let (meta, (namespace, name)) = (&stored.metadata, names_of(&service.metadata));
    let is_here = names_of(meta).0 == namespace && meta.deletion_timestamp.is_none();
    is_here && owner_uid(meta).is_none() && label(meta, "name") == name
}

/// StatefulSets leave revisions behind too. The cache holds no data of those that are nobody's.
async fn holds_our_template(stored: &ObservedRevision, context: &Context) -> Result<bool, Error> {
    let (namespace, name) = names_of(&stored.metadata);
    let api: Api<ObservedRevision> = Api::namespaced(context.client.clone(), namespace);
    let found = api.get_opt(name).await.map_err(|source| Error::Api {
        action: "get",
        kind: "ControllerRevision".into(),
        name: name.to_owned(),
        source: Box::new(source),
    })?;
    let template = found.and_then(|found| revision::template(&found.data).ok());
    let spec = template.and_then(|template| template.spec);
    Ok(spec.is_some_and(|spec| !spec.roles.is_empty()))
}

async fn take_over(
    kind: &ApiResource,
    meta: &ObjectMeta,
    target: &Target,
    context: &Context,
) -> Result<(), Error> {
    let mut owners = json!(meta.owner_references.clone().unwrap_or_default());
    if let Some(owners) = owners.as_array_mut() {
        owners.push(target.owner_ref.clone());
    }
    // As it was looked at: somebody else may take it at the same time.
    let patch = json!({"metadata": {
        "uid": meta.uid, "resourceVersion": meta.resource_version, "ownerReferences": owners,
    }});
    let (namespace, name) = names_of(meta);
    context.writer.merge(kind, namespace, name, &patch).await
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn service() -> StormService {
        let spec = json!({"selector": {"matchLabels": {"app": "llm"}}, "template": {}});
        let mut service = StormService::new("llm", serde_json::from_value(spec).unwrap());
        service.metadata.namespace = Some("n".into());
        service.metadata.uid = Some("u".into());
        service
    }

    #[test]
    fn only_a_service_that_stays_takes_anything_over() {
        let table = [
            (json!({"uid": "u"}), true),
            (json!({"uid": "v"}), false),
            (
                json!({"uid": "u", "deletionTimestamp": "2030-01-01T00:00:00Z"}),
                false,
            ),
        ];
        for (now, expected) in table {
            let meta = serde_json::from_value(now.clone()).unwrap();
            assert_eq!(is_same_and_stays(&meta, "u"), expected, "{now}");
        }
    }

    #[test]
    fn only_what_is_nobodys_and_carries_both_labels_is_taken_over() {
        let owner = |name: &str, uid: &str| {
            json!([{"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService",
                "name": name, "uid": uid, "controller": true}])
        };
        let ours = json!({"storm-service-name": "llm", "app": "llm"});
        let table = [
            ("n", ours.clone(), json!([]), Bond::Orphan),
            ("n", ours.clone(), owner("llm", "u"), Bond::None),
            ("n", ours.clone(), owner("llm", "v"), Bond::Predecessor),
            ("n", ours.clone(), owner("b", "v"), Bond::None),
            ("m", ours, json!([]), Bond::None),
            ("n", json!({"app": "llm"}), json!([]), Bond::None),
            (
                "n",
                json!({"storm-service-name": "llm"}),
                json!([]),
                Bond::None,
            ),
        ];
        for (namespace, labels, owners, expected) in table {
            let text = format!("{namespace} {labels} {owners}");
            let meta: Value = json!({"name": "r", "namespace": namespace, "labels": labels,
                "ownerReferences": owners});
            let meta = serde_json::from_value(meta).unwrap();
            assert_eq!(Bond::of(&meta, &service()), expected, "{text}");
        }
    }
}
