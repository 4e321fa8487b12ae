//! The CustomResourceDefinitions, as `kvtide-control crds` prints them.
//!
//! They come from the Rust types and are then edited as JSON: descriptions are kept but for those of
//! pod templates, so that each stays below the 256 KiB that `kubectl apply` can keep in an annotation;
//! defaults are only those that change no meaning; lists and names get bounds, so that the rules in CEL
//! stay within the API server's cost budget.

mod clean;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube_core::CustomResourceExt;
use serde_json::{Value, json};

use super::{PodSet, RoleSet, StormService};
use clean::{clean, strip_descriptions};

/// Roles in a RoleSet; bounds the cost of the rules about dependencies.
pub const ROLES_MAX: usize = 32;
/// Roles that one role may depend on.
pub const DEPENDENCIES_MAX: usize = 16;
/// Labels in a selector; bounds the cost of comparing it with the template.
const SELECTOR_LABELS_MAX: usize = 32;
/// Longest name: it becomes a label's value.
const NAME_LENGTH_MAX: usize = 63;
/// What a host name's part looks like.
const DNS_LABEL: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
/// What is added to `<name><role>` in the name of a PodSet's pod, at most.
pub const POD_SET_SUFFIX_LENGTH_MAX: usize = 36;

/// The three definitions, in the order in which they refer to each other.
///
/// # Errors
///
/// When an edited definition no longer is one; a test covers all three.
pub fn definitions() -> Result<Vec<CustomResourceDefinition>, serde_json::Error> {
    [
        edited(
            StormService::crd(),
            "An LLM service: one or more complete copies (RoleSets) of roles that work together.",
            edit_stormservice,
        ),
        edited(
            RoleSet::crd(),
            "One complete copy of a service, made of roles. Usually made by a StormService.",
            edit_roleset,
        ),
        edited(
            PodSet::crd(),
            "Several pods that are one replica of a role. Usually made by a RoleSet.",
            edit_podset,
        ),
    ]
    .into_iter()
    .collect()
}

fn edited(
    definition: CustomResourceDefinition,
    description: &str,
    edit: impl Fn(&mut Value),
) -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut definition = serde_json::to_value(definition)?;
    let schema = &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    clean(schema);
    schema["description"] = json!(description);
    bound_name(schema);
    edit(schema);
    serde_json::from_value(definition)
}

/// The object's own name becomes a label's value and a host name's part.
fn bound_name(schema: &mut Value) {
    schema["properties"]["metadata"] = json!({
        "type": "object",
        "properties": {"name": {
            "description": "Becomes part of the host names of its pods.",
            "type": "string", "maxLength": NAME_LENGTH_MAX, "pattern": DNS_LABEL,
        }},
    });
}

