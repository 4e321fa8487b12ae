//! The body that is sent, where it is not the client's own. Pure.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The body, an object, with the operator's priority in the place of the client's. All other fields
/// stay as they are, byte for byte.
///
/// # Errors
/// When the body is no JSON object.
pub(super) fn with_priority(body: &str, priority: i64) -> serde_json::Result<Vec<u8>> {
    let Fields(fields) = serde_json::from_str(body)?;
    let mut changed = Vec::with_capacity(body.len() + 32);
    changed.extend_from_slice(format!("{{\"priority\":{priority}").as_bytes());
    for (name, value) in fields {
        // A name may be spelt with escapes.
        if serde_json::from_str::<String>(name.get())? == "priority" {
            continue;
        }
        for part in [",", name.get(), ":", value.get()] {
            changed.extend_from_slice(part.as_bytes());
        }
    }
    changed.push(b'}');
    Ok(changed)
}

/// The fields of an object as they are written, in their order, those that come twice too.
struct Fields<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields<'de>, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_s_priority_is_the_only_one() {
        for (body, expected) in [
            ("{}", r#"{"priority":7}"#),
            (" { } ", r#"{"priority":7}"#),
            (r#"{"model": "m"}"#, r#"{"priority":7,"model":"m"}"#),
            (
                r#"{"priority": -9, "model": "m", "priority": null, "a\nb": [1.00,  {"priority": 1}]}"#,
                r#"{"priority":7,"model":"m","a\nb":[1.00,  {"priority": 1}]}"#,
            ),
            (r#"{"pri\u006frity": 1}"#, r#"{"priority":7}"#),
        ] {
            let changed = with_priority(body, 7).unwrap();
            assert_eq!(str::from_utf8(&changed).unwrap(), expected);
        }
        assert!(with_priority("[]", 7).is_err());
    }
}
