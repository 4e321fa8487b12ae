//! The TOML file: sections, keys, and the line of each.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use toml::de::{DeTable, DeValue};

use super::setting::{self, SETTINGS, sections};
use super::{ConfigError, Given, Origin};

/// What the file sets. What is wrong with it goes to `errors`.
pub(super) fn read(path: &Path, text: &str, errors: &mut Vec<ConfigError>) -> Vec<Given> {
    let at = |span: Range<usize>| Origin::File {
        path: path.to_owned(),
        line: line_of(text, span.start),
    };
    let document = match DeTable::parse(text) {
        Ok(document) => document.into_inner(),
        Err(error) => {
            errors.push(ConfigError {
                origin: at(error.span().unwrap_or_default()),
                key: "TOML".into(),
                problem: error.message().replace('\n', ", "),
                fix: "correct the line; texts stand in double quotes, sections in [brackets]"
                    .into(),
            });
            return Vec::new();
        }
    };
    let mut given = Vec::new();
    for (name, content) in document {
        let section = name.get_ref().as_ref();
        let origin = at(name.span());
        if !sections().contains(&section) {
            errors.push(no_section(section, origin));
            continue;
        }
        let DeValue::Table(table) = content.into_inner() else {
            errors.push(ConfigError {
                origin,
                key: section.to_owned(),
                problem: "it is a section and not a setting".into(),
                fix: format!("write [{section}] on a line of its own, and its settings below"),
            });
            continue;
        };
        for (key, value) in table {
            let (key, origin) = (key.get_ref().as_ref(), at(key.span()));
            let found = SETTINGS
                .iter()
                .find(|s| s.section == section && s.key == key);
            let Some(setting) = found else {
                errors.push(setting::unknown(section, key, origin));
                continue;
            };
            let value = plain(value.get_ref());
            given.push(Given {
                setting,
                origin,
                value,
            });
        }
    }
    given
}

fn no_section(section: &str, origin: Origin) -> ConfigError {
    let nearness = |name: &str| strsim::jaro_winkler(name, section);
    // A setting that stands before the first section belongs to one.
    let setting = SETTINGS.iter().find(|setting| setting.key == section);
    let nearest = setting.map_or_else(
        || {
            let names = sections();
            let nearest = names
                .iter()
                .max_by(|a, b| nearness(a).total_cmp(&nearness(b)));
            format!("[{}]", nearest.unwrap_or(&""))
        },
        |setting| format!("{} in [{}]", setting.key, setting.section),
    );
    ConfigError {
        origin,
        key: section.to_owned(),
        problem: "there is no such section".into(),
        fix: format!(
            "did you mean {nearest}? The sections are {}",
            sections().join(", ")
        ),
    }
}

/// The line of a place in the text, from 1.
fn line_of(text: &str, place: usize) -> usize {
    let before = text.as_bytes().iter().take(place);
    1 + before.filter(|byte| **byte == b'\n').count()
}

/// A value in the words that variables share. What no setting may be becomes a text, so that the
/// error shows it.
fn plain(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(number) => {
            let parsed = i64::from_str_radix(number.as_str(), number.radix());
            parsed.map_or_else(|_| number.to_string().into(), Value::from)
        }
        DeValue::Float(number) => {
            let parsed = number.as_str().parse::<f64>();
            parsed.map_or_else(|_| number.to_string().into(), Value::from)
        }
        DeValue::Boolean(value) => (*value).into(),
        DeValue::Datetime(time) => time.to_string().into(),
        DeValue::Array(list) => list.iter().map(|value| plain(value.get_ref())).collect(),
        DeValue::Table(table) => {
            let entry = |name: &str, value| (name.to_owned(), plain(value));
            let entries = table
                .iter()
                .map(|(n, v)| entry(n.get_ref().as_ref(), v.get_ref()));
            Value::Object(entries.collect())
        }
    }
}