fn edit_stormservice(schema: &mut Value) {
    // A rule at the root is asked at every write, also of a finalizer or status, so it is kept to
    // creations: what was stored before there was the rule must be served and deleted. What an update
    // adds is the webhook's to measure; reading `oldSelf` here costs more than the budget.
    let rules = json!([{
        "rule": format!(
            "oldSelf.hasValue() || \
             !has(self.spec.template.spec) || !has(self.spec.template.spec.roles) || \
             self.spec.template.spec.roles.all(r, !has(r.podGroupSize) || r.podGroupSize <= 1 || \
             size(self.metadata.name) + size(r.name) + {POD_SET_SUFFIX_LENGTH_MAX} <= {NAME_LENGTH_MAX})"
        ),
        "optionalOldSelf": true,
        "message": format!(
            "the names of this StormService and of a role with podGroupSize above 1 may have {} \
             characters together: their pods' host names have {NAME_LENGTH_MAX}",
            NAME_LENGTH_MAX - POD_SET_SUFFIX_LENGTH_MAX
        ),
        "fieldPath": ".spec.template.spec.roles",
    }]);
    schema["x-kubernetes-validations"] = rules;
    let spec = &mut schema["properties"]["spec"];
    spec["x-kubernetes-validations"] = json!([{
        "rule": "!has(self.selector.matchLabels) || self.selector.matchLabels.all(k, \
                 has(self.template.metadata) && has(self.template.metadata.labels) && \
                 k in self.template.metadata.labels && \
                 self.template.metadata.labels[k] == self.selector.matchLabels[k])",
        "message": "selector.matchLabels must be among template.metadata.labels",
        "fieldPath": ".selector",
    }]);
    let properties = &mut spec["properties"];
    properties["replicas"]["default"] = json!(1);
    properties["replicas"]["minimum"] = json!(0);
    let selector = &mut properties["selector"];
    // Its parts are Kubernetes' own.
    let description = selector["description"].take();
    strip_descriptions(selector);
    selector["description"] = description;
    selector["x-kubernetes-map-type"] = json!("atomic");
    bound_labels(&mut selector["properties"]["matchLabels"]);
    let template_meta = &mut properties["template"]["properties"]["metadata"]["properties"];
    bound_labels(&mut template_meta["labels"]);
    properties["updateStrategy"]["properties"]["type"]["default"] = json!("RollingUpdate");
    edit_roleset_spec(&mut properties["template"]["properties"]["spec"]);
}

fn bound_labels(labels: &mut Value) {
    labels["maxProperties"] = json!(SELECTOR_LABELS_MAX);
    labels["additionalProperties"]["maxLength"] = json!(NAME_LENGTH_MAX);
}

fn edit_roleset(schema: &mut Value) {
    edit_roleset_spec(&mut schema["properties"]["spec"]);
}

fn edit_podset(schema: &mut Value) {
    let properties = &mut schema["properties"]["spec"]["properties"];
    properties["recoveryPolicy"]["default"] = json!("ReplaceUnhealthy");
    edit_scheduling(&mut properties["schedulingStrategy"]);
    edit_pod_template(&mut properties["template"]);
}

fn edit_roleset_spec(spec: &mut Value) {
    spec["x-kubernetes-validations"] = json!([
        {
            "rule": "!has(self.roles) || self.roles.all(r, !has(r.dependencies) || \
                     r.dependencies.all(d, self.roles.exists(x, x.name == d)))",
            "message": "dependencies must name roles of this list",
            "fieldPath": ".roles",
        },
        {
            "rule": "!has(self.schedulingStrategy) || !has(self.roles) || \
                     self.roles.all(r, !has(r.dependencies) || size(r.dependencies) == 0)",
            "message": "dependencies of a role and a schedulingStrategy of the whole RoleSet exclude \
                        each other: the gang would wait for pods that wait for the gang",
            "fieldPath": ".roles",
        },
    ]);
    spec["properties"]["updateStrategy"]["default"] = json!("Sequential");
    edit_scheduling(&mut spec["properties"]["schedulingStrategy"]);
    let roles = &mut spec["properties"]["roles"];
    roles["x-kubernetes-list-type"] = json!("map");
    roles["x-kubernetes-list-map-keys"] = json!(["name"]);
    roles["maxItems"] = json!(ROLES_MAX);
    let role = &mut roles["items"];
    role["x-kubernetes-validations"] = json!([{
        "rule": "!has(self.dependencies) || !(self.name in self.dependencies)",
        "message": "a role cannot depend on itself",
        "fieldPath": ".dependencies",
    }]);
    let role = &mut role["properties"];
    role["replicas"]["default"] = json!(1);
    role["replicas"]["minimum"] = json!(0);
    bound_role_name(&mut role["name"]);
    role["dependencies"]["maxItems"] = json!(DEPENDENCIES_MAX);
    role["dependencies"]["x-kubernetes-list-type"] = json!("set");
    bound_role_name(&mut role["dependencies"]["items"]);
    edit_scheduling(&mut role["schedulingStrategy"]);
    edit_pod_template(&mut role["template"]);
}

