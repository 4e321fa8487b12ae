//! Whether the API server asks the webhook, trusts it and gets an answer: a StormService that only the
//! webhook refuses is written, without storing it.

use anyhow::{Context, bail};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};
use kvtide_control_api::StormService;
use kvtide_control_kube::error::said;
use serde_json::json;

use crate::install::manifests;

/// Writes what nothing else refuses: roles that wait for each other.
///
/// # Errors
///
/// When it is taken, or why it could not be tried.
pub(super) async fn check(client: &Client, namespace: &str) -> anyhow::Result<String> {
    let configurations: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    for object in manifests::webhook()? {
        let name = object.name_any();
        let kind = object.types.unwrap_or_default().kind;
        if kind != "ValidatingWebhookConfiguration" {
            continue;
        }
        let found = configurations.get_opt(&name).await;
        let found = found.context("looking at the webhook configuration")?;
        let Some(found) = found else {
            bail!("ValidatingWebhookConfiguration {name} is not installed; apply control/deploy");
        };
        let mut webhooks = found.webhooks.iter().flatten();
        if webhooks.any(|webhook| webhook.client_config.ca_bundle.is_none()) {
            bail!("{name} has no caBundle; a controller with --webhook-listen puts it there");
        }
    }
    let services: Api<StormService> = Api::namespaced(client.clone(), namespace);
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    match services.create(&params, &impossible()?).await {
        Ok(_) => bail!(
            "the API server got no answer from it, and takes what it would refuse; look at the \
             controller's log and whether API servers reach its port 9443"
        ),
        Err(error) if said(&error).contains("dependencies form a cycle") => {
            Ok("answers; cycles of dependencies are refused".to_owned())
        }
        Err(error) => Err(error).context("trying it"),
    }
}

fn impossible() -> anyhow::Result<StormService> {
    let role = |name: &str, other: &str| json!({"name": name, "dependencies": [other]});
    let spec = json!({
        "replicas": 0, "selector": {}, "template": {"spec": {"roles": [role("a", "b"), role("b", "a")]}},
    });
    let spec = serde_json::from_value(spec).context("building what is tried")?;
    Ok(StormService::new("kvtide-control-check", spec))
}
