//! A pod template kept as it was written.
//!
//! It is not decoded: a field that this build's Kubernetes types do not know is still passed on, and
//! what is hashed is what the user wrote. The schema in the CRD is the full one, so the API server
//! has checked it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `PodTemplateSpec` as JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodTemplate(pub Map<String, Value>);

impl PodTemplate {
    /// A label or annotation of the template (`which` is `labels` or `annotations`).
    #[must_use]
    pub fn meta(&self, which: &str, key: &str) -> Option<&str> {
        self.0.get("metadata")?.get(which)?.get(key)?.as_str()
    }

    /// The template's pod spec, empty where there is none.
    #[must_use]
    pub fn spec(&self) -> Map<String, Value> {
        match self.0.get("spec") {
            Some(Value::Object(spec)) => spec.clone(),
            _ => Map::new(),
        }
    }
}

impl JsonSchema for PodTemplate {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PodTemplate".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        k8s_openapi::api::core::v1::PodTemplateSpec::json_schema(generator)
    }
}