fn bound_role_name(name: &mut Value) {
    name["minLength"] = json!(1);
    name["maxLength"] = json!(NAME_LENGTH_MAX);
    name["pattern"] = json!(DNS_LABEL);
}

fn edit_scheduling(strategy: &mut Value) {
    strategy["maxProperties"] = json!(1);
    let properties = &mut strategy["properties"];
    let affinity = &mut properties["godelSchedulingStrategy"]["properties"]["affinity"];
    replace(affinity, godel_affinity());
    for variant in [
        "coschedulingSchedulingStrategy",
        "volcanoSchedulingStrategy",
    ] {
        let resources = &mut properties[variant]["properties"]["minResources"];
        let quantities = json!({"type": "object", "additionalProperties": quantity()});
        replace(resources, quantities);
    }
}

/// Another schema for a field that stays what it is described as.
fn replace(field: &mut Value, mut schema: Value) {
    schema["description"] = field["description"].take();
    *field = schema;
}

fn quantity() -> Value {
    json!({
        "x-kubernetes-int-or-string": true,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
    })
}

/// The affinity of Gödel's PodGroup API, field for field.
fn godel_affinity() -> Value {
    let requirement = json!({
        "type": "object",
        "required": ["key", "operator"],
        "properties": {
            "key": {"type": "string"},
            "operator": {"type": "string"},
            "values": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "atomic"},
        },
    });
    let requirements =
        json!({"type": "array", "items": requirement, "x-kubernetes-list-type": "atomic"});
    let terms = json!({
        "type": "array",
        "items": {"type": "object", "properties": {"topologyKey": {"type": "string"}}},
    });
    let sort_rule = json!({
        "type": "object",
        "required": ["order", "resource"],
        "properties": {
            "dimension": {"type": "string"},
            "order": {"type": "string"},
            "resource": {"type": "string"},
        },
    });
    json!({
        "type": "object",
        "properties": {
            "podGroupAffinity": {
                "type": "object",
                "properties": {
                    "nodeSelector": {
                        "type": "object",
                        "required": ["nodeSelectorTerms"],
                        "x-kubernetes-map-type": "atomic",
                        "properties": {"nodeSelectorTerms": {
                            "type": "array",
                            "x-kubernetes-list-type": "atomic",
                            "items": {
                                "type": "object",
                                "x-kubernetes-map-type": "atomic",
                                "properties": {
                                    "matchExpressions": requirements,
                                    "matchFields": requirements,
                                },
                            },
                        }},
                    },
                    "preferred": terms,
                    "required": terms,
                    "sortRules": {"type": "array", "items": sort_rule},
                },
            },
            "podGroupAntiAffinity": {
                "type": "object",
                "properties": {"preferred": terms, "required": terms},
            },
        },
    })
}

/// The lists of a pod spec that the Kubernetes API treats as maps, with their keys.
const KEYED_LISTS: &[(&str, &[&str])] = &[
    ("containers", &["name"]),
    ("initContainers", &["name"]),
    ("ephemeralContainers", &["name"]),
    ("volumes", &["name"]),
    ("imagePullSecrets", &["name"]),
    ("hostAliases", &["ip"]),
    ("resourceClaims", &["name"]),
    (
        "topologySpreadConstraints",
        &["topologyKey", "whenUnsatisfiable"],
    ),
];
/// The same for a container.
const KEYED_CONTAINER_LISTS: &[(&str, &[&str])] = &[
    ("env", &["name"]),
    ("ports", &["containerPort", "protocol"]),
    ("volumeMounts", &["mountPath"]),
    ("volumeDevices", &["devicePath"]),
];

