//! What two writings of the same thing have in common, and hashes of it.
//!
//! A hash must not move when a newer API server or controller fills in a default, nor when a
//! template comes back from AIBrix's Go types, which add `null` timestamps and empty objects, drop
//! what is empty (`readOnly: false`) and respell quantities. `go_types` says where.

use serde_json::Value;

use super::go_types::{self, Holds};

/// Letters of names: without vowels, so that no word appears.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// The value without what says nothing, with quantities in one spelling. Keys are in order, as
/// `serde_json` keeps them.
#[must_use]
pub fn canonical(value: &Value) -> Value {
    canonical_in("", value)
}

/// The canonical form of what the field `holder` holds: an object, or the objects of a list.
fn canonical_in(holder: &str, value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.iter().map(|(key, field)| {
                let field = match go_types::holds(key, field) {
                    Holds::Quantities => quantities(field),
                    Holds::Quantity => canonical_quantity(field),
                    Holds::StringMap => field.clone(),
                    Holds::Fields => canonical_in(key, field),
                };
                (key.clone(), field)
            });
            let kept = fields.filter(|(key, field)| !go_types::is_absent(holder, key, field));
            Value::Object(kept.collect())
        }
        Value::Array(items) => items
            .iter()
            .map(|item| canonical_in(holder, item))
            .collect(),
        other => other.clone(),
    }
}

fn quantities(map: &Value) -> Value {
    let Value::Object(fields) = map else {
        return map.clone();
    };
    Value::Object(
        fields
            .iter()
            .map(|(name, quantity)| (name.clone(), canonical_quantity(quantity)))
            .collect(),
    )
}

/// A quantity as a number of nano-units, or as it is where it is none.
fn canonical_quantity(quantity: &Value) -> Value {
    let text = match quantity {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        other => return other.clone(),
    };
    parse_quantity_nano(&text).map_or_else(
        || quantity.clone(),
        |nano| Value::String(format!("{nano}n")),
    )
}

/// Kubernetes' quantity format: a decimal number and a binary, decimal or exponent suffix.
fn parse_quantity_nano(text: &str) -> Option<i128> {
    const NANO: i128 = 1_000_000_000;
    let split = text
        .find(|character: char| !matches!(character, '0'..='9' | '.' | '+' | '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 9 {
        return None;
    }
    let digits = format!("{whole}{fraction:0<9}");
    let nano: i128 = digits.parse().ok()?;
    let multiplied = |factor: i128| nano.checked_mul(factor);
    let power = |base: i128, exponent: u32| base.checked_pow(exponent).and_then(multiplied);
    match suffix {
        "" => Some(nano),
        "n" => Some(nano / NANO),
        "u" => Some(nano / 1_000_000),
        "m" => Some(nano / 1_000),
        "k" => power(1000, 1),
        "M" => power(1000, 2),
        "G" => power(1000, 3),
        "T" => power(1000, 4),
        "P" => power(1000, 5),
        "E" => power(1000, 6),
        "Ki" => power(1024, 1),
        "Mi" => power(1024, 2),
        "Gi" => power(1024, 3),
        "Ti" => power(1024, 4),
        "Pi" => power(1024, 5),
        "Ei" => power(1024, 6),
        exponent => {
            let exponent: u32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            power(10, exponent)
        }
    }
}

/// A hash of the canonical form, spelled in `length` letters that fit into a name.
#[must_use]
pub fn hash_name(value: &Value, length: usize) -> String {
    spell(
        blake3::hash(canonical(value).to_string().as_bytes()).as_bytes(),
        length,
    )
}

/// A hash of text, spelled the same way.
#[must_use]
pub fn hash_text(text: &str, length: usize) -> String {
    spell(blake3::hash(text.as_bytes()).as_bytes(), length)
}

fn spell(digest: &[u8; 32], length: usize) -> String {
    digest
        .iter()
        .take(length)
        .map(|byte| char::from(ALPHABET[usize::from(*byte) % 27]))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_go_adds_does_not_change_the_hash() {
        let written = json!({"spec": {"containers": [{"name": "a", "image": "b",
            "resources": {"limits": {"cpu": 2, "memory": "1024Mi", "nvidia.com/gpu": "8"}}}]}});
        let from_go = json!({"metadata": {"creationTimestamp": null},
            "spec": {"containers": [{"name": "a", "image": "b",
            "resources": {"limits": {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": "8"}}}]}});
        assert_eq!(hash_name(&written, 8), hash_name(&from_go, 8));
        assert_eq!(canonical(&written), canonical(&from_go));
    }

    #[test]
    fn what_means_something_when_empty_is_kept() {
        let all = json!({"affinity": {"podAntiAffinity": {"labelSelector": {}}}});
        let none = json!({"affinity": {"podAntiAffinity": {}}});
        assert_ne!(canonical(&all), canonical(&none));
        assert_ne!(canonical(&json!({"emptyDir": {}})), canonical(&json!({})));
    }

    #[test]
    fn what_go_leaves_out_does_not_change_the_hash() {
        let written = json!({"metadata": {"labels": {"empty": ""}}, "spec": {
            "hostNetwork": false, "tolerations": [], "nodeSelector": {},
            "containers": [{"name": "a", "image": "b", "args": [], "tty": false,
                "env": [{"name": "E", "value": ""}, {"name": "CPU", "valueFrom": {"resourceFieldRef":
                    {"resource": "limits.cpu"}}}],
                "volumeMounts": [{"name": "v", "mountPath": "/v", "readOnly": false, "subPath": ""}],
                "ports": [{"containerPort": 80, "hostPort": 0}],
                "readinessProbe": {"httpGet": {"port": 80, "host": ""}, "initialDelaySeconds": 0},
                "securityContext": {"runAsNonRoot": false, "capabilities": {"add": [], "drop": ["ALL"]}}}],
            "volumes": [{"name": "v", "emptyDir": {"medium": "", "sizeLimit": "2048Mi"}}]}});
        let from_go = json!({"metadata": {"labels": {"empty": ""}, "creationTimestamp": null}, "spec": {
            "containers": [{"name": "a", "image": "b", "resources": {},
                "env": [{"name": "E"}, {"name": "CPU", "valueFrom": {"resourceFieldRef":
                    {"resource": "limits.cpu", "divisor": "0"}}}],
                "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "readinessProbe": {"httpGet": {"port": 80}},
                "securityContext": {"runAsNonRoot": false, "capabilities": {"drop": ["ALL"]}}}],
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "2Gi"}}]}});
        assert_eq!(canonical(&written), canonical(&from_go));
        let mut other = written.clone();
        other["spec"]["containers"][0]["securityContext"]
            .as_object_mut()
            .unwrap()
            .remove("runAsNonRoot");
        assert_ne!(
            canonical(&other),
            canonical(&written),
            "the pod's own setting would hold"
        );
        let mut other = written.clone();
        other["metadata"]["labels"] = json!({});
        assert_ne!(
            canonical(&other),
            canonical(&written),
            "an empty label is one"
        );
    }

    #[test]
    fn quantities_are_compared_by_value() {
        for (left, right) in [
            ("1", "1000m"),
            ("1Gi", "1073741824"),
            ("0.5", "500m"),
            ("1e3", "1k"),
            ("1.5Gi", "1536Mi"),
        ] {
            assert_eq!(
                parse_quantity_nano(left),
                parse_quantity_nano(right),
                "{left} {right}"
            );
            assert!(parse_quantity_nano(left).is_some(), "{left}");
        }
        assert_eq!(parse_quantity_nano("many"), None);
    }
}
