//! The effective configuration, as a TOML file that says where each value came from.

use std::fmt::Write as _;

use serde_json::Value;

use super::setting::{SETTINGS, sections};
use super::{Origin, Settings};

/// Where comments begin, if the value leaves room.
const COMMENT_COLUMN: usize = 44;

impl Settings {
    /// The configuration as a file that would give the same one.
    #[must_use]
    pub fn as_toml(&self) -> String {
        let mut text = String::new();
        for section in sections() {
            if !text.is_empty() {
                text.push('\n');
            }
            line(&mut text, format_args!("[{section}]"));
            for setting in SETTINGS.iter().filter(|s| s.section == section) {
                let origin = self.origin(&setting.name());
                let shown = match ((setting.show)(&self.config), &origin) {
                    // A default that follows from the machine is no choice of anybody's: as a
                    // setting, it would keep a pool from keeping its size.
                    (Some(value), Origin::Default) if setting.is("memory.capacity") => {
                        format!("# {} = {}", setting.key, toml_value(&value))
                    }
                    (Some(value), _) => format!("{} = {}", setting.key, toml_value(&value)),
                    (None, _) => format!("# {}", setting.key),
                };
                line(
                    &mut text,
                    format_args!("{shown:<COMMENT_COLUMN$}# {origin}"),
                );
            }
        }
        text
    }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "{content}");
}

/// A value in TOML. Texts and numbers are as in JSON, whose escapes TOML has too.
fn toml_value(value: &Value) -> String {
    match value {
        Value::Array(list) => {
            let values: Vec<String> = list.iter().map(toml_value).collect();
            format!("[{}]", values.join(", "))
        }
        Value::Object(table) if table.is_empty() => "{}".to_owned(),
        Value::Object(table) => {
            let entry = |(name, value): (&String, &Value)| {
                format!("{} = {}", Value::from(name.as_str()), toml_value(value))
            };
            let entries: Vec<String> = table.iter().map(entry).collect();
            format!("{{ {} }}", entries.join(", "))
        }
        other => other.to_string(),
    }
}