fn edit_pod_template(template: &mut Value) {
    strip_descriptions(template);
    template["description"] = json!(
        "What each pod is made from, as Kubernetes has it: kubectl explain pod.spec. Kept as written."
    );
    template["properties"]["metadata"] = json!({
        "type": "object",
        "properties": {
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            "finalizers": {"type": "array", "items": {"type": "string"}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "name": {"type": "string"},
            "namespace": {"type": "string"},
        },
    });
    let spec = &mut template["properties"]["spec"]["properties"];
    for (list, keys) in KEYED_LISTS {
        key_list(&mut spec[*list], keys);
    }
    // AIBrix's default, and Kubernetes' own: the key of a map list must have a value.
    spec["imagePullSecrets"]["items"]["properties"]["name"]["default"] = json!("");
    for containers in ["containers", "initContainers", "ephemeralContainers"] {
        let container = &mut spec[containers]["items"]["properties"];
        for (list, keys) in KEYED_CONTAINER_LISTS {
            key_list(&mut container[*list], keys);
        }
        // A key of a map list must have a value; Kubernetes' own default.
        container["ports"]["items"]["properties"]["protocol"]["default"] = json!("TCP");
    }
}

fn key_list(list: &mut Value, keys: &[&str]) {
    if list.is_object() {
        list["x-kubernetes-list-type"] = json!("map");
        list["x-kubernetes-list-map-keys"] = json!(keys);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The annotation in which `kubectl apply` keeps the object has 256 KiB; half of it is slack.
    const SIZE_MAX: usize = 200 * 1000;

    #[test]
    fn every_field_of_ours_is_explained() {
        fn unexplained(path: &str, node: &Value, found: &mut Vec<String>) {
            let properties = node.get("properties").and_then(Value::as_object);
            for (name, property) in properties.into_iter().flatten() {
                let path = format!("{path}.{name}");
                let is_foreign = ["template", "selector", "affinity"].contains(&name.as_str());
                let is_role_set = property
                    .pointer("/properties/spec/properties/roles")
                    .is_some();
                if property.get("description").is_none() && name != "metadata" {
                    found.push(path.clone());
                }
                if !is_foreign || is_role_set {
                    unexplained(&path, property, found);
                }
            }
            if let Some(items) = node.get("items") {
                unexplained(&format!("{path}[]"), items, found);
            }
        }
        for definition in definitions().unwrap() {
            let crd = serde_json::to_value(&definition).unwrap();
            let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            let mut found = Vec::new();
            assert!(schema["description"].is_string());
            unexplained("", schema, &mut found);
            assert_eq!(found, Vec::<String>::new());
        }
    }

    #[test]
    fn every_definition_fits_into_the_annotation_of_kubectl_apply() {
        for definition in definitions().unwrap() {
            let size = serde_json::to_vec(&definition).unwrap().len();
            assert!(
                size < SIZE_MAX,
                "{}: {size} bytes",
                definition.metadata.name.unwrap()
            );
        }
    }

    #[test]
    fn defaults_are_only_those_that_change_no_meaning() {
        fn defaults(path: &str, node: &Value, found: &mut Vec<String>) {
            if let Some(default) = node.get("default") {
                found.push(format!("{path}={default}"));
            }
            if let Some(Value::Object(properties)) = node.get("properties") {
                for (name, property) in properties {
                    defaults(&format!("{path}.{name}"), property, found);
                }
            }
            if let Some(items) = node.get("items") {
                defaults(&format!("{path}[]"), items, found);
            }
        }
        let crd = serde_json::to_value(&definitions().unwrap()[0]).unwrap();
        let mut found = Vec::new();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        defaults("", schema, &mut found);
        // Keys of map lists must have a value.
        found.retain(|path| {
            !path.ends_with("protocol=\"TCP\"") && !path.contains("imagePullSecrets[]")
        });
        assert_eq!(
            found,
            [
                ".spec.replicas=1",
                ".spec.template.spec.roles[].replicas=1",
                ".spec.template.spec.updateStrategy=\"Sequential\"",
                ".spec.updateStrategy.type=\"RollingUpdate\"",
            ]
        );
    }
}
