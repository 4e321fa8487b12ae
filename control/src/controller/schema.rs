//! Whether the installed CRDs keep what this version writes.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::Api;
use kube::{Client, ResourceExt};
use serde_json::Value;

use crate::api::crds::definitions;

/// Fields that other CRDs of the same names lack: where they are, and what is lost with them.
const FIELDS: [(&str, &str, &str); 5] = [
    (
        "stormservices.orchestration.aibrix.ai",
        "/properties/spec/properties/template/properties/spec/properties/roles/items/properties/recoveryPolicy",
        "recoveryPolicy of roles",
    ),
    (
        "stormservices.orchestration.aibrix.ai",
        "/properties/spec/properties/template/properties/spec/properties/roles/items/properties/dependencies",
        "dependencies of roles",
    ),
    (
        "rolesets.orchestration.aibrix.ai",
        "/properties/spec/properties/roles/items/properties/recoveryPolicy",
        "recoveryPolicy of roles in RoleSets",
    ),
    (
        "rolesets.orchestration.aibrix.ai",
        "/properties/status/properties/observedGeneration",
        "observedGeneration of RoleSets",
    ),
    (
        "podsets.orchestration.aibrix.ai",
        "/properties/status/properties/observedGeneration",
        "observedGeneration of PodSets",
    ),
];

/// What the installed CRDs would drop, in words; none if nothing.
///
/// # Errors
///
/// When a CRD is missing or the API server does not answer.
pub(super) async fn gap(client: &Client) -> anyhow::Result<Option<String>> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut lost = Vec::new();
    for wanted in definitions()? {
        let name = wanted.name_any();
        let Some(installed) = api.get_opt(&name).await? else {
            anyhow::bail!(
                "the CRD {name} is not installed: run `kvtide-control crds | kubectl apply -f -`"
            );
        };
        let schema = served_schema(&installed);
        for (_, path, what) in FIELDS.iter().filter(|(crd, _, _)| *crd == name) {
            if schema.pointer(path).is_none() {
                lost.push(*what);
            }
        }
    }
    Ok((!lost.is_empty()).then(|| {
        format!(
            "the installed CRDs are not of this version and drop {}: run `kvtide-control crds | \
             kubectl apply -f -`",
            lost.join(", ")
        )
    }))
}

fn served_schema(definition: &CustomResourceDefinition) -> Value {
    let version = definition
        .spec
        .versions
        .iter()
        .find(|version| version.name == crate::api::VERSION);
    let schema = version
        .and_then(|version| version.schema.as_ref())
        .and_then(|schema| schema.open_api_v3_schema.as_ref());
    serde_json::to_value(schema).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_definitions_have_every_field() {
        for definition in definitions().unwrap() {
            let schema = served_schema(&definition);
            let name = definition.name_any();
            for (_, path, what) in FIELDS.iter().filter(|(crd, _, _)| *crd == name) {
                assert!(schema.pointer(path).is_some(), "{name} lacks {what}");
            }
        }
    }
}
