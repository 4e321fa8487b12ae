//! The headless Service of a StormService.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::{names_of, owner_key, owner_uid, uid_of};
use kvtide_control_api::observed::ObservedService;
use kvtide_control_api::target::Target;
use kvtide_control_api::{StormService, keys};
use kvtide_control_kube::error::Error;
use kvtide_control_kube::writer::resource;
use serde_json::{Value, json};

use super::adopt::stays;
use crate::context::Context;

/// Whether pods have names in DNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Headless {
    /// The Service is there.
    Serves,
    /// One of this name is on its way out, and ours takes its place; or the StormService goes itself.
    Waits,
}

/// Whose a Service of the StormService's name is.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    /// The StormService's.
    Us,
    /// Nobody's, and it does what ours would: one that a StormService of this name left behind.
    Nobody,
    /// It is going, or a StormService of this name that is gone owned it: garbage collection lets it
    /// go, or makes it nobody's.
    Predecessor,
    /// Anybody else's.
    Other,
}

impl Owner {
    fn of(found: &ObservedService, service: &StormService, is_going: bool) -> Self {
        let (uid, meta) = (uid_of(&service.metadata), &found.metadata);
        let (namespace, name) = names_of(&service.metadata);
        let of_our_name = owner_key(meta, "StormService")
            .is_some_and(|key| key.namespace == namespace && key.name == name);
        match owner_uid(meta) {
            Some(owner) if owner == uid => Self::Us,
            _ if is_going || of_our_name => Self::Predecessor,
            None if is_like_ours(found, name) => Self::Nobody,
            _ => Self::Other,
        }
    }
}

fn is_like_ours(found: &ObservedService, name: &str) -> bool {
    found.spec.cluster_ip.as_deref() == Some("None") && found.spec.selector == selector(name)
}

fn selector(name: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(keys::STORM_SERVICE_NAME.to_owned(), name.to_owned())])
}

fn wanted(service: &StormService, target: &Target, uid: Option<&String>) -> Value {
    let name = &target.name;
    let labels: BTreeMap<&String, &String> = service.metadata.labels.iter().flatten().collect();
    let mut wanted = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "labels": labels,
            "ownerReferences": [target.owner_ref],
        },
        "spec": {
            "clusterIP": "None",
            "selector": selector(name),
            "publishNotReadyAddresses": true,
        },
    });
    if let Some(uid) = uid {
        // Of the one that was looked at, and no later one of its name.
        wanted["metadata"]["uid"] = json!(uid);
    }
    wanted
}

/// The headless Service that gives pods names in DNS. One that a StormService of this name left behind
/// is taken over; any other is not touched.
pub(super) async fn sync_headless(
    service: &StormService,
    target: &Target,
    context: &Context,
) -> Result<Headless, Error> {
    let ((namespace, name), uid) = (target.names(), &target.uid);
    let kind = resource::<Service>();
    let Some(found) = context.headless.get(&target.key()) else {
        if context.ledger.unseen(uid, "Service", |_| false).is_empty() {
            // A POST: applying would take over a Service of somebody else's.
            let wanted = wanted(service, target, None);
            context
                .writer
                .create(uid, "Service", &kind, namespace, wanted)
                .await?;
        }
        return Ok(Headless::Serves);
    };
    match Owner::of(&found, service, context.is_going(&found.metadata)) {
        Owner::Us if context.is_going(&found.metadata) => return Ok(Headless::Waits),
        Owner::Us if is_like_ours(&found, name) && found.spec.publish_not_ready_addresses => {
            return Ok(Headless::Serves);
        }
        Owner::Us => {}
        Owner::Nobody if !stays(target, context).await? => return Ok(Headless::Waits),
        Owner::Nobody => {
            let note = format!("took over the Service {name}, which was nobody's");
            let meta = &service.metadata;
            context
                .tell::<StormService>(meta, EventType::Normal, "Adopted", note)
                .await;
        }
        Owner::Predecessor => return Ok(Headless::Waits),
        Owner::Other => {
            return Err(Error::NameTaken {
                kind: "Service".into(),
                name: name.to_owned(),
            });
        }
    }
    let wanted = wanted(service, target, found.metadata.uid.as_ref());
    context
        .writer
        .apply(&kind, namespace, name, &wanted)
        .await?;
    Ok(Headless::Serves)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(uid: &str) -> StormService {
        let spec = json!({"selector": {}, "template": {}});
        let spec = serde_json::from_value(spec).unwrap();
        let mut service = StormService::new("llm", spec);
        service.metadata.namespace = Some("n".into());
        service.metadata.uid = Some(uid.into());
        service
    }

    fn found(owner: Value, selector: Value, cluster_ip: &str) -> ObservedService {
        serde_json::from_value(json!({
            "metadata": {"name": "llm", "namespace": "n", "ownerReferences": owner},
            "spec": {"clusterIP": cluster_ip, "selector": selector},
        }))
        .unwrap()
    }

    #[test]
    fn only_what_nobody_owns_and_does_the_same_is_taken_over() {
        let owner = |api_version: &str, kind: &str, name: &str, uid: &str| {
            json!([{"apiVersion": api_version, "kind": kind, "name": name, "uid": uid,
                "controller": true}])
        };
        let ours = "orchestration.aibrix.ai/v1alpha1";
        let same = json!({"storm-service-name": "llm"});
        let table = [
            (
                owner(ours, "StormService", "llm", "u"),
                &same,
                "None",
                Owner::Us,
            ),
            (
                owner(ours, "StormService", "llm", "v"),
                &same,
                "None",
                Owner::Predecessor,
            ),
            (
                owner(ours, "StormService", "b", "v"),
                &same,
                "None",
                Owner::Other,
            ),
            (
                owner("apps/v1", "StatefulSet", "llm", "v"),
                &same,
                "None",
                Owner::Other,
            ),
            (json!([]), &same, "None", Owner::Nobody),
            (json!([]), &same, "10.0.0.1", Owner::Other),
            (json!([]), &json!({"app": "llm"}), "None", Owner::Other),
        ];
        for (owner, selector, address, expected) in table {
            let found = found(owner, selector.clone(), address);
            let got = Owner::of(&found, &service("u"), false);
            assert_eq!(got, expected, "{found:?}");
            let going = Owner::of(&found, &service("u"), true);
            assert!(matches!(going, Owner::Us | Owner::Predecessor), "{found:?}");
        }
    }
}
