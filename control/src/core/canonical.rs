//! What two writings of the same thing have in common, and hashes of it.
//!
//! A hash must not move when a newer API server or controller fills in a default, nor when a
//! template comes back from AIBrix's Go types, which add `null` timestamps, empty objects and
//! respell quantities.

use serde_json::{Map, Value};

/// Objects whose absence and emptiness are the same, and which Go's JSON writes although empty.
const EMPTY_MEANS_ABSENT: [&str; 6] = [
    "metadata",
    "resources",
    "updateStrategy",
    "disruptionTolerance",
    "status",
    "strategy",
];
/// Maps from resource names to quantities.
const QUANTITY_MAPS: [&str; 4] = ["limits", "requests", "minResources", "overhead"];
/// Letters of names: without vowels, so that no word appears.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// The value without nulls, without objects that mean nothing when empty, with quantities in one
/// spelling. Keys are in order, as `serde_json` keeps them.
#[must_use]
pub fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut kept = Map::new();
            for (key, field) in fields {
                let field = if QUANTITY_MAPS.contains(&key.as_str()) {
                    quantities(field)
                } else {
                    canonical(field)
                };
                let absent = field.is_null()
                    || (EMPTY_MEANS_ABSENT.contains(&key.as_str())
                        && field.as_object().is_some_and(Map::is_empty));
                if !absent {
                    kept.insert(key.clone(), field);
                }
            }
            Value::Object(kept)
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        other => other.clone(),
    }
}

fn quantities(map: &Value) -> Value {
    let Value::Object(fields) = map else {
        return canonical(map);
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
