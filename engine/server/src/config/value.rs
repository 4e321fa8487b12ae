//! How one value is read, from TOML or from the text of an environment variable.

use std::collections::BTreeMap;

use serde_json::Value;

use super::quantity;

/// Compares without case and punctuation, so that "S3-FIFO" and "s3fifo" are the same.
pub(super) fn choose<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Option<T> {
    let plain = |text: &str| -> String {
        let letters = text.chars().filter(char::is_ascii_alphanumeric);
        letters.collect::<String>().to_lowercase()
    };
    let wanted = plain(value.as_str()?);
    let found = choices.iter().find(|(name, _)| *name == wanted);
    found.map(|&(_, choice)| choice)
}

/// A size, as text.
pub(super) fn bytes(value: &Value) -> Option<u64> {
    quantity::bytes(value.as_str()?)
}

/// Sizes by name: a table, in a variable `name=size` with commas between them. A name that is there
/// twice has two sizes, of which nobody knows which is meant.
pub(super) fn sizes(value: &Value) -> Option<BTreeMap<String, u64>> {
    let entries: Vec<(String, u64)> = match value {
        Value::Object(table) => {
            let size = |(name, size): (&String, &Value)| Some((name.clone(), bytes(size)?));
            table.iter().map(size).collect::<Option<_>>()?
        }
        Value::String(text) => {
            let size = |entry: &str| {
                // A model's name may have such a sign, a size has none.
                let (name, size) = entry.rsplit_once('=')?;
                Some((name.trim().to_owned(), quantity::bytes(size)?))
            };
            text.split(',').map(size).collect::<Option<_>>()?
        }
        _ => return None,
    };
    let count = entries.len();
    let sizes: BTreeMap<_, _> = entries.into_iter().collect();
    (sizes.len() == count).then_some(sizes)
}

/// A text that is not empty and has no blanks around it.
pub(super) fn text(value: &Value) -> Option<String> {
    let text = value.as_str()?;
    (!text.is_empty() && text.trim() == text).then(|| text.to_owned())
}

/// A number in a range.
pub(super) fn whole(value: &Value, least: u32, most: u32) -> Option<u32> {
    let number = match value {
        Value::String(text) => text.trim().parse().ok()?,
        _ => value.as_u64()?,
    };
    let number = u32::try_from(number).ok()?;
    (least..=most).contains(&number).then_some(number)
}

/// A list of numbers, in a variable with commas between them.
pub(super) fn ids(value: &Value) -> Option<Vec<u32>> {
    let number = |value: &Value| whole(value, 0, u32::MAX);
    match value {
        Value::Array(list) => list.iter().map(number).collect(),
        Value::String(text) => text.split(',').map(|id| number(&id.into())).collect(),
        _ => None,
    }
}

/// A name or a number of a user or a group.
pub(super) fn principal(value: &Value) -> Option<String> {
    match value {
        Value::Number(_) => whole(value, 0, u32::MAX).map(|id| id.to_string()),
        _ => text(value),
    }
}

/// A file's mode, in octal digits, such as "0660". Whoever owns it has to be able to use it.
pub(super) fn mode(value: &Value) -> Option<u32> {
    let text = value.as_str()?;
    let mode = u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8).ok()?;
    (mode <= 0o777 && mode & 0o600 == 0o600).then_some(mode)
}
