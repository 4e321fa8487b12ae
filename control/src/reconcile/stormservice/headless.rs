//! The headless Service of a StormService.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use serde_json::json;

use crate::api::{StormService, keys};
use crate::reconcile::Key;
use crate::reconcile::apply::{owner_reference, resource};
use crate::reconcile::context::Context;
use crate::reconcile::error::Error;
use crate::reconcile::informer::owner_uid;
use crate::reconcile::meta::{names_of, uid_of};

/// The headless Service that gives pods names in DNS. It belongs to the StormService or it is not
/// touched.
pub(super) async fn sync_headless(service: &StormService, context: &Context) -> Result<(), Error> {
    let (namespace, name) = names_of(&service.metadata);
    let uid = uid_of(&service.metadata);
    let key = Key {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    let kind = resource::<Service>();
    let found = context.headless.get(&key);
    if let Some(found) = &found {
        if owner_uid(&found.metadata) != Some(uid) {
            return Err(Error::NameTaken {
                kind: "Service".into(),
                name: name.to_owned(),
            });
        }
        let selected = BTreeMap::from([(keys::STORM_SERVICE_NAME.to_owned(), name.to_owned())]);
        let as_wanted = found.spec.cluster_ip.as_deref() == Some("None")
            && found.spec.selector == selected
            && found.spec.publish_not_ready_addresses;
        if as_wanted || context.is_going(&found.metadata) {
            return Ok(());
        }
    }
    let labels: BTreeMap<&String, &String> = service.metadata.labels.iter().flatten().collect();
    let wanted = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "labels": labels,
            "ownerReferences": [owner_reference::<StormService>(&service.metadata)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": {keys::STORM_SERVICE_NAME: name},
            "publishNotReadyAddresses": true,
        },
    });
    if found.is_none() {
        if !context.ledger.unseen(uid, "Service", |_| false).is_empty() {
            return Ok(());
        }
        // A POST first: applying would take over a Service of somebody else's.
        context
            .writer
            .create(uid, "Service", &kind, namespace, wanted)
            .await?;
        return Ok(());
    }
    context.writer.apply(&kind, namespace, name, &wanted).await
}
