//! Whether the installed CRDs keep what this version writes.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::Api;
use kube::{Client, ResourceExt};
use kvtide_control_api::crd_gap::Gap;
use kvtide_control_api::crds::definitions;
use serde_json::Value;

const GENERATION_OF_ROLE_SETS: &str = "observedGeneration of RoleSets";
const GENERATION_OF_POD_SETS: &str = "observedGeneration of PodSets";
const FULL_RECREATE: &str = "the spelling FullRecreate in PodSets";

const POD_SETS: &str = "podsets.orchestration.aibrix.ai";

/// Fields that other CRDs of the same names lack: where they are, and what is lost with them.
const FIELDS: [(&str, &str, &str); 6] = [
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
        "/properties/spec/properties/roles/items/properties/dependencies",
        "dependencies of roles in RoleSets",
    ),
    (
        "rolesets.orchestration.aibrix.ai",
        "/properties/status/properties/observedGeneration",
        GENERATION_OF_ROLE_SETS,
    ),
    (
        POD_SETS,
        "/properties/status/properties/observedGeneration",
        GENERATION_OF_POD_SETS,
    ),
];

/// What the installed CRDs drop, as it is known at present.
#[derive(Debug, Default)]
pub struct KnownGap(RwLock<Gap>);

impl KnownGap {
    /// What is dropped at present.
    #[must_use]
    pub fn gap(&self) -> Gap {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Notes what is dropped. Returns whether that is news.
    pub fn note(&self, gap: Gap) -> bool {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let changed = *known != gap;
        *known = gap;
        changed
    }
}

/// What the installed CRDs would drop.
///
/// # Errors
///
/// When a CRD is missing or the API server does not answer.
pub async fn installed_gap(client: &Client) -> anyhow::Result<Gap> {
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
        lost.extend(lost_in(&name, &schema));
    }
    let text = format!(
        "the installed CRDs are not of this version and drop {}: run `kvtide-control crds | \
         kubectl apply -f -`",
        lost.join(", ")
    );
    Ok(Gap {
        lost: (!lost.is_empty()).then_some(text),
        role_set_generation: lost.contains(&GENERATION_OF_ROLE_SETS),
        pod_set_generation: lost.contains(&GENERATION_OF_POD_SETS),
        full_recreate: lost.contains(&FULL_RECREATE),
    })
}

/// What a CRD with this name and schema drops.
fn lost_in(name: &str, schema: &Value) -> Vec<&'static str> {
    let fields = FIELDS.iter().filter(|(crd, _, _)| *crd == name);
    let fields = fields.filter(|(_, path, _)| schema.pointer(path).is_none());
    let mut lost: Vec<&str> = fields.map(|(_, _, what)| *what).collect();
    let policies = schema.pointer("/properties/spec/properties/recoveryPolicy/enum");
    let spelled = |policies: &Value| {
        let all = policies.as_array().into_iter().flatten();
        all.filter_map(Value::as_str)
            .any(|policy| policy == "FullRecreate")
    };
    if name == POD_SETS && !policies.is_none_or(spelled) {
        lost.push(FULL_RECREATE);
    }
    lost
}

/// CRD → its generation, if it is there.
pub type Generations = HashMap<&'static str, Option<i64>>;

/// The generations of the installed CRDs: they change when others are installed.
///
/// # Errors
///
/// When the API server does not answer.
pub async fn generations(client: &Client) -> kube::Result<Generations> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut found = Generations::new();
    for (name, _, _) in FIELDS {
        if !found.contains_key(name) {
            let definition = api.get_metadata_opt(name).await?;
            found.insert(name, definition.and_then(|found| found.metadata.generation));
        }
    }
    Ok(found)
}

fn served_schema(definition: &CustomResourceDefinition) -> Value {
    let version = definition
        .spec
        .versions
        .iter()
        .find(|version| version.name == kvtide_control_api::VERSION);
    let schema = version
        .and_then(|version| version.schema.as_ref())
        .and_then(|schema| schema.open_api_v3_schema.as_ref());
    serde_json::to_value(schema).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn our_own_definitions_have_every_field() {
        for definition in definitions().unwrap() {
            let schema = served_schema(&definition);
            let lost = lost_in(&definition.name_any(), &schema);
            assert_eq!(lost, Vec::<&str>::new(), "{}", definition.name_any());
        }
    }

    #[test]
    fn what_other_definitions_lack_is_named() {
        for definition in definitions().unwrap() {
            let name = definition.name_any();
            let expected = FIELDS.iter().filter(|(crd, _, _)| *crd == name).count();
            let lost = lost_in(&name, &Value::Null);
            assert_eq!(lost.len(), expected, "{lost:?}");
        }
        let path = "/properties/spec/properties/recoveryPolicy/enum";
        let pod_sets = &definitions().unwrap()[2];
        let mut schema = served_schema(pod_sets);
        *schema.pointer_mut(path).unwrap() = json!(["ReplaceUnhealthy", "Recreate"]);
        assert_eq!(lost_in(POD_SETS, &schema), [FULL_RECREATE]);
    }

    #[test]
    fn only_a_new_gap_is_news() {
        let known = KnownGap::default();
        let gap = Gap {
            role_set_generation: true,
            ..Gap::default()
        };
        assert!(!known.note(Gap::default()));
        assert!(known.note(gap.clone()));
        assert!(!known.note(gap));
    }
}
