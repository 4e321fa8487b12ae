//! What the generator of schemas writes and the API does not want.

use serde_json::{Map, Value, json};

use super::quantity;

/// Removes, from a schema and all below it, what the generator adds and the API does not want:
/// defaults and nullability (a null is then dropped, as for Kubernetes' own types).
pub(super) fn clean(schema: &mut Value) {
    let Value::Object(node) = schema else {
        return;
    };
    for key in ["default", "nullable", "title", "examples"] {
        node.remove(key);
    }
    narrow_integer(node);
    loosen_reference(node);
    if let Some(Value::Array(values)) = node.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    if node.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
        node.insert(
            "anyOf".into(),
            json!([{"type": "integer"}, {"type": "string"}]),
        );
    }
    if let Some(Value::Object(properties)) = node.get_mut("properties") {
        for (name, property) in properties.iter_mut() {
            clean(property);
            if matches!(name.as_str(), "limits" | "requests" | "overhead") {
                property["additionalProperties"] = quantity();
            } else if matches!(name.as_str(), "sizeLimit" | "divisor") {
                *property = quantity();
            }
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(child) = node.get_mut(key) {
            clean(child);
        }
    }
}

/// Removes all descriptions below a schema: those of a pod are half a megabyte.
pub(super) fn strip_descriptions(schema: &mut Value) {
    match schema {
        Value::Object(node) => {
            // A property of that name is a schema.
            if node.get("description").is_some_and(Value::is_string) {
                node.remove("description");
            }
            node.values_mut().for_each(strip_descriptions);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_descriptions),
        _ => {}
    }
}

/// A reference to a ConfigMap or Secret may lack its name, as Kubernetes' own schema has it.
fn loosen_reference(node: &mut Map<String, Value>) {
    const FIELDS: [&str; 7] = [
        "name",
        "namespace",
        "optional",
        "key",
        "items",
        "defaultMode",
        "defaultUser",
    ];
    let is_reference = node
        .get("properties")
        .and_then(Value::as_object)
        .is_some_and(|fields| {
            fields.contains_key("name")
                && fields.keys().all(|field| FIELDS.contains(&field.as_str()))
        });
    if let (true, Some(Value::Array(required))) = (is_reference, node.get_mut("required")) {
        required.retain(|field| field != "name");
        if required.is_empty() {
            node.remove("required");
        }
    }
}

/// The API server knows no unsigned formats.
fn narrow_integer(node: &mut Map<String, Value>) {
    if node
        .get("format")
        .and_then(Value::as_str)
        .is_some_and(|format| format.starts_with("uint"))
    {
        node.remove("format");
    }
}
