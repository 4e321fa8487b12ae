//! `kvtide-control crds`: prints the CustomResourceDefinitions.

use std::io::Write;

use anyhow::Context;
use clap::Args as ClapArgs;
use kvtide_control_api::crds::definitions;
use serde_json::{Value, json};

/// Arguments of `kvtide-control crds`.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub struct Args {}

/// Prints the definitions as YAML, for `kubectl apply -f -`.
///
/// # Errors
///
/// When standard output is closed.
pub fn run(_args: Args) -> anyhow::Result<()> {
    let text = render()?;
    std::io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .context("writing to standard output")
}

/// The definitions as a YAML stream. Schemas are on one line each, as JSON, which YAML contains:
/// indented, they would be three times as large.
///
/// # Errors
///
/// When a definition cannot be written as YAML; a test covers all.
pub fn render() -> anyhow::Result<String> {
    const PLACE: &str = "SCHEMA";
    let mut text = String::new();
    for definition in definitions().context("building the definitions")? {
        let mut definition = serde_json::to_value(definition).context("reading a definition")?;
        let place = definition.pointer_mut("/spec/versions/0/schema/openAPIV3Schema");
        let schema = place.map_or(Value::Null, |place| std::mem::replace(place, json!(PLACE)));
        let yaml = serde_norway::to_string(&definition).context("writing YAML")?;
        let yaml = yaml.replacen(PLACE, &schema.to_string(), 1);
        text.push_str("---\n");
        text.push_str(&yaml);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_reads_as_the_definitions_again() {
        let text = render().unwrap();
        let documents = text.split("---\n").filter(|document| !document.is_empty());
        let read: Vec<Value> = documents
            .map(|document| serde_norway::from_str(document).unwrap())
            .collect();
        let built: Vec<Value> = definitions()
            .unwrap()
            .iter()
            .map(|built| serde_json::to_value(built).unwrap())
            .collect();
        assert_eq!(read, built);
    }

    #[test]
    fn the_manifest_to_install_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/crds.yaml");
        let installed = std::fs::read_to_string(path).unwrap();
        assert!(
            installed == render().unwrap(),
            "run: kvtide-control crds > control/deploy/crds.yaml"
        );
    }
}
